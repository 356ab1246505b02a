# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The gated delta rule token by token, for decoding: a program holds a slice of a state, read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.gated_delta_rule import (
    _cdiv,
    _flat,
    _log_decay,
    _power_of_2,
    _step_size,
    check_heads,
)
from q3n_functional.ops.kernels.launch import launch


@triton.jit(do_not_specialize=["num_sequences", "T", "total"])
def _recurrent_kernel(
    q, k, v, g, beta, A_log, dt_bias, initial, final, o, cu, num_sequences, T, total, scale, beta_scale,
    q_token, q_head, k_token, k_head, v_token, v_head, g_token, g_head, beta_token, beta_head,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOCUMENTS: tl.constexpr, INITIAL: tl.constexpr, ACTIVATE: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """One sequence, value head and slice of V; with documents the last programs write zeros to the stream's tail."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    hv = (pid // NV) % HV
    hk = hv // (HV // HK)
    n = pid // (NV * HV)
    rows = tl.arange(0, BK)
    cols = (pid % NV) * BV + tl.arange(0, BV)
    if DOCUMENTS:
        first = tl.load(cu + n).to(tl.int64)
        end = tl.load(cu + n + 1, mask=n < num_sequences, other=total).to(tl.int64)
    else:
        first = n.to(tl.int64) * T
        end = first + T
    if n == num_sequences:
        for t in range(first, end):
            tl.store(o + (t * HV + hv) * V + cols, tl.zeros([BV], o.dtype.element_ty), mask=cols < V)
    else:
        at = rows[:, None] * V + cols[None, :]
        inside = (rows < K)[:, None] & (cols < V)[None, :]
        S = tl.zeros([BK, BV], tl.float32)
        if INITIAL:
            S += tl.load(initial + (n.to(tl.int64) * HV + hv) * (K * V) + at, mask=inside, other=0.0).to(tl.float32)
        for t in range(first, end):
            qq = tl.load(q + t * q_token + hk * q_head + rows, mask=rows < K, other=0.0).to(tl.float32)
            kk = tl.load(k + t * k_token + hk * k_head + rows, mask=rows < K, other=0.0).to(tl.float32)
            vv = tl.load(v + t * v_token + hv * v_head + cols, mask=cols < V, other=0.0).to(tl.float32)
            decay = tl.load(g + t * g_token + hv * g_head).to(tl.float32)
            step = tl.load(beta + t * beta_token + hv * beta_head).to(tl.float32)
            decay, _ = _log_decay(tl.full([1], decay, tl.float32), A_log, dt_bias, hv, ACTIVATE)
            step, _ = _step_size(tl.full([1], step, tl.float32), beta_scale, SIGMOID)
            if NORMALISE:
                qq *= tl.rsqrt(tl.sum(qq * qq, 0) + 1e-6)
                kk *= tl.rsqrt(tl.sum(kk * kk, 0) + 1e-6)
            S *= tl.exp(decay)[:, None]
            u = step * (vv - tl.sum(S * kk[:, None], 0))
            S = tl.fma(tl.broadcast_to(kk[:, None], [BK, BV]), tl.broadcast_to(u[None, :], [BK, BV]), S)
            out = tl.sum(S * (scale * qq)[:, None], 0)
            tl.store(o + (t * HV + hv) * V + cols, out.to(o.dtype.element_ty), mask=cols < V)
            if EVERY:
                tl.store(final + (t * HV + hv) * (K * V) + at, S, mask=inside)
        if not EVERY:
            tl.store(final + (n.to(tl.int64) * HV + hv) * (K * V) + at, S, mask=inside)


def recurrent_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool, beta_scale: float,
    every_state: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o and the final state (fp32), or with `every_state` those behind all tokens of the rows."""
    check_heads(q, v)
    batch, length, key_heads, K = q.shape
    heads, V = v.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty(batch, length, heads, V, dtype=v.dtype, device=v.device)
    where = (batch, length) if every_state else (sequences,)
    final = torch.empty(*where, heads, K, V, dtype=torch.float32, device=v.device)
    cu = None if cu_seqlens is None else cu_seqlens.contiguous()
    state = None if initial_state is None else initial_state.contiguous()
    q, k, v, g, beta = (_flat(x) for x in (q, k, v, g, beta))
    BK = _power_of_2(K)
    BV = min(_power_of_2(V), 4096 // BK)  # 128 numbers a thread: the state of one warp stays in registers
    programs = (sequences + (cu is not None)) * heads * _cdiv(V, BV)
    if programs:
        launch(_recurrent_kernel, programs)(
            q, k, v, g, beta, A_log, dt_bias, state, final, o, cu, sequences, length, batch * length, scale, beta_scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride(), *beta.stride(),
            HK=key_heads, HV=heads, K=K, V=V, BK=BK, BV=BV, DOCUMENTS=cu is not None, INITIAL=state is not None,
            ACTIVATE=A_log is not None, SIGMOID=beta_scale != 0, NORMALISE=qk_l2norm,
            EVERY=every_state, num_warps=1,
            enable_fp_fusion=False,  # what ptxas fuses depends on the code around, so bits would on EVERY
        )  # fmt: skip
    return o, final


def recurrent_every_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, scale: float, qk_l2norm: bool, beta_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o and the states behind all tokens (fp32)."""
    tensors = (q, k, v, g, beta, A_log, dt_bias, initial_state, None)
    return recurrent_forward(*tensors, scale, qk_l2norm, beta_scale, every_state=True)
