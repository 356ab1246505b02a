"""Documents in a batch: where they lie, each token's position, and which tokens predict which.

A batch is tokens [B, T]. Without `Documents` each row is one document. With them, `cu_seqlens` cuts the B*T tokens,
rows laid end to end, into documents; a document never crosses the end of a row. `cu_seqlens` may repeat an entry (an
empty document), so a fixed length serves any number of documents, and may stop short of B*T: what follows is padding.
Everything here is tensor arithmetic of static shapes, so it traces under torch.compile and never waits for a device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from q3n_functional.ops.registration import check_documents, is_readable

IGNORE = -100
"""The label that no loss counts, as in torch.nn.functional.cross_entropy and transformers."""


class Documents(NamedTuple):
    """Where the documents of a [B, T] batch lie.

    cu_seqlens: int32 [N+1], offsets into the flattened batch. positions_BT: int32, from 0 in every document.
    segment_ids_BT: int32, the document's index. valid_BT: bool, false on padding.
    """

    cu_seqlens: Tensor
    positions_BT: Tensor
    segment_ids_BT: Tensor
    valid_BT: Tensor


def lengths(documents: Documents) -> Tensor:
    """int32 [B, T]: the length of each token's own document, 0 on padding after the last one."""
    ends = torch.cat([documents.cu_seqlens[1:], documents.cu_seqlens[-1:]])
    return (ends - documents.cu_seqlens)[documents.segment_ids_BT]


def documents(cu_seqlens: Tensor, batch: int, length: int) -> Documents:
    """`Documents` of a [batch, length] batch from `cu_seqlens` [N+1] (int32 on the tokens' device).

    Raises ValueError for another shape or dtype and, on the CPU outside of a trace, for offsets that fall, do not begin
    at 0, end behind the batch, or let a document cross the end of a row.
    """
    check_documents(cu_seqlens, batch * length)
    if is_readable(cu_seqlens):
        _check_rows(cu_seqlens, length)
    index, ends = torch.arange(batch * length, dtype=torch.int32, device=cu_seqlens.device), cu_seqlens[1:]
    # A token's document is the number of those that end before it. (searchsorted would do, but complains under vmap.)
    counts = ends.new_zeros(batch * length + 1).scatter_add(0, ends.long(), torch.ones_like(ends))
    segments = counts[:-1].cumsum(0, dtype=torch.int32)
    positions, valid = index - cu_seqlens[segments], index < cu_seqlens[-1]
    return Documents(cu_seqlens, *(x.view(batch, length) for x in (positions, segments, valid)))


def _check_rows(cu_seqlens: Tensor, length: int) -> None:
    begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
    crossing = (ends > begins) & (begins // length != (ends - 1) // length)
    if crossing.any():
        n = int(crossing.int().argmax())
        raise ValueError(
            f"document {n} has tokens {int(begins[n])} to {int(ends[n])}, over the end of a row of {length}: "
            "cut it there"
        )


def documents_from_mask(mask_BT: Tensor) -> Documents:
    """`Documents` of a padded batch: row b's document runs from its first to its last true mask entry.

    Padding on either side becomes a document of its own, which nothing else sees and no loss counts. A false entry
    between true ones is a token of the document that carries no loss. A row without any true entry is all padding.
    """
    batch, length = mask_BT.shape
    kept = (mask_BT != 0).to(torch.int32)
    any_row = kept.amax(1)
    first = kept.argmax(1) * any_row
    end = (length - kept.flip(1).argmax(1)) * any_row
    rows = torch.arange(batch, device=mask_BT.device) * length
    bounds = torch.stack([rows, rows + first, rows + end], 1).flatten()
    cu_seqlens = torch.cat([bounds, rows[-1:] + length]).to(torch.int32)
    # Not `_replace`, whose result Dynamo of torch 2.11 cannot return from a graph.
    return Documents(*documents(cu_seqlens, batch, length)[:3], mask_BT != 0)


def shift(values_BT: Tensor, documents: Documents | None, by: int, fill: int) -> Tensor:
    """`values[b, t + by]` where that is a valid token of the same document as `t`, else `fill`."""
    later_BT = _later(values_BT, by, fill)
    return later_BT if documents is None else torch.where(same_document(documents, by), later_BT, fill)


def same_document(documents: Documents, by: int) -> Tensor:
    """bool [B, T]: whether `t + by` is a valid token of the document that the valid token `t` belongs to."""
    segments_BT, valid_BT = documents.segment_ids_BT, documents.valid_BT
    return (_later(segments_BT, by, -1) == segments_BT) & valid_BT & _later(valid_BT, by, 0)


def _later(values_BT: Tensor, by: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values_BT, (0, by), value=fill)[:, by:]
