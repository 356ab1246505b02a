"""Routed experts that ep ranks share out: tokens travel to their experts and back, none is dropped.

Each rank sorts the slots of its tokens by expert, which is by owner too, and sends a copy of the token for each. How
many go where is known on the device alone, and the exchange wants it on the host: one wait for the device a layer.

Letters: T tokens, D model width, J experts a token, M = T*J slots, R slots that arrived, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from q3n_functional import params
from q3n_functional.ops import grouped_swiglu
from q3n_functional.parallel.collectives import Axis, all_reduce, all_to_all, exchange_counts
from q3n_functional.parallel.placement import Parallel


def routed(p: params.SwiGLU, x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, parallel: Parallel | None) -> Tensor:
    """`grouped_swiglu` [T, D] where the rank has a range of the experts; numbers in experts_TJ count all of them."""
    if parallel is None or parallel.ep.size == 1:
        return grouped_swiglu(x_TD, experts_TJ, weights_TJ, *p)
    ep, own = parallel.ep, p.gate.shape[0]
    if parallel.tokens.size == 1:
        return _own_share(p, x_TD, experts_TJ, weights_TJ, ep)
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


def _own_share(p: params.SwiGLU, x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, ep: Axis) -> Tensor:
    """For tokens that all ep ranks have, as in decoding: the sum of what each rank's own experts make of them."""
    own = p.gate.shape[0]
    local_TJ = experts_TJ - ep.rank * own
    mine_TJ = (local_TJ >= 0) & (local_TJ < own)
    # A slot of another rank's goes where one of its token does anyway, so that no expert is read for nothing.
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
