"""Rows of an embedding table, and the gradient of the table, whose sums have an order of their own.

Shapes: tokens [...]; table [V, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from q3n_functional.ops import sharding
from q3n_functional.ops.registration import Impl, composite, define, gradient, is_recorded, wide


def embedding(tokens: Tensor, table_VD: Tensor, kept: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """`table[tokens]` [..., D], zeros where `kept` is False.

    tokens: int32 or int64 [...], those that are kept in [0, V). table: [V, D]. kept: bool like tokens, None for all.
    The gradient of a row is the sum over its tokens, in fp32 (fp64 for fp64 tables) and in an order that the tokens
    alone decide, so that it repeats bit by bit. Saved for backward: the tokens.

    Raises ValueError for shapes that do not fit, IndexError (on CUDA a device-side assertion) for a token that is kept
    and not in the table.
    """
    if table_VD.ndim != 2 or (kept is not None and kept.shape != tokens.shape):
        shapes = ", ".join(str(tuple(x.shape)) for x in (tokens, table_VD, kept) if x is not None)
        raise ValueError(f"table must be [V, D] and kept like tokens, got tokens, table and kept of {shapes}")
    if not is_recorded(table_VD):
        return _looked_up(tokens, table_VD, kept)
    x: Tensor = _embedding(tokens, table_VD, kept, impl)
    return x


def embedding_gradient(dx_MD: Tensor, rows_M: Tensor, num: int, impl: Impl = "auto") -> Tensor:
    """The gradient [num, D] of a table from that of its rows [M, D]; rows outside [0, num) have none."""
    dtable: Tensor = _embedding_backward(dx_MD, rows_M, num, impl)
    return dtable


def _looked_up(tokens: Tensor, table_VD: Tensor, kept: Tensor | None) -> Tensor:
    x = functional.embedding(tokens if kept is None else tokens.where(kept, 0), table_VD)
    return x if kept is None else x.masked_fill(~kept[..., None], 0)


def _backward(dx: Tensor, rows: Tensor, num: int) -> Tensor:
    # No gradient goes to the row behind the last.
    rows = rows.where((rows >= 0) & (rows < num), num)
    wide_dx = dx.to(wide(dx.dtype))
    dtable: Tensor = torch.ops.aten.embedding_dense_backward(wide_dx, rows, num + 1, num, False)
    return dtable[:num].to(dx.dtype, copy=True)


_backward_op = define(
    "embedding_backward",
    "(Tensor dx, Tensor rows, int num, str impl) -> Tensor",
    reference=_backward,
    fake=lambda dx, rows, num: dx.new_empty(num, dx.shape[1]),
    kernel="embedding:backward",
)
_embedding_backward = gradient(_backward_op)
sharding.register(_backward_op, ())


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, kept: Tensor | None, impl: Impl) -> Tensor:
        ctx.num, ctx.impl = len(table), impl
        ctx.save_for_backward(tokens if kept is None else tokens.where(kept, len(table)))
        return _looked_up(tokens, table, kept)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return None, embedding_gradient(dx.flatten(0, -2), rows.flatten(), ctx.num, ctx.impl), None, None


_embedding = composite("embedding(Tensor tokens, Tensor table, Tensor? kept, str impl) -> Tensor", _Embedding.apply)
