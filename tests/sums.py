"""The sums over ranks that a step consists of, told apart by who asks for them; any one can be left out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from q3n_functional.parallel import collectives, placement
from q3n_functional.parallel.placement import Parallel

PARALLEL = Path(placement.__file__).parent
DIFFERENTIATED = (collectives._AllGather, collectives._ReduceScatter, collectives._AllReduce, collectives._Parameter)


class Asked(NamedTuple):
    """A place in the model: function, line, and the function of `parallel` that is called there."""

    function: str
    line: int
    calls: str


class Sum(NamedTuple):
    """asked: by which line of the model's, and which function of `parallel` it calls. kind: of collective."""

    asked: Asked
    kind: str
    axis: str
    backward: bool


class Sums:
    """Notes every sum of the ranks (threads of `tests.simulated`) in `found`, and does not do `missing`."""

    def __init__(self, missing: Sum | None = None) -> None:
        self.missing, self.found, self._own = missing, set[Sum](), local()

    def connected(self, parallel: Parallel) -> Parallel:
        """Learns which axis a group's name means for this rank."""
        self._own.axes = {getattr(parallel, axis).group: axis for axis in placement.GROUPS}
        return parallel

    def comes(self, asked: Asked, backward: bool) -> None:
        """Whose are the sums that come next on this rank."""
        self._own.asked, self._own.backward = asked, backward

    def asked(self) -> Asked:
        """Whose sums have come last."""
        asked: Asked = self._own.asked
        return asked

    def left_out(self, kind: str, group: str) -> bool:
        """Notes the sum; whether it is the missing one."""
        one = Sum(self._own.asked, kind, self._own.axes[group], self._own.backward)
        self.found.add(one)
        return one == self.missing


def _asking() -> Asked:
    """Who called, seen from `_noting`: functions without a name, and those of other packages, do not count."""
    frame, calls = sys._getframe(1), ""
    while True:
        code, folder = frame.f_code, Path(frame.f_code.co_filename).parent
        if folder == PARALLEL and code.co_name.isidentifier():
            calls = code.co_name
        if folder == PARALLEL.parent and code.co_name.isidentifier():
            return Asked(code.co_name, frame.f_lineno, calls)
        assert frame.f_back is not None
        frame = frame.f_back


def _noting(sums: Sums) -> Iterator[tuple[Any, str, Any]]:
    """What replaces what in which object."""
    apply, scattered, reduced = collectives._apply, collectives._scattered, collectives._reduced

    def apply_(function: Any, *arguments: Any) -> Any:
        sums.comes(_asking(), backward=False)
        return apply(function, *arguments)

    def scattered_(x: Tensor, size: int, group: str, dim: int) -> Tensor:
        if not sums.left_out("reduce_scatter", group):
            return scattered(x, size, group, dim)
        place = dist.distributed_c10d._resolve_process_group(group).rank()
        return x.chunk(size, dim)[place].clone()

    def reduced_(x: Tensor, group: str, op: str = "sum") -> Tensor:
        if op == "max":
            sums.comes(_asking(), backward=False)
        return x.clone() if sums.left_out(f"all_reduce {op}", group) else reduced(x, group, op)

    yield collectives, "_apply", apply_
    yield collectives, "_scattered", scattered_
    yield collectives, "_reduced", reduced_
    for function in DIFFERENTIATED:
        yield from _noting_function(sums, function)


def _noting_function(sums: Sums, function: Any) -> Iterator[tuple[Any, str, Any]]:
    forward, backward = function.forward, function.backward

    def forward_(ctx: Any, *arguments: Any) -> Any:
        ctx.asked = sums.asked()
        return forward(ctx, *arguments)

    def backward_(ctx: Any, dy: Tensor) -> Any:
        sums.comes(ctx.asked, backward=True)
        return backward(ctx, dy)

    yield function, "forward", staticmethod(forward_)
    yield function, "backward", staticmethod(backward_)


@contextmanager
def noted(missing: Sum | None = None) -> Iterator[Sums]:
    """The sums of what runs inside, without the `missing` one."""
    sums, connect = Sums(missing), placement.connect
    changes = [(placement, "connect", lambda *x: sums.connected(connect(*x))), *_noting(sums)]
    kept = [(owner, name, owner.__dict__[name]) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield sums
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
