"""Rows whose tokens lie on several ranks: what a piece of a row needs from the pieces before it.

A row is cut into 2 n pieces for cp = n ranks, of which rank r holds the r-th and the r-th from the end: their causal
attention together is every rank's same share (Grattafiori et al. 2024, The Llama 3 herd, section 3.3.2). Attention
gathers all keys and values, of which there are few heads. A linear layer's state passes from piece to piece by one
all-gather: a piece takes the state S in front of it to M S + S', and both M and S' (here the result for the states 1
and 0) come from one walk over it, so each rank folds its pieces' predecessors by itself (Martin and Cundy 2018,
parallel scans of linear recurrences). The convolution looks back on the last W-1 inputs of the piece before.

Documents end at the end of a row at the latest, so at most one of them, per row, reaches into a piece.

Letters: B batch, P the rank's two pieces of a row, T time (of both, one behind the other), N sequences (documents, cut
between the pieces), H value heads, K key dim, V value dim, C channels, W taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from q3n_functional import packing
from q3n_functional.ops import attention, piece_attention
from q3n_functional.packing import Documents
from q3n_functional.parallel.collectives import Axis, all_gather
from q3n_functional.parallel.placement import Parallel

Rule = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Crossing(NamedTuple):
    """How documents reach over the ends of the rank's pieces of each row.

    first_PB, last_PB: int64, the sequences of their first and last tokens, another where that is padding. continues_PB:
    bool, whether the first began in an earlier piece. inputs_PBW: bool, which of the W-1 tokens before a piece are of
    that document. queries_PN, keys_PN: int32 offsets of what attends together, among a piece's tokens and all keys;
    None where every row is one document.
    """

    first_PB: Tensor
    last_PB: Tensor
    continues_PB: Tensor
    inputs_PBW: Tensor
    queries_PN: Tensor | None
    keys_PN: Tensor | None


def _own(axis: Axis) -> Tensor:
    """int64 [P]: which pieces of a row are the rank's."""
    return torch.cat([axis.rank, 2 * axis.size - 1 - axis.rank])


def _in_order(x: Tensor) -> Tensor:
    """What the ranks had for their pieces, rank by rank, in the order of the pieces."""
    return torch.cat([x[0::2], x[1::2].flip(0)])


def piece(x_BT: Tensor, parallel: Parallel | None) -> Tensor:
    """The rank's pieces of whole rows."""
    if parallel is None or parallel.cp.size == 1:
        return x_BT
    pieces: Tensor = x_BT.unflatten(1, (2 * parallel.cp.size, -1))
    return pieces.index_select(1, _own(parallel.cp)).flatten(1, 2)


def crossing(
    documents: Documents | None, tokens_BT: Tensor, taps: int, parallel: Parallel
) -> tuple[Documents, Crossing]:
    """The documents of the rank's pieces, and how they reach over its ends; `documents` lie in whole rows."""
    (batch, length), packed = tokens_BT.shape, documents is not None
    starts_B = torch.arange(batch, dtype=torch.int32, device=tokens_BT.device) * length
    if documents is None:
        whole = torch.cat([starts_B, starts_B[-1:] + length])
        documents = packing.documents(whole, batch, length)
    cu, segments_BT = documents.cu_seqlens, documents.segment_ids_BT
    size = length // (2 * parallel.cp.size)
    begin_P = (_own(parallel.cp) * size).to(torch.int32)
    # A document that has tokens in both pieces is two sequences here.
    between_B = torch.minimum(starts_B + begin_P[0] + size, cu[-1])
    cuts = torch.cat([cu, between_B]).sort().values
    local = cuts // length * (2 * size) + sum(_among(cuts, begin, size, length) for begin in begin_P)
    here = Documents(local, *(piece(x, parallel) for x in documents[1:]))
    first_P1 = torch.arange(2, device=cu.device)[:, None] * size
    tokens_PB = first_P1 + torch.arange(batch, device=cu.device) * (2 * size)
    first_PB, last_PB = (
        (torch.searchsorted(here.cu_seqlens, at.int(), right=True) - 1).clamp(max=len(local) - 2)
        for at in (tokens_PB, tokens_PB + size - 1)
    )
    backs = torch.arange(-max(taps - 1, 1), 0, dtype=torch.int32, device=cu.device)
    same_PBW = _same_document(segments_BT, begin_P, backs, len(cu) - 1)
    queries_PN, keys_PN = _meetings(cu, begin_P, size, length) if packed else (None, None)
    inputs_PBW = same_PBW[..., len(backs) + 1 - taps :]
    return here, Crossing(first_PB, last_PB, same_PBW[..., -1], inputs_PBW, queries_PN, keys_PN)


def _same_document(segments_BT: Tensor, begin_P: Tensor, backs_W: Tensor, num: int) -> Tensor:
    """bool [P, B, W]: whether the tokens so far back are of the document that the piece begins in, of `num`."""
    first_BP, before_PW = segments_BT.index_select(1, begin_P), begin_P[:, None] + backs_W
    # The first piece's look back wraps around to tokens that are not its predecessors.
    found = segments_BT.index_select(1, (before_PW % segments_BT.shape[1]).flatten())
    same_BPW: Tensor = found.unflatten(1, before_PW.shape) == first_BP[..., None]
    return (same_BPW & (before_PW >= 0) & (first_BP < num)[..., None]).movedim(1, 0)


