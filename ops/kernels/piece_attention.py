# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Attention of a context parallel rank's two pieces on CUDA, in blocks that cuDNN's attention takes.

Of 2 n pieces the rank has the r-th, A, and the r-th from the end, B. Blocks of keys, of one shape on every rank:

    A and B, each with its own keys, causal
    B with the first n pieces, all of which come before it
    n - 1 times one piece: A with the j-th where j < r, or B with the (n + j - r)-th

Which it is, is data. In backward the second line takes a turn for each piece. A block gives what its keys alone come
to, o and log-partition; of two such results for the same queries o is their mean, weighted by exp of the
log-partitions. In backward every block is given the whole o and log-partition, so that its probabilities are those of
the whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels import attention
from q3n_functional.ops.kernels.attention import cudnn_backward, cudnn_forward, cudnn_serves
from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.piece_attention import backward_by_offsets, forward_by_offsets, own

ROWS = 16


@triton.jit(do_not_specialize=["size"])
def _merge_kernel(o, lse, o_block, lse_block, applies, size, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    """Puts a block's result to o (fp32) [size, K] and lse [size] where `applies` says that it is of these queries."""
    if tl.load(applies):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        k = tl.arange(0, BK)
        inside = (row < size)[:, None] & (k < K)[None, :]
        at = row[:, None] * K + k[None, :]
        before = tl.load(lse + row, mask=row < size, other=0.0)
        new = tl.load(lse_block + row, mask=row < size, other=0.0)
        top = tl.maximum(before, new)
        total = tl.exp(before - top) + tl.exp(new - top)
        x = tl.load(o + at, mask=inside, other=0.0) * (tl.exp(before - top) / total)[:, None]
        y = tl.load(o_block + at, mask=inside, other=0.0).to(tl.float32) * (tl.exp(new - top) / total)[:, None]
        tl.store(o + at, x + y, mask=inside)
        tl.store(lse + row, top + tl.log(total), mask=row < size)


def _merge(o: Tensor, lse: Tensor, block: tuple[Tensor, Tensor], applies: Tensor) -> None:
    size, dim = lse.numel(), o.shape[3]
    launch(_merge_kernel, triton.cdiv(size, ROWS))(
        o, lse, *block, applies, size, K=dim, BK=triton.next_power_of_2(dim), ROWS=ROWS
    )


def _pieces(x_BSGK: Tensor, size: int) -> Tensor:
    pieces: Tensor = x_BSGK.unflatten(1, (x_BSGK.shape[1] // size, size))
    return pieces


def _some(x_BSGK: Tensor, piece: Tensor, size: int) -> Tensor:
    """One of the pieces that rows are cut into."""
    return _pieces(x_BSGK, size).index_select(1, piece).squeeze(1)


def _chosen(rank: Tensor, num: int, turn: int) -> tuple[Tensor, Tensor]:
    """Whether a turn is A's, and the piece of keys that it takes."""
    early = rank > turn
    return early, torch.where(early, turn, num + turn - rank)


def forward(q: Tensor, k: Tensor, v: Tensor, rank: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return the output and the log-partitions [B, T, H], as `q3n_functional.ops.piece_attention` says."""
    if not cudnn_serves(q, k):
        return forward_by_offsets(attention.forward, q, k, v, rank, scale)
    size, num = q.shape[1] // 2, k.shape[1] // q.shape[1]
    (a, b), always = q.chunk(2, 1), torch.ones(1, dtype=torch.bool, device=q.device)
    found = [
        cudnn_forward(part, _some(k, piece, size), _some(v, piece, size), scale)
        for part, piece in zip((a, b), own(q, k, rank).split(1), strict=True)
    ]
    sums = [(o.float(), lse.clone()) for o, lse in found]
    before = slice(0, num * size)
    _merge(*sums[1], cudnn_forward(b, k[:, before], v[:, before], scale, causal=False), always)
    for turn in range(num - 1):
        early, piece = _chosen(rank, num, turn)
        part = torch.where(early, a, b)
        block = cudnn_forward(part, _some(k, piece, size), _some(v, piece, size), scale, causal=False)
        for total, applies in zip(sums, (early, ~early), strict=True):
            _merge(*total, block, applies)
    o, lse = (torch.cat(x, 1) for x in zip(*sums, strict=True))
    return o.to(q.dtype), lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, rank: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    if not cudnn_serves(q, k):
        return backward_by_offsets(attention.backward, do, q, k, v, o, lse, rank, scale)
    size, num = q.shape[1] // 2, k.shape[1] // q.shape[1]
    given = [_pieces(x, size) for x in (do, q, o, lse)]
    dq, dk, dv = (_pieces(torch.zeros_like(x, dtype=torch.float32), size) for x in (q, k, v))

    def add(which: Tensor, piece: Tensor, causal: bool) -> None:
        """What the block of a part of q, 0 or 1, and a piece of keys adds."""
        do_, q_, o_, lse_ = (x.index_select(1, which).squeeze(1) for x in given)
        k_, v_ = _some(k, piece, size), _some(v, piece, size)
        found = cudnn_backward(do_, q_, k_, v_, o_, lse_, scale, causal=causal)
        for total, at, x in zip((dq, dk, dv), (which, piece, piece), found, strict=True):
            total.index_add_(1, at, x.float()[:, None])

    first, second = torch.arange(2, device=q.device).split(1)
    for which, piece in zip((first, second), own(q, k, rank).split(1), strict=True):
        add(which, piece, causal=True)
    for turn in range(num):
        add(second, first + turn, causal=False)
    for turn in range(num - 1):
        early, piece = _chosen(rank, num, turn)
        add(torch.where(early, first, second), piece, causal=False)
    return tuple(total.flatten(1, 2).to(x.dtype) for total, x in zip((dq, dk, dv), (q, k, v), strict=True))
