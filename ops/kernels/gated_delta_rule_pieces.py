# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Long sequences of few heads, cut into pieces that are walked side by side.

Where keys are of unit length and beta is at most 2, a chunk cannot make a state longer, only shorter, by its decay. So
a piece's walk begins some chunks before the piece, with no state: so many that the decay over them is below 2^-64, or,
if it nowhere is, at the sequence's beginning. Walks side by side then take as long as the longest, never longer than an
uncut one, and what they leave out is beyond the state's digits. Backward's reverse walks begin as many chunks behind.
Documents whose chunks are taken in two halves (`halves`) are walked so too, where the middle cuts one.

Elsewhere a piece takes the state S in front of it to M S + H: H is the state behind it that starts from none, M its
transition. So all pieces are walked at once for H and M, the states in front of them follow by a short walk over
pieces, and with these all pieces are walked at once again (Martin and Cundy 2018, parallel scans of linear
recurrences). Backward then goes uncut: its two scans share the card already, and M^T with two more walks took as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import Launcher, kind, where

if TYPE_CHECKING:
    from q3n_functional.ops.kernels.gated_delta_rule import Problem


FLOOR = -64.0
"""log2 of the decay behind which a state is not looked for: fp32 has 24 digits."""
LEAD = 16
"""Chunks that a piece's walk is expected to take before its own, which a sequence's first piece has more instead."""


@triton.jit
def place_by_length(cu, n, num, begin, end, BLOCK: tl.constexpr):
    """How many documents have more tokens than document n between `begin` and `end`, or as many and come before it."""
    i = tl.arange(0, BLOCK)
    mine = _within(tl.load(cu + n + 1), begin, end) - _within(tl.load(cu + n), begin, end)
    place = 0
    for m in range(0, num, BLOCK):
        inside = m + i < num
        length = _within(tl.load(cu + m + i + 1, mask=inside, other=0), begin, end)
        length -= _within(tl.load(cu + m + i, mask=inside, other=0), begin, end)
        before = (length > mine) | ((length == mine) & (m + i < n))
        place += tl.sum((inside & before).to(tl.int32), 0)
    return place


