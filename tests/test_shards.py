"""safetensors files: written as the library would, and refused where they are damaged."""

import json

import pytest
import torch
from safetensors.torch import save_file

from q3n_functional.checkpoint import load
from q3n_functional.shards import DTYPES, Entry, write_file
from tests.folders import on_disk, small, two_shards, write_folder


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


def test_index_that_disagrees_with_the_shards(tmp_path):
    tensors = on_disk(small())
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
def test_truncated_shard(tmp_path, keep):
    tensors = on_disk(small())
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
