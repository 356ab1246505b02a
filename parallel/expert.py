"""Routed experts that ep ranks share out: tokens travel to their experts and back, none is dropped.

Each rank sorts the slots of its tokens by expert, which is by owner too, and sends a copy of the token for each. How
many go where is known on the device alone, and the exchange wants it on the host: one wait for the device a layer.
Where all ranks have the same tokens, as in writing, many of them, of prompts, are shared out first; a few, as in a
step, stay where they are, and the ranks add up what their own experts make of them, without a wait.

Letters: T tokens, D model width, J experts a token, M = T*J slots, R slots that arrived, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from q3n_functional import params
from q3n_functional.ops import grouped_swiglu
from q3n_functional.parallel.collectives import Axis, all_gather, all_reduce, all_to_all, exchange_counts, pick
from q3n_functional.parallel.placement import Parallel

FEW = 1024
"""Tokens up to which products that are thrown away take less time than the experts' weights take to be read."""


def routed(p: params.SwiGLU, x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, parallel: Parallel | None) -> Tensor:
    """`grouped_swiglu` [T, D] where the rank has a range of the experts; numbers in experts_TJ count all of them."""
    if parallel is None or parallel.ep.size == 1:
        return grouped_swiglu(x_TD, experts_TJ, weights_TJ, *p)
    if parallel.tokens.size > 1:
        return _exchanged(p, x_TD, experts_TJ, weights_TJ, parallel.ep)
    same = _added if x_TD.shape[0] <= FEW else _shared_out
    return same(p, x_TD, experts_TJ, weights_TJ, parallel.ep)


def _exchanged(p: params.SwiGLU, x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, ep: Axis) -> Tensor:
    """For tokens that are the rank's own."""
    own = p.gate.shape[0]
    sorted_M, order_M = experts_TJ.flatten().sort(stable=True)
    sent, received = _splits(sorted_M, own, ep)
    arrived_RD = all_to_all(x_TD[order_M // experts_TJ.shape[1]], received, sent, ep)
    numbers_R = all_to_all(sorted_M % own, received, sent, ep)
    y_RD = grouped_swiglu(arrived_RD, numbers_R[:, None], torch.ones_like(numbers_R[:, None], dtype=x_TD.dtype), *p)
    y_MD = all_to_all(y_RD, sent, received, ep)
    # Back in the tokens' order without a scatter: every slot is there once.
    places_M = torch.empty_like(order_M).scatter(0, order_M, torch.arange(len(order_M), device=order_M.device))
    y_TJD = y_MD[places_M].view(*experts_TJ.shape, -1)
    return (y_TJD * weights_TJ[..., None].to(weights_TJ.dtype)).sum(1).to(x_TD.dtype)


def _shared_out(p: params.SwiGLU, x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, ep: Axis) -> Tensor:
    """For many tokens that all ranks have: each rank's piece of them goes where the tokens' experts are."""
    num = x_TD.shape[0]
    x, experts, weights = (pick(pad(t, (0, 0, 0, -num % ep.size)), ep, 0) for t in (x_TD, experts_TJ, weights_TJ))
    return all_gather(_exchanged(p, x, experts, weights, ep), ep, 0)[:num]


def _added(p: params.SwiGLU, x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, ep: Axis) -> Tensor:
    """For few tokens that all ranks have."""
    own = p.gate.shape[0]
    local_TJ = experts_TJ - ep.rank * own
    mine_TJ = (local_TJ >= 0) & (local_TJ < own)
    # A slot of another rank's goes to an expert that its token has here anyway, where there is one: reading weights is
    # what takes the time, not the products.
    stand_in_T1 = local_TJ.where(mine_TJ, 0).amax(-1, keepdim=True)
    y_TD = grouped_swiglu(x_TD, local_TJ.where(mine_TJ, stand_in_T1), weights_TJ.where(mine_TJ, 0), *p)
    return all_reduce(y_TD, ep)


def _splits(sorted_M: Tensor, own: int, ep: Axis) -> tuple[list[int], list[int]]:
    """How many slots go to each rank, and how many come from it."""
    owners_M = sorted_M // own
    counts = owners_M.new_zeros(ep.size).scatter_add(0, owners_M, torch.ones_like(owners_M))
    sent, received = torch.stack([counts, exchange_counts(counts, ep)]).tolist()
    for number in (*sent, *received):
        torch._check(number >= 0)
    return sent, received
