"""Causal softmax attention over rows, packed documents, or a cache of keys.

Letters: B batch, T queries of a row, N sequences of keys, S keys of one, H query heads, G key/value heads, R query
heads of a key/value head, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q3n_functional.ops.registration import (
    Impl,
    Outputs,
    check_documents,
    define,
    differentiable,
    gradient,
    wide,
)

BLOCK = 128
"""Queries that the reference takes at once where it has to write down which keys they see."""


def attention(
    q_BTHK: Tensor,
    k_NSGK: Tensor,
    v_NSGK: Tensor,
    cu_seqlens: Tensor | None = None,
    lengths_N: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
    keys: Tensor | None = None,
) -> Tensor:
    """`softmax(scale q k^T) v` [B, T, H, K] over the keys that each query may see; no [T, S] matrix is kept.

    q: [B, T, H, K]; k, v: [N, S, G, K], G a divisor of H, of one dtype. A query sees what comes before it, and itself:
    - in its row, N = B and S = T;
    - in its document with cu_seqlens (int32, see `q3n_functional.packing`), N = B and S = T;
    - in a cache with lengths_N (int32 [N]), whose row n belongs to query row n, or with cu_seqlens to document n: the
      t-th query of a row or document sees the first lengths + t + 1 of its S keys;
    - with keys (int32, of cu_seqlens' shape), in rows of S keys that are more than the queries: sequence n has the
      queries from cu_seqlens[n] and the keys from keys[n], to the next's, and its last query sees all of its keys.
    What lies behind the last document gives zeros and has zero gradients.

    scale defaults to 1/sqrt(K). Saved for backward: the inputs, the output, and the fp32 log-partitions, 4 H bytes a
    token. On CUDA, `impl="triton"` asks for torch's flash attention (Dao 2023), or on Hopper for whole rows cuDNN's,
    which take bf16 and fp16 and head dims to 256 that are multiples of 8, and differentiate all but the cache; flash
    attention's dq is repeatable bit by bit only under torch.use_deterministic_algorithms.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    check(q_BTHK, k_NSGK, v_NSGK)
    check_documents(cu_seqlens, q_BTHK.shape[0] * q_BTHK.shape[1])
    if keys is None:
        _check_lengths(q_BTHK, k_NSGK, cu_seqlens, lengths_N)
    else:
        _check_keys(q_BTHK, k_NSGK, cu_seqlens, lengths_N, keys)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    o_BTHK: Tensor = _attention(q_BTHK, k_NSGK, v_NSGK, cu_seqlens, lengths_N, keys, scale, impl)[0]
    return o_BTHK


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for shapes or dtypes that do not fit each other."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [B, T, H, K], k and v [N, S, G, K], got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads evenly")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _check_lengths(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> None:
    if lengths is None:
        if q.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"queries in {tuple(q.shape[:2])} and keys in {tuple(k.shape[:2])} differ: with a cache, give lengths"
            )
        return
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if k.shape[0] != num or lengths.shape != (num,) or lengths.dtype != torch.int32:
        raise ValueError(
            f"{num} sequences of queries need a cache of {num} rows and lengths int32 [{num}], "
            f"got {k.shape[0]} rows and {lengths.dtype} {tuple(lengths.shape)}"
        )


def _check_keys(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, keys: Tensor) -> None:
    if cu_seqlens is None or lengths is not None or keys.shape != cu_seqlens.shape or len(q) != len(k):
        raise ValueError(
            f"keys {tuple(keys.shape)} are offsets beside cu_seqlens of the same shape, without lengths, and "
            f"{len(q)} rows of queries need as many of keys, got {len(k)}"
        )
    check_documents(keys, k.shape[0] * k.shape[1], "keys", from_first=False)


class Span(NamedTuple):
    """A range of consecutive tokens in some rows of a batch."""

    rows: slice
    tokens: slice


def _spans(length: int, offsets: list[int]) -> list[Span]:
    """Each document's range in rows of `length` tokens."""
    spans = []
    for start, end in pairwise(offsets):
        row = start // max(length, 1)
        spans.append(Span(slice(row, row + 1), slice(start - row * length, end - row * length)))
    return spans


def _sequences(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, keys: Tensor | None
) -> list[tuple[Span, Span]]:
    """The queries and keys that attend together; the last query sees all of the keys."""
    whole = slice(0, q.shape[1])
    if cu_seqlens is not None:
        queries = _spans(q.shape[1], cu_seqlens.tolist())
    elif lengths is not None:
        queries = [Span(slice(row, row + 1), whole) for row in range(q.shape[0])]
    else:
        queries = [Span(slice(0, q.shape[0]), whole)]
    if keys is not None:
        return list(zip(queries, _spans(k.shape[1], keys.tolist()), strict=True))
    if lengths is None:
        return [(span, span) for span in queries]
    stops = [
        before + span.tokens.stop - span.tokens.start for before, span in zip(lengths.tolist(), queries, strict=True)
    ]
    return [
        (span, Span(slice(n, n + 1), slice(0, stop))) for n, (span, stop) in enumerate(zip(queries, stops, strict=True))
    ]


def _blocks(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, among: Tensor | None
) -> Iterator[tuple[Span, Span]]:
    """The same in blocks of at most `BLOCK` queries; what the CPU's kernel knows as a triangle stays whole."""
    for (rows, queries), (key_rows, keys) in _sequences(q, k, cu_seqlens, lengths, among):
        triangle = queries.stop - queries.start == keys.stop - keys.start
        size = max(q.shape[1], 1) if triangle and q.device.type == "cpu" else BLOCK
        for start in range(queries.start, queries.stop, size):
            stop = min(start + size, queries.stop)
            seen = slice(keys.start, keys.stop - (queries.stop - stop))
            yield Span(rows, slice(start, stop)), Span(key_rows, seen)


