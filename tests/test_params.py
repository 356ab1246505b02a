"""The parameter tree: names, shapes, counts, and initial values that depend on a leaf's name alone."""

import math

import pytest
import torch
import torch.utils._pytree as pytree
from expecttest import assert_expected_inline

from q3n_functional import params
from q3n_functional.config import PRESETS
from tests.configs import small

FP32 = ("A_log", "dt_bias", "mixer.norm")
KINDS = {
    "small": small(),
    "dense": small(num_experts=0, intermediate_size=24, num_nextn_predict_layers=0),
    "dense first": small(mlp_only_layers=(0,), intermediate_size=24),
    "tied": small(tie_word_embeddings=True),
    "tiny": PRESETS["tiny"](),
}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def describe(config):
    lines = []
    for name, leaf in params.named_specs(config).items():
        dtype = "" if leaf.dtype is None else f" {leaf.dtype}".replace("torch.", "")
        lines.append(f"{name} {leaf.axes} {list(leaf.shape)} {leaf.init}{dtype}")
    return "\n".join(lines)


def test_leaves():
    config = small(num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))
    assert_expected_inline(
        describe(config),
        """\
embed_tokens VD [64, 32] normal
layers.0.input_layernorm D [32] zeros
layers.0.mixer.q ND [16, 32] normal
layers.0.mixer.k ND [16, 32] normal
layers.0.mixer.v MD [48, 32] normal
layers.0.mixer.z MD [48, 32] normal
layers.0.mixer.b HD [4, 32] normal
layers.0.mixer.a HD [4, 32] normal
layers.0.mixer.conv_q NC [16, 4] normal
layers.0.mixer.conv_k NC [16, 4] normal
layers.0.mixer.conv_v MC [48, 4] normal
layers.0.mixer.A_log H [4] log_uniform float32
layers.0.mixer.dt_bias H [4] ones float32
layers.0.mixer.norm K [12] ones float32
layers.0.mixer.out DM [32, 48] normal
layers.0.post_attention_layernorm D [32] zeros
layers.0.mlp.router RD [8, 32] normal
layers.0.mlp.experts.gate EFD [8, 16, 32] normal
layers.0.mlp.experts.up EFD [8, 16, 32] normal
layers.0.mlp.experts.down EDF [8, 32, 16] normal
layers.0.mlp.shared_expert.gate WD [16, 32] normal
layers.0.mlp.shared_expert.up WD [16, 32] normal
layers.0.mlp.shared_expert.down DW [32, 16] normal
layers.0.mlp.shared_expert_gate 1D [1, 32] normal
layers.1.input_layernorm D [32] zeros
layers.1.mixer.q QD [64, 32] normal
layers.1.mixer.gate QD [64, 32] normal
layers.1.mixer.k GD [32, 32] normal
layers.1.mixer.v GD [32, 32] normal
layers.1.mixer.q_norm K [16] zeros
layers.1.mixer.k_norm K [16] zeros
layers.1.mixer.out DQ [32, 64] normal
layers.1.post_attention_layernorm D [32] zeros
layers.1.mlp.router RD [8, 32] normal
layers.1.mlp.experts.gate EFD [8, 16, 32] normal
layers.1.mlp.experts.up EFD [8, 16, 32] normal
layers.1.mlp.experts.down EDF [8, 32, 16] normal
layers.1.mlp.shared_expert.gate WD [16, 32] normal
layers.1.mlp.shared_expert.up WD [16, 32] normal
layers.1.mlp.shared_expert.down DW [32, 16] normal
layers.1.mlp.shared_expert_gate 1D [1, 32] normal
norm D [32] zeros
lm_head VD [64, 32] normal
mtp.pre_fc_norm_embedding D [32] zeros
mtp.pre_fc_norm_hidden D [32] zeros
mtp.fc DX [32, 64] normal
mtp.layer.input_layernorm D [32] zeros
mtp.layer.mixer.q QD [64, 32] normal
mtp.layer.mixer.gate QD [64, 32] normal
mtp.layer.mixer.k GD [32, 32] normal
mtp.layer.mixer.v GD [32, 32] normal
mtp.layer.mixer.q_norm K [16] zeros
mtp.layer.mixer.k_norm K [16] zeros
mtp.layer.mixer.out DQ [32, 64] normal
mtp.layer.post_attention_layernorm D [32] zeros
mtp.layer.mlp.router RD [8, 32] normal
mtp.layer.mlp.experts.gate EFD [8, 16, 32] normal
mtp.layer.mlp.experts.up EFD [8, 16, 32] normal
mtp.layer.mlp.experts.down EDF [8, 32, 16] normal
mtp.layer.mlp.shared_expert.gate WD [16, 32] normal
mtp.layer.mlp.shared_expert.up WD [16, 32] normal
mtp.layer.mlp.shared_expert.down DW [32, 16] normal
mtp.layer.mlp.shared_expert_gate 1D [1, 32] normal
mtp.norm D [32] zeros""",
    )


