"""Causal attention of a context parallel rank's two pieces of whole rows.

Letters: B batch, T queries of a row (both pieces), S keys of a row, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops.attention import backward, check, forward
from q3n_functional.ops.registration import Impl, define, differentiable, gradient, wide


def piece_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, rank: Tensor, scale: float | None = None, impl: Impl = "auto"
) -> Tensor:
    """`softmax(scale q k^T) v` [B, T, H, K] where q are two of the pieces that rows of S tokens are cut into.

    q: [B, T, H, K]; k, v: [B, S, G, K], G a divisor of H, of one dtype. S is a multiple n of T, and rows are cut into 2
    n pieces: q has the `rank`-th (int64 [1], below n) and the rank-th from the end, which together see as many keys on
    every rank (Grattafiori et al. 2024, The Llama 3 herd, section 3.3.2). scale defaults to 1/sqrt(K).

    The rank is data, so that all ranks compile one program. On CUDA the pieces' keys are taken in blocks, by cuDNN's
    attention on Hopper (bf16 and fp16, head dims to 256 that are multiples of 8), n + 2 of them, and put together by
    their log-partitions (Liu et al. 2023, Ring Attention); elsewhere flash attention takes each piece. The output
    repeats bit by bit, the gradients do not: those of blocks that are not causal vary. Saved for backward: the inputs,
    the output, and the fp32 log-partitions.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    check(q_BTHK, k_BSGK, v_BSGK)
    length, keys = q_BTHK.shape[1], k_BSGK.shape[1]
    if len(q_BTHK) != len(k_BSGK) or length % 2 or not length or keys % length:
        raise ValueError(
            f"q {tuple(q_BTHK.shape)} must be two pieces of each of {len(k_BSGK)} rows of {keys} keys, which an even "
            "number of them makes up"
        )
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    o_BTHK: Tensor = _piece_attention(q_BTHK, k_BSGK, v_BSGK, rank, scale, impl)[0]
    return o_BTHK


def own(q: Tensor, k: Tensor, rank: Tensor) -> Tensor:
    """int64 [2]: which of the rows' pieces q has."""
    return torch.cat([rank, 2 * k.shape[1] // q.shape[1] - 1 - rank])


def _offsets(q: Tensor, k: Tensor, rank: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each piece int32 [2 B]: where its queries of each row begin and end, and the keys that the last one sees."""
    size = q.shape[1] // 2
    rows_B1, ends_2 = (torch.arange(n, dtype=torch.int32, device=q.device) for n in (len(q), 2))
    for piece in own(q, k, rank).int():
        queries = (rows_B1[:, None] + ends_2).flatten() * size
        yield queries, (rows_B1[:, None] * k.shape[1] + ends_2 * (piece + 1) * size).flatten()


def forward_by_offsets(
    attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, rank: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Output and log-partitions by attention that takes offsets of queries and keys."""
    found = [
        attend(part, k, v, queries, None, keys, scale)
        for part, (queries, keys) in zip(q.chunk(2, 1), _offsets(q, k, rank), strict=True)
    ]
    return tuple(torch.cat(x, 1) for x in zip(*found, strict=True))


def backward_by_offsets(
    attend: Callable[..., Any],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rank: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """The same of the gradients; keys' and values' are added in fp32 or wider."""
    parts = zip(*(x.chunk(2, 1) for x in (do, q, o, lse)), _offsets(q, k, rank), strict=True)
    found = [
        attend(do_, q_, k, v, o_, lse_, queries, None, keys, scale) for do_, q_, o_, lse_, (queries, keys) in parts
    ]
    dq, *more = zip(*found, strict=True)
    sums = (first.to(wide(k.dtype)) + second for first, second in more)
    return torch.cat(dq, 1), *(x.to(k.dtype) for x in sums)


_forward = functools.partial(forward_by_offsets, forward)
_backward = functools.partial(backward_by_offsets, backward)


_piece_attention_backward = gradient(
    define(
        "piece_attention_backward",
        "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor rank, float scale, str impl) "
        "-> (Tensor, Tensor, Tensor)",
        reference=_backward,
        fake=lambda do, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
        kernel="piece_attention:backward",
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, rank, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, *output, rank)
    ctx.mark_non_differentiable(output[1])


def _backward_of_op(ctx: Any, do: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 6
    return (*_piece_attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.impl), None, None, None)


_piece_attention = differentiable(
    define(
        "piece_attention",
        "(Tensor q, Tensor k, Tensor v, Tensor rank, float scale, str impl) -> (Tensor, Tensor)",
        reference=_forward,
        fake=lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide(q.dtype))),
        kernel="piece_attention:forward",
    ),
    _setup_context,
    _backward_of_op,
    rows=("q", "k", "v"),
)
