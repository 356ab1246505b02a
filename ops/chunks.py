"""Sequences cut into chunks: which tokens make up which chunk, and what is kept for each.

Letters: B batch, T time, H heads, S sequences; R rows of chunks that are walked side by side, M chunks in each,
C tokens in a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATES_BYTES = 2**29
"""What states and their gradients of all chunks may take in backward on Hopper; beyond it they are made in parts."""


def num_chunks(batch: int, length: int, num_documents: int | None, chunk_size: int) -> int:
    """Chunks that are laid out: exact for rows, an upper bound that depends on shapes only for documents."""
    if num_documents is None:
        return batch * -(-length // chunk_size)
    return -(-(batch * length) // chunk_size) + num_documents


def saved_shapes(v_BTHV: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what forward saves, by chunks: vectors of the gates, which only the kernels use, and the inverse."""
    batch, length, heads, _ = v_BTHV.shape
    num = num_chunks(batch, length, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, chunk_size)
    return (num, heads, 7, chunk_size), (num, heads, chunk_size, chunk_size)


class Chunks(NamedTuple):
    """Which tokens make up which chunk. A chunk belongs to one sequence and starts at a multiple of C in it.

    token: [R, M, C] into the B*T tokens, or B*T where the chunk has ended. sequence: [R, M], or S for a chunk without
    tokens. first, last: [R, M], whether the chunk opens or closes its sequence.
    """

    token: Tensor
    sequence: Tensor
    first: Tensor
    last: Tensor


def _row_chunks(batch: int, length: int, size: int, device: torch.device) -> Chunks:
    num = max(-(-length // size), 1)
    position = torch.arange(num * size, device=device).view(num, size)
    row = torch.arange(batch, device=device)
    token = torch.where(position < length, row[:, None, None] * length + position, batch * length)
    number = torch.arange(num, device=device).expand(batch, num)
    return Chunks(token, row[:, None].expand(batch, num), number == 0, number == num - 1)


def _document_chunks(cu_seqlens: Tensor, tokens: int, size: int) -> Chunks:
    cu_seqlens = cu_seqlens.long()
    documents = cu_seqlens.shape[0] - 1
    ends = ((cu_seqlens.diff() + size - 1) // size).cumsum(0)
    padded = torch.cat([ends.new_zeros(1), ends])
    # A count that the device holds would cost a wait; there the static bound serves.
    num = max(int(padded[-1]), 1) if ends.device.type == "cpu" else -(-tokens // size) + documents
    chunk = torch.arange(num, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, chunk, right=True)
    local = chunk - padded[sequence]
    bounds = torch.cat([cu_seqlens, cu_seqlens[-1:]])
    token = bounds[sequence, None] + local[:, None] * size + torch.arange(size, device=cu_seqlens.device)
    token = torch.where(token < bounds[sequence + 1, None], token, tokens)
    last = torch.cat([padded[1:], padded[-1:]])[sequence] == chunk + 1
    return Chunks(token[None], sequence[None], (local == 0)[None], last[None])


def chunk_table(x_BT: Tensor, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """The chunks of `size` tokens of x_BT's rows, or of its documents."""
    batch, length = x_BT.shape[:2]
    if cu_seqlens is None:
        return _row_chunks(batch, length, size, x_BT.device)
    return _document_chunks(cu_seqlens, batch * length, size)


def gather(x_BTH: Tensor, chunks: Chunks) -> Tensor:
    """[B, T, H, ...] to [R, M, H, C, ...], zeros behind the end of a sequence."""
    flat = x_BTH.flatten(0, 1)
    padded = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
    return padded[chunks.token].transpose(2, 3)


def scatter(x_RMHC: Tensor, chunks: Chunks, like_BT: Tensor) -> Tensor:
    """The inverse of `gather`, with zeros for the tokens outside every sequence."""
    batch, length = like_BT.shape[:2]
    x = x_RMHC.transpose(2, 3)
    flat = x.new_zeros(batch * length + 1, *x.shape[3:])
    flat[chunks.token] = x
    return flat[:-1].view(batch, length, *x.shape[3:])
