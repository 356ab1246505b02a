"""Routed experts that ep ranks share out: tokens travel to their experts and back, none is dropped.

Each rank sends a token once to every rank that has some of its experts, with their numbers and weights, and gets back
what they add together: with two ranks and ten experts a token, a fifth of the bytes of a copy for every expert.
How many go where is known on the device alone, and the exchange wants it on the host: one wait for the device a layer.
Where all ranks have the same tokens, as in writing, many of them, of prompts, are shared out first; a few, as in a
step, stay where they are, and the ranks add up what their own experts make of them, without a wait.

Letters: T tokens, D model width, J experts a token, M = T*J slots, U tokens that are sent, each as often as it is, W
the most that one is; S slots and R tokens that arrived; E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from q3n_functional import params
from q3n_functional.ops import grouped_swiglu
from q3n_functional.ops.registration import wide
from q3n_functional.parallel.collectives import Axis, _apply, all_gather, all_reduce, all_to_all, exchange_counts, pick
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
    trip = _trip(experts_TJ, own, ep)
    slots, rows = trip.slots, trip.rows
    arrived_RD = all_to_all(_spread(x_TD, trip.tokens_U, trip.places_TW), rows.received, rows.sent, ep)
    codes_M = (experts_TJ.flatten() % own)[trip.order_M] * 2 + trip.first_M
    codes_S = all_to_all(codes_M, slots.received, slots.sent, ep)
    weights_M1 = _spread(weights_TJ.reshape(-1, 1), trip.order_M, trip.inverse_M[:, None])
    weights_S1 = all_to_all(weights_M1, slots.received, slots.sent, ep)
    rows_S = (codes_S % 2).cumsum(0).to(torch.int32) - 1
    y_RD = grouped_swiglu(arrived_RD, codes_S[:, None] // 2, weights_S1, *p, rows_S)
    return _collected(all_to_all(y_RD, rows.sent, rows.received, ep), trip.tokens_U, trip.places_TW)


class _Numbers(NamedTuple):
    """How many go to each rank, and how many come from it."""

    sent: list[int]
    received: list[int]


class _Trip(NamedTuple):
    """order_M: slots by the rank of their expert, there by token. inverse_M: where each slot is in that order.
    first_M: in that order, int64, 1 for the first that a token has at a rank. tokens_U: the tokens, in the order in
    which they are sent. places_TW: where each token is in that order, -1 where it is sent to fewer than W ranks.
    """

    order_M: Tensor
    inverse_M: Tensor
    first_M: Tensor
    tokens_U: Tensor
    places_TW: Tensor
    slots: _Numbers
    rows: _Numbers


def _trip(experts_TJ: Tensor, own: int, ep: Axis) -> _Trip:
    num, per_token = experts_TJ.shape
    owners_M, order_M = (experts_TJ.flatten() // own).sort(stable=True)
    inverse_M = torch.empty_like(order_M).scatter(0, order_M, torch.arange(len(order_M), device=order_M.device))
    tokens_M = order_M // per_token
    pairs_M = owners_M * num + tokens_M
    first_M = torch.cat([pairs_M.new_ones(1), (pairs_M[1:] != pairs_M[:-1]).long()])
    slots, rows = _numbers(owners_M, first_M, ep)
    rows_M = first_M.cumsum(0) - 1
    # A token that has several slots at a rank is written several times.
    tokens_U = tokens_M.new_zeros(sum(rows.sent)).scatter(0, rows_M, tokens_M)
    places_TJ = rows_M.where(first_M > 0, -1)[inverse_M].view(num, per_token)
    places_TW = places_TJ.sort(-1, descending=True).values[:, : min(ep.size, per_token)]
    return _Trip(order_M, inverse_M, first_M, tokens_U, places_TW, slots, rows)


def _numbers(owners_M: Tensor, first_M: Tensor, ep: Axis) -> tuple[_Numbers, _Numbers]:
    """Of slots and of tokens."""
    counts = [owners_M.new_zeros(ep.size).scatter_add(0, owners_M, x) for x in (torch.ones_like(first_M), first_M)]
    sent_N2 = torch.stack(counts, 1)
    received_N2 = exchange_counts(sent_N2.flatten(), ep).view(ep.size, 2)
    # To the host at once: compiled, a list of numbers on a card is a wait for every number.
    sent, rows_sent, received, rows_received = torch.cat([sent_N2, received_N2], 1).T.cpu().tolist()
    for number in (*sent, *rows_sent, *received, *rows_received):
        torch._check(number >= 0)
    return _Numbers(sent, received), _Numbers(rows_sent, rows_received)


# What is sent and what comes back are each other's transposes: neither gradient needs a scatter, whose sums would be in
# any order.


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_U: Tensor, places_TW: Tensor) -> Tensor:
        ctx.save_for_backward(places_TW)
        return x_TD[tokens_U]

    @staticmethod
    def backward(ctx: Any, dy_UD: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(dy_UD, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_UD: Tensor, tokens_U: Tensor, places_TW: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_U)
        return _summed(y_UD, places_TW)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        return dy_TD[ctx.saved_tensors[0]], None, None


def _summed(y_UD: Tensor, places_TW: Tensor) -> Tensor:
    y_TWD = y_UD[places_TW.clamp(min=0)].where(places_TW[..., None] >= 0, 0)
    # A copy, as torch 2.11 compiles a Function that ends in a cast to the dtype that is there to gradients of zero.
    return y_TWD.sum(1, dtype=wide(y_UD.dtype)).to(y_UD.dtype, copy=True)


def _spread(x_TD: Tensor, tokens_U: Tensor, places_TW: Tensor) -> Tensor:
    """x[tokens], [U, D]; `places_TW` is where each token is in it, -1 for nowhere."""
    return _apply(_Spread, x_TD, tokens_U, places_TW)


def _collected(y_UD: Tensor, tokens_U: Tensor, places_TW: Tensor) -> Tensor:
    """The sums over all that came back for each token, [T, D]."""
    return _apply(_Collect, y_UD, tokens_U, places_TW)


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
