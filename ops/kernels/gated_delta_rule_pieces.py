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

from q3n_functional.ops.kernels.launch import Launcher, kind, launch, where

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


@triton.jit(do_not_specialize=["num_sequences", "T", "size", "more", "begin"])
def _pieces_kernel(
    gates, cu, first_chunk, piece_cu, piece_chunk, first_piece, walks, num_sequences, T, size, more, begin,
    HV: tl.constexpr, C: tl.constexpr, DOCUMENTS: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First token and first chunk of each piece from `begin` on; and the first piece of each sequence, or the walks.

    Pieces follow each other in the stream, so one ends where the next begins; an empty sequence is one piece. All but a
    sequence's last have `size` tokens, its first `more` besides. Pieces that are left over are empty, at the end.

    A walk, of each piece and head, forward and in reverse: the tokens that it takes before its own, the sequence whose
    given state it begins with, and that whose last state it leaves (-1: none).
    """
    pid = tl.program_id(0)
    piece = begin + pid // HV
    i = tl.arange(0, BLOCK)
    n = 0
    first = 0
    total = 0
    for m in range(0, num_sequences, BLOCK):
        inside = m + i < num_sequences
        if DOCUMENTS:
            length = tl.load(cu + m + i + 1, mask=inside, other=0) - tl.load(cu + m + i, mask=inside, other=0)
        else:
            length = tl.where(inside, T, 0)
        ends = total + tl.cumsum(tl.where(inside, tl.maximum((length - more + size - 1) // size, 1), 0), 0)
        passed = inside & (ends <= piece)
        n += tl.sum(passed.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(passed, ends, 0), 0))
        total = tl.max(ends, 0)
    if DOCUMENTS:
        start = tl.load(cu + n)
        length = tl.load(cu + tl.minimum(n + 1, num_sequences)) - start
        chunk = tl.load(first_chunk + n, mask=n < num_sequences, other=0)
    else:
        start = n * T
        length = tl.where(n < num_sequences, T, 0)
        chunk = n * ((T + C - 1) // C)
    index = piece - first
    before = tl.where((index > 0) & (n < num_sequences), (index * size + more) // C, 0)
    own_length = tl.minimum((index + 1) * size + more, length)
    chunk += before
    if pid % HV == 0:
        tl.store(piece_cu + piece - begin, start + before * C)
        tl.store(piece_cu + piece - begin + 1, start + own_length)
        tl.store(piece_chunk + piece - begin, chunk)
    if walks is None:
        tl.store(first_piece + n, piece, mask=(index == 0) & (n < num_sequences))
        tl.store(first_piece + n + 1, piece + 1, mask=(own_length == length) & (n < num_sequences))
    elif n < num_sequences:
        decays = gates + (chunk.to(tl.int64) * HV + pid % HV) * (7 * C) + C - 1
        lead, cut_off = _chunks_to_floor(decays - HV * 7 * C, -HV * 7 * C, before, FLOOR, BLOCK)
        _store_walk(walks + pid * 6, lead * C, tl.where(cut_off, -1, n), tl.where(own_length == length, n, -1))
        own_end = (own_length + C - 1) // C
        behind = (own_end - before).to(tl.int64) * (HV * 7 * C)
        lead, cut_off = _chunks_to_floor(decays + behind, HV * 7 * C, (length + C - 1) // C - own_end, FLOOR, BLOCK)
        # Not what would fill the last chunk: those rows are the next sequence's.
        tokens = tl.minimum(lead * C, length - own_length)
        _store_walk(walks + pid * 6 + 3, tokens, tl.where(cut_off, -1, n), tl.where(index == 0, n, -1))
    else:
        _store_walk(walks + pid * 6, 0, -1, -1)
        _store_walk(walks + pid * 6 + 3, 0, -1, -1)


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
    """What each half of the chunks has of a document, and its head's walks there, as `_pieces_kernel` writes them.

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


_pieces, _halves = Launcher(_pieces_kernel), Launcher(_halves_kernel)


def cut(p: Problem, pieces: int) -> tuple[Problem, Tensor]:
    """The problem whose sequences are pieces of about 1/`pieces` of an average one, and each sequence's first piece.

    Chunks and tokens stay where they are: what was stored for the chunks of `p` serves for the pieces.
    """
    first_piece = torch.empty(p.num_sequences + 1, dtype=torch.int32, device=p.q.device)
    return _cut(p, pieces, None, first_piece), first_piece


def walks(p: Problem, pieces: int, gates: Tensor, more: int = 0) -> Problem:
    """As `cut`, with the walks of pieces and heads; for unit keys and beta to 2 alone.

    A sequence's first piece has `more` chunks besides.
    """
    return _cut(p, pieces, gates, None, more)


def last_walk(p: Problem, pieces: int, gates: Tensor) -> Problem:
    """The last piece of one sequence that is cut into pieces of one size, with its walk; as `walks`."""
    return _cut(p, pieces, gates, None, last=True)


def _cut(
    p: Problem, pieces: int, gates: Tensor | None, first_piece: Tensor | None, more: int = 0, last: bool = False
) -> Problem:
    C, heads = int(p.constants["C"]), 1 if gates is None else int(p.constants["HV"])
    total, sequences = p.q.shape[0], max(p.num_sequences, 1)
    size = -(-(total - sequences * more * C) // (sequences * pieces * C)) * C
    begin, num = 0, p.num_sequences + total // size
    if last:
        begin, num = num - 2, 1  # one more, an empty one, would be at the end
    piece_cu, piece_chunk = (torch.empty(x, dtype=torch.int32, device=p.q.device) for x in (num + 1, num))
    table = None if gates is None else torch.empty(num, heads, 6, dtype=torch.int32, device=p.q.device)
    _pieces(
        num * heads, (where(piece_cu), kind(p.cu), kind(p.first_chunk), gates is None),
        (gates, p.cu, p.first_chunk, piece_cu, piece_chunk, first_piece, table, p.num_sequences, p.length, size,
         more * C, begin),
        (heads, C, p.cu is not None, FLOOR, 128), num_warps=1,
    )  # fmt: skip
    return p._replace(
        num_sequences=num, length=total, cu=piece_cu, first_chunk=piece_chunk, order=None, walks=table,
        constants={**p.constants, "DOCUMENTS": True},
    )  # fmt: skip


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


def fold(p: Problem, first_piece: Tensor, H: Tensor, M: Tensor, first: Tensor | None, last: Tensor) -> Tensor:
    """The states [pieces, HV, K, V] that the pieces start from; `p` is the uncut problem, `last` is written.

    H [pieces, HV, K, V] and M [pieces, HV, K, K] are fp32.
    """
    c = p.constants
    starts = torch.empty_like(H)
    BV = 32
    launch(_fold_kernel, p.num_sequences * c["HV"] * -(-c["V"] // BV))(
        H, M, first, starts, last, first_piece, HV=c["HV"], K=c["K"], V=c["V"], BK=c["BK"], BV=BV,
        FIRST=first is not None, num_warps=8,
    )  # fmt: skip
    return starts
