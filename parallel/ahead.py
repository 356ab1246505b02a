"""Parameters that ranks share out (ZeRO stage 3), sent for one part of the model before the one that uses them.

Parts are the embedding, every layer, and what stands behind the layers. Each takes whole parameters, which come and go
between them, outside of what is compiled. Forward, the gather of a part is sent while the part before it runs.
What a part keeps for its gradient are not its whole parameters but how it looked at them: backward gathers them
again, while the part behind it runs. Its gradients are on their way while the part before it runs, and the last of
them are waited for when all parts are done. One collective a part, group and kind of exchange.

What is under way belongs to one call of the loss: it is in a `_Flight`, and gone with its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from q3n_functional.parallel.collectives import Axis, _from_front, _to_front
from q3n_functional.parallel.placement import Parallel, Place, place

_ops = torch.ops._c10d_functional

Use = Callable[..., Any]
"""`use(number, function, *arguments, **options)` is `function(part, *arguments, **options)` of the part so numbered."""


class _Part(NamedTuple):
    """A part's shards, their places, and the tree that they are the leaves of."""

    shards: list[Tensor]
    places: list[Place]
    tree: pytree.TreeSpec


class _View(NamedTuple):
    """How a tensor that backward wants looked at the memory of a part's whole parameter."""

    leaf: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def begin(parts: Sequence[Any], layouts: Sequence[Any], parallel: Parallel) -> Use:
    """What runs the `parts`, trees of shards, one after the other on whole parameters."""
    flat = [_part(*pair, parallel) for pair in zip(parts, layouts, strict=True)]
    flight = _Flight(flat, parallel)
    shards = iter(_apply(_Shards, flight, *(shard for tree in parts for shard in pytree.tree_leaves(tree))))
    return partial(_use, flight, [list(islice(shards, len(part.shards))) for part in flat])


def _part(tree: Any, layouts: Any, parallel: Parallel) -> _Part:
    shards, spec = pytree.tree_flatten(tree)
    places = [place(where, parallel) for where in pytree.tree_leaves(layouts)]
    return _Part([shard.detach() for shard in shards], places, spec)


def _use(
    flight: _Flight, shards: list[list[Tensor]], number: int, function: Callable[..., Any], *arguments: Any, **more: Any
) -> Any:
    flight.send_for(number)
    flight.send_for(number + 1)
    whole = _apply(_Whole, flight, number, *shards[number])
    with saved_tensors_hooks(*flight.hooks(number, whole)):
        return function(pytree.tree_unflatten(whole, flight.parts[number].tree), *arguments, **more)


