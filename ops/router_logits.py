"""The router's scores in fp32, from tokens and a router in any dtype.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from q3n_functional.ops.registration import Impl, Outputs, define, differentiable, gradient, wide


def router_logits(x_TD: Tensor, router_ED: Tensor, impl: Impl = "auto") -> Tensor:
    """`x router^T` [T, E] in fp32 (fp64 for fp64 inputs), as if both had been widened first.

    x: [T, D], router: [E, D], each of any floating dtype; gradients have the inputs' dtypes, and theirs are sums in
    fp32 too. Where both are bf16 the CUDA implementation widens nothing: a product of two bf16 numbers is exact in
    fp32, so tensor cores give what fp32 arithmetic would, ten times as fast. Saved for backward: the inputs.

    Raises ValueError for shapes that do not fit.
    """
    if x_TD.ndim != 2 or router_ED.ndim != 2 or x_TD.shape[1] != router_ED.shape[1]:
        raise ValueError(f"x must be [T, D] and router [E, D], got {tuple(x_TD.shape)} and {tuple(router_ED.shape)}")
    logits: Tensor = _router_logits(x_TD, router_ED, impl)
    return logits


def _forward(x: Tensor, router: Tensor) -> Tensor:
    precise = wide(torch.promote_types(x.dtype, router.dtype))
    return linear(x.to(precise), router.to(precise))


def _backward(dlogits: Tensor, x: Tensor, router: Tensor) -> Outputs:
    dx = dlogits @ router.to(dlogits.dtype)
    return dx.to(x.dtype), (dlogits.mT @ x.to(dlogits.dtype)).to(router.dtype)


def _fake_forward(x: Tensor, router: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], router.shape[0], dtype=wide(torch.promote_types(x.dtype, router.dtype)))


_router_logits_backward = gradient(
    define(
        "router_logits_backward",
        "(Tensor dlogits, Tensor x, Tensor router, str impl) -> (Tensor, Tensor)",
        reference=_backward,
        fake=lambda dlogits, x, router: (x.new_empty(x.shape), router.new_empty(router.shape)),
        kernel="router_logits:backward",
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_op(ctx: Any, dlogits: Tensor | None) -> tuple[Tensor | None, ...]:
    if dlogits is None:
        return (None,) * 3
    return (*_router_logits_backward(dlogits, *ctx.saved_tensors, ctx.impl), None)


_router_logits = differentiable(
    define(
        "router_logits",
        "(Tensor x, Tensor router, str impl) -> Tensor",
        reference=_forward,
        fake=_fake_forward,
        kernel="router_logits:forward",
    ),
    _setup_context,
    _backward_of_op,
    rows=("x",),
)