@triton.jit
def _within(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit(do_not_specialize=["num_sequences", "T", "num_pieces", "size", "more"])
def _pieces_kernel(
    cu, first_chunk, piece_cu, piece_chunk, first_piece, num_sequences, T, num_pieces, size, more,
    C: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First token and first chunk of each piece, and the first piece of each sequence; program n is sequence n.

    Pieces follow each other in the stream, so one ends where the next begins; an empty sequence is one piece. All but a
    sequence's last have `size` tokens, its first `more` besides. The last program fills what is left with empty pieces
    at the end.
    """
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    piece = 0
    for m in range(0, n, BLOCK):
        if DOCUMENTS:
            length = tl.load(cu + m + i + 1, mask=m + i < n, other=0) - tl.load(cu + m + i, mask=m + i < n, other=0)
        else:
            length = tl.where(m + i < n, T, 0)
        piece += tl.sum(tl.where(m + i < n, tl.maximum((length - more + size - 1) // size, 1), 0), 0)
    tl.store(first_piece + n, piece)
    chunk = 0
    if DOCUMENTS:
        start = tl.load(cu + n)
        end = tl.load(cu + tl.minimum(n + 1, num_sequences))
        if n < num_sequences:
            chunk = tl.load(first_chunk + n)
    else:
        start = n * T
        end = tl.minimum(n + 1, num_sequences) * T
        chunk = n * ((T + C - 1) // C)
    count = tl.maximum((end - start - more + size - 1) // size, 1)
    if n == num_sequences:
        count = num_pieces + 1 - piece
    for m in range(0, count, BLOCK):
        at = piece + m + i
        tokens = tl.where(m + i > 0, (m + i) * size + more, 0)
        tl.store(piece_cu + at, tl.minimum(start + tokens, end), mask=m + i < count)
        tl.store(piece_chunk + at, chunk + tokens // C, mask=m + i < count)


@triton.jit
def _chunks_to_floor(decays, step, limit, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
    """How many decays (log2), from `decays` on and `step` apart, add up to less than FLOOR: `limit` if none do."""
    i = tl.arange(0, BLOCK)
    count = 0
    total = 0.0
    while (count < limit) & (total >= FLOOR):
        x = tl.load(decays + (count + i).to(tl.int64) * step, mask=count + i < limit, other=0.0)
        sums = total + tl.cumsum(x, 0)
        below = tl.min(tl.where(sums < FLOOR, i, BLOCK), 0)
        count = tl.minimum(count + tl.minimum(below + 1, BLOCK), limit)
        total = tl.where(below < BLOCK, FLOOR - 1, total + tl.sum(x, 0))
    return count, total < FLOOR


@triton.jit(do_not_specialize=["num_sequences", "begin"])
def _walks_kernel(
    gates, piece_cu, piece_chunk, first_piece, walks, num_sequences, begin,
    HV: tl.constexpr, C: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each piece from `begin` on and head, forward and in reverse: the tokens that its walk takes before its own,
    the sequence whose given state it begins with, and that whose last state it leaves (-1: none)."""
    pid = tl.program_id(0)
    piece = begin + pid // HV
    i = tl.arange(0, BLOCK)
    n = 0
    for m in range(0, num_sequences, BLOCK):
        ends = tl.load(first_piece + m + i + 1, mask=m + i < num_sequences, other=2147483647)
        n += tl.sum((ends <= piece).to(tl.int32), 0)
    walks += pid * 6
    if n < num_sequences:
        first, end = tl.load(first_piece + n), tl.load(first_piece + n + 1)
        start = tl.load(piece_cu + first)
        chunk = tl.load(piece_chunk + piece)
        before = chunk - tl.load(piece_chunk + first)
        length = tl.load(piece_cu + end) - start
        own_length = tl.load(piece_cu + piece + 1) - start
        own_end = (own_length + C - 1) // C
        decays = gates + (chunk.to(tl.int64) * HV + pid % HV) * (7 * C) + C - 1
        lead, cut_off = _chunks_to_floor(decays - HV * 7 * C, -HV * 7 * C, before, FLOOR, BLOCK)
        tl.store(walks, lead * C)
        tl.store(walks + 1, tl.where(cut_off, -1, n))
        tl.store(walks + 2, tl.where(piece == end - 1, n, -1))
        behind = (own_end - before).to(tl.int64) * (HV * 7 * C)
        lead, cut_off = _chunks_to_floor(decays + behind, HV * 7 * C, (length + C - 1) // C - own_end, FLOOR, BLOCK)
        # Not what would fill the last chunk: those rows are the next sequence's.
        tl.store(walks + 3, tl.minimum(lead * C, length - own_length))
        tl.store(walks + 4, tl.where(cut_off, -1, n))
        tl.store(walks + 5, tl.where(piece == first, n, -1))
    else:
        tl.store(walks + tl.arange(0, 8), tl.where(tl.arange(0, 8) % 3 > 0, -1, 0), mask=tl.arange(0, 8) < 6)


@triton.jit
def _store_walk(walk, tokens, begins, leaves):
    tl.store(walk, tokens)
    tl.store(walk + 1, begins)
    tl.store(walk + 2, leaves)


@triton.jit(do_not_specialize=["num_sequences", "num_tokens", "middle"])
def _halves_kernel(
    gates, cu, first_chunk, table, half_cu, half_chunk, order, walks, num_sequences, num_tokens, middle,
    HV: tl.constexpr, C: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each half of the chunks has of a document, and its head's walks there, as `_walks_kernel` writes them.

    The second half's `half_cu`, `half_chunk`, `order` and `walks` lie behind the first's. A document that a half has
    nothing of is empty there, and its states are given and left in the other one.
    """
    pid = tl.program_id(0)
    n, hv = pid // HV, pid % HV
    start, end, cut = tl.load(cu + n), tl.load(cu + n + 1), tl.load(table + 2 * middle)
    chunk = tl.load(first_chunk + n)
    last = chunk + (end - start + C - 1) // C
    opens, closes = chunk < middle, (last > middle) | (chunk >= middle)  # in the first half, in the second
    if hv == 0:
        for half in tl.static_range(2):
            low, high = (cut, num_tokens) if half else (0, cut)
            at = half_cu + half * (num_sequences + 1) + n
            tl.store(at, _within(start, low, high))
            tl.store(at + 1, _within(end, low, high))
            tl.store(half_chunk + half * num_sequences + n, tl.maximum(chunk, middle) if half else chunk)
            place = place_by_length(cu, n, num_sequences, low, high, BLOCK)
            tl.store(order + half * num_sequences + place, n)
    both = opens & closes
    decays = gates + (middle.to(tl.int64) * HV + hv) * (7 * C) + C - 1
    before = tl.where(both, middle - chunk, 0)
    lead, cut_off = _chunks_to_floor(decays - HV * 7 * C, -HV * 7 * C, before, FLOOR, BLOCK)
    behind = tl.where(both, last - middle, 0)
    reverse_lead, reverse_cut_off = _chunks_to_floor(decays, HV * 7 * C, behind, FLOOR, BLOCK)
    first = walks + pid * 6
    second = first + num_sequences * (HV * 6)
    tokens = tl.where(both, tl.minimum(reverse_lead * C, end - cut), 0)
    of_first, of_second = tl.where(opens, n, -1), tl.where(closes, n, -1)
    _store_walk(first, 0, of_first, -1)
    _store_walk(first + 3, tokens, tl.where(reverse_cut_off, -1, of_first), of_first)
    _store_walk(second, lead * C, tl.where(cut_off, -1, of_second), -1)
    _store_walk(second + 3, 0, of_second, tl.where(opens, -1, n))


@triton.jit
def _fold_kernel(
    H, M, first, starts, last, first_piece,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """starts[i] = S, S <- M[i] S + H[i] over the pieces of a sequence, from `first` (zeros without) to `last`."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    n = pid // (NV * HV)
    hv = pid // NV % HV
    rows = tl.arange(0, BK)
    cols = pid % NV * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    square = (rows < K)[:, None] & (rows < K)[None, :]
    tile = rows[:, None] * V + cols[None, :]
    sequence = (n.to(tl.int64) * HV + hv) * (K * V)
    begin = tl.load(first_piece + n)
    count = tl.load(first_piece + n + 1) - begin
    S = tl.load(first + sequence + tile, mask=inside, other=0.0) if FIRST else tl.zeros([BK, BV], tl.float32)
    for i in range(count):
        at = (begin + i).to(tl.int64) * HV + hv
        tl.store(starts + at * (K * V) + tile, S, mask=inside)
        by = tl.load(M + at * (K * K) + rows[:, None] * K + rows[None, :], mask=square, other=0.0)
        added = tl.load(H + at * (K * V) + tile, mask=inside, other=0.0)
        S = tl.dot(by, S, acc=added, input_precision="tf32x3")
    tl.store(last + sequence + tile, S, mask=inside)


_pieces, _walks, _halves = Launcher(_pieces_kernel), Launcher(_walks_kernel), Launcher(_halves_kernel)


def cut(p: Problem, pieces: int, more: int = 0) -> tuple[Problem, Tensor]:
    """The problem whose sequences are pieces of about 1/`pieces` of an average one, and each sequence's first piece.

    A sequence's first piece has `more` chunks besides. Chunks and tokens stay where they are: what was stored for the
    chunks of `p` serves for the pieces.
    """
    C = int(p.constants["C"])
    total, sequences = p.q.shape[0], max(p.num_sequences, 1)
    size = -(-(total - sequences * more * C) // (sequences * pieces * C)) * C
    num = p.num_sequences + total // size
    device = p.q.device
    piece_cu, piece_chunk = (torch.empty(num + 1, dtype=torch.int32, device=device) for _ in range(2))
    first_piece = torch.empty(p.num_sequences + 1, dtype=torch.int32, device=device)
    _pieces(
        p.num_sequences + 1, (where(piece_cu), kind(p.cu), kind(p.first_chunk)),
        (p.cu, p.first_chunk, piece_cu, piece_chunk, first_piece, p.num_sequences, p.length, num, size, more * C),
        (C, p.cu is not None, 256),
    )  # fmt: skip
    cut_ = p._replace(
        num_sequences=num, length=total, cu=piece_cu, first_chunk=piece_chunk, order=None,
        constants={**p.constants, "DOCUMENTS": True},
    )  # fmt: skip
    return cut_, first_piece


def walks(p: Problem, pieces: int, gates: Tensor, more: int = 0) -> Problem:
    """As `cut`, with the walks of pieces and heads; for unit keys and beta to 2 alone."""
    cut_, first_piece = cut(p, pieces, more)
    return cut_._replace(walks=_table(p, cut_, first_piece, gates, 0, cut_.num_sequences))


def last_walk(p: Problem, pieces: int, gates: Tensor) -> Problem:
    """The last piece of one sequence that is cut into pieces of one size, with its walk; as `walks`."""
    cut_, first_piece = cut(p, pieces)
    assert cut_.cu is not None
    at = cut_.num_sequences - 2  # one more, an empty one, is at the end
    table = _table(p, cut_, first_piece, gates, at, 1)
    return cut_._replace(
        num_sequences=1, cu=cut_.cu[at : at + 2], first_chunk=cut_.first_chunk[at : at + 1], walks=table
    )


def halves(p: Problem, gates: Tensor) -> tuple[Problem, Problem]:
    """The problems of the first and the second half of the documents' chunks, as `walks`.

    Of a half with chunks from `origin` on: `num_chunks` and `table` are of these alone; the numbers of chunks in
    `first_chunk`, and tokens, are those of the whole.
    """
    heads, num, middle = p.constants["HV"], p.num_sequences, p.num_chunks // 2
    shapes = (num + 1,), (num,), (num,), (num, heads, 6)
    half_cu, half_chunk, order, table = (torch.empty(2, *x, dtype=torch.int32, device=gates.device) for x in shapes)
    _halves(
        num * heads, (where(half_cu), kind(p.cu)),
        (gates, p.cu, p.first_chunk, p.table, half_cu, half_chunk, order, table, num, p.length, middle),
        (heads, p.constants["C"], FLOOR, 128), num_warps=1,
    )  # fmt: skip
    first, second = (
        p._replace(
            num_chunks=end - begin, cu=half_cu[n], table=p.table[begin:end], first_chunk=half_chunk[n], walks=table[n],
            origin=begin, order=order[n],
        )
        for n, (begin, end) in enumerate(((0, middle), (middle, p.num_chunks)))
    )  # fmt: skip
    return first, second


def _table(p: Problem, cut_: Problem, first_piece: Tensor, gates: Tensor, begin: int, num: int) -> Tensor:
    heads = p.constants["HV"]
    table = torch.empty(num, heads, 6, dtype=torch.int32, device=gates.device)
    _walks(
        num * heads, (where(table),),
        (gates, cut_.cu, cut_.first_chunk, first_piece, table, p.num_sequences, begin),
        (heads, p.constants["C"], FLOOR, 128), num_warps=1,
    )  # fmt: skip
    return table


def fold(p: Problem, first_piece: Tensor, H: Tensor, M: Tensor, first: Tensor | None, last: Tensor) -> Tensor:
    """The states [pieces, HV, K, V] that the pieces start from; `p` is the uncut problem, `last` is written.

    H [pieces, HV, K, V] and M [pieces, HV, K, K] are fp32.
    """
    c = p.constants
    starts = torch.empty_like(H)
    BV = 32
    _fold_kernel[(p.num_sequences * c["HV"] * -(-c["V"] // BV),)](
        H, M, first, starts, last, first_piece, HV=c["HV"], K=c["K"], V=c["V"], BK=c["BK"], BV=BV,
        FIRST=first is not None, num_warps=8,
    )  # fmt: skip
    return starts
