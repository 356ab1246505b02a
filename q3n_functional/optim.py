"""AdamW and Muon over a parameter tree: state in, state out, no optimizer object.

AdamW is torch.optim's function: its fused kernel where the update runs eagerly; its other forms, which Inductor fuses
with the clipping, where it is compiled: as a whole, or, in seconds however many parameters there are, for one of them
(`compiled.moves`). Muon is the update of torch.optim.Muon, to which a test holds it, in a form that takes experts as
one stack: torch.optim.Muon wants each matrix by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from q3n_functional.config import Config
from q3n_functional.parallel.placement import Parallel, total_norm
from q3n_functional.parallel.rules import Layout
from q3n_functional.params import Spec, named_leaves, named_specs


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the parameters move."""

    name: Literal["adamw", "muon"] = "adamw"
    """Muon moves the hidden matrices; AdamW moves the rest of them, or everything."""
    lr: float = 1e-3
    """Peak learning rate. Muon's is matched to AdamW's root mean square, so one value serves both."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's momentum, with Nesterov's step."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; inf leaves it alone."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine down to the end, or a constant that falls linearly in the last decay_fraction."""
    warmup_steps: int = 100
    final_lr: float = 0.1
    """Learning rate at the last step, as a fraction of lr."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What moments are stored in; they are moved in fp32. bfloat16 halves them, as DeepSeek-V3 trained."""
    decay_fraction: float = 0.2
    """The part of all steps in which wsd decays."""


class State(NamedTuple):
    """step: fp32 scalar, updates done. momentum: first moments by name. variance: AdamW's second moments by name."""

    step: Tensor
    momentum: dict[str, Tensor]
    variance: dict[str, Tensor]


class Groups(NamedTuple):
    """Names of the parameters that are orthogonalised by Muon, that AdamW moves with decay, and without."""

    muon: tuple[str, ...]
    decayed: tuple[str, ...]
    plain: tuple[str, ...]


class Moves(NamedTuple):
    """What moves parameters in place: lists of them, or one matrix. See `compiled.moves`."""

    decayed: Callable[..., None]
    plain: Callable[..., None]
    muon: Callable[..., None]


def groups(config: Config, optimizer: OptimizerConfig) -> Groups:
    """Which parameter is moved how, read off the axes of its `Spec`."""
    specs = named_specs(config)
    decayed = {name for name, leaf in specs.items() if _is_matrix(leaf)}
    hidden = {name for name in decayed if optimizer.name == "muon" and not set("V1") & set(specs[name].axes)}
    return Groups(
        tuple(name for name in specs if name in hidden),
        tuple(name for name in specs if name in decayed - hidden),
        tuple(name for name in specs if name not in decayed),
    )


def _is_matrix(leaf: Spec) -> bool:
    # The taps of a depthwise convolution are a filter per channel, not a map between widths.
    return len(leaf.axes) > 1 and "C" not in leaf.axes


