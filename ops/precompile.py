"""Compiling the kernels of a graph's ops while torch.compile is still at work on the graph, and side by side.

Triton compiles a kernel when it is first launched, which, one after the other, is half of a first step. Here an op that
is traced walks through its launcher as well, with tensors that hold nothing, and a launch only asks Triton to compile,
which it does on threads.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
"""A third of a compilation is Python: more of them would only wait for each other, and keep torch.compile waiting."""


class _Walks(NamedTuple):
    """The device type whose kernels are compiled, and what was walked: a compiler traces an op several times."""

    device: str
    done: set[Hashable]


_walks: ContextVar[_Walks | None] = ContextVar("walks", default=None)


class _Pool(ThreadPoolExecutor):
    """Loads what it compiles, too: for every kernel Triton builds what launches it, with a C compiler."""

    def submit(self, compile_: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> Future[T]:
        def loaded() -> T:
            kernel: Any = compile_(*args, **options)
            _ = kernel.run
            return cast(T, kernel)

        return super().submit(loaded)


@contextlib.contextmanager
def kernels(device: torch.device) -> Iterator[None]:
    """In it, kernels of the ops that are traced for such a device are compiled; at its end they all are.

    What cannot be compiled so is compiled when it is launched.
    """
    import triton

    def prepare() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with _Pool(THREADS, initializer=prepare) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        token = _walks.set(_Walks(device.type, set()))
        try:
            yield
        finally:
            _walks.reset(token)


def begin_walk(name: str, arguments: Sequence[Any]) -> bool:
    """Whether the kernels of an op traced with these are to be compiled: the first time, if no size may be any."""
    walks = _walks.get()
    if walks is None or any(isinstance(x, Tensor) and x.device.type != walks.device for x in arguments):
        return False
    kinds = tuple(_kind(x) for x in arguments)
    if any(isinstance(number, (torch.SymInt, torch.SymFloat)) for kind in kinds for number in kind):
        return False
    is_new = (name, kinds) not in walks.done
    walks.done.add((name, kinds))
    return is_new


def _kind(x: Any) -> tuple[Hashable, ...]:
    return (x.dtype, *x.shape, *x.stride()) if isinstance(x, Tensor) else (x,)


def walk(launcher: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Call a launcher of kernels with tensors that hold nothing, like `arguments`."""
    # Triton asks where a tensor lies, to see whether it is aligned; those of compilers refuse to say.
    readable = torch._functorch.config.patch(fake_tensor_allow_unsafe_data_ptr_access=True)
    with warnings.catch_warnings(), readable, FakeTensorMode():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        launcher(*map(_empty, arguments))


def _empty(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x


def is_walk(arguments: Sequence[Any]) -> bool:
    """Whether a launch is to compile its kernel and no more."""
    return _walks.get() is not None and any(isinstance(x, FakeTensor) for x in arguments)
