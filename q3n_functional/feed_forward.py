"""What stands behind attention in every layer: a SwiGLU, or a mixture of many.

Letters: B batch, T time (or all B*T tokens of a batch), D model width, E experts, J experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from q3n_functional import float8_experts, params
from q3n_functional.config import Config
from q3n_functional.float8 import Float8, projection
from q3n_functional.ops import router_logits, top_experts
from q3n_functional.parallel.expert import routed
from q3n_functional.parallel.placement import Parallel


class RouterStatistics(NamedTuple):
    """Sums over valid tokens of one or more layers: assignments to each expert, probabilities, and the tokens."""

    assignments_E: Tensor
    probabilities_E: Tensor
    tokens: Tensor


def swiglu(p: params.SwiGLU, x_BTD: Tensor, float8: Float8 = "none") -> Tensor:
    """`down(silu(gate x) * up x)` (Shazeer 2020)."""
    if torch.is_grad_enabled():  # one product has one gradient of x, and a decoding step joins no matrices
        gate, up = projection(x_BTD, torch.cat([p.gate, p.up]), float8).chunk(2, -1)
    else:
        gate, up = projection(x_BTD, p.gate, float8), projection(x_BTD, p.up, float8)
    return projection(silu(gate) * up, p.down, float8)


def mixture_of_experts(
    p: params.MixtureOfExperts,
    x_BTD: Tensor,
    valid_BT: Tensor | None,
    parallel: Parallel | None = None,
    *,
    config: Config,
    float8: Float8 = "none",
) -> tuple[Tensor, RouterStatistics]:
    """Top-J routed experts, none of whose tokens are dropped, beside a shared expert with a scalar sigmoid gate.

    The router works in fp32. `valid_BT` says which tokens its statistics count. With `parallel`, the result is what the
    rank's columns of the experts add, and the statistics are those of the rank's tokens. `float8` "linears" is for the
    shared expert alone, "linears_and_experts" for all; the latter raises ValueError with `parallel`.
    """
    x_TD = x_BTD.flatten(0, 1)
    probabilities_TE = router_logits(x_TD, p.router).softmax(-1)
    weights_TJ, experts_TJ = top_experts(probabilities_TE, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights_TJ = weights_TJ / weights_TJ.sum(-1, keepdim=True)
    routed_TD = _routed(p.experts, x_TD, experts_TJ, weights_TJ, parallel, float8)
    gate_T = torch.mv(x_TD, p.shared_expert_gate[0])  # a sum that the compiler makes with the norm, not a product
    shared_TD = torch.sigmoid(gate_T)[:, None] * swiglu(p.shared_expert, x_TD, float8)
    statistics = _router_statistics(probabilities_TE, experts_TJ, valid_BT)
    return (routed_TD + shared_TD).view(x_BTD.shape), statistics


def _routed(
    p: params.SwiGLU, x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, parallel: Parallel | None, float8: Float8
) -> Tensor:
    if float8 != "linears_and_experts":
        return routed(p, x_TD, experts_TJ, weights_TJ, parallel)
    if parallel is not None:
        raise ValueError("routed experts in float8 are for one device: set float8 to none")
    return float8_experts.experts(x_TD, experts_TJ, weights_TJ, *p)


def _counts(experts_TJ: Tensor, num_experts: int, valid_T: Tensor | None) -> Tensor:
    ones = torch.ones_like(experts_TJ) if valid_T is None else valid_T.long()[:, None].expand_as(experts_TJ)
    return ones.new_zeros(num_experts).scatter_add(0, experts_TJ.flatten(), ones.flatten())


def _router_statistics(probabilities_TE: Tensor, experts_TJ: Tensor, valid_BT: Tensor | None) -> RouterStatistics:
    num_tokens, num_experts = probabilities_TE.shape
    valid_T = None if valid_BT is None else valid_BT.flatten()
    assignments_E = _counts(experts_TJ, num_experts, valid_T).to(probabilities_TE.dtype)
    if valid_T is None:
        return RouterStatistics(assignments_E, probabilities_TE.sum(0), assignments_E.new_full((), num_tokens))
    kept = valid_T.to(probabilities_TE.dtype)
    return RouterStatistics(assignments_E, kept @ probabilities_TE, kept.sum())
