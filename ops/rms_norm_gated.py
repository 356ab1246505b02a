"""RMS normalisation followed by a SiLU gate, as Gated DeltaNet applies it to each head's output.

Shapes: x, gate [..., D]; weight [D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops import sharding
from q3n_functional.ops.registration import Impl, Outputs, define, differentiable, gradient
from q3n_functional.ops.rms_norm import normalised


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, impl: Impl = "auto") -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps) * silu(gate)` over the last dim.

    x and gate [..., D] share shape and dtype, weight [D] may have another; the arithmetic is fp32 (fp64 for fp64
    inputs) throughout and the result has x's dtype. Saved for backward: the inputs. (Yang et al. 2024, Gated Delta
    Networks; the norm comes before the gate.)

    Raises ValueError for shapes or dtypes that do not fit.
    """
    if x.shape != gate.shape or x.dtype != gate.dtype:
        raise ValueError(f"x and gate must agree, got {tuple(x.shape)} {x.dtype} and {tuple(gate.shape)} {gate.dtype}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {tuple(x.shape[-1:])}, the last dim of x, got {tuple(weight.shape)}")
    # The op wants a dim of rows, along which vmap lays its own.
    y: Tensor = _rms_norm_gated(torch.atleast_2d(x), torch.atleast_2d(gate), weight, eps, impl)
    return y.view(x.shape)


def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    normal, _ = normalised(x, eps)
    y = weight.to(normal.dtype) * normal * torch.nn.functional.silu(gate.to(normal.dtype))
    return y.to(x.dtype).contiguous()


def _backward(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Outputs:
    normal, rstd = normalised(x, eps)
    wide_gate, wide_weight, wide_dy = (t.to(normal.dtype) for t in (gate, weight, dy))
    sigmoid = torch.sigmoid(wide_gate)
    silu = wide_gate * sigmoid
    dnormal = wide_dy * silu * wide_weight
    dx = rstd * (dnormal - normal * (dnormal * normal).mean(-1, keepdim=True))
    dgate = wide_dy * wide_weight * normal * (sigmoid + silu * (1 - sigmoid))
    dweight = (wide_dy * silu * normal).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dgate.to(gate.dtype).contiguous(), dweight.to(weight.dtype)


_backward_op = define(
    "rms_norm_gated_backward",
    "(Tensor dy, Tensor x, Tensor gate, Tensor weight, float eps, str impl) -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=lambda dy, x, gate, weight, eps: tuple(t.new_empty(t.shape) for t in (x, gate, weight)),
    kernel="rms_norm_gated:backward",
)
_rms_norm_gated_backward = gradient(_backward_op)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, gate, weight, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(x, gate, weight)


def _backward_of_op(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    return (*_rms_norm_gated_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.impl), None, None)


_forward_op = define(
    "rms_norm_gated",
    "(Tensor x, Tensor gate, Tensor weight, float eps, str impl) -> Tensor",
    reference=_forward,
    fake=lambda x, gate, weight, eps: x.new_empty(x.shape),
    kernel="rms_norm_gated:forward",
)
_rms_norm_gated = differentiable(_forward_op, _setup_context, _backward_of_op, rows=("x", "gate"))

# Any dim but the last, over which the mean goes.
_SPLITS = [sharding.Split({"x": dim, "gate": dim}, (dim,), ("x",), behind=1) for dim in range(3)]
sharding.register(_forward_op, _SPLITS)
sharding.register(
    _backward_op,
    [sharding.gradient_split(split, ("x", "gate", "weight"), {"dy": split.arguments["x"]}) for split in _SPLITS],
)
