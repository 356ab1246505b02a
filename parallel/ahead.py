"""Parameters that ranks share out (ZeRO stage 3), sent for one part of the model before the one that uses them.

Parts are the embedding, every layer, and what stands behind the layers. Each takes whole parameters, which come and go
between them, outside of what is compiled. Forward, the gather of a part is sent while the part before it runs.
What a part keeps for its gradient are not its whole parameters but how it looked at them: backward gathers them
again, while the part behind it runs. Without `reshard_after_forward` (the name is that of PyTorch's FSDP2) parts keep
them, and nothing is gathered twice. A part's gradients are on their way while the part before it runs, and the last of
them are waited for when all parts are done. Gradients go to the ranks that keep them as they are, and are summed there,
in fp32 where they have 16 bits: half of the bytes of an fp32 sum on its way (the idea is of Wang et al. 2023, ZeRO++).

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

from q3n_functional.ops.registration import wide
from q3n_functional.parallel.collectives import Axis, _from_front, _to_front
from q3n_functional.parallel.placement import Parallel, Place, place

_ops = torch.ops._c10d_functional

LARGE = 2**20
"""Elements from which on a gradient is an exchange of its own, as it is copied to be sent with others."""

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


def begin(parts: Sequence[Any], layouts: Sequence[Any], parallel: Parallel, reshard_after_forward: bool = True) -> Use:
    """What runs the `parts`, trees of shards, one after the other on whole parameters.

    reshard_after_forward: whether whole parameters go between a part's forward and its backward.
    """
    flat = [_part(*pair, parallel) for pair in zip(parts, layouts, strict=True)]
    flight = _Flight(flat, parallel, reshard_after_forward)
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

    def __init__(self, parts: list[_Part], parallel: Parallel, reshard_after_forward: bool) -> None:
        self.parts, self.fsdp = parts, parallel.fsdp
        # The last part keeps what it has: its backward is the next that runs.
        self.gathered_again = range(len(parts) - 1 if reshard_after_forward else 0)
        self.axes = (parallel.fsdp, parallel.replicate, parallel.ep_copies, parallel.tp)
        self.coming: dict[int, list[Tensor]] = {}
        self.here: dict[int, list[Tensor]] = {}
        self.going: list[Iterator[None]] = []

    def is_cut(self, where: Place) -> bool:
        """Whether ranks share the parameter out."""
        return self.fsdp.size > 1 and where.dim is not None

    def cut(self, number: int) -> list[int]:
        """Which of the part's parameters are."""
        return [i for i, where in enumerate(self.parts[number].places) if self.is_cut(where)]

    def send_for(self, number: int) -> None:
        """Gathered, and not waited for; nothing where the part is under way or not there."""
        if number < len(self.parts) and number not in self.coming:
            shards, cut = self.parts[number].shards, self.cut(number)
            self.coming[number] = [shard.detach() for shard in shards]
            for i, gathered in zip(cut, _gather([shards[i] for i in cut], self.fsdp), strict=True):
                self.coming[number][i] = gathered

    def arrived(self, number: int) -> list[Tensor]:
        """The part's whole parameters."""
        self.send_for(number)
        pairs = zip(self.coming.pop(number), self.parts[number].places, strict=True)
        return [_joined(x, self.fsdp.size, where.dim) if self.is_cut(where) else x for x, where in pairs]

    def hooks(self, number: int, whole: Sequence[Tensor]) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """What is done to the tensors that the part saves, and to get them back."""
        leaves = {_memory(x): i for i, x in enumerate(whole if number in self.gathered_again else ())}

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
            # The embedding's gradient needs no table.
            if part > 0 and part in self.gathered_again:
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
        own = [
            torch.empty_like(shard, memory_format=torch.contiguous_format)
            if self.is_cut(where) or self.copied(where)
            else gradient
            for shard, where, gradient in zip(shards, places, gradients, strict=True)
        ]
        self.going.append(self.summed(number, gradients, own))
        next(self.going[-1], None)
        return tuple(own)

    def summed(self, number: int, gradients: Sequence[Tensor], own: list[Tensor]) -> Iterator[None]:
        """Writes `own`: sums over one group of ranks after the other; each time it goes on it waits for the last."""
        places, size = self.parts[number].places, self.fsdp.size
        sent = _send({i: _to_front(gradients[i], size, places[i].dim or 0) for i in self.cut(number)}, self.fsdp)
        copied = {i: self.copied(where) for i, where in enumerate(places)}
        sums = {i: _widened(gradients[i]) for i in copied if copied[i] and not self.is_cut(places[i])}
        del gradients
        if sent:
            yield
        for i, pieces in _arrived(sent):
            if copied[i]:
                sums[i] = pieces.sum(0, dtype=wide(pieces.dtype)).view_as(own[i])
            else:
                _add_up(pieces, own[i].view(-1))
        for axis in self.axes:
            together = _sum([x for i, x in sums.items() if any(axis is other for other in copied[i])], axis)
            if together:
                yield
            for x in together:
                _ops.wait_tensor(x)
        for i, x in sums.items():
            own[i].copy_(x)

    def copied(self, where: Place) -> list[Axis]:
        """The groups whose ranks hold copies of the parameter, or of its shard."""
        axes = [*where.copies, *([self.fsdp] if where.dim is None else [])]
        return [axis for axis in axes if axis.size > 1]

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


