"""The embedding by rows: tokens and their vectors travel between ranks, not the table.

Ranks that share out the table's rows (fsdp) gather one another's tokens; each looks up those that it has the rows of,
and a reduce-scatter adds to every token's vector nothing but zeros. Backward gathers the gradients of the vectors, from
the ranks that hold copies of its rows too, and sums up those of its own: the same on all copies. A table of 151,936
rows and its gradient are many times what a step's tokens take, and neither has a layer to travel behind.

Letters: B batch, T time, D model width, V the rank's rows of the table; M the tokens of several ranks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from q3n_functional.ops.embedding import embedding, embedding_gradient
from q3n_functional.parallel.collectives import _apply, _gathered, _scattered
from q3n_functional.parallel.placement import Parallel
from q3n_functional.parallel.rules import Layout


def goes_by_rows(tokens_BT: Tensor, parallel: Parallel | None) -> bool:
    """Whether `embed_rows` serves, and moves less than the table: fewer tokens in all than it has rows."""
    if parallel is None or parallel.tp.size > 1:
        return False
    where = cast(Layout, parallel.layouts.embed_tokens)
    ranks = parallel.tokens.size
    is_cut = parallel.fsdp.size == 1 or where.fsdp == 0
    return is_cut and ranks > 1 and ranks * tokens_BT.numel() < where.spec.shape[0]


def embed_rows(tokens_BT: Tensor, shard_VD: Tensor, parallel: Parallel) -> Tensor:
    """The vectors [B, T, D] of this rank's tokens, from the rank's shard of the table; every rank has as many."""
    fsdp, num = parallel.fsdp, shard_VD.shape[0]
    rows_M = _from_all(tokens_BT.flatten(), fsdp.size, fsdp.group) - fsdp.rank * num
    copies = [(axis.size, axis.group) for axis in (parallel.ep, parallel.replicate) if axis.size > 1]
    x_MD = _apply(_Rows, rows_M, shard_VD, fsdp.size, fsdp.group, copies)
    return x_MD.view(*tokens_BT.shape, -1)


class _Rows(torch.autograd.Function):
    """The rank's rows of the table, summed up over the ranks that have the others."""

    @staticmethod
    def forward(
        ctx: Any, rows_M: Tensor, shard_VD: Tensor, size: int, group: str, copies: list[tuple[int, str]]
    ) -> Tensor:
        x_MD = embedding(rows_M, shard_VD, (rows_M >= 0) & (rows_M < shard_VD.shape[0]))
        ctx.save_for_backward(rows_M)
        ctx.where, ctx.num = (size, group, copies), shard_VD.shape[0]
        return _scattered(x_MD, size, group, 0) if size > 1 else x_MD

    @staticmethod
    def backward(ctx: Any, dx_MD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_M,), (size, group, copies) = ctx.saved_tensors, ctx.where
        dx_MD = _from_all(dx_MD, size, group)
        for others in copies:
            rows_M, dx_MD = _from_all(rows_M, *others), _from_all(dx_MD, *others)
        return None, embedding_gradient(dx_MD, rows_M, ctx.num), None, None, None


def _from_all(x_M: Tensor, size: int, group: str) -> Tensor:
    return x_M if size == 1 else _gathered(x_M, size, group, 0)