def test_leaves_without_experts():
    config = small(
        num_hidden_layers=1,
        layer_types=("full_attention",),
        num_experts=0,
        intermediate_size=24,
        num_nextn_predict_layers=0,
        tie_word_embeddings=True,
    )
    assert_expected_inline(
        describe(config),
        """\
embed_tokens VD [64, 32] normal
layers.0.input_layernorm D [32] zeros
layers.0.mixer.q QD [64, 32] normal
layers.0.mixer.gate QD [64, 32] normal
layers.0.mixer.k GD [32, 32] normal
layers.0.mixer.v GD [32, 32] normal
layers.0.mixer.q_norm K [16] zeros
layers.0.mixer.k_norm K [16] zeros
layers.0.mixer.out DQ [32, 64] normal
layers.0.post_attention_layernorm D [32] zeros
layers.0.mlp.gate WD [24, 32] normal
layers.0.mlp.up WD [24, 32] normal
layers.0.mlp.down DW [32, 24] normal
norm D [32] zeros""",
    )


def test_published_counts():
    sizes = {name: leaf.numel for name, leaf in params.named_specs(PRESETS["qwen3_next_80b_a3b"]()).items()}
    prediction = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    assert sum(sizes.values()) - prediction == 79_674_391_296
    assert prediction == 1_650_471_424
    assert params.count(PRESETS["qwen3_next_80b_a3b"]()) == 79_674_391_296 + 1_650_471_424


@pytest.mark.parametrize("dense", [(), (0, 3)], ids=["sparse", "two dense layers"])
def test_axes_match_shapes(dense):
    c = small(
        vocab_size=100,
        hidden_size=36,
        linear_key_head_dim=9,
        linear_conv_kernel_dim=3,
        intermediate_size=28,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=24,
        mlp_only_layers=dense,
    )
    sizes = {
        "V": {c.vocab_size},
        "D": {c.hidden_size},
        "Q": {c.num_attention_heads * c.head_dim},
        "G": {c.num_key_value_heads * c.head_dim},
        "N": {c.linear_num_key_heads * c.linear_key_head_dim},
        "M": {c.linear_num_value_heads * c.linear_value_head_dim},
        "H": {c.linear_num_value_heads},
        "K": {c.head_dim, c.linear_value_head_dim},
        "C": {c.linear_conv_kernel_dim},
        "E": {c.num_experts},
        "F": {c.moe_intermediate_size},
        "W": {c.intermediate_size, c.shared_expert_intermediate_size},
        "X": {2 * c.hidden_size},
        "1": {1},
    }
    # No two letters share a size, so that none can stand for another.
    assert len(set.union(*sizes.values())) == sum(len(each) for each in sizes.values())
    sizes["R"] = sizes["E"]  # but for the router's scores, of which there are as many as experts
    for name, leaf in params.named_specs(c).items():
        assert all(size in sizes[axis] for size, axis in zip(leaf.shape, leaf.axes, strict=True)), name


@each_kind
def test_init_follows_the_spec(config):
    specs, tree = params.named_specs(config), params.init(config, seed=0)
    leaves = params.named_leaves(tree)
    assert list(leaves) == list(specs)
    assert pytree.tree_structure(tree) == pytree.tree_structure(params.spec(config))
    assert {name: leaf.shape for name, leaf in leaves.items()} == {name: leaf.shape for name, leaf in specs.items()}
    assert sum(leaf.numel() for leaf in leaves.values()) == params.count(config)
    assert all(leaf.is_contiguous() and not leaf.requires_grad for leaf in leaves.values())