class _Flight:
    """Whole parameters that are sent for (`coming`) or here for a part's backward, and gradients that are `going`."""

    def __init__(self, parts: list[_Part], parallel: Parallel) -> None:
        self.parts, self.fsdp = parts, parallel.fsdp
        self.axes = (parallel.fsdp, parallel.replicate, parallel.ep, parallel.tp)
        self.coming: dict[int, list[Tensor]] = {}
        self.here: dict[int, list[Tensor]] = {}
        self.going: list[Iterator[None]] = []

    def is_cut(self, where: Place) -> bool:
        """Whether ranks share the parameter out."""
        return self.fsdp.size > 1 and where.dim is not None

    def send_for(self, number: int) -> None:
        """Cast and gathered, and not waited for; nothing where the part is under way or not there."""
        if number < len(self.parts) and number not in self.coming:
            shards, places, _ = self.parts[number]
            cast = _cast([shard.detach() for shard in shards], [where.dtype for where in places])
            cut = [i for i, where in enumerate(places) if self.is_cut(where)]
            for i, gathered in zip(cut, _gather([cast[i] for i in cut], self.fsdp), strict=True):
                cast[i] = gathered
            self.coming[number] = cast

    def arrived(self, number: int) -> list[Tensor]:
        """The part's whole parameters."""
        self.send_for(number)
        pairs = zip(self.coming.pop(number), self.parts[number].places, strict=True)
        return [_joined(x, self.fsdp.size, where.dim) if self.is_cut(where) else x for x, where in pairs]

    def hooks(self, number: int, whole: Sequence[Tensor]) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """What is done to the tensors that the part saves, and to get them back."""
        # The last part's backward is the next that runs: it keeps what it has.
        gone = () if number == len(self.parts) - 1 else whole
        leaves = {_memory(x): i for i, x in enumerate(gone)}

        def pack(x: Tensor) -> Tensor | _View:
            leaf = leaves.get(_memory(x))
            return x if leaf is None else _View(leaf, x.size(), x.stride(), int(x.storage_offset()))

        def unpack(saved: Tensor | _View) -> Tensor:
            self.begin_backward(number)
            if isinstance(saved, Tensor):
                return saved
            return self.again(number)[saved.leaf].as_strided(saved.size, saved.stride, saved.offset)

        return pack, unpack

    def begin_backward(self, number: int) -> None:
        """Sends for the part before, and for this one where that was not done; again for nothing."""
        if number in self.here:
            return
        self.here[number] = []
        for part in (number, number - 1):
            # The last part has what it needs, and the embedding's gradient needs no table.
            if 0 < part < len(self.parts) - 1:
                self.send_for(part)

    def again(self, number: int) -> list[Tensor]:
        """The part's whole parameters in its backward."""
        if not self.here[number]:
            self.here[number] = self.arrived(number)
        return self.here[number]

    def end_backward(self, number: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the part's shards, not there before `_Shards` has waited for them."""
        self.here.pop(number, None)
        # Before the next are sent: what is sent stays in memory until it is waited for.
        self.go_on()
        shards, places, _ = self.parts[number]
        own = _cast(gradients, [shard.dtype for shard in shards])
        cut = [i for i, where in enumerate(places) if self.is_cut(where)]
        sent = _scatter([_to_front(own[i], self.fsdp.size, places[i].dim or 0) for i in cut], self.fsdp)
        for i, piece in zip(cut, sent, strict=True):
            own[i] = piece
        # What is not cut is summed in place.
        own = [
            x.clone(memory_format=torch.contiguous_format) if x is g else x for x, g in zip(own, gradients, strict=True)
        ]
        self.going.append(self.summed(own, places, sent))
        next(self.going[-1], None)
        return tuple(own)

    def summed(self, own: list[Tensor], places: list[Place], sent: list[Tensor]) -> Iterator[None]:
        """Sums gradients over one group of ranks after the other; each time it goes on it waits for the last sums."""
        for axis in self.axes:
            copies = [x for x, where in zip(own, places, strict=True) if axis.size > 1 and self.is_copied(where, axis)]
            sent = [*sent, *_sum(copies, axis)]
            if sent:
                yield
            for x in sent:
                _ops.wait_tensor(x)
            sent = []

    def is_copied(self, where: Place, axis: Axis) -> bool:
        """Whether the ranks of the axis hold copies of the parameter, or of its shard."""
        return where.dim is None if axis is self.fsdp else any(axis is other for other in where.copies)

    def go_on(self) -> None:
        """Waits for the gradients that were sent, and sends those on that are not yet summed over all groups."""
        self.going = [parts for parts in self.going if next(parts, "done") is None]


class _Shards(torch.autograd.Function):
    """The shards as they are; backward comes to them when all parts are done."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return tuple(shard.detach() for shard in shards)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        while ctx.flight.going:
            ctx.flight.go_on()
        return None, *gradients


class _Whole(torch.autograd.Function):
    """A part's shards to its whole parameters."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, number: int, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.flight, ctx.number = flight, number
        return tuple(flight.arrived(number))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.flight.end_backward(ctx.number, gradients)


def _apply(function: Any, *arguments: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = function.apply(*arguments)
    return outputs


def _memory(x: Tensor) -> tuple[int, torch.dtype]:
    return x.untyped_storage()._cdata, x.dtype


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """In these dtypes, those of a kind by one call: one by one they take the host longer than the card."""
    found = [
        x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
        for x, dtype in zip(tensors, dtypes, strict=True)
    ]
    pairs = [(new, old) for new, old in zip(found, tensors, strict=True) if new is not old]
    for kinds in dict.fromkeys((new.dtype, old.dtype) for new, old in pairs):
        alike = [pair for pair in pairs if (pair[0].dtype, pair[1].dtype) == kinds]
        torch._foreach_copy_([new for new, _ in alike], [old for _, old in alike])
    return found


def _joined(pieces: Tensor, size: int, dim: int | None) -> Tensor:
    return _from_front(_ops.wait_tensor(pieces), size, dim or 0)


def _gather(shards: list[Tensor], axis: Axis) -> list[Tensor]:
    """Every rank's shards one behind the other along dim 0, when they are waited for."""
    if not shards:
        return []
    shards = [shard.contiguous() for shard in shards]
    gathered: list[Tensor] = _ops.all_gather_into_tensor_coalesced(shards, axis.size, axis.group)
    return gathered


def _scatter(rows: list[Tensor], axis: Axis) -> list[Tensor]:
    """The rank's rows of the ranks' sums, when they are waited for."""
    if not rows:
        return []
    rows = [x.contiguous() for x in rows]
    scattered: list[Tensor] = _ops.reduce_scatter_tensor_coalesced(rows, "sum", axis.size, axis.group)
    return scattered


def _sum(copies: list[Tensor], axis: Axis) -> list[Tensor]:
    """Sums in place, when they are waited for; of each dtype by itself, as gloo wants."""
    for dtype in dict.fromkeys(x.dtype for x in copies):
        _ops.all_reduce_coalesced_([x for x in copies if x.dtype == dtype], "sum", axis.group)
    return copies
