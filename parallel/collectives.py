"""Collectives that differentiate: each one's gradient is its transpose.

What is differentiated on N ranks is the sum of the scalars that each of them computes. The program of all ranks is
then one function of all their inputs, the gradient of a collective is its linear transpose, and nothing is ever scaled:
an input that several ranks hold copies of has the sum of their gradients.

`Axis` carries the rank as a tensor: it enters a graph as data, so that every rank compiles the same one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from q3n_functional.ops.registration import wide

_ops = torch.ops._c10d_functional


class Axis(NamedTuple):
    """A group of `size` ranks by the name that torch.distributed knows, and this rank's place in it (int64 [1])."""

    size: int
    group: str
    rank: Tensor


def _waited(x: Tensor) -> Tensor:
    y: Tensor = _ops.wait_tensor(x)
    return y


def _to_front(x: Tensor, size: int, dim: int) -> Tensor:
    """[..., size * n, ...] to [size * n_0, ...] with the pieces of `dim` laid one behind the other along dim 0."""
    return x if dim == 0 else torch.cat(x.chunk(size, dim))


def _from_front(x: Tensor, size: int, dim: int) -> Tensor:
    return x if dim == 0 else torch.cat(x.chunk(size), dim)


def _gathered(x: Tensor, size: int, group: str, dim: int) -> Tensor:
    pieces = _waited(_ops.all_gather_into_tensor(x.contiguous(), size, group))
    return _from_front(pieces, size, dim)


def _scattered(x: Tensor, size: int, group: str, dim: int) -> Tensor:
    pieces = _to_front(x, size, dim).contiguous()
    return _waited(_ops.reduce_scatter_tensor(pieces, "sum", size, group))


def _reduced(x: Tensor, group: str, op: str = "sum") -> Tensor:
    return _waited(_ops.all_reduce(x.contiguous(), op, group))


def _exchanged(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    return _waited(_ops.all_to_all_single(x.contiguous(), received, sent, group))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str, dim: int) -> Tensor:
        ctx.where = size, group, dim
        return _gathered(x, size, group, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _scattered(dy, *ctx.where), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str, dim: int) -> Tensor:
        ctx.where = size, group, dim
        return _scattered(x, size, group, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(dy, *ctx.where), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _reduced(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _reduced(dy, ctx.group), None


class _Parameter(torch.autograd.Function):
    """A parameter at use, gathered; its gradient is summed in fp32 where it has 16 bits, and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str, dim: int, sums: list[str]) -> Tensor:
        ctx.where, ctx.sums = (size, group, dim), sums
        return _gathered(x, size, group, dim) if size > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy.to(wide(dy.dtype))
        if ctx.where[0] > 1:
            dx = _scattered(dx, *ctx.where)
        for group in ctx.sums:
            dx = _reduced(dx, group)
        return dx.to(dy.dtype), None, None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        ctx.where = sent, received, group
        return _exchanged(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _exchanged(dy, *ctx.where), None, None, None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    y: Tensor = function.apply(*args)
    return y


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The ranks' x side by side along `dim`; the gradient is reduce-scattered."""
    return x if axis.size == 1 else _apply(_AllGather, x, axis.size, axis.group, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The rank's piece along `dim` of the sum of the ranks' x; the gradient is gathered."""
    return x if axis.size == 1 else _apply(_ReduceScatter, x, axis.size, axis.group, dim)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' x; the gradients are summed as well."""
    return x if axis.size == 1 else _apply(_AllReduce, x, axis.group)


def maximum(x: Tensor, axis: Axis) -> Tensor:
    """The largest of the ranks' x, elementwise; no gradient."""
    return x.detach() if axis.size == 1 else _reduced(x.detach(), axis.group, "max")


def all_to_all(x: Tensor, received: list[int], sent: list[int], axis: Axis) -> Tensor:
    """Rows of x, `sent[i]` of them in order to rank i, and `received[i]` from it; the gradients go back."""
    return x if axis.size == 1 else _apply(_AllToAll, x, received, sent, axis.group)


def exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """int64 [size * n]: n numbers from every rank for n to every rank."""
    each = [counts.shape[0] // axis.size] * axis.size
    return counts if axis.size == 1 else _exchanged(counts, each, each, axis.group)


def pick(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The rank's own piece of x along `dim`, x being the same on all; the gradient is that of the piece alone."""
    if axis.size == 1:
        return x
    pieces: Tensor = x.unflatten(dim, (axis.size, x.shape[dim] // axis.size))
    return pieces.index_select(dim, axis.rank).squeeze(dim)


def parameter(x: Tensor, gather: Axis, dim: int | None, sums: list[Axis]) -> Tensor:
    """A shard as the whole that is used: gathered from `gather`'s ranks along `dim`.

    Its gradient is reduce-scattered to them and then summed over `sums`, the axes whose ranks hold copies.
    """
    copies = [axis for axis in (sums if dim is not None else [gather, *sums]) if axis.size > 1]
    groups = [axis.group for axis in copies]
    if dim is not None and gather.size > 1:
        return _apply(_Parameter, x, gather.size, gather.group, dim, groups)
    return _apply(_Parameter, x, 1, "", 0, groups) if groups else x