def _bias(q: Tensor, k: Tensor) -> Tensor:
    """[T, S]: minus infinity where a query does not see a key; the last sees them all."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).triu(num_keys - num_queries + 1)
    return torch.zeros_like(hidden, dtype=wide(q.dtype)).masked_fill(hidden, -torch.inf)


# One block by torch's flash attention for CPUs, [B, H, T, K], which sees no mask where the block is a triangle.


def _flash_options(q: Tensor, k: Tensor, scale: float) -> tuple[bool, dict[str, Any]]:
    triangle = q.shape[1] == k.shape[1]
    return triangle, {"attn_mask": None if triangle else _bias(q, k).to(q.dtype), "scale": scale}


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    triangle, options = _flash_options(q, k, scale)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, triangle, **options)
    return o.transpose(1, 2), lse.transpose(1, 2)


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    triangle, options = _flash_options(q, k, scale)
    heads = (x.transpose(1, 2) for x in (do, q, k, v, o, lse))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, 0.0, triangle, **options)
    return tuple(x.transpose(1, 2) for x in gradients)


# The same written out, for other devices.


def _grouped(x_BTHK: Tensor, groups: int) -> Tensor:
    batch, length, heads, dim = x_BTHK.shape
    return x_BTHK.to(wide(x_BTHK.dtype)).view(batch, length, groups, heads // groups, dim)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, G, R, T, S]."""
    products = torch.einsum("btgrk,bsgk->bgrts", _grouped(q, k.shape[2]), k.to(wide(k.dtype)))
    return products * scale + _bias(q, k)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale)
    o = torch.einsum("bgrts,bsgk->btgrk", scores.softmax(-1), v.to(wide(v.dtype)))
    return o.flatten(2, 3), scores.logsumexp(-1).flatten(1, 2).transpose(1, 2)


def _cached(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All rows at once behind their caches, at the cost of the room in these: a CUDA graph cannot ask for lengths."""
    scores = torch.einsum("btgrk,bsgk->bgrts", _grouped(q, k.shape[2]), k.to(wide(k.dtype))) * scale
    last_BT = lengths[:, None] + torch.arange(q.shape[1], device=q.device)
    seen_BTS = torch.arange(k.shape[1], device=q.device) <= last_BT[:, :, None]
    scores = scores.masked_fill(~seen_BTS[:, None, None], -torch.inf)
    read = v.to(wide(v.dtype)).masked_fill(~seen_BTS[:, -1, :, None, None], 0)  # what lies behind may be anything
    o = torch.einsum("bgrts,bsgk->btgrk", scores.softmax(-1), read)
    return o.flatten(2, 3).to(q.dtype), scores.logsumexp(-1).flatten(1, 2).transpose(1, 2)


def _plain_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    p, wide_do = _scores(q, k, scale).softmax(-1), _grouped(do, k.shape[2])
    dp = torch.einsum("btgrk,bsgk->bgrts", wide_do, v.to(wide(v.dtype)))
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bgrts,bsgk->btgrk", ds, k.to(wide(k.dtype))).flatten(2, 3)
    dk = torch.einsum("bgrts,btgrk->bsgk", ds, _grouped(q, k.shape[2]))
    return dq, dk, torch.einsum("bgrts,btgrk->bsgk", p, wide_do)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    among: Tensor | None,
    scale: float,
) -> Outputs:
    """The reference: output and log-partitions [B, T, H]."""
    if lengths is not None and cu_seqlens is None and q.device.type != "cpu":
        return _cached(q, k, v, lengths, scale)
    block = _flash_forward if q.device.type == "cpu" else _plain_forward
    q, k, v = (x.contiguous() for x in (q, k, v))  # flash attention reads any other last dim wrongly
    o, lse = q.new_zeros(q.shape), q.new_zeros(q.shape[:3], dtype=wide(q.dtype))
    for queries, keys in _blocks(q, k, cu_seqlens, lengths, among):
        o[queries], lse[queries] = block(q[queries], k[keys], v[keys], scale)
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    among: Tensor | None,
    scale: float,
) -> Outputs:
    """The reference's gradients of q, k and v."""
    block = _flash_backward if q.device.type == "cpu" else _plain_backward
    do, q, k, v = (x.contiguous() for x in (do, q, k, v))
    dq, (dk, dv) = q.new_zeros(q.shape), (x.new_zeros(x.shape, dtype=wide(x.dtype)) for x in (k, v))
    for queries, keys in _blocks(q, k, cu_seqlens, lengths, among):
        dq[queries], *more = block(do[queries], q[queries], k[keys], v[keys], o[queries], lse[queries], scale)
        dk[keys] += more[0]
        dv[keys] += more[1]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


_attention_backward = gradient(
    define(
        "attention_backward",
        "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? cu_seqlens, Tensor? lengths, "
        "Tensor? keys, float scale, str impl) -> (Tensor, Tensor, Tensor)",
        reference=backward,
        fake=lambda do, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
        kernel="attention:backward",
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _backward_of_op(ctx: Any, do: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 8
    return (*_attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.impl), None, None, None, None, None)


_attention = differentiable(
    define(
        "attention",
        "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? lengths, Tensor? keys, "
        "float scale, str impl) -> (Tensor, Tensor)",
        reference=forward,
        fake=lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide(q.dtype))),
        kernel="attention:forward",
    ),
    _setup_context,
    _backward_of_op,
    rows=("q", "k", "v", "lengths"),
)
