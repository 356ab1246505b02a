"""Attention on CUDA by torch's flash attention (Dao 2023), given where each sequence lies; whole rows by cuDNN's.

Chosen among what torch 2.11 to 2.13 offers for a head dim of 256, by examples/benchmarks/attention.py. Flash attention
takes documents by offsets that the device alone knows, without a mask, shares key/value heads without copies, and
prepares nothing for a shape. On Hopper cuDNN's takes 0.6 of its time for rows of one length, and builds a plan for each
length, 0.15 s once; its kernels for documents gave wrong gradients. (FlexAttention compiles for each shape, and its
backward takes twice the time; scaled_dot_product_attention with a mask writes the mask down.)
"""

from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops.registration import UnsupportedError

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def _check(q: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise UnsupportedError(f"q is {q.dtype}: flash attention takes bf16 and fp16")
    if q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 8:
        raise UnsupportedError(f"head dim {q.shape[3]}: flash attention takes multiples of 8 to {MAX_HEAD_DIM}")


def _rows(x: Tensor) -> Tensor:
    """int32 [B+1]: where each row of x begins among the rows laid end to end."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def _longest(x: Tensor, rows: bool = False) -> int:
    # At most a row. At 1, flash attention takes each token for a sequence, and orders the log-partitions otherwise:
    # right, and fast, where rows continue a cache, which nothing differentiates.
    return x.shape[1] if rows else max(x.shape[1], 2)


def _zero_behind(x_BTHK: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x with zeros behind the last document, which no kernel has written."""
    if cu_seqlens is not None:
        index = torch.arange(x_BTHK.shape[0] * x_BTHK.shape[1], device=x_BTHK.device)
        behind = (index >= cu_seqlens[-1]).view(*x_BTHK.shape[:2], 1, 1)
        x_BTHK.masked_fill_(behind, 0)
    return x_BTHK


def cudnn_serves(q: Tensor, k: Tensor, *given: Tensor | None) -> bool:
    """Whether cuDNN's kernels take whole rows, without `given` documents, cache or keys: on Hopper, where measured."""
    if any(x is not None for x in given) or torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    params: Any = torch.backends.cuda.SDPAParams  # its stub lacks an argument
    heads = (x.transpose(1, 2) for x in (q, k, k))
    return torch.backends.cuda.can_use_cudnn_attention(params(*heads, None, 0.0, True, True))


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Output and log-partitions of rows over rows of keys: all of these, or as many as come before a query."""
    heads = (x.contiguous().transpose(1, 2) for x in (q, k, v))
    o, lse_BHT1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads, None, True, 0.0, causal, False, scale=scale
    )
    return o.transpose(1, 2).contiguous(), lse_BHT1[..., 0].transpose(1, 2).contiguous()


def cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v; o and lse may be those over more keys, of which these are some."""
    heads = (x.contiguous().transpose(1, 2) for x in (do, q, k, v, o))
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads, lse.transpose(1, 2).contiguous()[..., None], unused, unused, None, None, None, q.shape[1], k.shape[1],
        0.0, causal, scale=scale,
    )  # fmt: skip
    return tuple(x.transpose(1, 2).contiguous() for x in gradients)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    keys: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-partitions [B, T, H], as `q3n_functional.ops.attention` says."""
    _check(q)
    if not q.numel():
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if cudnn_serves(q, k, cu_seqlens, lengths, keys):
        return cudnn_forward(q, k, v, scale)
    offsets = _rows(q) if cu_seqlens is None else cu_seqlens
    key_offsets, used = (offsets, None) if lengths is None else (_rows(k), lengths + offsets.diff())
    if keys is not None:
        key_offsets = keys
    cached = lengths is not None and cu_seqlens is None
    o, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
        *(_dense(x) for x in (q, k, v)), offsets, key_offsets, _longest(q, rows=cached), _longest(k), 0.0, True, False,
        scale=scale, seqused_k=used,
    )  # fmt: skip
    lse_BTH = lse_HN.reshape(q.shape[2], -1).mT.contiguous().view(q.shape[:3])
    return _zero_behind(o.view(q.shape), cu_seqlens), lse_BTH


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    keys: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    _check(q)
    if lengths is not None:
        raise UnsupportedError("flash attention does not differentiate a cache of keys")
    if not q.numel():
        return tuple(torch.empty_like(x) for x in (q, k, v))
    if cudnn_serves(q, k, cu_seqlens, keys):
        return cudnn_backward(do, q, k, v, o, lse, scale)
    offsets = _rows(q) if cu_seqlens is None else cu_seqlens
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout
    gradients = torch.ops.aten._flash_attention_backward(
        *(_dense(x) for x in (do, q, k, v, o)), lse.flatten(0, 1).mT.contiguous(), offsets,
        offsets if keys is None else keys,
        _longest(q), _longest(k), 0.0, True, unused, unused, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (d.view(x.shape) for d, x in zip(gradients, (q, k, v), strict=False))
    if keys is None:
        return tuple(_zero_behind(d, cu_seqlens) for d in (dq, dk, dv))
    seen = _seen(keys, offsets.diff() > 0, k)
    return _zero_behind(dq, cu_seqlens), *(d.masked_fill_(~seen, 0) for d in (dk, dv))


def _seen(keys: Tensor, asked: Tensor, k_BSGK: Tensor) -> Tensor:
    """bool [B, S, 1, 1]: the keys of sequences that have queries; no kernel has written the others' gradients."""
    bounds = keys.new_zeros(k_BSGK.shape[0] * k_BSGK.shape[1] + 1)
    bounds = bounds.scatter_add(0, keys[:-1].long(), asked.int()).scatter_add(0, keys[1:].long(), -asked.int())
    return (bounds[:-1].cumsum(0) > 0).view(*k_BSGK.shape[:2], 1, 1)


def _dense(x_BTHK: Tensor) -> Tensor:
    """x as [B*T, H, K]. Contiguous, because the results take its strides."""
    return x_BTHK.flatten(0, 1).contiguous()
