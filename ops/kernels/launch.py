"""Launching a kernel again without the host looking at each of its arguments again: hosts may be slow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon

from q3n_functional.ops import precompile


def launch(kernel: Any, programs: int) -> Callable[..., None]:
    """`kernel[(programs,)]`, which only compiles on a walk of `ops.precompile`."""

    def launched(*arguments: Any, **options: Any) -> None:
        if precompile.is_walk(arguments):
            kernel.warmup(*arguments, grid=(programs,), **options)
        else:
            kernel[(programs,)](*arguments, **options)

    return launched


class Launcher:
    """`kernel[(programs,)](*arguments, *constants, **options)`, where Triton decides once for every key what to run.

    Triton's own look takes half of a launch. What it looks at has to be in the key: `constants` and `kinds`, which are
    all else that the arguments' types, alignments and special numbers follow from, their device included; `options`
    follow from these. What is kept is what Triton compiled, which Triton keeps for as long itself.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, programs: int, kinds: tuple[Hashable, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...],
        **options: Any,
    ) -> None:  # fmt: skip
        """Launch so many programs; `constants` in the order of the kernel's last parameters."""
        if precompile.is_walk(arguments):
            launch(self._kernel, programs)(*arguments, *constants, **options)
            return
        key = kinds, constants
        compiled = self._compiled.get(key)
        if compiled is None:  # as is always so in the interpreter, which compiles nothing
            self._compiled[key] = self._kernel[(programs,)](*arguments, *constants, **options)
        else:
            compiled[programs, 1, 1](*arguments, *constants)


def kind(x: Tensor | None) -> Hashable:
    """What Triton asks of a tensor."""
    return None if x is None else (x.dtype, x.data_ptr() % 16 == 0)


def where(x: Tensor) -> Hashable:
    """The device that a kernel of x is compiled and loaded for: Triton's is the current one."""
    return torch.cuda.current_device() if x.is_cuda else -1


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a card has the instructions that the kernels in Gluon are made of."""
    return torch.cuda.get_device_capability(device)[0] == 9


class Constant(gluon.language.constexpr):  # type: ignore[misc]
    """A constant of a kernel's module. Triton compares them all at every launch, with copies that it took."""

    def __deepcopy__(self, memo: Any) -> Constant:
        return self

    def __ne__(self, other: object) -> Any:
        return False if self is other else super().__ne__(other)

    __hash__ = gluon.language.constexpr.__hash__
