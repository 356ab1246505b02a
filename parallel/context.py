"""Rows whose tokens lie on several ranks: what a piece of a row needs from the pieces before it.

cp ranks hold consecutive pieces. A linear layer's state passes from piece to piece by one all-gather: a piece takes
the state S in front of it to M S + S', and both M and S' (here the result for the states 1 and 0) come from one walk
over it, so each rank folds its predecessors' by itself (Martin and Cundy 2018, parallel scans of linear recurrences).
The convolution looks back on the last W-1 inputs of the piece before. Attention gathers all keys and values, of which
there are few heads.

Documents end at the end of a row at the latest, so at most one of them, per row, reaches into a piece.

Letters: B batch, T time (of a piece), N sequences (documents), H value heads, K key dim, V value dim, C channels,
W taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from q3n_functional import packing
from q3n_functional.packing import Documents
from q3n_functional.parallel.collectives import all_gather, pick
from q3n_functional.parallel.placement import Parallel

Rule = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Crossing(NamedTuple):
    """How documents reach over the ends of the rank's piece of each row.

    first_B, last_B: int64, the documents of its first and last token, another where that is padding. continues_B: bool,
    whether the first began on an earlier rank. inputs_BW: bool, which of the W-1 tokens before the piece are of that
    document. queries, keys: int32 offsets of what attends together, among the rank's tokens and among all keys.
    """

    first_B: Tensor
    last_B: Tensor
    continues_B: Tensor
    inputs_BW: Tensor
    queries: Tensor
    keys: Tensor


def piece(x_BT: Tensor, parallel: Parallel | None) -> Tensor:
    """The rank's piece of whole rows."""
    return x_BT if parallel is None else pick(x_BT, parallel.cp, 1)


def crossing(
    documents: Documents | None, tokens_BT: Tensor, taps: int, parallel: Parallel
) -> tuple[Documents, Crossing]:
    """The documents of the rank's piece, and how they reach over its ends; `documents` lie in whole rows."""
    batch, length = tokens_BT.shape
    if documents is None:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=tokens_BT.device) * length
        documents = packing.documents(starts, batch, length)
    size = length // parallel.cp.size
    begin = (parallel.cp.rank * size).to(torch.int32)
    cu, segments_BT = documents.cu_seqlens, documents.segment_ids_BT
    rows = cu // length
    local = rows * size + (cu - rows * length - begin).clamp(0, size)
    first_B = segments_BT.index_select(1, begin)
    before = begin + torch.arange(1 - taps, 0, dtype=torch.int32, device=cu.device)
    # The first rank's look back wraps around to tokens that are not its predecessors.
    same_BW = segments_BT.index_select(1, before % length) == first_B
    same_BW = same_BW & (before >= 0) & (first_B < len(cu) - 1)
    last_B = segments_BT.index_select(1, begin + size - 1)
    most = len(cu) - 2
    here = Documents(local, *(pick(x, parallel.cp, 1) for x in documents[1:]))
    previous_B = segments_BT.index_select(1, (begin - 1) % length)
    continues_B = (previous_B == first_B) & (begin > 0) & (first_B <= most)
    keys_end = torch.minimum(cu[1:], rows[:-1] * length + begin + size)
    keys_end = torch.where(local.diff() > 0, keys_end, cu[:-1])
    return here, Crossing(
        first_B[:, 0].clamp(max=most).long(),
        last_B[:, 0].clamp(max=most).long(),
        continues_B[:, 0],
        same_BW,
        torch.stack([local[:-1], local[1:]], 1).flatten(),
        torch.stack([cu[:-1], keys_end], 1).flatten(),
    )


def carried_inputs(x_BTC: Tensor, num: int, crossing: Crossing, parallel: Parallel) -> Tensor:
    """[N, C, W-1]: the inputs in front of each sequence of the piece, for the convolution."""
    width = crossing.inputs_BW.shape[1]
    tails = all_gather(x_BTC[:, x_BTC.shape[1] - width :][None], parallel.cp, 0)
    before_BWC = tails.index_select(0, (parallel.cp.rank - 1).clamp(min=0))[0]
    before_BWC = before_BWC.masked_fill(~crossing.inputs_BW[..., None], 0)
    return x_BTC.new_zeros(num, x_BTC.shape[2], width).index_add(0, crossing.first_B, before_BWC.mT)


def carried_rule(
    rule: Rule, v_BTHV: Tensor, key_dim: int, num: int, crossing: Crossing, parallel: Parallel
) -> tuple[Tensor, Tensor]:
    """Output and final states of a rule that is linear in values and state, its state passed on between ranks.

    `rule` takes values [B, T, H, V'] and initial states [N, H, K, V']. It runs once, with K more columns that start
    from the identity: they tell what any state in front of the piece adds to the outputs and to the state behind.
    """
    heads, value_dim = v_BTHV.shape[2:]
    starts = _units(crossing, heads, key_dim, num, v_BTHV)
    o, final = rule(torch.nn.functional.pad(v_BTHV, (0, key_dim)), torch.nn.functional.pad(starts, (value_dim, 0)))
    before_BHKV = _before(final[crossing.last_B], value_dim, crossing, parallel)
    seen = o[..., value_dim:]
    o_BTHV = o[..., :value_dim] + torch.einsum("bthk,bhkv->bthv", seen, before_BHKV.to(seen.dtype))
    before = starts.new_zeros(num, heads, key_dim, value_dim).index_add(0, crossing.first_B, before_BHKV)
    return o_BTHV, final[..., :value_dim] + final[..., value_dim:] @ before


def _units(crossing: Crossing, heads: int, dim: int, num: int, like: Tensor) -> Tensor:
    """[N, H, K, K]: the identity for the sequences that began on an earlier rank, zeros for others."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    identity = torch.eye(dim, dtype=dtype, device=like.device).expand(heads, dim, dim)
    units = crossing.continues_B[:, None, None, None] * identity
    return identity.new_zeros(num, heads, dim, dim).index_add(0, crossing.first_B, units)


def _before(summary_BHKZ: Tensor, value_dim: int, crossing: Crossing, parallel: Parallel) -> Tensor:
    """The state in front of the piece's first sequence of each row, zeros where that begins here."""
    summaries = all_gather(summary_BHKZ[None], parallel.cp, 0)
    state = torch.zeros_like(summary_BHKZ[..., :value_dim])
    states = [state]
    for earlier in summaries[:-1].unbind():
        state = earlier[..., value_dim:] @ state + earlier[..., :value_dim]
        states.append(state)
    mine = torch.stack(states).index_select(0, parallel.cp.rank)[0]
    return mine.masked_fill(~crossing.continues_B[:, None, None, None], 0)


def all_keys(x_BTGK: Tensor, parallel: Parallel) -> Tensor:
    """Keys or values of the whole rows."""
    return all_gather(x_BTGK, parallel.cp, 1)
