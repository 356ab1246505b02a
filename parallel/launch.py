"""How the ranks that torchrun launches find each other, and how they agree before the work begins.

Every rank runs the same program. What all of them need for certain (files that are there, settings that fit) is tried
by all and then compared, so that a rank that fails takes the others with it at once and its reason is said once.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


class AgreedError(ValueError):
    """A mistake that every rank raises alike once one of them has found it."""


class LostRankError(RuntimeError):
    """Another rank is gone or silent."""


SETUP = timedelta(hours=3)
"""How long ranks wait for each other before the first step: one of them may tokenise for hours. torchrun ends them all
where one dies."""


class World(NamedTuple):
    """This process among the `size` that torchrun launched, and its place on its host; alone without torchrun."""

    rank: int
    size: int
    local_rank: int

    @property
    def lead(self) -> bool:
        """Whether this rank writes what one rank writes: logs, curves, progress."""
        return self.rank == 0


def world() -> World:
    """This process' place, as torchrun's environment variables say."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    return World(rank, size, local)


_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def restarted() -> bool:
    """Whether torchrun launched this process in place of one that failed (its --max-restarts)."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def own_device(device: torch.device, where: World) -> torch.device:
    """The rank's own card where `device` is CUDA, else `device`; ValueError where the host has too few cards."""
    if device.type != "cuda" or where.size == 1:
        return device
    if where.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {where.rank} is number {where.local_rank} of its host, which has {torch.cuda.device_count()} CUDA "
            "cards: launch at most that many with --nproc-per-node, or set device to cpu"
        )
    return torch.device("cuda", where.local_rank)


@contextmanager
def joined(where: World, device: torch.device) -> Iterator[None]:
    """torch.distributed while the block runs; nothing where the process is alone."""
    if where.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Checkpoints and agreements go through the host on either device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=SETUP))
    # torchrun may keep its store when it starts ranks again: the addresses in it are those of the dead.
    fresh = dist.PrefixStore(f"attempt {_restarts()}", store)  # type: ignore[attr-defined]  # it is documented
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=SETUP)
    yield
    # NCCL waits for the graphs that hold its communicators, so those of the block must be gone, in cycles too.
    gc.collect()
    # Not after an error: the others may be gone, and what is left ends with the process.
    dist.destroy_process_group()


def together(function: Callable[[], T]) -> T:
    """What `function` returns; where it raises ValueError or FileNotFoundError on any rank, AgreedError on all."""
    if not dist.is_initialized():
        return function()
    result, said = _tried(function)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    texts = {text: rank for rank, text in reversed(list(enumerate(everyone))) if text}
    if not texts:
        return cast(T, result)
    text, rank = min(texts.items(), key=lambda item: item[1])
    raise AgreedError(text if set(everyone) == {text} else f"rank {rank}: {text}")


def _tried(function: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return function(), None
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


def from_lead(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, which alone calls it; its mistake on all."""
    if not dist.is_initialized():
        return function()
    own = together(function if dist.get_rank() == 0 else lambda: None)
    box = [own]
    dist.broadcast_object_list(box)
    return cast(T, box[0])


def in_turn(function: Callable[[], T]) -> T:
    """What `function` returns, on rank 0 first: the others find the files that it wrote."""
    if dist.is_initialized() and dist.get_rank() > 0:
        together(lambda: None)
        return together(function)
    result = together(function)
    together(lambda: None)
    return result


def same(value: T, name: str) -> T:
    """`value`, which must be equal on all ranks; AgreedError where the ranks see different ones."""
    if not dist.is_initialized():
        return value
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, str(value))
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise AgreedError(
                f"{name} is {everyone[0]} for rank 0 and {other} for rank {rank}: "
                "all ranks must see one file system where the run's folder lies"
            )
    return value


def told_by(error: Exception, where: World) -> bool:
    """Whether this rank is to tell `error`: one does for what all have, one a host before they meet, else each."""
    if isinstance(error, AgreedError | FloatingPointError):
        return where.lead
    return dist.is_initialized() or where.local_rank == 0


@contextmanager
def watched(where: World, remedy: Callable[[], str]) -> Iterator[None]:
    """Turns what torch.distributed says of ranks that are gone or silent into LostRankError with the `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if where.size == 1 or not any(sign in str(error) for sign in _SIGNS):
            raise
        first = str(error).strip().splitlines()[0]
        raise LostRankError(f"another rank is gone or silent ({first}); {remedy()}") from error


_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "imed out", "imeout", "NCCL")
"""How gloo, NCCL and the store say it: they have no class of errors for it."""
