"""RMS normalisation in front of a block, and the residual stream that goes around the block.

Shapes: x [..., D]; weight [D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops import sharding
from q3n_functional.ops.registration import Impl, Outputs, composite, define, gradient, is_recorded, wide


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (1 + weight)` over the last dim, in fp32; the weight is stored around zero."""
    normal, _ = normalised(x, eps)
    return (normal * (1.0 + weight.to(normal.dtype))).to(x.dtype)


def pre_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """x, to which the block's result is added, and `rms_norm(x, weight, eps)`, which the block takes.

    x [..., D] and weight [D], each of any floating dtype; both results have x's shape and dtype. Forward is plain
    operators, which a compiler fuses with what is around them. In backward, where both gradients of x meet, one kernel
    reads them and x once, sums in fp32 and rounds once; a compiler writes intermediates in fp32 and reads them again
    for the weight. (Under torch.func's transforms backward is plain too.) Saved for backward: the inputs.

    Raises ValueError for shapes that do not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {tuple(x.shape[-1:])}, the last dim of x, got {tuple(weight.shape)}")
    if not is_recorded(x, weight):
        return x, rms_norm(x, weight, eps)
    residual, y = _pre_norm(x, weight, eps, impl)
    return residual, y


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps)` in fp32 (fp64 for fp64 inputs), and what x was multiplied by."""
    x = x.to(wide(x.dtype))
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _backward(dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> Outputs:
    normal, rstd = normalised(x, eps)
    wide_dy = dy.to(normal.dtype)
    dnormal = wide_dy * (1.0 + weight.to(normal.dtype))
    dx = rstd * (dnormal - normal * (dnormal * normal).mean(-1, keepdim=True))
    if dresidual is not None:
        dx = dx + dresidual.to(dx.dtype)
    dweight = (wide_dy * normal).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


_backward_op = define(
    "pre_norm_backward",
    "(Tensor dy, Tensor? dresidual, Tensor x, Tensor weight, float eps, str impl) -> (Tensor, Tensor)",
    reference=_backward,
    fake=lambda dy, dresidual, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    kernel="rms_norm:backward",
)
_pre_norm_backward = gradient(_backward_op)


class _PreNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, impl: Impl) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.options = eps, impl
        return x.view_as(x), rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dresidual: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dresidual, None, None, None
        return *_pre_norm_backward(dy, dresidual, *ctx.saved_tensors, *ctx.options), None, None


_pre_norm = composite("pre_norm(Tensor x, Tensor weight, float eps, str impl) -> (Tensor, Tensor)", _PreNorm.apply)

# Any dim but the last, over which the mean goes.
sharding.register(
    _backward_op,
    [sharding.Split(dict.fromkeys(("dy", "dresidual", "x"), dim), (dim, "sum"), ("x",), behind=1) for dim in range(3)],
)
