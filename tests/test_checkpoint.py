"""Hugging Face folders: theirs here, ours there, nothing lost, nothing wrong accepted, little memory."""

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from q3n_functional import checkpoint
from q3n_functional.checkpoint import Extras, load, save
from q3n_functional.config import Config, qwen3_next_80b_a3b
from q3n_functional.names import sources
from q3n_functional.params import init, named_leaves, named_specs
from q3n_functional.rotary import RopeParameters
from q3n_functional.shards import DTYPES, Entry, read_header, write_file

FULL, LINEAR = "full_attention", "linear_attention"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QKVZ = "model.layers.0.linear_attn.in_proj_qkvz.weight"
A_LOG = "model.layers.0.linear_attn.A_log"
ROUTER = "model.layers.0.mlp.gate.weight"
FP32_LEAVES = ("A_log", "dt_bias", "mixer.norm")


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


# --- names -----------------------------------------------------------------------------------------------------------


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


# --- transformers ----------------------------------------------------------------------------------------------------


def reference_model(config, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**config.to_json())).to(dtype)
    model.load_state_dict(perturbed(model.state_dict()))
    return model


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_folder_is_read_and_written_back_byte_for_byte(tmp_path, ratio, dtype):
    config = small(ratio)
    reference_model(config, dtype).save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs", dtype=torch.float32)
    assert replace(loaded.config, extra=()) == config
    assert set(loaded.dtypes.values()) == {dtype}
    assert {leaf.dtype for leaf in named_leaves(loaded.params).values()} == {torch.float32}
    save(tmp_path / "ours", *loaded)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "ours" / "generation_config.json").exists()


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000])
def test_our_folder_loads_there_with_nothing_missing_or_left_over(tmp_path, ratio, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    expected = reference_model(small(ratio))
    expected.save_pretrained(tmp_path / "theirs")
    save(tmp_path / "ours", *load(tmp_path / "theirs"), max_shard_bytes=max_shard_bytes)
    model, info = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))


def test_fresh_model_with_prediction_module_loads_there(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = small(num_nextn_predict_layers=1)
    params = init(config, seed=0)
    save(tmp_path, params, config)
    model, info = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert torch.equal(model.lm_head.weight, params.lm_head)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_mixed_dtypes_survive(tmp_path, dtype):
    config = small()
    tensors = on_disk(config, torch.bfloat16)
    for name in (A_LOG, "model.layers.2.linear_attn.norm.weight", "model.layers.0.mlp.experts.1.up_proj.weight"):
        tensors[name] = torch.randn(tensors[name].shape)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    loaded = load(write_folder(tmp_path / "a", config, tensors), dtype=dtype)
    assert loaded.dtypes[A_LOG] == torch.float32
    save(tmp_path / "b", *loaded)
    assert_same(read_folder(tmp_path / "b"), tensors)


def test_leaves_have_the_dtype_that_is_asked_or_stored(tmp_path):
    config = small()
    tensors = on_disk(config, torch.bfloat16)
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.randn(12, 16)
    folder = write_folder(tmp_path, config, tensors)
    for dtype in (None, torch.bfloat16, torch.float16, torch.float64):
        for name, leaf in named_leaves(load(folder, dtype).params).items():
            stored = torch.float32 if name == "layers.0.mlp.experts.up" else torch.bfloat16
            expected = torch.float32 if name.endswith(FP32_LEAVES) else dtype or stored
            assert leaf.dtype == expected, name


def test_without_dtypes_leaves_are_written_as_they_are(tmp_path):
    config = small()
    params = init(config, seed=0, dtype=torch.bfloat16)
    save(tmp_path, params, config)
    assert load(tmp_path).dtypes[A_LOG] == torch.float32
    assert load(tmp_path).dtypes[QKVZ] == torch.bfloat16
    assert_same(named_leaves(load(tmp_path).params), named_leaves(params))


def test_trained_leaves_are_rounded_to_the_dtype_of_the_source(tmp_path):
    config = small()
    params = init(config, seed=0)
    save(tmp_path, params, config, dtypes={QKVZ: torch.bfloat16})
    assert torch.equal(load(tmp_path).params.layers[0].mixer.q, params.layers[0].mixer.q.bfloat16())


# --- what is carried along -------------------------------------------------------------------------------------------


def test_unknown_tensors_and_tokenizer_files_survive(tmp_path):
    config = small()
    known = on_disk(config)
    unknown = {
        "visual.weight": torch.randn(3, 0, 2),
        "mtp.norm.weight": torch.randn(16).to(torch.bfloat16),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "scale": torch.randn(5).to(torch.float8_e4m3fn),
    }
    folder = write_folder(tmp_path / "a", config, known | unknown, num_nextn_predict_layers=0, note=[1])
    files = {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"\xff",
        "merges.txt": b"a b",
        "chat_template.jinja": b"",
    }
    for name, text in files.items():
        (folder / name).write_bytes(text)
    (folder / "optimizer.pt").write_bytes(b"not the model's")
    loaded = load(folder)
    assert dict(loaded.extras.files) == files
    save(tmp_path / "b", *loaded)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted([*files, "config.json", "model.safetensors"])
    again = load(tmp_path / "b")
    assert again.config == config_with_note(config)
    assert_same(dict(again.extras.tensors), unknown)


def config_with_note(config):
    return replace(config, extra=(("note", "[1]"),))


def test_tensors_of_the_prediction_module_turn_it_on(tmp_path):
    config = small(num_nextn_predict_layers=1)
    tensors = on_disk(config)
    folder = write_folder(tmp_path / "a", config, tensors, num_nextn_predict_layers=...)
    loaded = load(folder)
    assert loaded.config == config
    assert torch.equal(loaded.params.mtp.fc, tensors["mtp.fc.weight"])
    save(tmp_path / "b", *loaded)
    assert_same(read_folder(tmp_path / "b"), tensors)


def test_extras_do_not_depend_on_the_file_they_came_from(tmp_path):
    config = small()
    write_folder(tmp_path, config, on_disk(config) | {"other": torch.ones(1000)})
    loaded = load(tmp_path)
    save(tmp_path, *loaded)
    save(tmp_path, loaded.params, config)
    assert torch.equal(loaded.extras.tensors["other"], torch.ones(1000))
    assert not load(tmp_path).extras.tensors


@pytest.mark.parametrize("kept", [False, True])
def test_tied_head(tmp_path, kept):
    config = small(tie_word_embeddings=True)
    tensors = on_disk(config)
    assert HEAD not in tensors
    if kept:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    loaded = load(write_folder(tmp_path / "a", config, tensors))
    assert loaded.params.lm_head == ()
    assert torch.equal(loaded.params.embed_tokens, tensors[EMBEDDING])
    save(tmp_path / "b", *loaded)
    assert_same(read_folder(tmp_path / "b"), tensors)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [1, 3000, 20_000])
