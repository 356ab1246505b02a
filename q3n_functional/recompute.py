"""What a layer keeps for its gradient, and what it computes again there.

Letters: B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
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
        _q3n.grouped_swiglu.default,
        _q3n.router_logits.default,
        _aten.mm.default,
        _aten.bmm.default,
        # An expert chosen differently the second time would be another function's gradient.
        _aten.topk.default,
        # What other ranks must be asked for again; gathered parameters are not here, or nothing would be sharded.
        _collective.reduce_scatter_tensor.default,
        _collective.all_reduce.default,
        _collective.all_to_all_single.default,
    }
)
"""Operators whose results selective recomputation keeps: costly ones. Norms, convolutions, gates come again."""


def recomputed(policy: Recompute, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, whose intermediate results are kept for backward as `policy` says.

    Works eagerly and, traced into a graph whose gradient is taken outside it, compiled: there the partitioner obeys.
    (Chen et al. 2016, "Training deep nets with sublinear memory cost"; selective: Korthikanti et al. 2022.)
    """
    if policy == "none":
        return function(*arguments)
    options: dict[str, Any] = {"context_fn": _contexts} if policy == "selective" else {}
    # Nothing here draws random numbers.
    result: T = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
    return result


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_choose)


def _choose(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
