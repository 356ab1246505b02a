"""safetensors files and folders of them: what is in them, checked before it is read, and writing tensor by tensor.

Files are read with the safetensors library. It can only write a whole file from memory, so the writer is here: the
format is the header's length (8 bytes, little endian), the header (JSON: dtype, shape and offsets of each tensor,
padded with spaces to a multiple of 8) and the bytes of the tensors in the order of the header. It writes the same
bytes as the library would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# Narrow to wide, in the order of the library, which writes tensors of the last kind first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {dtype: i for i, dtype in enumerate(DTYPES.values())}


class Entry(NamedTuple):
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Stored(NamedTuple):
    """A tensor in a file of a folder."""

    file: Path
    entry: Entry


def open_file(path: Path) -> Any:
    """The safetensors library's reader of `path`, data mapped rather than read.

    Raises:
        ValueError: the file is absent, truncated or no safetensors file.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); fetch or write it again") from error


def read_header(path: Path) -> dict[str, Entry]:
    """Dtype and shape of every tensor in the file, without reading their data.

    Raises:
        ValueError: as `open_file`, or a dtype that torch does not have.
    """
    found: dict[str, Entry] = {}
    with open_file(path) as file:
        for name in file.keys():  # noqa: SIM118 - the reader is no mapping
            view = file.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name} has dtype {view.get_dtype()}; known are {', '.join(DTYPES)}")
            found[name] = Entry(DTYPES[view.get_dtype()], tuple(view.get_shape()))
    return found


def entry_point(folder: Path) -> Path:
    """The file that a folder is read from: its single model file, or the index of its shards.

    Raises:
        ValueError: there is neither or both, or only pickled weights, which are never opened.
    """
    found = [folder / name for name in (SINGLE, INDEX) if (folder / name).exists()]
    if len(found) == 2:
        raise ValueError(f"{folder} has both {SINGLE} and {INDEX}; remove the one that is out of date")
    if found:
        return found[0]
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has only pickled weights ({pickles[0]}), which could run any code when opened; "
            "convert them to safetensors"
        )
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in the folder with the file that holds it; all headers are read, no data.

    Raises:
        ValueError: as `entry_point` and `read_header`, or the index and the shards disagree.
    """
    start = entry_point(folder)
    if start.name == SINGLE:
        return {name: Stored(start, entry) for name, entry in read_header(start).items()}
    index, found = _weight_map(start), {}
    for shard in sorted(set(index.values())):
        for name, entry in read_header(folder / shard).items():
            if index.get(name) != shard:
                raise ValueError(f"{folder / shard} holds {name}, which {start} places in {index.get(name)}")
            found[name] = Stored(folder / shard, entry)
    if lost := [name for name in index if name not in found]:
        raise ValueError(f"{folder / index[lost[0]]} lacks {lost[0]}, which {start} places there{and_more(lost)}")
    return found


def and_more(names: list[str]) -> str:
    """The end of a sentence about the first of `names`."""
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = dict(index).items()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no index of shards ({error!r}); it must be JSON with a weight_map") from error
    for name, shard in items:
        # A shard is a file of this folder: an index must not make us read others.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} places {name} in {shard!r}; it must be the name of a file in the same folder")
    return dict(items)


def partition(entries: Mapping[str, Entry], max_bytes: int) -> list[list[str]]:
    """Names cut, in order, into shards of at most `max_bytes`; a larger tensor is a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.nbytes
    return shards


def write_file(path: Path, entries: Mapping[str, Entry], tensor: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, asking `tensor` for one tensor after the other so that only one need exist.

    Args:
        path: the file; it is complete on the disk when this returns.
        entries: dtype and shape of each tensor.
        tensor: from a name to its values, on any device, of the dtype and shape of its entry.
    """
    # Wide types first keep every tensor aligned.
    order = sorted(entries, key=lambda name: (-RANK[entries[name].dtype], name))
    with path.open("wb") as file:
        file.write(_header(entries, order))
        for name in order:
            values = tensor(name).detach().cpu().contiguous()
            assert (values.dtype, tuple(values.shape)) == tuple(entries[name]), name
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        _settle(file)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file that is complete on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        _settle(file)


def _settle(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _header(entries: Mapping[str, Entry], order: Iterable[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = entries[name]
        end = offset + entries[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