def test_parts_that_are_lacking_have_no_leaves():
    tree = params.spec(small(tie_word_embeddings=True, num_nextn_predict_layers=0))
    assert tree.lm_head == ()
    assert tree.mtp == ()
    assert not [name for name in params.named_leaves(tree) if name.startswith(("lm_head", "mtp"))]


def test_init_depends_on_the_name_alone():
    """Neither the other layers, nor their number, sizes and order, nor the global generator change a leaf."""
    base = params.named_leaves(params.init(small(), seed=3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    others = small(
        num_hidden_layers=6,
        layer_types=("linear_attention",) * 3 + ("full_attention",) * 3,
        vocab_size=80,
        num_experts=4,
        num_nextn_predict_layers=0,
    )
    leaves = params.named_leaves(params.init(others, seed=3))
    shared = [name for name in base if name in leaves and base[name].shape == leaves[name].shape]
    assert {name.split(".")[1] for name in shared if name.startswith("layers.")} == {"0", "1", "2", "3"}
    assert all(torch.equal(base[name], leaves[name]) for name in shared)
    assert torch.equal(torch.get_rng_state(), state)
    specs = params.named_specs(small())
    for name in reversed(list(specs)):
        assert torch.equal(params.init_leaf(name, specs[name], 3, small().initializer_range), base[name])


def test_init_depends_on_the_name_and_seed():
    random = [name for name, leaf in params.named_specs(small()).items() if leaf.init in ("normal", "log_uniform")]
    trees = [params.named_leaves(params.init(small(), seed)) for seed in (0, 1, -1)]
    first = [tuple(tree[name].flatten()[:4].tolist()) for tree in trees for name in random]
    assert len(set(first)) == len(first) == 3 * len(random)


def test_initial_values():
    config = PRESETS["tiny"]()
    leaves, specs = params.named_leaves(params.init(config, seed=0)), params.named_specs(config)
    for name, leaf in leaves.items():
        if specs[name].init == "normal":
            assert leaf.std().item() == pytest.approx(config.initializer_range, rel=5 / math.sqrt(leaf.numel())), name
            assert abs(leaf.mean()) < 5 * config.initializer_range / math.sqrt(leaf.numel()), name
        elif name.endswith("A_log"):
            assert leaf.min() >= math.log(0.01)
            assert leaf.max() <= math.log(16)
        else:
            # Norms are stored around zero, but for the gated one.
            assert (leaf == (1.0 if name.endswith(("dt_bias", "mixer.norm")) else 0.0)).all(), name


def test_decays_fill_their_range():
    leaf = params.init_leaf("a", params.Spec((10_000,), "H", "log_uniform"), 0, 0.02).exp()
    assert leaf.mean().item() == pytest.approx(8, abs=0.3)
    assert leaf.min() < 0.1
    assert leaf.max() > 15.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_storage(dtype):
    """What is multiplied along the sequence stays fp32; the rest is the fp32 draw, rounded."""
    tree = params.named_leaves(params.init(small(), seed=0, dtype=dtype))
    drawn = params.named_leaves(params.init(small(), seed=0))
    for name, leaf in tree.items():
        assert leaf.dtype == (torch.float32 if name.endswith(FP32) else dtype), name
        assert torch.equal(leaf, drawn[name].to(leaf.dtype)), name


def test_values_stay_the_same_over_versions():
    leaves = params.named_leaves(params.init(small(), seed=0))
    picked = [
        f"{name} {leaves[name].flatten()[0]:.4f}"
        for name in ("embed_tokens", "layers.3.mixer.q", "layers.0.mixer.A_log", "mtp.fc")
    ]
    assert_expected_inline(
        "\n".join(picked),
        """\
embed_tokens -0.0498
layers.3.mixer.q 0.0350
layers.0.mixer.A_log 0.1949
mtp.fc 0.0866""",
    )
