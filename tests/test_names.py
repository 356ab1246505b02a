"""The map between the tensors of a checkpoint and the leaves."""

import math

import pytest
import torch

from q3n_functional.checkpoint import load
from q3n_functional.config import qwen3_next_80b_a3b
from q3n_functional.names import sources
from q3n_functional.params import named_leaves, named_specs
from tests.folders import A_LOG, EMBEDDING, HEAD, QKVZ, on_disk, small, write_folder


def test_published_model_has_the_published_tensors():
    found = sources(qwen3_next_80b_a3b())
    mtp = {name: source for name, source in found.items() if name.startswith("mtp.")}
    main = {name: source for name, source in found.items() if name not in mtp}
    assert (len(main), sum(math.prod(s.shape) for s in main.values())) == (74_391, 79_674_391_296)
    assert (len(mtp), sum(math.prod(s.shape) for s in mtp.values())) == (1_553, 1_650_471_424)
    shapes = {
        EMBEDDING: (151936, 2048),
        HEAD: (151936, 2048),
        "model.norm.weight": (2048,),
        QKVZ: (12288, 2048),
        "model.layers.0.linear_attn.in_proj_ba.weight": (64, 2048),
        "model.layers.46.linear_attn.conv1d.weight": (8192, 1, 4),
        "model.layers.0.linear_attn.norm.weight": (128,),
        "model.layers.0.linear_attn.out_proj.weight": (2048, 4096),
        A_LOG: (32,),
        "model.layers.47.self_attn.q_proj.weight": (8192, 2048),
        "model.layers.47.self_attn.k_proj.weight": (512, 2048),
        "model.layers.47.self_attn.k_norm.weight": (256,),
        "model.layers.47.self_attn.o_proj.weight": (2048, 4096),
        "model.layers.9.mlp.gate.weight": (512, 2048),
        "model.layers.9.mlp.experts.511.down_proj.weight": (2048, 512),
        "model.layers.9.mlp.shared_expert.up_proj.weight": (512, 2048),
        "model.layers.9.mlp.shared_expert_gate.weight": (1, 2048),
        "mtp.fc.weight": (2048, 4096),
        "mtp.layers.0.mlp.experts.0.gate_proj.weight": (512, 2048),
        "mtp.layers.0.self_attn.q_proj.weight": (8192, 2048),
    }
    assert {name: found[name].shape for name in shapes} == shapes


@pytest.mark.parametrize("config", [small(), small(1, num_nextn_predict_layers=1), small(3, tie_word_embeddings=True)])
def test_every_element_of_every_leaf_has_one_place(config):
    written = {name: torch.zeros(s.shape, dtype=torch.int64) for name, s in named_specs(config).items()}
    for source in sources(config).values():
        for _, leaf in source.pieces(torch.empty(source.shape), written):
            leaf += 1
    assert all(torch.all(count == 1) for count in written.values())


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_rows_are_where_the_reference_looks_for_them(tmp_path, ratio):
    config = small(ratio)
    tensors = on_disk(config)
    leaves = named_leaves(load(write_folder(tmp_path, config, tensors)).params)
    heads, key, value = 2, 4, 6 * ratio
    qkvz = tensors[QKVZ].view(heads, 2 * key + 2 * value, 16)
    for name, part in zip("qkvz", qkvz.split([key, key, value, value], 1), strict=True):
        assert torch.equal(leaves[f"layers.0.mixer.{name}"], part.reshape(-1, 16)), name
    ba = tensors["model.layers.0.linear_attn.in_proj_ba.weight"].view(heads, 2 * ratio, 16)
    for name, part in zip("ba", ba.split([ratio, ratio], 1), strict=True):
        assert torch.equal(leaves[f"layers.0.mixer.{name}"], part.reshape(-1, 16)), name
    conv = tensors["model.layers.0.linear_attn.conv1d.weight"][:, 0]
    for name, part in zip("qkv", conv.split([heads * key, heads * key, heads * value]), strict=True):
        assert torch.equal(leaves[f"layers.0.mixer.conv_{name}"], part), name
    q, gate = tensors["model.layers.1.self_attn.q_proj.weight"].view(4, 16, 16).chunk(2, 1)
    assert torch.equal(leaves["layers.1.mixer.q"], q.reshape(-1, 16))
    assert torch.equal(leaves["layers.1.mixer.gate"], gate.reshape(-1, 16))
    assert torch.equal(leaves["layers.0.mlp.experts.down"][2], tensors["model.layers.0.mlp.experts.2.down_proj.weight"])
    assert torch.equal(leaves["layers.2.mlp.up"], tensors["model.layers.2.mlp.up_proj.weight"])
