"""`q3n plan`: what a training step takes on a mesh of cards that one does not have.

The step's own functions run on fake tensors as rank 0 of a fake process group, all layers, compiled as in training down
to the graphs that Inductor would be given. What is counted is what ran; nothing is known here about the model. Assumed:
every expert is chosen equally often, a compiler fuses neighbouring pointwise operators and reductions, an operator
takes the longer of its arithmetic and its memory traffic, and a collective runs beside what the program does until it
waits for it (nothing, without `overlap`; in one graph of everything not even with it), slowing it by nothing.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from q3n_functional import compiled, optim, step
from q3n_functional.data import Batch
from q3n_functional.parallel import mesh as meshes
from q3n_functional.parallel import placement, rules
from q3n_functional.parallel.placement import GROUPS, Parallel
from q3n_functional.params import Parameters, named_leaves
from q3n_functional.plan_cards import Card
from q3n_functional.plan_cost import Link, link, time
from q3n_functional.plan_trace import KINDS, Kernel, Tracker, kernels, memory
from q3n_functional.train_config import TrainConfig

BACKEND = "aot_eager_decomp_partition"
"""Graphs as Inductor would be given them: its decompositions, and its choice of what backward computes again."""


class Plan(NamedTuple):
    """A step of one rank on a mesh of cards.

    memory: float [kinds, kernels], bytes of each of `KINDS` at the fullest moment of every kernel. seconds: float
    [kernels], which add up to the step's, and bounds, what they are spent on. lasting: float [kernels], the same but
    for collectives, of whose time `seconds` has what the step waits for. links: how the ranks of each axis of
    `placement.GROUPS` are connected; a kernel's `group` is its axis.
    """

    config: TrainConfig
    card: Card
    kernels: list[Kernel]
    memory: NDArray[np.float64]
    seconds: NDArray[np.float64]
    bounds: tuple[str, ...]
    lasting: NDArray[np.float64]
    links: dict[str, Link]

    @property
    def peak(self) -> float:
        """The most bytes that are taken at a time."""
        return float(self.memory.sum(0).max())

    @property
    def budget(self) -> dict[str, float]:
        """The bytes of each kind when most are taken."""
        return dict(zip(KINDS, self.memory[:, self.memory.sum(0).argmax()].tolist(), strict=True))

    @property
    def fits(self) -> bool:
        """Whether the card has as much memory as is taken."""
        return self.peak <= self.card.usable

    @property
    def tokens_per_s(self) -> float:
        """Tokens that all ranks train on in a second."""
        return float(self.config.batch_size * self.config.seq_len / self.seconds.sum())


def plan(config: TrainConfig, card: Card) -> Plan:
    """What a step of `config` takes on each rank of its mesh.

    Raises ValueError for a mesh that does not fit model or batch, and where torch.distributed is in use already.
    """
    mesh = config.mesh
    meshes.check_batch(mesh, config.model, config.batch_size, config.seq_len)
    layouts = rules.layouts(config.model, mesh)
    # What was compiled for another mesh serves no more.
    torch._dynamo.reset()
    with _ranks(mesh.size):
        parallel = placement.connect(mesh, layouts, torch.device("cpu"))
        tracker = Tracker(_splits(config))
        with FakeTensorMode(shape_env=ShapeEnv(), allow_fallback_kernels=False) as mode:
            faked = pytree.tree_map_only(Tensor, mode.from_tensor, parallel)
            shards = pytree.tree_map(_empty, layouts)
            tokens = torch.empty(config.batch_size // mesh.rows, config.seq_len, dtype=torch.int64)
            run(config, shards, tokens, faked if mesh.size > 1 else None, tracker, BACKEND)
    return _estimate(config, card, tracker, parallel)


def run(
    config: TrainConfig,
    masters: Parameters,
    tokens_BT: Tensor,
    parallel: Parallel | None,
    tracker: Tracker,
    backend: str,
) -> None:
    """A step of training under `tracker`, on real tensors or fake ones; graphs are compiled by `backend`."""
    model = config.model
    groups = optim.groups(model, config.optimizer)
    state = optim.init(named_leaves(masters), groups, getattr(torch, config.optimizer.state_dtype))
    ahead = config.overlap and config.compile != "model", config.reshard_after_forward
    inner = compiled.compiled(step.make_loss(config, model, parallel), config.compile, *ahead, backend=backend)

    def loss(*arguments: Any) -> Any:
        result = inner(*arguments)
        tracker.turn()
        return result

    with tracker:
        tracker.own(masters, "parameters")
        tracker.own(state, "optimizer")
        batches = [Batch(tokens_BT, None)]
        params = step.working(masters, config, model)
        tracker.own(params, "parameters")
        gradients, *_ = step.gradients(loss, params, batches, step.count(batches))
        del params
        tracker.own(gradients, "gradients")
        tracker.phase = "update"
        lr, optimizer = torch.tensor(config.optimizer.lr), config.optimizer
        optim.update_(named_leaves(masters), gradients, state, lr, parallel, groups=groups, optimizer=optimizer)


def _empty(where: rules.Layout) -> Tensor:
    return torch.empty(where.local_shape, dtype=where.spec.dtype or torch.float32)


def _splits(config: TrainConfig) -> Iterator[int]:
    """What the program asks the device for: slots that go to each of ep ranks, tokens that go there, and both back."""
    mesh, experts, chosen = config.mesh, config.model.num_experts, config.model.num_experts_per_tok
    tokens = config.batch_size // mesh.rows * config.seq_len // mesh.cp
    slots = [tokens * chosen // mesh.ep + (rank < tokens * chosen % mesh.ep) for rank in range(mesh.ep)]
    # Of the ways to choose experts, those that choose none of a rank's.
    without = math.comb(experts - experts // mesh.ep, chosen) / max(math.comb(experts, chosen), 1)
    return itertools.cycle([*slots, *[round(tokens * (1 - without))] * mesh.ep])


@contextmanager
def _ranks(size: int) -> Iterator[None]:
    """This process as rank 0 of as many, none of which is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("torch.distributed is in use in this process: plan in one of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _estimate(config: TrainConfig, card: Card, tracker: Tracker, parallel: Parallel) -> Plan:
    axes = {getattr(parallel, axis).group: axis for axis in GROUPS}
    links = {axis: link(config.mesh, GROUPS[axis], card) for axis in GROUPS}
    found = [kernel._replace(group=axes[kernel.group]) if kernel.group else kernel for kernel in kernels(tracker)]
    times, bounds = zip(*(time(kernel, card, links.get(kernel.group)) for kernel in found), strict=True)
    living = memory(tracker)
    ends = np.array([kernel.op for kernel in found])
    starts = np.concatenate([[0], ends[:-1] + 1])
    fullest = [a + int(living[:, a : b + 1].sum(0).argmax()) for a, b in zip(starts, ends, strict=True)]
    lasting = np.array(times)
    return Plan(config, card, found, living[:, fullest], waited(found, lasting, tracker.waits), bounds, lasting, links)


def waited(kernels: list[Kernel], lasting: NDArray[np.float64], waits: list[tuple[int, int]]) -> NDArray[np.float64]:
    """What each kernel adds to the step: a collective, which runs behind the others of its axis, what is waited for."""
    number = {kernel.op: i for i, kernel in enumerate(kernels)}
    added, ends = np.where([bool(kernel.group) for kernel in kernels], 0.0, lasting), np.zeros(len(kernels))
    pending, idle, now = deque(waits), dict.fromkeys(GROUPS, 0.0), 0.0
    for i, kernel in enumerate([*kernels, None]):
        while pending and (kernel is None or pending[0][0] <= kernel.op):
            other = number[pending.popleft()[1]]
            late = max(ends[other] - now, 0.0)
            added[other] += late
            now += late
        if kernel is not None and kernel.group:
            ends[i] = idle[kernel.group] = max(idle[kernel.group], now) + lasting[i]
        elif kernel is not None:
            now += lasting[i]
    return added
