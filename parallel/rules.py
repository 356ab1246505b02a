"""Which axis of the mesh cuts which axis of a parameter: one table, from the letters of `Spec.axes`.

A letter that is not in the table is never cut by tp or ep. The shards that make FSDP are cut from the first dim that
nothing else cuts and that divides evenly, so one dim is never cut twice and a strided shard cannot arise. Vectors, too
short to be worth a collective, and leaves without such a dim are whole on every rank of that axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from q3n_functional import params
from q3n_functional.config import Config
from q3n_functional.parallel.mesh import Mesh, check
from q3n_functional.params import Spec

TABLE = {
    "V": "tp",  # vocabulary
    "Q": "tp",  # query heads
    "G": "tp",  # key/value heads
    "N": "tp",  # key heads of linear attention, and their channels of the convolution
    "M": "tp",  # value heads
    "H": "tp",  # numbers per value head
    "W": "tp",  # width of a dense or shared SwiGLU
    "F": "tp",  # width of an expert
    "E": "ep",  # stacked experts
}

STORAGE = ("replicate", "fsdp", "ep", "tp")
"""The axes that a parameter can be cut over or repeated along, outermost first."""


@dataclass(frozen=True)
class Layout:
    """How one leaf lies on a mesh: the dim that each axis cuts, None where the axis' ranks hold the same.

    `sizes` are the degrees along `STORAGE`.
    """

    spec: Spec
    sizes: tuple[int, int, int, int]
    fsdp: int | None
    ep: int | None
    tp: int | None

    @property
    def dims(self) -> tuple[int | None, ...]:
        """The dim that each of `STORAGE` cuts."""
        return (None, self.fsdp, self.ep, self.tp)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of one rank's shard."""
        shape = list(self.spec.shape)
        for size, dim in zip(self.sizes, self.dims, strict=True):
            if dim is not None:
                shape[dim] //= size
        return tuple(shape)

    def offsets(self, at: Mapping[str, int]) -> tuple[int, ...]:
        """Where a rank's shard begins in the whole leaf; `at` are the rank's coordinates."""
        begin = [0] * len(self.spec.shape)
        for axis, dim in zip(STORAGE, self.dims, strict=True):
            if dim is not None:
                begin[dim] += at[axis] * self.local_shape[dim]
        return tuple(begin)

    @property
    def copies(self) -> int:
        """How many ranks hold each number."""
        # A list: Dynamo multiplies no generators.
        return math.prod([size for size, dim in zip(self.sizes, self.dims, strict=True) if dim is None])

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one rank's shard, stored in `dtype` unless the leaf names its own."""
        return math.prod(self.local_shape) * (self.spec.dtype or dtype).itemsize

    def shard(self, value: Tensor, at: dict[str, int]) -> Tensor:
        """The rank's shard of the whole leaf, as a copy; `at` are its coordinates."""
        for axis, size, dim in zip(STORAGE, self.sizes, self.dims, strict=True):
            if dim is not None:
                value = value.chunk(size, dim)[at[axis]]
        return value.clone(memory_format=torch.contiguous_format)

    def __str__(self) -> str:
        """Such as `V/tp D/fsdp`: only the cut axes; `whole` where there is none."""
        cuts = {
            dim: axis
            for axis, size, dim in zip(STORAGE, self.sizes, self.dims, strict=True)
            if dim is not None and size > 1
        }
        return " ".join(f"{letter}/{cuts[i]}" for i, letter in enumerate(self.spec.axes) if i in cuts) or "whole"


def layout(leaf: Spec, mesh: Mesh, config: Config) -> Layout:
    """How one leaf lies on `mesh`."""
    cut: dict[str, int | None] = {"ep": None, "tp": None}
    for dim, letter in enumerate(leaf.axes):
        axis = TABLE.get(letter)
        # Fewer key/value heads than ranks: every rank holds them all and picks its own.
        if axis and not (letter == "G" and config.num_key_value_heads % mesh.tp):
            cut[axis] = dim
    taken = {dim for axis, dim in cut.items() if mesh.degree(axis) > 1}
    free = [i for i, size in enumerate(leaf.shape) if i not in taken and size % mesh.fsdp == 0 and len(leaf.shape) > 1]
    sizes = (mesh.replicate, mesh.fsdp, mesh.ep, mesh.tp)
    return Layout(leaf, sizes, free[0] if free else None, **cut)


def layouts(config: Config, mesh: Mesh) -> params.Parameters:
    """The parameter tree with a `Layout` at every leaf; ValueError where the model does not fit the mesh."""
    check(mesh, config)

    def place(leaf: Tensor) -> Tensor:
        return cast(Tensor, layout(cast(Spec, leaf), mesh, config))

    return cast(params.Parameters, pytree.tree_map(place, params.spec(config)))


def named_layouts(config: Config, mesh: Mesh) -> dict[str, Layout]:
    """The `Layout` of every leaf by dotted name, in tree order."""
    return cast(dict[str, Layout], params.named_leaves(layouts(config, mesh)))


def init(
    config: Config,
    seed: int,
    mesh: Mesh,
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> params.Parameters:
    """The rank's shards of `params.init(config, seed)`; no more than one whole leaf is in memory at a time."""
    at = mesh.coordinates(rank)

    def make(path: pytree.KeyPath, leaf: Tensor) -> Tensor:
        where = cast(Layout, leaf)
        values = params.init_leaf(params.path_name(path), where.spec, seed, config.initializer_range)
        return where.shard(values, at).to(device, where.spec.dtype or dtype)

    return cast(params.Parameters, pytree.tree_map_with_path(make, layouts(config, mesh)))


def shard(tree: params.Parameters, layouts: params.Parameters, at: dict[str, int]) -> params.Parameters:
    """The rank's shards of a whole tree, as copies."""
    return cast(
        params.Parameters, pytree.tree_map(lambda leaf, where: cast(Layout, where).shard(leaf, at), tree, layouts)
    )
