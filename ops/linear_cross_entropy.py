"""Cross-entropy of a linear head, and the squared log-partition of the z-loss, without the logits in memory.

Letters: M tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q3n_functional.ops.registration import (
    Impl,
    Outputs,
    define,
    differentiable,
    gradient,
    transform_is_active,
    wide,
)

IGNORE = -100  # as `q3n_functional.packing` has it; an op knows nothing of the package around it
CHUNK_BYTES = 5 * 2**30
"""What the logits of a chunk of tokens may take, whose gradients take their place; of several, every chunk reads and
writes the fp32 sum of the head's gradient, so that few take less time."""


class Sums(NamedTuple):
    """Sums over the targets, 0-d in fp32 (fp64 for fp64 inputs). Only `total` has a gradient."""

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


def linear_cross_entropy(
    h: Tensor, head_VD: Tensor, targets: Tensor, z_loss_coef: float = 0.0, impl: Impl = "auto"
) -> Sums:
    """`cross_entropy + z_loss_coef * z_loss`, and the two: sums of `log Z - logit[target]` and of `(log Z)^2`.

    h: [..., D]. head: [V, D], of h's dtype. targets: int64 [...], the token to predict or -100 (IGNORE) where there is
    none. Z is the sum of exp over the V logits `head h`, which are kept in fp32 from product to loss (z-loss: Chowdhery
    et al. 2022, PaLM, section 5).

    The gradients are computed with the loss, a chunk of tokens at a time: three matrix products in all, as without
    chunks, because what is differentiated has one factor still to come. Memory beyond inputs and gradients: at most
    5 GiB for the chunk, whatever the number of tokens, and with several the fp32 sum of the head's gradient, 4 V D
    bytes. Saved for backward: the gradients of h and head in their dtypes. (Hsu et al. 2024, Liger Kernel; torch 2.13
    has a linear_cross_entropy, without z-loss, torch.compile and torch.func.)

    Raises ValueError for shapes or dtypes that do not fit, RuntimeError (on CUDA a device-side assertion) for a target
    that is neither a token nor -100.
    """
    check(h, head_VD, targets)
    wanted = torch.is_grad_enabled() and (h.requires_grad or head_VD.requires_grad)
    wanted = wanted or transform_is_active()
    sums = _linear_cross_entropy(h.flatten(0, -2), head_VD, targets.flatten(), float(z_loss_coef), wanted, impl)[:3]
    return Sums(sums[0], sums[1].detach(), sums[2].detach())


def check(h: Tensor, head_VD: Tensor, targets: Tensor) -> None:
    """Raise ValueError for shapes or dtypes that do not fit."""
    if head_VD.ndim != 2 or h.shape[-1:] != head_VD.shape[1:] or targets.shape != h.shape[:-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (h, head_VD, targets))
        raise ValueError(f"h must be [..., D], head [V, D] and targets [...], got {shapes}")
    if h.dtype != head_VD.dtype or targets.dtype != torch.int64:
        raise ValueError(
            f"h and head must share a dtype and targets be int64, got {h.dtype}, {head_VD.dtype}, {targets.dtype}"
        )


def chunks(num_tokens: int, vocabulary: int, itemsize: int = 4) -> Iterator[slice]:
    """Ranges of tokens of one size, a multiple of 128 but for the last, whose logits take at most `CHUNK_BYTES`."""
    most = max(CHUNK_BYTES // (vocabulary * itemsize) // 128, 1) * 128
    num = -(-num_tokens // most)
    size = -(-num_tokens // max(num, 1) // 128) * 128
    for start in range(0, num_tokens, size or 1):
        yield slice(start, min(start + size, num_tokens))


def _terms(logits_MV: Tensor, targets_M: Tensor, z_loss_coef: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and squared log-partition of each token, and the gradient that replaces the logits in place."""
    kept = targets_M != IGNORE
    partition_M = logits_MV.logsumexp(-1)
    index_M1 = targets_M.where(kept, 0)[:, None]
    picked_M = logits_MV.gather(1, index_M1)[:, 0]
    gradient_MV = logits_MV.sub_(partition_M[:, None]).exp_().mul_(1 + 2 * z_loss_coef * partition_M[:, None])
    gradient_MV.scatter_add_(1, index_M1, -torch.ones_like(partition_M)[:, None]).masked_fill_(~kept[:, None], 0)
    return (partition_M - picked_M).where(kept, 0), partition_M.square().where(kept, 0), gradient_MV


def _forward(h: Tensor, head: Tensor, targets: Tensor, z_loss_coef: float, gradients: bool) -> Outputs:
    dtype = wide(h.dtype)
    wide_head, sums = head.to(dtype), h.new_zeros(2, dtype=dtype)
    dh, dhead = (x.new_zeros(x.shape if gradients else 0, dtype=dtype) for x in (h, head))
    for rows in chunks(len(h), len(head), 2 * dtype.itemsize):
        wide_h = h[rows].to(dtype)
        *terms, dlogits = _terms(wide_h @ wide_head.mT, targets[rows], z_loss_coef)
        sums += torch.stack([x.sum() for x in terms])
        if gradients:
            dh[rows] = dlogits @ wide_head
            dhead.addmm_(dlogits.mT, wide_h)
    return sums[0] + z_loss_coef * sums[1], sums[0].clone(), sums[1].clone(), dh.to(h.dtype), dhead.to(head.dtype)


def _fake(h: Tensor, head: Tensor, targets: Tensor, z_loss_coef: float, gradients: bool) -> Outputs:
    sums = (h.new_empty((), dtype=wide(h.dtype)) for _ in range(3))
    return *sums, *(x.new_empty(x.shape if gradients else 0) for x in (h, head))


def _times(dtotal: Tensor, dh: Tensor, dhead: Tensor, h: Tensor, head: Tensor) -> Outputs:
    # h and head are there for autograd alone: a second derivative goes through them, and is refused.
    # Of a 0-d factor on a card torch takes what x's dtype has of it.
    return tuple((dtotal * x.to(dtotal.dtype)).to(x.dtype) for x in (dh, dhead))


_linear_cross_entropy_backward = gradient(
    define(
        "linear_cross_entropy_backward",
        "(Tensor dtotal, Tensor dh, Tensor dhead, Tensor h, Tensor head, str impl) -> (Tensor, Tensor)",
        reference=_times,
        fake=lambda dtotal, dh, dhead, *rest: (dh.new_empty(dh.shape), dhead.new_empty(dhead.shape)),
        kernel="linear_cross_entropy:backward",
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.impl = inputs[-1]
    ctx.save_for_backward(*output[3:], *inputs[:2])
    ctx.mark_non_differentiable(*output[1:])


def _backward_of_op(ctx: Any, dtotal: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
    if dtotal is None:
        return (None,) * 6
    return (*_linear_cross_entropy_backward(dtotal, *ctx.saved_tensors, ctx.impl), None, None, None, None)


_linear_cross_entropy = differentiable(
    define(
        "linear_cross_entropy",
        "(Tensor h, Tensor head, Tensor targets, float z_loss_coef, bool gradients, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=_forward,
        fake=_fake,
        kernel="linear_cross_entropy:forward",
    ),
    _setup_context,
    _backward_of_op,
)
