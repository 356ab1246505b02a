"""Where parameters lie on a mesh, without a device: the table, what is refused, and initial values."""

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional import cli, params
from q3n_functional.config import PRESETS
from q3n_functional.parallel.mesh import AXES, Mesh, check, check_batch, check_size, parse
from q3n_functional.parallel.rules import STORAGE, init, named_layouts
from q3n_functional.params import named_leaves
from tests.configs import small

MESHES = [Mesh(), Mesh(dp=2, tp=2), Mesh(replicate=2, cp=2, ep=2), Mesh(dp=4, ep=2, tp=2)]
LARGE = PRESETS["qwen3_next_80b_a3b"]()


def test_placements_of_the_large_model():
    places = named_layouts(LARGE, Mesh(replicate=2, dp=16, cp=2, ep=4, tp=2))
    shown = ("embed_tokens", "layers.0.", "layers.3.mixer", "norm", "lm_head", "mtp.fc")
    lines = [
        f"{name:38} {where.spec.axes:4} {where!s:16} {list(where.local_shape)}"
        for name, where in places.items()
        if name.startswith(shown)
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
embed_tokens                           VD   V/tp D/fsdp      [75968, 64]
layers.0.input_layernorm               D    whole            [2048]
layers.0.mixer.q                       ND   N/tp D/fsdp      [1024, 64]
layers.0.mixer.k                       ND   N/tp D/fsdp      [1024, 64]
layers.0.mixer.v                       MD   M/tp D/fsdp      [2048, 64]
layers.0.mixer.z                       MD   M/tp D/fsdp      [2048, 64]
layers.0.mixer.b                       HD   H/tp D/fsdp      [16, 64]
layers.0.mixer.a                       HD   H/tp D/fsdp      [16, 64]
layers.0.mixer.conv_q                  NC   N/tp             [1024, 4]
layers.0.mixer.conv_k                  NC   N/tp             [1024, 4]
layers.0.mixer.conv_v                  MC   M/tp             [2048, 4]
layers.0.mixer.A_log                   H    H/tp             [16]
layers.0.mixer.dt_bias                 H    H/tp             [16]
layers.0.mixer.norm                    K    whole            [128]
layers.0.mixer.out                     DM   D/fsdp M/tp      [64, 2048]
layers.0.post_attention_layernorm      D    whole            [2048]
layers.0.mlp.router                    RD   R/fsdp           [16, 2048]
layers.0.mlp.experts.gate              EFD  E/ep F/tp D/fsdp [128, 256, 64]
layers.0.mlp.experts.up                EFD  E/ep F/tp D/fsdp [128, 256, 64]
layers.0.mlp.experts.down              EDF  E/ep D/fsdp F/tp [128, 64, 256]
layers.0.mlp.shared_expert.gate        WD   W/tp D/fsdp      [256, 64]
layers.0.mlp.shared_expert.up          WD   W/tp D/fsdp      [256, 64]
layers.0.mlp.shared_expert.down        DW   D/fsdp W/tp      [64, 256]
layers.0.mlp.shared_expert_gate        1D   D/fsdp           [1, 64]
layers.3.mixer.q                       QD   Q/tp D/fsdp      [2048, 64]
layers.3.mixer.gate                    QD   Q/tp D/fsdp      [2048, 64]
layers.3.mixer.k                       GD   G/tp D/fsdp      [256, 64]
layers.3.mixer.v                       GD   G/tp D/fsdp      [256, 64]
layers.3.mixer.q_norm                  K    whole            [256]
layers.3.mixer.k_norm                  K    whole            [256]
layers.3.mixer.out                     DQ   D/fsdp Q/tp      [64, 2048]
norm                                   D    whole            [2048]
lm_head                                VD   V/tp D/fsdp      [75968, 64]
mtp.fc                                 DX   D/fsdp           [64, 4096]""",
    )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_dim_is_cut_once_and_shards_make_up_the_leaf(mesh):
    config = small()
    whole, found = named_leaves(params.init(config, 3)), {}
    for rank in range(mesh.size):
        for name, leaf in named_leaves(init(config, 3, mesh, rank)).items():
            found.setdefault(name, []).append(leaf)
    for name, where in named_layouts(config, mesh).items():
        cut = [dim for size, dim in zip(where.sizes, where.dims, strict=True) if dim is not None and size > 1]
        assert len(set(cut)) == len(cut), name
        assert {tuple(leaf.shape) for leaf in found[name]} == {where.local_shape}
        assert sum(leaf.numel() for leaf in found[name]) == where.copies * whole[name].numel()
        for rank, leaf in enumerate(found[name]):
            assert torch.equal(leaf, where.shard(whole[name], mesh.coordinates(rank))), name
        seen = torch.cat([leaf.flatten() for leaf in found[name]]).sort()[0]
        assert torch.equal(seen, whole[name].flatten().repeat(where.copies).sort()[0]), name


def test_coordinates_count_the_ranks_once():
    mesh = Mesh(replicate=2, dp=3, cp=2, ep=2, tp=2)
    places = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert len({tuple(at[axis] for axis in AXES) for at in places}) == mesh.size == 48
    assert [at["tp"] for at in places[:4]] == [0, 1, 0, 1]
    assert {at["fsdp"] for at in places} == set(range(mesh.fsdp))
    assert {at["rows"] for at in places} == set(range(mesh.rows))
    assert set(STORAGE) <= places[0].keys()


def failure(function, *arguments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is pinned
        function(*arguments)
    return str(caught.value)


def test_what_is_refused():
    odd = small(num_experts=6, num_experts_per_tok=2)
    assert_expected_inline(
        "\n".join(
            [
                failure(check, Mesh(tp=3), LARGE),
                failure(check, Mesh(tp=32), LARGE),
                failure(check, Mesh(ep=4), odd),
                failure(check, Mesh(tp=4), small(num_key_value_heads=4, linear_num_key_heads=2)),
                failure(check, Mesh(dp=0), odd),
                failure(check_batch, Mesh(dp=2, ep=2), odd, 6, 32),
                failure(check_batch, Mesh(cp=4, tp=2), odd, 8, 20),
                failure(check_batch, Mesh(cp=8), odd, 8, 16),
                failure(check_size, Mesh(dp=2, tp=2), 1),
                failure(check_size, Mesh(), 8),
                failure(parse, "dp=2,pp=2"),
                failure(parse, "dp"),
            ]
        ),
        """\
mesh.tp is 3, but vocab_size is 151936, not a multiple of it; this model allows tp 1, 2, 4, 8, 16
mesh.tp is 32, but linear_num_key_heads is 16, not a multiple of it; this model allows tp 1, 2, 4, 8, 16
mesh.ep is 4, but num_experts is 6, not a multiple of it; this model allows ep 1, 2, 3, 6
mesh.tp is 4, but linear_num_key_heads is 2, not a multiple of it; this model allows tp 1, 2
mesh.dp is 0, it must be at least 1
a batch has 6 rows, which replicate x dp x ep = 4 ranks cannot share: use a multiple
a row has 20 tokens, which are cut into 2 x cp x tp = 16 pieces: use a multiple
mesh.cp is 8, but 16 pieces of a row of 16 tokens are below the 3 that the convolution looks back on: use a smaller cp
the mesh (dp 2 x tp 2) needs torchrun with hosts x --nproc-per-node = 4, but 1 was launched
the mesh (one device) needs torchrun with hosts x --nproc-per-node = 1, but 8 were launched
mesh part 'pp=2' must be one of cp, dp, ep, replicate, tp with a degree, as in dp=2
mesh part 'dp' must be one of cp, dp, ep, replicate, tp with a degree, as in dp=2""",
    )


def test_inspect_shows_what_a_rank_holds(capsys):
    cli.main(["inspect", "qwen3_next_80b_a3b", "--mesh", "dp=64,ep=4,tp=2"])
    lines = capsys.readouterr().out.splitlines()
    assert_expected_inline(
        "\n".join([*lines[:6], *lines[-3:]]),
        """\
parameter                        placement        shape per rank     copies bytes per rank
embed_tokens                     V/tp D/fsdp      [75968, 32]             4      4.637 MiB
layers 0-2 4-6 8-10 12-14 16-18 20-22 24-26 28-30 32-34 36-38 40-42 44-46
  input_layernorm                whole            [2048]                512          4 KiB
  mixer.q                        N/tp D/fsdp      [1024, 32]              4         64 KiB
  mixer.k                        N/tp D/fsdp      [1024, 32]              4         64 KiB
512 ranks: dp 64 x ep 4 x tp 2
parameters per rank: 332.3 MiB in bf16
parameters, gradients and AdamW per rank: 2.60 GiB in fp32""",
    )


def test_parse():
    assert parse("dp=2,tp=4") == Mesh(dp=2, tp=4)
    assert parse("") == Mesh()
