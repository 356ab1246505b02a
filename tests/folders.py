"""Small checkpoint folders for tests, written and read with the safetensors library alone."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from q3n_functional.config import Config
from q3n_functional.names import sources
from q3n_functional.rotary import RopeParameters

FULL, LINEAR = "full_attention", "linear_attention"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QKVZ = "model.layers.0.linear_attn.in_proj_qkvz.weight"
A_LOG = "model.layers.0.linear_attn.A_log"
ROUTER = "model.layers.0.mlp.gate.weight"


def small(ratio=2, **changes):
    """A model of every kind of layer; `ratio` value heads a key head, key and value heads of different widths."""
    base = Config(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=3,
        layer_types=(LINEAR, FULL, LINEAR),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters=RopeParameters(rope_theta=1e4),
        max_position_embeddings=64,
        linear_num_key_heads=2,
        linear_num_value_heads=2 * ratio,
        linear_key_head_dim=4,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=3,
        intermediate_size=20,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=10,
        mlp_only_layers=(2,),
    )
    return replace(base, **changes)


def perturbed(tensors, dtype=None):
    """The same names with values that are all different, also where initial values are all equal."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape, generator=generator, dtype=torch.float32).to(dtype or t.dtype)
        for name, t in tensors.items()
    }


def on_disk(config, dtype=torch.float32):
    """The tensors of a checkpoint of `config`, by name, with random values."""
    meta = {name: torch.empty(source.shape, device="meta") for name, source in sources(config).items()}
    return perturbed(meta, dtype)


def write_folder(folder, config, tensors, shards=None, **json_changes):
    """A folder written with the library alone, in one file or as {file: names} with an index."""
    folder.mkdir(exist_ok=True)
    content = {**config.to_json(), **json_changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    if shards is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def two_shards(tensors):
    names = list(tensors)
    half = len(names) // 2
    return {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}


def read_folder(folder):
    return {k: v for path in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}