def test_shards(tmp_path, max_shard_bytes):
    config = small()
    tensors = on_disk(config, torch.bfloat16)
    save(tmp_path / "b", *load(write_folder(tmp_path / "a", config, tensors)), max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file in files:
        header = read_header(tmp_path / "b" / file)
        assert {index["weight_map"][name] for name in header} == {file}
        assert len(header) == 1 or sum(entry.nbytes for entry in header.values()) <= max_shard_bytes
    assert_same(read_folder(tmp_path / "b"), tensors)
    assert_same(named_leaves(load(tmp_path / "b").params), named_leaves(load(tmp_path / "a").params))


def test_our_writer_writes_the_bytes_of_the_library(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).to(torch.bfloat16),
        "c.ü": torch.randn(2, 1, 2),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "strided": torch.randn(4, 6).T,
    }
    for name, dtype in DTYPES.items():
        tensors[f"of dtype {name}"] = torch.ones(3, dtype=torch.uint8).to(dtype)
    entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_file(tmp_path / "ours", entries, tensors.__getitem__)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_save_replaces_the_checkpoint_and_nothing_else(tmp_path):
    config, other = small(), small(3)
    params = init(config, seed=0)
    save(tmp_path, init(other, seed=1), other, max_shard_bytes=2000)
    (tmp_path / "optimizer.safetensors").write_bytes(b"mine")
    save(tmp_path, params, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    assert_same(named_leaves(load(tmp_path).params), named_leaves(params))
    save(tmp_path, params, config, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(named_leaves(load(tmp_path).params), named_leaves(params))


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    config = small()
    params = init(config, seed=0)
    save(tmp_path, params, config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full_disk(path, entries, tensor):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("no space left on device")
        write_file(path, entries, tensor)

    monkeypatch.setattr(checkpoint, "write_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, init(config, seed=1), config, max_shard_bytes=2000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_params_of_another_config_are_refused(tmp_path):
    params = init(small(), seed=0)
    with pytest.raises(ValueError, match=r"layers.0.mixer.v has shape \[24, 16\], but config makes it \[36, 16\]"):
        save(tmp_path, params, small(3))
    with pytest.raises(ValueError, match=r"lm_head is only in params; params must be the tree of config"):
        save(tmp_path, params, small(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"mtp.* is only in config; .*more like it"):
        save(tmp_path, params, small(num_nextn_predict_layers=1))
    with pytest.raises(ValueError, match=r"extras holds model.norm.weight, which is a tensor of the model"):
        save(tmp_path, params, small(), extras=Extras({"model.norm.weight": torch.ones(16)}, {}))
    assert not list(tmp_path.iterdir())


# --- memory ----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators made and Python still holds; views are not counted."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        is_new = isinstance(result, torch.Tensor) and not (func.is_view or func._schema.is_mutable)
        if is_new and result.device.type == "cpu":
            self._add(result.nbytes)
            weakref.finalize(result, self._add, -result.nbytes)
        return result

    def _add(self, nbytes):
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def test_one_tensor_at_a_time(tmp_path):
    config = small(num_experts=40, moe_intermediate_size=64)
    tensors = on_disk(config, torch.bfloat16)
    write_folder(tmp_path / "a", config, tensors)
    largest = max(t.numel() for t in tensors.values()) * 4
    with LiveBytes() as reading:
        loaded = load(tmp_path / "a", dtype=torch.float32)
    model = sum(leaf.nbytes for leaf in named_leaves(loaded.params).values())
    assert model > 20 * largest
    assert model <= reading.peak <= model + 2 * largest
    with LiveBytes() as writing:
        save(tmp_path / "b", *loaded)
    assert 0 < writing.peak <= 2 * largest


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """A configuration, the tensors of its checkpoint and a function that writes both and expects to be refused."""
    config = small()
    tensors = on_disk(config)

    def refused(match, tensors=tensors, **options):
        folder = write_folder(tmp_path / "folder", config, tensors, **options)
        with pytest.raises(ValueError, match=match):
            load(folder)

    return tensors, refused


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_missing_tensor(model):
    tensors, refused = model
    refused(r"model.safetensors: model.layers.0.mlp.gate.weight is missing; the weights", without(tensors, ROUTER))
    refused(r"missing \(and 1 more like it\)", without(tensors, ROUTER, QKVZ))
    refused(
        r"mtp.pre_fc_norm_embedding.weight is missing .* set num_nextn_predict_layers to 0", num_nextn_predict_layers=1
    )
    refused(r"lm_head.weight is missing", without(tensors, HEAD))


def test_tensor_that_the_model_does_not_have(model):
    tensors, refused = model
    refused(r"model.safetensors: model.layers.3.norm is no tensor of", tensors | {"model.layers.3.norm": torch.ones(1)})
    refused(r"lm_head.bias is no tensor of", tensors | {"lm_head.bias": torch.ones(1)})
    mtp = on_disk(small(num_nextn_predict_layers=1))
    refused(r"mtp.layers.1.x is no tensor of", mtp | {"mtp.layers.1.x": torch.ones(1)}, num_nextn_predict_layers=1)


def test_shape_and_dtype(model):
    tensors, refused = model
    refused(
        r"gate.weight has shape \[16, 3\], but config.json makes it \[3, 16\]", tensors | {ROUTER: torch.ones(16, 3)}
    )
    refused(r"gate.weight is torch.int8; it must be .* quantised", tensors | {ROUTER: torch.ones(3, 16).to(torch.int8)})
    refused(r"embed_tokens.weight has shape \[48, 16\], but config.json makes it \[50, 16\]", vocab_size=50)


def test_tied_head_that_differs(model):
    _, refused = model
    refused(r"lm_head.weight differs from model.embed_tokens.weight, but config.json ties", tie_word_embeddings=True)


def test_config_json(model, tmp_path):
    _, refused = model
    refused(r"config.json: rope_theta is missing", rope_theta=..., rope_parameters=...)
    refused(r"config.json: quantization_config is", quantization_config={"quant_method": "fp8"})
    (tmp_path / "folder" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load(tmp_path / "folder")


def test_index_that_disagrees_with_the_shards(model, tmp_path):
    tensors, _ = model
    index = tmp_path / "folder" / "model.safetensors.index.json"
    shards = two_shards(tensors)
    second = list(shards)[1]

    def edited(change):
        folder = write_folder(tmp_path / "folder", small(), tensors, shards)
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))
        return folder

    for match, change in (
        (
            r"00001-of-00002.safetensors holds model.norm.weight, which .* in None",
            lambda c: c["weight_map"].pop("model.norm.weight"),
        ),
        (
            r"00001.* holds model.norm.weight, which .* places in model-00002",
            lambda c: c["weight_map"].update({"model.norm.weight": second}),
        ),
        (
            r"00002.* lacks extra.weight, which .* places there",
            lambda c: c["weight_map"].update({"extra.weight": second}),
        ),
        (r"model-3.safetensors is missing", lambda c: c["weight_map"].update({"extra.weight": "model-3.safetensors"})),
        (
            r"places x in '../other.safetensors'; it must be the name of a file",
            lambda c: c["weight_map"].update(x="../other.safetensors"),
        ),
        (r"is no index of shards \(KeyError", lambda c: c.pop("weight_map")),
    ):
        with pytest.raises(ValueError, match=match):
            load(edited(change))
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is no index of shards"):
        load(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has both model.safetensors and model.safetensors.index.json"):
        load(tmp_path / "folder")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(model, tmp_path, keep):
    tensors, _ = model
    folder = write_folder(tmp_path / "folder", small(), tensors, two_shards(tensors))
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"00002-of-00002.safetensors is truncated or no safetensors file"):
        load(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"00002-of-00002.safetensors is missing"):
        load(folder)


def test_nothing_is_unpickled(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small().to_json()))
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\), which could run any code"):
        load(tmp_path)


def test_memory_is_taken_only_after_the_checks(model, monkeypatch):
    tensors, refused = model
    monkeypatch.setattr(checkpoint, "_empty_leaves", lambda *_: pytest.fail("built"))
    refused(r"is missing", without(tensors, HEAD))
    refused(r"has shape", tensors | {ROUTER: torch.ones(1)})