def _among(offsets: Tensor, begin: Tensor, size: int, length: int) -> Tensor:
    """Of offsets into rows of `length` tokens, how many of the row's `size` tokens from `begin` on lie before them."""
    return (offsets % length - begin).clamp(0, size)


def _meetings(cu: Tensor, begin_P: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Where each document's queries in a piece, and the keys that the last of them sees, begin and end."""
    begin_P1 = begin_P[:, None]
    local = cu // length * size + _among(cu, begin_P1, size, length)
    keys_end = torch.minimum(cu[1:], cu[:-1] // length * length + begin_P1 + size)
    keys_end = torch.where(local.diff(dim=1) > 0, keys_end, cu[:-1])
    keys = torch.stack([cu[:-1].expand_as(keys_end), keys_end], 2)
    return torch.stack([local[:, :-1], local[:, 1:]], 2).flatten(1), keys.flatten(1)


def carried_inputs(x_BTC: Tensor, num: int, crossing: Crossing, parallel: Parallel) -> Tensor:
    """[N, C, W-1]: the inputs in front of each sequence of the pieces, for the convolution."""
    width = crossing.inputs_PBW.shape[2]
    tails_PBWC = torch.stack([x[:, x.shape[1] - width :] for x in x_BTC.chunk(2, 1)])
    tails = _in_order(all_gather(tails_PBWC, parallel.cp, 0))
    before_PBWC = tails.index_select(0, (_own(parallel.cp) - 1).clamp(min=0))
    before_PBWC = before_PBWC.masked_fill(~crossing.inputs_PBW[..., None], 0)
    zeros = x_BTC.new_zeros(num, x_BTC.shape[2], width)
    return zeros.index_add(0, crossing.first_PB.flatten(), before_PBWC.mT.flatten(0, 1))


def carried_rule(
    rule: Rule, v_BTHV: Tensor, key_dim: int, num: int, crossing: Crossing, parallel: Parallel
) -> tuple[Tensor, Tensor]:
    """Output and final states of a rule that is linear in values and state, its state passed on between ranks.

    `rule` takes values [B, T, H, V'] and initial states [N, H, K, V']. It runs once, with K more columns that start
    from the identity: they tell what any state in front of a piece adds to the outputs and to the state behind.
    """
    heads, value_dim = v_BTHV.shape[2:]
    starts = _units(crossing, heads, key_dim, num, v_BTHV)
    o, final = rule(torch.nn.functional.pad(v_BTHV, (0, key_dim)), torch.nn.functional.pad(starts, (value_dim, 0)))
    before_PBHKV = _before(final[crossing.last_PB], value_dim, crossing, parallel)
    seen_BPTHK = o[..., value_dim:].unflatten(1, (2, -1))
    added_BPTHV = torch.einsum("bpthk,pbhkv->bpthv", seen_BPTHK, before_PBHKV.to(o.dtype))
    before = starts.new_zeros(num, heads, key_dim, value_dim)
    before = before.index_add(0, crossing.first_PB.flatten(), before_PBHKV.flatten(0, 1))
    return o[..., :value_dim] + added_BPTHV.flatten(1, 2), final[..., :value_dim] + final[..., value_dim:] @ before


def _units(crossing: Crossing, heads: int, dim: int, num: int, like: Tensor) -> Tensor:
    """[N, H, K, K]: the identity for the sequences that began in an earlier piece, zeros for others."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    identity = torch.eye(dim, dtype=dtype, device=like.device).expand(heads, dim, dim)
    units = crossing.continues_PB.flatten()[:, None, None, None] * identity
    return identity.new_zeros(num, heads, dim, dim).index_add(0, crossing.first_PB.flatten(), units)


def _before(summary_PBHKZ: Tensor, value_dim: int, crossing: Crossing, parallel: Parallel) -> Tensor:
    """The state in front of each piece's first sequence of each row, zeros where that begins there."""
    summaries = _in_order(all_gather(summary_PBHKZ, parallel.cp, 0))
    state = torch.zeros_like(summary_PBHKZ[0, ..., :value_dim])
    states = [state]
    for earlier in summaries[:-1].unbind():
        state = earlier[..., value_dim:] @ state + earlier[..., :value_dim]
        states.append(state)
    mine = torch.stack(states).index_select(0, _own(parallel.cp))
    return mine.masked_fill(~crossing.continues_PB[..., None, None, None], 0)


def crossing_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, crossing: Crossing, parallel: Parallel
) -> Tensor:
    """Causal attention of the rank's pieces over the rows' keys, wherever these are."""
    k, v = (all_keys(x, parallel) for x in (k_BTGK, v_BTGK))
    if crossing.queries_PN is None or crossing.keys_PN is None:
        return piece_attention(q_BTHK, k, v, parallel.cp.rank)
    each = zip(q_BTHK.chunk(2, 1), crossing.queries_PN, crossing.keys_PN, strict=True)
    return torch.cat([attention(q, k, v, queries, keys=keys) for q, queries, keys in each], 1)


def all_keys(x_BTGK: Tensor, parallel: Parallel) -> Tensor:
    """Keys or values of the whole rows."""
    pieces = _in_order(all_gather(torch.stack(x_BTGK.chunk(2, 1)), parallel.cp, 0))
    return pieces.movedim(0, 1).flatten(1, 2)