def _add_up(pieces: Tensor, out: Tensor) -> None:
    """The sum over dim 0, rounded once. Of two, which torch's reduction takes far longer for than an addition."""
    if len(pieces) == 2:
        torch.add(*pieces, out=out)
    else:
        torch.sum(pieces, 0, out=out)


def _widened(x: Tensor) -> Tensor:
    """A copy to be summed in place."""
    return x.to(wide(x.dtype), copy=True, memory_format=torch.contiguous_format)


def _joined(pieces: Tensor, size: int, dim: int | None) -> Tensor:
    return _from_front(_ops.wait_tensor(pieces), size, dim or 0)


def _gather(shards: list[Tensor], axis: Axis) -> list[Tensor]:
    """Every rank's shards one behind the other along dim 0, when they are waited for."""
    if not shards:
        return []
    shards = [shard.contiguous() for shard in shards]
    gathered: list[Tensor] = _ops.all_gather_into_tensor_coalesced(shards, axis.size, axis.group)
    return gathered


def _send(rows: dict[int, Tensor], axis: Axis) -> list[tuple[dict[int, int], Tensor]]:
    """Pieces of `rows`, one behind the other along dim 0, each to its rank; small ones of a dtype in one exchange.

    Returns exchanges as what is in them, the numbers of elements of a piece, and what comes once it is waited for.
    """
    bundles: dict[Any, list[int]] = {}
    for i, x in rows.items():
        bundles.setdefault(i if x.numel() >= LARGE else x.dtype, []).append(i)
    found = []
    for bundle in bundles.values():
        flat = [rows[i].reshape(axis.size, -1) for i in bundle]
        x, each = flat[0] if len(flat) == 1 else torch.cat(flat, 1), [1] * axis.size
        widths = {i: pieces.shape[1] for i, pieces in zip(bundle, flat, strict=True)}
        found.append((widths, _ops.all_to_all_single(x.contiguous(), each, each, axis.group)))
    return found


def _arrived(sent: list[tuple[dict[int, int], Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Of each of the rows that `_send` got, all ranks' pieces for this rank, [ranks, elements]."""
    for widths, x in sent:
        yield from zip(widths, _ops.wait_tensor(x).split(list(widths.values()), 1), strict=True)


def _sum(copies: list[Tensor], axis: Axis) -> list[Tensor]:
    """Sums in place, when they are waited for; of each dtype by itself, as gloo wants."""
    for dtype in dict.fromkeys(x.dtype for x in copies):
        _ops.all_reduce_coalesced_([x for x in copies if x.dtype == dtype], "sum", axis.group)
    return copies
