"""Log-partition and target's logit of a linear head, of whose rows these may be some: a vocabulary that ranks share.

Letters: M tokens, D model width, V rows of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops.linear_cross_entropy import IGNORE, check
from q3n_functional.ops.registration import Impl, Outputs, define, differentiable, gradient, wide

OTHER = -1


def linear_log_partition(h: Tensor, head_VD: Tensor, targets: Tensor, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """The log of the sum of exp over the V logits `head h`, and the target's logit; both [...] in fp32 (fp64 for fp64).

    h: [..., D]. head: [V, D], of h's dtype. targets: int64 [...], a row of the head; -1 (OTHER) for a target that is
    none of them, whose logit counts as 0; -100 (IGNORE) where there is none: results and gradients are 0 there.

    What ranks find with their rows makes the cross-entropy of them all: partitions add up by logsumexp, targets' logits
    by a sum (Shoeybi et al. 2019, Megatron-LM, section 3). Logits stay in fp32 from product to result. Saved for
    backward: these, 4 M V bytes, beside h and head; backward takes 2 M V bytes more for their gradient in 16 bits.

    Raises ValueError for shapes or dtypes that do not fit, RuntimeError (on CUDA a device-side assertion) for a target
    that is none of these.
    """
    check(h, head_VD, targets)
    partition_M, picked_M, _ = _linear_log_partition(h.flatten(0, -2), head_VD, targets.flatten(), impl)
    return partition_M.view(targets.shape), picked_M.view(targets.shape)


def _forward(h: Tensor, head: Tensor, targets: Tensor) -> Outputs:
    dtype = wide(h.dtype)
    logits_MV = h.to(dtype) @ head.to(dtype).mT
    picked_M = logits_MV.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    partition_M = logits_MV.logsumexp(-1)
    return partition_M.where(targets != IGNORE, 0), picked_M.where(targets >= 0, 0), logits_MV


def _fake(h: Tensor, head: Tensor, targets: Tensor) -> Outputs:
    dtype = wide(h.dtype)
    each = (h.new_empty(h.shape[0], dtype=dtype) for _ in range(2))
    return *each, h.new_empty(h.shape[0], head.shape[0], dtype=dtype)


def _gradients(
    dpartition: Tensor, dpicked: Tensor, partition: Tensor, logits: Tensor, h: Tensor, head: Tensor, targets: Tensor
) -> Outputs:
    dlogits_MV = (logits - partition[:, None]).exp() * dpartition[:, None]
    dlogits_MV.scatter_add_(1, targets.clamp(min=0)[:, None], dpicked.where(targets >= 0, 0)[:, None])
    dlogits_MV.masked_fill_((targets == IGNORE)[:, None], 0)
    dh, dhead = dlogits_MV @ head.to(logits.dtype), dlogits_MV.mT @ h.to(logits.dtype)
    return dh.to(h.dtype), dhead.to(head.dtype)


_linear_log_partition_backward = gradient(
    define(
        "linear_log_partition_backward",
        "(Tensor dpartition, Tensor dpicked, Tensor partition, Tensor logits, Tensor h, Tensor head, Tensor targets, "
        "str impl) -> (Tensor, Tensor)",
        reference=_gradients,
        fake=lambda dpartition, dpicked, partition, logits, h, head, targets: (
            h.new_empty(h.shape),
            head.new_empty(head.shape),
        ),
        kernel="linear_log_partition:backward",
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.impl = inputs[-1]
    partition, _, logits = output
    ctx.save_for_backward(partition, logits, *inputs[:3])
    ctx.mark_non_differentiable(logits)


def _backward_of_op(ctx: Any, dpartition: Tensor | None, dpicked: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dpartition is None and dpicked is None:
        return (None,) * 4
    saved = ctx.saved_tensors
    given = (torch.zeros_like(saved[0]) if x is None else x for x in (dpartition, dpicked))
    return (*_linear_log_partition_backward(*given, *saved, ctx.impl), None, None)


_linear_log_partition = differentiable(
    define(
        "linear_log_partition",
        "(Tensor h, Tensor head, Tensor targets, str impl) -> (Tensor, Tensor, Tensor)",
        reference=_forward,
        fake=_fake,
        kernel="linear_log_partition:forward",
    ),
    _setup_context,
    _backward_of_op,
)
