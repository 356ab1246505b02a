"""What a layer keeps for its gradient, and what it computes again there.

Letters: B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from q3n_functional import ops  # noqa: F401  # registers what SAVED names

Recompute = Literal["none", "full", "selective"]
"""none keeps all, full the layer's input alone, selective what `SAVED` names besides."""

T = TypeVar("T")

_q3n, _aten, _collective = torch.ops.q3n, torch.ops.aten, torch.ops._c10d_functional
SAVED = frozenset(
    {
        _q3n.gated_delta_rule.default,
        _q3n.recurrent_gated_delta_rule.default,
        _q3n.attention.default,
        _q3n.piece_attention.default,
        _q3n.grouped_swiglu.default,
        _q3n.router_logits.default,
        _aten.mm.default,
        _aten.bmm.default,
        _aten._scaled_mm.default,
        _q3n.float8_grouped_mm.default,
        # An expert chosen differently the second time would be another function's gradient.
        _q3n.top_experts.default,
        # What other ranks must be asked for again; gathered parameters are not here, or nothing would be sharded.
        _collective.reduce_scatter_tensor.default,
        _collective.all_reduce.default,
        _collective.all_to_all_single.default,
    }
)
"""Operators whose results selective recomputation keeps: costly ones. Norms, convolutions, gates come again."""

BEHIND_GATHERS = frozenset({_collective.wait_tensor.default, _aten.cat.default, _aten._to_copy.default})
"""Operators that make a whole parameter of what was gathered. They cost little where they do something else."""


def recomputed(policy: Recompute, function: Callable[..., T], *arguments: Any, shards: str = "") -> T:
    """`function(*arguments)`, whose intermediate results are kept for backward as `policy` says.

    What it gathers from the group of ranks called `shards` is gathered again in backward whatever the policy: kept, the
    whole parameters would be in memory, and nothing shared out (Rajbhandari et al. 2020, ZeRO stage 3).

    Works eagerly and, traced into a graph whose gradient is taken outside it, compiled: there the partitioner obeys.
    (Chen et al. 2016, "Training deep nets with sublinear memory cost"; selective: Korthikanti et al. 2022.)
    """
    if policy == "none" and not shards:
        return function(*arguments)
    options: dict[str, Any] = {}
    if policy != "full" or shards:
        choose = {"selective": _selective, "full": _everything}.get(policy, partial(_all_but_gathered, shards))
        options["context_fn"] = partial(create_selective_checkpoint_contexts, choose)
    # Nothing here draws random numbers.
    result: T = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
    return result


def _everything(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    # As without a policy, but that torch 2.11 would then keep what it gathered.
    return CheckpointPolicy.PREFER_RECOMPUTE


def _selective(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    # The second of the experts' products in float8, wider than what it is made of, is what no gradient needs.
    if op == _q3n.float8_grouped_mm.default and arguments[1].shape[1] > arguments[1].shape[2]:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _all_but_gathered(shards: str, context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    if op == _collective.all_gather_into_tensor.default:
        own = arguments[2] == shards
        return CheckpointPolicy.MUST_RECOMPUTE if own else CheckpointPolicy.MUST_SAVE
    if op in SAVED:
        return CheckpointPolicy.MUST_SAVE
    # A view holds what it looks at.
    if op in BEHIND_GATHERS or op.is_view:
        return CheckpointPolicy.PREFER_RECOMPUTE
    # Compiled, the partitioner is free in what it saves of the rest.
    return CheckpointPolicy.PREFER_SAVE