def init(params: Mapping[str, Tensor], groups: Groups, dtype: torch.dtype | None = None) -> State:
    """The state before the first update, for parameters by name; moments in `dtype`, the parameters' where None."""
    first = {name: torch.zeros_like(p, dtype=dtype) for name, p in params.items()}
    second = {name: torch.zeros_like(params[name], dtype=dtype) for name in groups.decayed + groups.plain}
    return State(torch.zeros((), device=next(iter(params.values())).device), first, second)


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Learning rate of update `step` of `steps`, counted from 0."""
    o = optimizer
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.schedule == "cosine":
        done = (step + 1 - o.warmup_steps) / max(steps - o.warmup_steps, 1)
        return o.lr * (o.final_lr + (1 - o.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)
    left = (steps - step - 1) / max(o.decay_fraction * steps, 1)
    return o.lr * (o.final_lr + (1 - o.final_lr) * min(left, 1.0))


def decayed_(*arguments: Any, optimizer: OptimizerConfig) -> None:
    """Moves parameters by AdamW, with weight decay; arguments are those of `_adamw_`."""
    _adamw_(*arguments, weight_decay=optimizer.weight_decay, optimizer=optimizer)


def plain_(*arguments: Any, optimizer: OptimizerConfig) -> None:
    """Moves parameters by Adam."""
    _adamw_(*arguments, weight_decay=0.0, optimizer=optimizer)


def _adamw_(
    params: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    variances: list[Tensor],
    step: Tensor,
    scale: Tensor,
    lr: Tensor,
    *,
    weight_decay: float,
    optimizer: OptimizerConfig,
) -> None:
    """Moves parameters and their moments by `scale` times their gradients."""
    compiled, num, stored = torch.compiler.is_compiling(), len(params), [*momenta, *variances]
    # In the parameters' dtype while they are moved: themselves where they are stored in it.
    moments = [moment.to(p.dtype) for moment, p in zip(stored, params * 2, strict=True)]
    adamw(
        params,
        [g.to(p.dtype) * scale.to(p.device, p.dtype) for g, p in zip(gradients, params, strict=True)],
        moments[:num],
        moments[num:],
        [],
        list(step.expand(num).clone()),  # it counts a step for every tensor; ours is one number
        fused=not compiled,
        foreach=compiled and num > 1,
        capturable=compiled,
        amsgrad=False,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=optimizer.eps,
        maximize=False,
    )
    for old, new in zip(stored, moments, strict=True):
        if old is not new:
            old.copy_(new)


def muon_(p: Tensor, g: Tensor, momentum: Tensor, scale: Tensor, lr: Tensor, optimizer: OptimizerConfig) -> None:
    """Moves one matrix, or each of a stack, and its momentum by `scale` times its gradient."""
    g = g.to(p.dtype) * scale.to(p.device, p.dtype)
    moved = momentum.to(g.dtype).lerp(g, 1 - optimizer.momentum)
    momentum.copy_(moved)
    direction = orthogonalised(g.lerp(moved, optimizer.momentum))
    # Gives the update the root mean square of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training").
    rms = 0.2 * math.sqrt(max(p.shape[-2:]))
    p.mul_(1 - lr * optimizer.weight_decay).sub_(direction * (lr * rms))


def orthogonalised(x: Tensor) -> Tensor:
    """The orthogonal factor of each matrix of [..., M, N], roughly: five quintic Newton-Schulz steps in bf16.

    Singular values end between 0.7 and 1.2 rather than at 1, which serves as well (Jordan et al. 2024, "Muon").
    """
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).bfloat16()
    y = y.reshape(-1, *y.shape[-2:])
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), y, beta=3.4445)
    return (y if wide else y.mT).reshape(x.shape).to(x.dtype)


MOVES = Moves(decayed_, plain_, muon_)


@torch.no_grad()
def update_(
    params: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: State,
    lr: Tensor,
    parallel: Parallel | None = None,
    *,
    groups: Groups,
    optimizer: OptimizerConfig,
    moves: Moves = MOVES,
) -> Tensor:
    """Clips the gradients by global norm and moves `params` and `state` in place; returns the norm before clipping.

    In place, because a second copy of a model rarely fits. `lr` is a scalar tensor, so that a compiled update serves
    every step. All mappings are by parameter name. With `parallel` everything is the rank's shards, and the
    norm that of the whole gradient; ValueError where that leaves Muon with parts of matrices.
    """
    check_whole(groups, parallel)
    norm = total_norm(gradients, parallel)
    scale = (optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for names, move in ((groups.decayed, moves.decayed), (groups.plain, moves.plain)):
        kinds = (params, gradients, state.momentum, state.variance)
        if names:
            move(*([kind[name] for name in names] for kind in kinds), state.step, scale, lr, optimizer=optimizer)
    for name in groups.muon:
        moves.muon(params[name], gradients[name], state.momentum[name], scale, lr, optimizer)
    state.step.add_(1)
    return norm


def check_whole(groups: Groups, parallel: Parallel | None) -> None:
    """Raise ValueError where the mesh leaves Muon with parts of matrices, whose orthogonal factor is another."""
    if parallel is None or not groups.muon:
        return
    layouts = cast(dict[str, Layout], named_leaves(parallel.layouts))
    for name in groups.muon:
        local, whole = layouts[name].local_shape, layouts[name].spec.shape
        if local[-2:] != whole[-2:]:
            raise ValueError(
                f"Muon needs whole matrices, but the mesh leaves each rank {tuple(local)} of {name} {tuple(whole)}: "
                "use adamw, or a mesh without dp, cp and tp"
            )


def to_tensors(state: State) -> dict[str, Tensor]:
    """The state's own tensors as one flat dictionary, for a checkpoint."""
    moments = {f"{kind}.{name}": t for kind in ("momentum", "variance") for name, t in getattr(state, kind).items()}
    return {"step": state.step, **moments}
