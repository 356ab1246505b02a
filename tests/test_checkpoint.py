"""Hugging Face folders: theirs here, ours there, nothing lost, nothing wrong accepted, little memory."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from q3n_functional import checkpoint
from q3n_functional.checkpoint import Extras, load, save
from q3n_functional.parallel import rules
from q3n_functional.parallel.mesh import Mesh
from q3n_functional.params import init, named_leaves
from q3n_functional.shards import read_header, write_file
from tests.folders import (
    A_LOG,
    EMBEDDING,
    HEAD,
    QKVZ,
    ROUTER,
    assert_same,
    on_disk,
    perturbed,
    read_folder,
    small,
    without,
    write_folder,
)

FP32_LEAVES = ("A_log", "dt_bias", "mixer.norm")


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
    assert again.config == replace(config, extra=(("note", "[1]"),))
    assert_same(dict(again.extras.tensors), unknown)


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


def test_missing_tensor(model):
    tensors, refused = model
    refused(r"model.safetensors: model.layers.0.mlp.gate.weight is missing; the weights", without(tensors, ROUTER))
    refused(r"missing \(and 1 more like it\)", without(tensors, ROUTER, QKVZ))
    refused(
        r"mtp.pre_fc_norm_embedding.weight is missing .* set num_nextn_predict_layers to 0", num_nextn_predict_layers=1
    )
    refused(r"lm_head.weight is missing", without(tensors, HEAD))
    refused(
        rf"model.safetensors: num_experts is 1000000000 in config.json, but there are only {len(tensors)} tensors; the",
        num_experts=10**9,
    )


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


def test_memory_is_taken_only_after_the_checks(model, monkeypatch):
    tensors, refused = model
    monkeypatch.setattr(checkpoint, "_empty_leaves", lambda *_: pytest.fail("built"))
    refused(r"is missing", without(tensors, HEAD))
    refused(r"has shape", tensors | {ROUTER: torch.ones(1)})


class Copied(TorchDispatchMode):
    """Counts the numbers that are copied."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mesh", [Mesh(dp=4), Mesh(dp=2, tp=2), Mesh(cp=2, ep=3), Mesh(replicate=2, tp=2)], ids=str)
def test_a_rank_reads_its_own_slices_and_no_more(tmp_path, mesh):
    folder = write_folder(tmp_path, small(), on_disk(small()))
    whole = load(folder)
    places, leaves = rules.named_layouts(whole.config, mesh), named_leaves(whole.params)
    for rank in range(mesh.size):
        with Copied() as copied:
            found = load(folder, mesh=mesh, rank=rank)
        shards = named_leaves(found.params)
        assert copied.count == sum(shard.numel() for shard in shards.values())
        for name, shard in shards.items():
            assert torch.equal(shard, places[name].shard(leaves[name], mesh.coordinates(rank))), name
    with pytest.raises(ValueError, match=r"mesh\.tp is 3, but linear_num_key_heads is 2"):
        load(folder, mesh=Mesh(tp=3))
