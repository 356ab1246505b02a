"""How ops take and return DTensors.

A `Split` says along which dim of each tensor the work of an op can be shared out: rows, heads or channels. From it
follow the placements of the op and of its gradient; DTensor redistributes inputs that lie otherwise. Nothing is split
that does not divide, so every rank has whole rows, heads or channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

Dim = int | str | None


class Split(NamedTuple):
    """One way to share out an op.

    arguments: the dim that is split, by argument; the others are whole on every rank. outputs: of each output, the dim
    that is split, None where every rank has it whole, "sum" where the ranks' outputs add up. divides: the arguments
    whose split dims must be multiples of the number of ranks. documents: whether `cu_seqlens` may be given. behind: how
    many dims must follow a split one.
    """

    arguments: Mapping[str, int]
    outputs: Sequence[Dim]
    divides: Sequence[str]
    documents: bool = True
    behind: int = 0


def gradient_split(split: Split, inputs: Sequence[str], extra: Mapping[str, int]) -> Split:
    """The same for the op's gradient, whose outputs belong to `inputs` and which is given `extra` tensors too."""
    outputs = [split.arguments.get(name, "sum") for name in inputs]
    return split._replace(arguments={**split.arguments, **extra}, outputs=outputs)


def register(op: OpOverload, splits: Sequence[Split], absent: Mapping[int, str] | None = None) -> None:
    """Tell DTensor how `op` may be shared out. `absent`: outputs that are empty where an argument is not given."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.experimental import register_sharding

    names = [argument.name for argument in op._schema.arguments]
    tensors = {argument.name for argument in op._schema.arguments if "Tensor" in str(argument.type)}

    def strategies(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        given = {name: x for name, x in zip(names, args, strict=False) if name in tensors and x is not None}
        whole = [Replicate() if name in given else None for name in names[: len(args)]]
        found: list[tuple[list[Any], list[Any]]] = [([Replicate()] * len(op._schema.returns), whole)]
        for split in splits:
            if _possible(split, given):
                outputs = [_placement(dim) for dim in split.outputs]
                for index, name in (absent or {}).items():
                    outputs[index] = outputs[index] if name in given else Replicate()
                dims = [split.arguments.get(name) for name in names[: len(args)]]
                inputs = [_placement(dim) if name in given else None for name, dim in zip(names, dims, strict=False)]
                found.append((outputs, inputs))
        return found

    register_sharding(op)(strategies)


def _possible(split: Split, given: Mapping[str, Any]) -> bool:
    if "cu_seqlens" in given and not split.documents:
        return False
    dims = [(given[name].shape, split.arguments[name]) for name in split.divides]
    if any(dim + split.behind >= len(shape) for shape, dim in dims):
        return False
    mesh = next(iter(given.values())).mesh
    return all(shape[dim] % mesh.size(axis) == 0 for shape, dim in dims for axis in range(mesh.ndim))


def _placement(dim: Dim) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if dim is None:
        return Replicate()
    return Partial() if isinstance(dim, str) else Shard(dim)
