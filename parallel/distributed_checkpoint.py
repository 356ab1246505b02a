"""Tensors of all ranks in one folder, written and read by torch.distributed.checkpoint in safetensors files.

Shards are local tensors everywhere else; here alone they become DTensors, which tell the library where they lie in the
whole, so that any layout reads what any other wrote. Its own format has a pickle in it; safetensors has not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from q3n_functional.parallel.mesh import Mesh
from q3n_functional.parallel.rules import STORAGE, Layout


class Storage(NamedTuple):
    """How the ranks write together: where each leaf lies, and a group of the hosts' processors for agreeing."""

    layouts: Mapping[str, Layout]
    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    ranks: int


def storage(layouts: Mapping[str, Layout], mesh: Mesh, timeout: timedelta) -> Storage:
    """Makes the groups for `layouts`, the leaves' by dotted name; every rank calls it once."""
    sizes = tuple(next(iter(layouts.values())).sizes)
    group = dist.new_group(backend="gloo", timeout=timeout)
    return Storage(layouts, init_device_mesh("cpu", sizes, mesh_dim_names=STORAGE), group, dist.get_rank(), mesh.size)


def barrier(where: Storage | None) -> None:
    """Waits for all ranks."""
    if where is not None:
        dist.barrier(group=where.group)


def save(folder: Path, tensors: Mapping[str, Tensor], where: Storage | None) -> None:
    """Writes the ranks' shards, on the host; a tensor without a layout is the same on all. Names as for `load_`."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet():
        state_dict_saver.save(_placed(tensors, where), storage_writer=writer, **_ranks(where))


def load_(folder: Path, tensors: Mapping[str, Tensor], where: Storage | None) -> None:
    """Fills `tensors`, the rank's shards on any device, from `folder`, whatever layout wrote it.

    A name is a leaf's, perhaps with one word before it, as in `momentum.norm`. Raises ValueError, naming the tensor,
    where the folder does not hold all of them or holds others.
    """
    reader = HuggingFaceStorageReader(str(folder))
    values = {name: tensor if tensor.device.type == "cpu" else tensor.cpu() for name, tensor in tensors.items()}
    placed = _placed(values, where)
    _check(folder, placed, reader.read_metadata().state_dict_metadata)
    with _quiet():
        state_dict_loader.load(placed, storage_reader=reader, **_ranks(where))
    for name, value in values.items():
        tensors[name].copy_(value)


def whole(folder: Path, names: Sequence[str], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Whole leaves of a folder that `save` wrote, read by this rank alone."""
    reader = HuggingFaceStorageReader(str(folder))
    stored: Any = reader.read_metadata().state_dict_metadata
    leaves = {name: torch.empty(layouts[name].spec.shape, dtype=stored[name].properties.dtype) for name in names}
    with _quiet():
        state_dict_loader.load(dict(leaves), storage_reader=reader, no_dist=True)
    return leaves


def _placed(tensors: Mapping[str, Tensor], where: Storage | None) -> dict[str, Any]:
    if where is None:
        return dict(tensors)
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        layout = where.layouts.get(name) or where.layouts.get(name.partition(".")[2])
        found[name] = tensor if layout is None else _distributed(tensor, layout, where.mesh)
    return found


def _distributed(shard: Tensor, layout: Layout, mesh: DeviceMesh) -> DTensor:
    placements = [Replicate() if dim is None else Shard(dim) for dim in layout.dims]
    stride = torch.empty(layout.spec.shape, device="meta").stride()
    shape = torch.Size(layout.spec.shape)
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)


def _check(folder: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    for name in sorted(wanted.keys() ^ stored.keys()):
        raise ValueError(f"{folder} {'lacks' if name in wanted else 'has an unknown'} tensor {name}")
    for name, tensor in wanted.items():
        if stored[name].size != tensor.shape:
            raise ValueError(f"{folder}: {name} is {list(stored[name].size)}, not {list(tensor.shape)}")


def _ranks(where: Storage | None) -> dict[str, Any]:
    return {"no_dist": True} if where is None else {"process_group": where.group}


@contextmanager
def _quiet() -> Any:
    """The library warns where it is told to work on one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
