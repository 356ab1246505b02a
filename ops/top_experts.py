"""The experts that each token goes to: those of the largest probabilities.

Letters: T tokens, E experts, J experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops.registration import Impl, Outputs, define, differentiable, gradient


def top_experts(probabilities_TE: Tensor, num: int, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Each row's `num` largest probabilities [T, J], largest first, and their experts, int64 [T, J].

    probabilities: [T, E], of any floating dtype, which the first result has too. Equal ones are in the order of their
    experts, which torch.topk leaves open, so every implementation chooses alike; NaN counts as the largest, as in
    torch. The gradient is zero but at the chosen. Saved for backward: the experts and, for their shape, the
    probabilities.

    Raises ValueError for shapes or numbers that do not fit.
    """
    if probabilities_TE.ndim != 2 or not 0 <= num <= probabilities_TE.shape[1]:
        raise ValueError(
            f"probabilities must be [T, E] and num at most E, got {tuple(probabilities_TE.shape)} and {num}"
        )
    weights, experts = _top_experts(probabilities_TE, num, impl)
    return weights, experts


def _forward(probabilities: Tensor, num: int) -> Outputs:
    weights, experts = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    return weights[:, :num].contiguous(), experts[:, :num].contiguous()


def _backward(dweights: Tensor, experts: Tensor, probabilities: Tensor) -> Tensor:
    return dweights.new_zeros(probabilities.shape).scatter(1, experts, dweights)


def _fake_forward(probabilities: Tensor, num: int) -> Outputs:
    shape = (probabilities.shape[0], num)
    return probabilities.new_empty(shape), probabilities.new_empty(shape, dtype=torch.int64)


_top_experts_backward = gradient(
    define(
        "top_experts_backward",
        "(Tensor dweights, Tensor experts, Tensor probabilities, str impl) -> Tensor",
        reference=_backward,
        fake=lambda dweights, experts, probabilities: dweights.new_empty(probabilities.shape),
        kernel="top_experts:backward",
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    probabilities, _, ctx.impl = inputs
    # Of the probabilities the gradient is the shape alone; a second derivative goes through them, and is refused.
    ctx.save_for_backward(output[1], probabilities)
    ctx.mark_non_differentiable(output[1])


def _backward_of_op(ctx: Any, dweights: Tensor | None, dexperts: None) -> tuple[Tensor | None, ...]:
    if dweights is None:
        return (None,) * 3
    return (_top_experts_backward(dweights, *ctx.saved_tensors, ctx.impl), None, None)


_top_experts = differentiable(
    define(
        "top_experts",
        "(Tensor probabilities, int num, str impl) -> (Tensor, Tensor)",
        reference=_forward,
        fake=_fake_forward,
        kernel="top_experts:forward",
    ),
    _setup_context,
    _backward_of_op,
    rows=("probabilities",),
)
