"""The pieces of a training step: the loss of a micro-batch, exact sums over micro-batches, and what gets compiled."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from q3n_functional import compiled, cuda_graph, float8, model, optim, packing
from q3n_functional.config import Config
from q3n_functional.data import Batch
from q3n_functional.ops.registration import wide
from q3n_functional.parallel import overlap
from q3n_functional.parallel.placement import Parallel
from q3n_functional.params import Parameters, named_leaves, spec
from q3n_functional.train_config import TrainConfig

logger = logging.getLogger(__name__)

Loss = Callable[[Parameters, Tensor, Tensor | None, Tensor], tuple[Tensor, model.Metrics]]
Update = Callable[[dict[str, Tensor], dict[str, Tensor], optim.State, Tensor], Tensor]


class Inputs(NamedTuple):
    """What changes from step to step, all on the device: nothing else may, or a CUDA graph would keep its first value.

    batches: the micro-batches, the rank's rows. counts: what `count` gives for all of them. lr: fp32 scalar.
    """

    batches: tuple[Batch, ...]
    counts: Tensor
    lr: Tensor


Step = Callable[[Inputs], Tensor]
"""Moves parameters and moments; returns the loss, the norm of the gradient and `model.Metrics`, fp32 [7]."""


def pick_device(name: str) -> torch.device:
    """The device called `name`, "auto" being cuda where there is one, else cpu; ValueError for one that is not here."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d\d?)?", name):
        raise ValueError(f"device is {name!r}, it must be auto, cpu, cuda or cuda:N")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no CUDA card here: use auto or cpu")
    return device


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError where `config` asks for what `device` cannot do."""
    if config.float8 != "none":
        float8.check_device(device, config.float8)
    if config.cuda_graph:
        cuda_graph.check_device(device)


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None: Inductor needs a C++ compiler on the CPU, Triton a C compiler."""
    if device.type == "cuda":
        candidates, variable = [os.environ.get("CC", ""), "gcc", "clang"], "CC"
    else:
        candidates, variable = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")], "CXX"
    if any(shutil.which(candidate) for candidate in candidates if candidate):
        return None
    return f"no compiler ({' or '.join(filter(None, candidates))} is not there; install one or set ${variable})"


def make_loss(config: TrainConfig, shape: Config, parallel: Parallel | None = None) -> Loss:
    """The loss of a micro-batch as a function of `working` parameters, tokens, cu_seqlens and the targets to divide by.

    With `parallel`, of the rank's shards and rows.
    """

    def loss(
        params: Parameters,
        tokens_BT: Tensor,
        cu_seqlens: Tensor | None,
        num_targets: Tensor,
        stages: model.Stages = model.Stages(),  # noqa: B008  # immutable
    ) -> tuple[Tensor, model.Metrics]:
        return model.loss(
            params,
            tokens_BT,
            _documents(tokens_BT, cu_seqlens),
            num_targets=num_targets,
            parallel=parallel,
            config=shape,
            z_loss_coef=config.z_loss_coef,
            recompute=config.recompute,
            float8=config.float8,
            stages=stages,
        )

    return loss


def working(masters: Parameters, config: TrainConfig, shape: Config) -> Parameters:
    """The parameters a step computes with: leaves that take gradients, in `config.dtype` but for those always fp32.

    Copies, made once a step, where that is not the masters' dtype; their gradients are then in it too, half as large.
    On a mesh they are shards as the masters are.
    """
    compute = getattr(torch, config.dtype)
    dtypes = pytree.tree_map(lambda leaf: leaf.dtype or compute, spec(shape))
    return cast(Parameters, pytree.tree_map(lambda p, d: p.detach().to(d).requires_grad_(), masters, dtypes))


def _documents(tokens_BT: Tensor, cu_seqlens: Tensor | None) -> packing.Documents | None:
    return None if cu_seqlens is None else packing.documents(cu_seqlens, *tokens_BT.shape)


def functions(
    config: TrainConfig, shape: Config, device: torch.device, parallel: Parallel | None = None
) -> tuple[Loss, Update]:
    """The two functions of a step for a model of `shape`, compiled where there is a compiler.

    Raises ValueError for an optimizer that `parallel` leaves with parts of what it needs whole.
    """
    loss: Loss = make_loss(config, shape, parallel)
    groups = optim.groups(shape, config.optimizer)
    optim.check_whole(groups, parallel)
    update = partial(optim.update_, parallel=parallel, groups=groups, optimizer=config.optimizer)
    reason = missing_compiler(device) if config.compile != "none" else "compile is none"
    ahead = config.overlap and config.compile == "layers"
    if reason:
        logger.info("running eagerly: %s", reason)
        return compiled.compiled(loss, "none", ahead, config.reshard_after_forward), update
    options = {"options": overlap.OPTIONS} if config.overlap and not ahead else {}
    found: Loss = compiled.compiled(loss, config.compile, ahead, config.reshard_after_forward, **options)
    return found, partial(update, moves=compiled.moves(**options))


def make_step(
    loss: Loss, update: Update, masters: Parameters, optimizer: optim.State, config: TrainConfig, shape: Config
) -> Step:
    """A step of training that writes `masters` and `optimizer` in place, a CUDA graph where `config` asks for one."""

    def run(masters: Parameters, optimizer: optim.State, inputs: Inputs) -> Tensor:
        params = working(masters, config, shape)
        new, total, parts = gradients(loss, params, inputs.batches, inputs.counts)
        del params
        norm = update(named_leaves(masters), new, optimizer, inputs.lr)
        return torch.stack([total, norm, *parts])

    return cuda_graph.CapturedStep(run, masters, optimizer) if config.cuda_graph else partial(run, masters, optimizer)


def gradients(
    loss: Loss, params: Parameters, batches: Sequence[Batch], counts: Tensor
) -> tuple[dict[str, Tensor], Tensor, model.Metrics]:
    """Gradients by name, loss and metrics of `batches` as if they were one; leaves of `params` must require grad.

    `counts` are the targets of all of them and, on a mesh, of all ranks' rows: the sum of `count`. Of one batch,
    gradients are in the parameters' dtypes; of several they are summed in fp32 or wider.
    """
    leaves = named_leaves(params)
    sums: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    for batch in batches:
        value, metrics_ = loss(params, *batch, counts)
        new = torch.autograd.grad(value, list(leaves.values()))
        if len(batches) > 1:
            # The first of them is the sum's storage where it is wide enough, and a wide copy where not.
            sums = [a.add_(b) for a, b in zip(sums, new, strict=True)] if sums else [g.to(wide(g.dtype)) for g in new]
        else:
            sums = list(new)
        parts.append((value.detach(), *metrics_))
    total, *rest = torch.stack([torch.stack(part) for part in parts]).sum(0)
    return dict(zip(leaves, sums, strict=True)), total, model.Metrics(*rest)


def count(batches: Iterable[Batch]) -> Tensor:
    """fp32 [2]: the targets of the head and of the prediction module in all of `batches`."""
    return torch.stack([model.count_targets(batch.tokens_BT, _documents(*batch)) for batch in batches]).sum(0)


def validate(loss: Loss, params: Parameters, batches: Iterable[tuple[Batch, Tensor]]) -> float:
    """Mean cross-entropy over all targets, in nats; of batches with their `count`, or a rank's rows with all ranks'."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch, counts in batches:
        _, parts = loss(params, *batch, counts)
        sums += torch.stack([parts.cross_entropy * parts.num_targets, parts.num_targets]).cpu()
    return float(sums[0] / sums[1])
