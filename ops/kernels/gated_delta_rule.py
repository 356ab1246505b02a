# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The chunked gated delta rule in Triton: forward and backward, documents, fused gates and key normalisation.

Per value head and chunk, with the state S [K, V] at the chunk's start, log-decays summed inside the chunk to c, and
gam = exp(c), dec = exp(c_last - c), Gam_ij = exp(c_i - c_j) for i >= j (every exponent is <= 0):

    M = Gam * K K^T strictly below the diagonal            Y = -(I + M diag(beta))^-1 M
    W = V - gam (K S)           U = W + Y (beta W)         V' = beta U
    O = scale gam (Q S) + P V'                             P = scale Gam * Q K^T on and below the diagonal
    S <- gam_last S + K^T (dec V')

and backward, with dS the gradient of the state after the chunk:

    dV' = P^T dO + dec (K dS)   Z = dV' + Y^T (beta dV')   dV = beta Z
    dS <- gam_last dS + Q^T (scale gam dO) - K^T (gam beta Z)
    dbeta = rowsum(U * Z)       X = -Gam * (beta Z)(beta U)^T strictly below the diagonal
    dQ = scale gam (dO S^T) + D K            D = scale Gam * dO V'^T on and below the diagonal
    dK = D^T Q + (X + X^T) K + dec (V' dS^T) - gam beta (Z S^T)

Y (not the inverse itself) is stored because (I + diag(beta) M)^-1 = I + diag(beta) Y and (I + M diag(beta))^-1 =
I + Y diag(beta): beta then only scales rows, nothing is divided by it (beta = 0 is legal), and the identity is added in
fp32. L2 normalisation of q and k enters as row scales too: no kernel ever holds a normalised copy.

Kernels: _chunk_kernel (parallel over chunks: gates, Y, P), _scan_kernel (sequential: o and the final state, or the
states h and U that backward needs), _reverse_scan_kernel (sequential, from the last chunk: dS and Z), _gradient_kernel
(parallel: every gradient). Chunks of documents come from a table that _table_kernel builds on the device. On Hopper,
where head dims of 128, chunks of 64 and 16 bits allow them, gates and Y are those of gated_delta_rule_hopper_chunks.py
(for unit keys and beta to 1), the scans, which make P as they go, those of gated_delta_rule_hopper.py, the gradients of
whole chunks those of gated_delta_rule_hopper_gradient.py. Few heads and long sequences: gated_delta_rule_pieces.py.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from q3n_functional.ops.chunks import STATES_BYTES, num_chunks, saved_shapes
from q3n_functional.ops.kernels import gated_delta_rule_hopper as hopper
from q3n_functional.ops.kernels.gated_delta_rule_hopper_chunks import launch_chunks
from q3n_functional.ops.kernels.gated_delta_rule_hopper_gradient import launch_gradients
from q3n_functional.ops.kernels.gated_delta_rule_pieces import (
    LEAD,
    cut,
    fold,
    halves,
    last_walk,
    place_by_length,
    walks,
)
from q3n_functional.ops.kernels.launch import Launcher, kind, launch, where
from q3n_functional.ops.registration import UnsupportedError

CHUNK_SIZES = (16, 32, 64)
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_SMS = hopper.NUM_SMS
WALK = 32  # chunks that a piece has at least


@triton.jit(do_not_specialize=["num_docs", "num_tokens", "num_chunks"])
def _table_kernel(
    cu, table, first_chunk, order, num_docs, num_tokens, num_chunks, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write table[chunk] = (first token, length); program n is document n, the last one is the tail of the stream.

    A tail chunk has a negative length (its rows are to be zeroed), an unused entry length 0. order: longest first.
    """
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    chunk = 0
    for m in range(0, n, BLOCK):
        length = tl.load(cu + m + i + 1, mask=m + i < n, other=0) - tl.load(cu + m + i, mask=m + i < n, other=0)
        chunk += tl.sum((length + C - 1) // C, 0)
    start = tl.load(cu + n)
    end = tl.load(cu + n + 1, mask=n < num_docs, other=num_tokens)
    tl.store(first_chunk + n, chunk)
    if n < num_docs:
        tl.store(order + place_by_length(cu, n, num_docs, 0, num_tokens, BLOCK), n)
    entries = (end - start + C - 1) // C
    if n == num_docs:
        entries = num_chunks - chunk
    for m in range(0, entries, BLOCK):
        token = start + (m + i) * C
        length = tl.minimum(tl.maximum(end - token, 0), C)
        length = tl.where(n == num_docs, -length, length)
        tl.store(table + 2 * (chunk + m + i), token, mask=m + i < entries)
        tl.store(table + 2 * (chunk + m + i) + 1, length, mask=m + i < entries)


@triton.jit
def _chunk_range(chunk, table, T, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """First token (in the flattened stream) and length of a chunk."""
    if DOCUMENTS:
        start = tl.load(table + 2 * chunk).to(tl.int64)
        length = tl.load(table + 2 * chunk + 1)
    else:
        row_chunks = (T + C - 1) // C
        first = (chunk % row_chunks) * C
        start = (chunk // row_chunks).to(tl.int64) * T + first
        length = tl.minimum(T - first, C)
    return start, length


@triton.jit
def _sequence_range(n, cu, first_chunk, T, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """First token, length and first chunk of a sequence."""
    if DOCUMENTS:
        start = tl.load(cu + n).to(tl.int64)
        length = tl.load(cu + n + 1) - start.to(tl.int32)
        chunk = tl.load(first_chunk + n).to(tl.int64)
    else:
        start = n.to(tl.int64) * T
        length = T
        chunk = n.to(tl.int64) * ((T + C - 1) // C)
    return start, length, chunk


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1, accurate near zero, where 1 + x would lose x."""
    return tl.where(x < 1e-2, x * (1 - x * (0.5 - x * (0.33333334 - x * 0.25))), tl.log(1 + x))


@triton.jit
def _log_decay(g, A_log, dt_bias, hv, ACTIVATE: tl.constexpr):
    """The log-decay and its derivative with respect to g."""
    if ACTIVATE:
        x = g + tl.load(dt_bias + hv).to(tl.float32)
        rate = -tl.exp(tl.load(A_log + hv).to(tl.float32))
        small = tl.exp(-tl.abs(x))
        decay = rate * (tl.maximum(x, 0.0) + _log1p(small))
        slope = rate * tl.where(x >= 0, 1.0, small) / (1 + small)
    else:
        decay = g
        slope = tl.full(g.shape, 1.0, tl.float32)
    return decay, slope


@triton.jit
def _step_size(beta, beta_scale, SIGMOID: tl.constexpr):
    """Beta as the rule uses it, and its derivative with respect to the input."""
    if SIGMOID:
        s = 1 / (1 + tl.exp(-beta))
        step = beta_scale * s
        slope = step * (1 - s)
    else:
        step = beta
        slope = tl.full(beta.shape, 1.0, tl.float32)
    return step, slope


@triton.jit
def _inverse_norm(x, NORMALISE: tl.constexpr):
    x = x.to(tl.float32)
    total = tl.sum(x * x, 1)
    return tl.rsqrt(total + 1e-6) if NORMALISE else tl.full(total.shape, 1.0, tl.float32)


@triton.jit
def _decay_matrix(c, i, j):
    """exp2(c_i - c_j) on and below the diagonal: an exponent is never positive, so nothing overflows."""
    return tl.exp2(tl.where(i >= j, c[:, None] - c[None, :], float("-inf")))


@triton.jit
def _dot(a, b, MERGE: tl.constexpr):
    """A product of two fp32 matrices on the tensor cores, in the precision that MERGE names."""
    if MERGE == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        return tl.dot(a, b, input_precision=MERGE)


@triton.jit
def _core_of_inverse(M, beta, C: tl.constexpr, MERGE: tl.constexpr):
    """Y = -M (I + diag(beta) M)^-1 for a strictly lower triangular M.

    The inverse: diagonal blocks of 16 rows by substitution in fp32, then joined two by two, X <- X - X L X, where L is
    what of diag(beta) M joins the pairs.
    """
    BLOCK: tl.constexpr = 16
    NUM: tl.constexpr = C // BLOCK
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    n = tl.arange(0, NUM)
    b = tl.arange(0, BLOCK)
    on_diagonal = n[:, None, None, None] == n[None, None, :, None]
    row = b[None, :, None]
    col = b[None, None, :]
    L = M * beta[:, None]
    L_blocks = tl.sum(tl.where(on_diagonal, tl.reshape(L, [NUM, BLOCK, NUM, BLOCK]), 0.0), axis=2)
    X_blocks = tl.where(row == col, 1.0, 0.0) + tl.zeros([NUM, BLOCK, BLOCK], tl.float32)
    for s in tl.static_range(BLOCK - 1):
        X_s = tl.sum(tl.where(row == s, X_blocks, 0.0), axis=1)
        X_blocks -= tl.sum(tl.where(col == s, L_blocks, 0.0), axis=2)[:, :, None] * X_s[:, None, :]
    X = tl.reshape(tl.where(on_diagonal, X_blocks[:, :, None, :], 0.0), [C, C])
    if C >= 32:
        joint = tl.where((i // 32 == j // 32) & (i // 16 != j // 16), L, 0.0)
        X = X - _dot(_dot(X, joint, MERGE), X, MERGE)
    if C >= 64:
        X = X - _dot(_dot(X, tl.where(i // 32 != j // 32, L, 0.0), MERGE), X, MERGE)
    return -M - _dot(M, tl.where(i > j, X, 0.0), MERGE)


@triton.jit(do_not_specialize=["T"])
def _chunk_kernel(
    q, k, g, beta, A_log, dt_bias, table, gates, Y, P, o, T, scale, beta_scale,
    q_token, q_head, k_token, k_head, g_token, g_head, beta_token, beta_head,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DOCUMENTS: tl.constexpr, ACTIVATE: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr, INVERT: tl.constexpr, MERGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gates (rows c / ln 2, beta, gam r_k, dec r_k, scale gam r_q, r_k, r_q), Y and P of one chunk and value head.

    r_q and r_k are the inverse norms of the rows of q and k (or 1). INVERT False is backward's call: it needs P again.
    The scans for Hopper make P themselves: it is None for them.
    """
    pid = tl.program_id(0)
    hv = pid % HV
    hk = hv // (HV // HK)
    start, length = _chunk_range(pid // HV, table, T, C, DOCUMENTS)
    r = tl.arange(0, C)
    cols = tl.arange(0, BK)
    if INVERT and DOCUMENTS and o is not None and length < 0:
        v_cols = tl.arange(0, BV)
        v_rows = (start + r)[:, None] * (HV * V) + hv * V
        tl.store(
            o + v_rows + v_cols[None, :],
            tl.zeros([C, BV], o.dtype.element_ty),
            mask=(r < -length)[:, None] & (v_cols < V)[None, :],
        )
    valid = r < length
    tile = valid[:, None] & (cols < K)[None, :]
    t = start + r
    kk = tl.load(k + start * k_token + hk * k_head + (r[:, None] * k_token + cols[None, :]), mask=tile, other=0.0)
    i = r[:, None]
    j = r[None, :]
    gates += pid.to(tl.int64) * (7 * C) + r
    Y += pid.to(tl.int64) * (C * C)
    matrix = i * C + j
    # Vectors go to memory and are read back where they are needed: the compiler would otherwise repeat their arithmetic
    # for each layout that a matrix product asks for, and keep the results in registers during the inverse.
    if INVERT:
        x = tl.load(g + t * g_token + hv * g_head, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(beta + t * beta_token + hv * beta_head, mask=valid, other=0.0).to(tl.float32)
        x, _ = _log_decay(x, A_log, dt_bias, hv, ACTIVATE)
        b, _ = _step_size(b, beta_scale, SIGMOID)
        tl.store(gates, tl.cumsum(tl.where(valid, x, 0.0), 0) * 1.4426950408889634)  # exp2 is one instruction, exp five
        tl.store(gates + C, tl.where(valid, b, 0.0))
        tl.store(gates + 5 * C, _inverse_norm(kk, NORMALISE))
        tl.debug_barrier()
        c = tl.load(gates)
        r_k = tl.load(gates + 5 * C)
        last = tl.load(gates - r + C - 1)
        tl.store(gates + 2 * C, tl.where(valid, tl.exp2(c) * r_k, 0.0))
        tl.store(gates + 3 * C, tl.where(valid, tl.exp2(last - c) * r_k, 0.0))
        M = tl.dot(kk, tl.trans(kk), input_precision=DOT) * r_k[:, None] * r_k[None, :]
        M = tl.where(i > j, M * _decay_matrix(c, i, j), 0.0)
        core = _core_of_inverse(M, tl.load(gates + C), C, MERGE)
        tl.store(Y + matrix, core.to(Y.dtype.element_ty))
    qq = tl.load(q + start * q_token + hk * q_head + (r[:, None] * q_token + cols[None, :]), mask=tile, other=0.0)
    if P is not None:
        scores = tl.dot(qq, tl.trans(kk), input_precision=DOT)
    if INVERT:
        tl.store(gates + 6 * C, _inverse_norm(qq, NORMALISE))
        tl.debug_barrier()
    c = tl.load(gates)
    r_q = tl.load(gates + 6 * C)
    if INVERT:
        tl.store(gates + 4 * C, tl.where(valid, scale * tl.exp2(c) * r_q, 0.0))
    if P is not None:
        scores *= (scale * r_q)[:, None] * tl.load(gates + 5 * C)[None, :]
        P += pid.to(tl.int64) * (C * C)
        tl.store(P + matrix, (scores * _decay_matrix(c, i, j)).to(P.dtype.element_ty))


@triton.jit
def _rows(pointer, row, stride, width, valid, descriptor, col,
          C: tl.constexpr, B: tl.constexpr, RAGGED: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """A [C, B] tile: rows from `row` on, of which `valid` count in a TAIL, columns below `width` where it is RAGGED.

    `pointer` stands at row 0 and the tile's first column, which is column `col` of the descriptor.
    """
    cols = tl.arange(0, B)
    if TMA:
        tile = descriptor.load([row.to(tl.int32), col])
    else:
        at = pointer + row * stride + (tl.arange(0, C)[:, None] * stride + cols[None, :])
        if TAIL:
            tile = tl.load(at, mask=(tl.arange(0, C) < valid)[:, None] & (cols < width)[None, :], other=0.0)
        elif RAGGED:
            tile = tl.load(at, mask=(cols < width)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _matrix(pointer, tile, descriptor, C: tl.constexpr, TMA: tl.constexpr):
    """One of the stored [C, C] tiles."""
    if TMA:
        x = descriptor.load([(tile * C).to(tl.int32), 0])
    else:
        x = tl.load(pointer + tile * (C * C) + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :])
    return x


@triton.jit
def _store_rows(pointer, row, stride, width, valid, x, C: tl.constexpr, B: tl.constexpr, RAGGED: tl.constexpr,
                TAIL: tl.constexpr):  # fmt: skip
    """The counterpart of _rows, by pointer."""
    cols = tl.arange(0, B)
    at = pointer + row * stride + (tl.arange(0, C)[:, None] * stride + cols[None, :])
    x = x.to(pointer.dtype.element_ty)
    if TAIL:
        tl.store(at, x, mask=(tl.arange(0, C) < valid)[:, None] & (cols < width)[None, :])
    elif RAGGED:
        tl.store(at, x, mask=(cols < width)[None, :])
    else:
        tl.store(at, x)


@triton.jit
def _store_state(pointer, x, K, width, stride, BK: tl.constexpr, B: tl.constexpr, RAGGED: tl.constexpr):
    """A [K, B] slice of a state whose rows are `stride` long; `pointer` stands at its first element."""
    rows = tl.arange(0, BK)
    cols = tl.arange(0, B)
    at = pointer + rows[:, None] * stride + cols[None, :]
    x = x.to(pointer.dtype.element_ty)
    if RAGGED:
        tl.store(at, x, mask=(rows < K)[:, None] & (cols < width)[None, :])
    else:
        tl.store(at, x)


@triton.jit
def _scan_step(
    S, i, valid, start, chunk, hv, hk, v0, q, k, v, gates, Y, P, o, h,
    q_tma, k_tma, v_tma, o_tma, h_tma, Y_tma, P_tma, q_token, k_token, v_token,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    MODE: tl.constexpr, DOT: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Advance S by one chunk. Written, by MODE: o; or the chunk's first state and U (to h and o); or nothing."""
    K_RAGGED: tl.constexpr = K != BK
    V_RAGGED: tl.constexpr = V % BV != 0
    row = start + i * C
    tile = (chunk + i) * HV + hv
    width = V - v0
    kk = _rows(k, row, k_token, K, valid, k_tma, hk * K, C, BK, K_RAGGED, TAIL, TMA)
    if MODE != "transition":
        vv = _rows(v, row, v_token, width, valid, v_tma, hv * V + v0, C, BV, V_RAGGED, TAIL, TMA)
    y = _matrix(Y, tile, Y_tma, C, TMA)
    if MODE == "output":
        qq = _rows(q, row, q_token, K, valid, q_tma, hk * K, C, BK, K_RAGGED, TAIL, TMA)
        p = _matrix(P, tile, P_tma, C, TMA)
    gate = gates + tile * (7 * C) + tl.arange(0, C)
    b = tl.load(gate + C)
    gam_k = tl.load(gate + 2 * C)
    dec_k = tl.load(gate + 3 * C)
    last = tl.exp2(tl.load(gates + tile * (7 * C) + C - 1))
    S_low = S.to(kk.dtype)
    if MODE == "states":
        if TMA:
            h_tma.store([(tile * K).to(tl.int32), v0], S_low)
        else:
            _store_state(h + tile * (K * V) + v0, S_low, K, width, V, BK, BV, K_RAGGED or V_RAGGED)
    if MODE == "transition":
        W = -gam_k[:, None] * tl.dot(kk, S_low, input_precision=DOT)
    else:
        W = vv.to(tl.float32) - gam_k[:, None] * tl.dot(kk, S_low, input_precision=DOT)
    U = tl.dot(y, (b[:, None] * W).to(kk.dtype), acc=W, input_precision=DOT)
    new = b[:, None] * U
    if MODE == "output":
        out = tl.dot(qq, S_low, input_precision=DOT) * tl.load(gate + 4 * C)[:, None]
        out = tl.dot(p, new.to(kk.dtype), acc=out, input_precision=DOT)
    else:
        out = U
    S = tl.dot(tl.trans(kk), (dec_k[:, None] * new).to(kk.dtype), acc=S * last, input_precision=DOT)
    if MODE != "transition":
        if TMA:
            o_tma.store([row.to(tl.int32), hv * V + v0], out.to(kk.dtype))
        else:
            _store_rows(o, row, HV * V, width, valid, out, C, BV, V_RAGGED, TAIL)
    return S


@triton.jit(do_not_specialize=["T"])
def _scan_kernel(
    q, k, v, gates, Y, P, initial, final, o, h, q_tma, k_tma, v_tma, o_tma, h_tma, Y_tma, P_tma, cu, first_chunk, T,
    q_token, q_head, k_token, k_head, v_token, v_head,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DOCUMENTS: tl.constexpr, INITIAL: tl.constexpr, MODE: tl.constexpr, DOT: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one sequence, value head and slice of V, chunk after chunk; for a transition V is K and all values are 0."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v0 = (pid % NV) * BV
    hv = (pid // NV) % HV
    hk = hv // (HV // HK)
    n = pid // (NV * HV)
    start, length, chunk = _sequence_range(n, cu, first_chunk, T, C, DOCUMENTS)
    state = (n.to(tl.int64) * HV + hv) * (K * V) + v0
    rows = tl.arange(0, BK)
    cols = tl.arange(0, BV)
    if MODE == "transition":
        S = tl.where(rows[:, None] == v0 + cols[None, :], 1.0, 0.0)
    elif INITIAL:
        S = tl.load(
            initial + state + rows[:, None] * V + cols[None, :],
            mask=(rows < K)[:, None] & (v0 + cols < V)[None, :],
            other=0.0,
        ).to(tl.float32)
    else:
        S = tl.zeros([BK, BV], tl.float32)
    q += hk * q_head
    k += hk * k_head
    v += hv * v_head + v0
    o += hv * V + v0
    for i in tl.range(0, length // C, num_stages=STAGES):
        S = _scan_step(S, i, C, start, chunk, hv, hk, v0, q, k, v, gates, Y, P, o, h, q_tma, k_tma, v_tma, o_tma, h_tma,
                       Y_tma, P_tma, q_token, k_token, v_token, HV, K, V, BK, BV, C, MODE, DOT, False,
                       TMA)  # fmt: skip
    # A loop, though it runs once at most: outside a pipelined loop Triton 3.6 miscompiles the step (NOTES.md).
    for i in tl.range(length // C, (length + C - 1) // C, num_stages=STAGES):
        S = _scan_step(S, i, length % C, start, chunk, hv, hk, v0, q, k, v, gates, Y, P, o, h, q_tma, k_tma, v_tma,
                       o_tma, h_tma, Y_tma, P_tma, q_token, k_token, v_token, HV, K, V, BK, BV, C, MODE, DOT, True,
                       False)  # fmt: skip
    if MODE != "states":
        _store_state(final + state, S, K, V - v0, V, BK, BV, (K != BK) or (V % BV != 0))


@triton.jit
def _reverse_scan_step(
    dS, i, valid, start, chunk, hv, hk, v0, q, k, do, gates, Y, P, z, dh,
    q_tma, k_tma, do_tma, z_tma, dh_tma, Y_tma, P_tma, q_token, k_token, do_token,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """From the gradient of the state after a chunk to that before it; write the former and Z."""
    K_RAGGED: tl.constexpr = K != BK
    V_RAGGED: tl.constexpr = V % BV != 0
    row = start + i * C
    tile = (chunk + i) * HV + hv
    width = V - v0
    kk = _rows(k, row, k_token, K, valid, k_tma, hk * K, C, BK, K_RAGGED, TAIL, TMA)
    grad = _rows(do, row, do_token, width, valid, do_tma, hv * V + v0, C, BV, V_RAGGED, TAIL, TMA)
    p = _matrix(P, tile, P_tma, C, TMA)
    y = _matrix(Y, tile, Y_tma, C, TMA)
    qq = _rows(q, row, q_token, K, valid, q_tma, hk * K, C, BK, K_RAGGED, TAIL, TMA)
    gate = gates + tile * (7 * C) + tl.arange(0, C)
    b = tl.load(gate + C)
    gam_k = tl.load(gate + 2 * C)
    dec_k = tl.load(gate + 3 * C)
    scale_gam_q = tl.load(gate + 4 * C)
    last = tl.exp2(tl.load(gates + tile * (7 * C) + C - 1))
    dS_low = dS.to(kk.dtype)
    if TMA:
        dh_tma.store([(tile * K).to(tl.int32), v0], dS_low)
    else:
        _store_state(dh + tile * (K * V) + v0, dS_low, K, width, V, BK, BV, K_RAGGED or V_RAGGED)
    d_new = dec_k[:, None] * tl.dot(kk, dS_low, input_precision=DOT)
    d_new = tl.dot(tl.trans(p), grad, acc=d_new, input_precision=DOT)
    Z = tl.dot(tl.trans(y), (b[:, None] * d_new).to(kk.dtype), acc=d_new, input_precision=DOT)
    grad = (scale_gam_q[:, None] * grad.to(tl.float32)).to(kk.dtype)
    dS = tl.dot(tl.trans(qq), grad, acc=dS * last, input_precision=DOT)
    dS = tl.dot(tl.trans(kk), (-(gam_k * b)[:, None] * Z).to(kk.dtype), acc=dS, input_precision=DOT)
    if TMA:
        z_tma.store([row.to(tl.int32), hv * V + v0], Z.to(kk.dtype))
    else:
        _store_rows(z, row, HV * V, width, valid, Z, C, BV, V_RAGGED, TAIL)
    return dS


@triton.jit(do_not_specialize=["T"])
def _reverse_scan_kernel(
    q, k, do, gates, Y, P, d_final, d_initial, z, dh,
    q_tma, k_tma, do_tma, z_tma, dh_tma, Y_tma, P_tma, cu, first_chunk, T,
    q_token, q_head, k_token, k_head, do_token, do_head,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DOCUMENTS: tl.constexpr, FINAL: tl.constexpr, INITIAL: tl.constexpr, DOT: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one sequence, value head and slice of V from the last chunk to the first."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v0 = (pid % NV) * BV
    hv = (pid // NV) % HV
    hk = hv // (HV // HK)
    n = pid // (NV * HV)
    start, length, chunk = _sequence_range(n, cu, first_chunk, T, C, DOCUMENTS)
    state = (n.to(tl.int64) * HV + hv) * (K * V) + v0
    rows = tl.arange(0, BK)
    cols = tl.arange(0, BV)
    if FINAL:
        dS = tl.load(
            d_final + state + rows[:, None] * V + cols[None, :],
            mask=(rows < K)[:, None] & (v0 + cols < V)[None, :],
            other=0.0,
        ).to(tl.float32)
    else:
        dS = tl.zeros([BK, BV], tl.float32)
    q += hk * q_head
    k += hk * k_head
    do += hv * do_head + v0
    z += hv * V + v0
    full = length // C
    # A loop, though it runs once at most: outside a pipelined loop Triton 3.6 miscompiles the step (NOTES.md).
    for i in tl.range(full, (length + C - 1) // C, num_stages=STAGES):
        dS = _reverse_scan_step(dS, i, length % C, start, chunk, hv, hk, v0, q, k, do, gates, Y, P, z, dh, q_tma, k_tma,
                                do_tma, z_tma, dh_tma, Y_tma, P_tma, q_token, k_token, do_token, HV, K, V, BK, BV, C,
                                DOT, True, False)  # fmt: skip
    for i in tl.range(0, full, num_stages=STAGES):
        dS = _reverse_scan_step(dS, full - 1 - i, C, start, chunk, hv, hk, v0, q, k, do, gates, Y, P, z, dh, q_tma,
                                k_tma, do_tma, z_tma, dh_tma, Y_tma, P_tma, q_token, k_token, do_token, HV, K, V, BK,
                                BV, C, DOT, False, TMA)  # fmt: skip
    if INITIAL:
        _store_state(d_initial + state, dS, K, V - v0, V, BK, BV, (K != BK) or (V % BV != 0))


@triton.jit
def _normalised_gradient(dx, x, r, NORMALISE: tl.constexpr):
    """The gradient of x from that of r x, where r is the inverse norm of the row."""
    if NORMALISE:
        x = x.to(tl.float32)
        dx = r[:, None] * (dx - x * (r * r * tl.sum(dx * x, 1))[:, None])
    return dx


@triton.jit
def _query_gradient(
    q, k, start, length, chunk, hk, do, u, h, gates, sums, scale, q_token, k_token, do_token, do_head,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SLICES: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of one chunk and key head, and what it adds to the gradient of c.

    Everything is linear in what a slice of V contributes, so a slice of one value head is dealt with in full. What a
    turn of the loop needs in registers is read in it (from the cache): kept over the loop, it would spill.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    r = tl.arange(0, C)
    i = r[:, None]
    j = r[None, :]
    k_rows = tl.arange(0, BK)
    cols = tl.arange(0, BV)
    dQ = tl.zeros([C, BK], tl.float32)
    if BK <= 128:
        kk = _rows(k, start, k_token, K, length, k, 0, C, BK, False, True, False)
    for turn in tl.range(HV // HK * NV, num_stages=STAGES, disable_licm=True):
        hv = hk * (HV // HK) + turn // NV
        v0 = (turn % NV) * BV
        tile = chunk * HV + hv
        c = tl.load(gates + tile * (7 * C) + r)
        b = tl.load(gates + tile * (7 * C) + C + r)
        r_k = tl.load(gates + tile * (7 * C) + 5 * C + r)
        r_q = tl.load(gates + tile * (7 * C) + 6 * C + r)
        grad = _rows(do + hv * do_head + v0, start, do_token, V - v0, length, do, 0, C, BV, False, True, False)
        U = _rows(u + hv * V + v0, start, HV * V, V - v0, length, u, 0, C, BV, False, True, False)
        qq = _rows(q, start, q_token, K, length, q, 0, C, BK, False, True, False)
        S = tl.load(
            h + tile * (K * V) + v0 + (k_rows[:, None] * V + cols[None, :]),
            mask=(k_rows < K)[:, None] & (v0 + cols < V)[None, :] & (length > 0),
            other=0.0,
        )
        if BK > 128:  # shared memory does not hold it over the loop
            kk = _rows(k, start, k_token, K, length, k, 0, C, BK, False, True, False)
        D = tl.dot(grad, tl.trans(U), input_precision=DOT) * _decay_matrix(c, i, j) * (scale * b * r_k)[None, :]
        dQ = tl.dot(D.to(kk.dtype), kk, acc=dQ, input_precision=DOT)
        # The diagonal does not depend on the gates: leaving it out of their gradient spares a cancellation that costs
        # all digits where the decay is strong.
        pair = tl.dot(qq, tl.trans(kk), input_precision=DOT) * r_q[:, None]
        pair = tl.where(i > j, D * pair, 0.0)
        d_c = tl.sum(pair, 1) - tl.sum(pair, 0)
        x = tl.dot(grad, tl.trans(S), input_precision=DOT) * (tl.exp2(c) * scale)[:, None]
        d_c += tl.sum(x * qq.to(tl.float32), 1) * r_q
        dQ += x
        tl.store(sums + (tile * SLICES + turn % NV) * (3 * C) + r, d_c)
    return dQ


@triton.jit
def _key_gradient(
    q, k, start, length, rows, chunk, hk, do, u, z, h, dh, gates, sums, dv, scale,
    q_token, k_token, do_token, do_head,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SLICES: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """dK and dV of one chunk and key head, dbeta, and what dK adds to the gradient of c."""
    NV: tl.constexpr = (V + BV - 1) // BV
    r = tl.arange(0, C)
    i = r[:, None]
    j = r[None, :]
    k_rows = tl.arange(0, BK)
    cols = tl.arange(0, BV)
    dK = tl.zeros([C, BK], tl.float32)
    if BK <= 128:
        qq = _rows(q, start, q_token, K, length, q, 0, C, BK, False, True, False)
    for turn in tl.range(HV // HK * NV, num_stages=STAGES, disable_licm=True):
        hv = hk * (HV // HK) + turn // NV
        v0 = (turn % NV) * BV
        tile = chunk * HV + hv
        c = tl.load(gates + tile * (7 * C) + r)
        b = tl.load(gates + tile * (7 * C) + C + r)
        r_k = tl.load(gates + tile * (7 * C) + 5 * C + r)
        r_q = tl.load(gates + tile * (7 * C) + 6 * C + r)
        last = tl.load(gates + tile * (7 * C) + C - 1)
        state = tile * (K * V) + v0
        inside = (k_rows < K)[:, None] & (v0 + cols < V)[None, :] & (length > 0)
        Z = _rows(z + hv * V + v0, start, HV * V, V - v0, length, z, 0, C, BV, False, True, False)
        b_z = tl.full([C], 1.0, tl.float32) if SCALED else b
        _store_rows(dv + hv * V + v0, start, HV * V, V - v0, rows, b_z[:, None] * Z.to(tl.float32), C, BV, False, True)
        U = _rows(u + hv * V + v0, start, HV * V, V - v0, length, u, 0, C, BV, False, True, False)
        at = sums + (tile * SLICES + turn % NV) * (3 * C) + r
        tl.store(at + 2 * C, tl.sum(U.to(tl.float32) * Z.to(tl.float32), 1))
        kk = _rows(k, start, k_token, K, length, k, 0, C, BK, False, True, False)
        # X below the diagonal, its transpose above it.
        X = tl.where(i > j, tl.dot(Z, tl.trans(U), input_precision=DOT), 0.0)
        X = tl.where(i >= j, X, tl.dot(U, tl.trans(Z), input_precision=DOT))
        X *= tl.exp2(tl.where(i >= j, c[:, None] - c[None, :], c[None, :] - c[:, None]))
        X *= tl.where(i >= j, b_z[:, None] * b[None, :], b[:, None] * b_z[None, :]) * -r_k[None, :]
        dK = tl.dot(X.to(kk.dtype), kk, acc=dK, input_precision=DOT)
        pair = tl.dot(kk, tl.trans(kk), input_precision=DOT) * tl.where(i > j, X, 0.0) * r_k[:, None]
        d_c = tl.sum(pair, 1) - tl.sum(pair, 0)
        grad = _rows(do + hv * do_head + v0, start, do_token, V - v0, length, do, 0, C, BV, False, True, False)
        if BK > 128:
            qq = _rows(q, start, q_token, K, length, q, 0, C, BK, False, True, False)
        D_t = tl.dot(U, tl.trans(grad), input_precision=DOT) * b[:, None]
        D_t *= tl.exp2(tl.where(j >= i, c[None, :] - c[:, None], float("-inf"))) * (scale * r_q)[None, :]
        dK = tl.dot(D_t.to(kk.dtype), qq, acc=dK, input_precision=DOT)
        S = tl.load(h + state + (k_rows[:, None] * V + cols[None, :]), mask=inside, other=0.0)
        dS = tl.load(dh + state + (k_rows[:, None] * V + cols[None, :]), mask=inside, other=0.0)
        d_last = tl.exp2(last) * tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1), 0)
        x = tl.dot(Z, tl.trans(S), input_precision=DOT) * (tl.exp2(c) * b_z)[:, None]
        d_c -= tl.sum(x * kk.to(tl.float32), 1) * r_k
        dK -= x
        x = tl.dot(U, tl.trans(dS), input_precision=DOT) * (tl.exp2(last - c) * b)[:, None]
        to_last = tl.sum(x * kk.to(tl.float32), 1) * r_k
        d_c += tl.where(r == C - 1, d_last + tl.sum(to_last, 0), 0.0) - to_last
        dK += x
        tl.store(at + C, d_c)
    return dK


@triton.jit
def _last_chunk(n, cu, first_chunk, T, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The last chunk of a sequence, -1 if it is empty."""
    if DOCUMENTS:
        length = tl.load(cu + n + 1) - tl.load(cu + n)
        chunk = tl.where(length > 0, tl.load(first_chunk + n) + (length - 1) // C, -1)
    else:
        chunk = (n + 1) * ((T + C - 1) // C) - 1
    return chunk


@triton.jit(do_not_specialize=["T", "origin"])
def _gradient_kernel(
    q, k, do, u, z, h, dh, gates, table, cu, first_chunk, dq, dk, dv, sums, T, origin, scale,
    q_token, q_head, k_token, k_head, do_token, do_head,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALISE: tl.constexpr, DOT: tl.constexpr, SIDE: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """dQ (SIDE 0), or dK and dV (SIDE 1), of one chunk and key head, over its value heads in turn.

    Two launches, because the registers of one program do not hold both sums. dv may be z's own memory. WHOLE False is
    for chunks that lack rows, sequences' last ones, of which there is a program each. SCALED: z holds beta Z.
    """
    pid = tl.program_id(0)
    hk = pid % HK
    chunk = (pid // HK).to(tl.int64)
    if not WHOLE:
        chunk = _last_chunk(pid // HK, cu, first_chunk, T, C, DOCUMENTS).to(tl.int64) - origin
        if chunk < 0:
            return
    start, length = _chunk_range(chunk, table, T, C, DOCUMENTS)
    if not WHOLE and length == C:
        return
    # The tail of the stream runs through with length 0: its tiles load as zeros and it writes zeros to its rows.
    rows = tl.where(length < 0, -length, length)
    length = tl.maximum(length, 0)
    q += hk * q_head
    k += hk * k_head
    r_k = gates + chunk * (HV * 7 * C) + hk * (HV // HK * 7 * C) + 5 * C + tl.arange(0, C)
    if SIDE == 0:
        dQ = _query_gradient(q, k, start, length, chunk, hk, do, u, h, gates, sums, scale, q_token, k_token,
                             do_token, do_head, HK, HV, K, V, BK, BV, C, SLICES, DOT, STAGES)  # fmt: skip
        qq = _rows(q, start, q_token, K, length, q, 0, C, BK, False, True, False)
        dQ = _normalised_gradient(dQ, qq, tl.load(r_k + C), NORMALISE)
        _store_rows(dq + hk * K, start, HK * K, K, rows, dQ, C, BK, False, True)
    else:
        dK = _key_gradient(q, k, start, length, rows, chunk, hk, do, u, z, h, dh, gates, sums, dv, scale,
                           q_token, k_token, do_token, do_head, HK, HV, K, V, BK, BV, C, SLICES, DOT,
                           STAGES, SCALED)  # fmt: skip
        kk = _rows(k, start, k_token, K, length, k, 0, C, BK, False, True, False)
        dK = _normalised_gradient(dK, kk, tl.load(r_k), NORMALISE)
        _store_rows(dk + hk * K, start, HK * K, K, rows, dK, C, BK, False, True)


@triton.jit(do_not_specialize=["num_docs", "num_tokens"])
def _zero_tail_kernel(
    cu, dq, dk, dv, num_docs, num_tokens, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zero the rows [KEYS] of dq and dk and [VALUES] of dv behind the last document."""
    col, zero = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int64)
    for row in range(tl.load(cu + num_docs) + tl.program_id(0), num_tokens, tl.num_programs(0)):
        keys = (zero + row) * KEYS + col
        tl.store(dq + keys, tl.zeros([BLOCK], dq.dtype.element_ty), mask=col < KEYS)
        tl.store(dk + keys, tl.zeros([BLOCK], dk.dtype.element_ty), mask=col < KEYS)
        values = (zero + row) * VALUES + col
        tl.store(dv + values, tl.zeros([BLOCK], dv.dtype.element_ty), mask=col < VALUES)


@triton.jit(do_not_specialize=["T", "num_chunks"])
def _gate_gradient_kernel(
    g, beta, A_log, dt_bias, table, sums, dg, dbeta, d_gate, T, num_chunks, beta_scale,
    g_token, g_head, beta_token, beta_head,
    HV: tl.constexpr, SLICES_Q: tl.constexpr, SLICES_K: tl.constexpr, C: tl.constexpr, DOCUMENTS: tl.constexpr,
    ACTIVATE: tl.constexpr, SIGMOID: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Gradients of g and beta of one chunk and value head, and the chunk's share of those of A_log and dt_bias."""
    pid = tl.program_id(0)
    hv = pid % HV
    chunk = (pid // HV).to(tl.int64)
    start, length = _chunk_range(chunk, table, T, C, DOCUMENTS)
    rows = tl.where(length < 0, -length, length)
    r = tl.arange(0, C)
    t = start + r
    valid = r < length
    d_c = tl.zeros([C], tl.float32)
    d_beta = tl.zeros([C], tl.float32)
    sums += pid.to(tl.int64) * (3 * C * max(SLICES_Q, SLICES_K)) + r
    for part in tl.static_range(SLICES_Q):
        d_c += tl.load(sums + part * (3 * C))
    for part in tl.static_range(SLICES_K):
        d_c += tl.load(sums + part * (3 * C) + C)
        d_beta += tl.load(sums + part * (3 * C) + 2 * C)
    d_decay = tl.cumsum(d_c, 0, reverse=True)  # a log-decay moves every later sum of its chunk
    x = tl.load(g + t * g_token + hv * g_head, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(beta + t * beta_token + hv * beta_head, mask=valid, other=0.0).to(tl.float32)
    decay, slope = _log_decay(x, A_log, dt_bias, hv, ACTIVATE)
    _, beta_slope = _step_size(y, beta_scale, SIGMOID)
    if SCALED:  # the sums are those of beta Z
        beta_slope = 1 / (1 + tl.exp(y))
    d_g = tl.where(valid, d_decay * slope, 0.0)
    d_beta = tl.where(valid, d_beta * beta_slope, 0.0)
    tl.store(dg + t * HV + hv, d_g.to(dg.dtype.element_ty), mask=r < rows)
    tl.store(dbeta + t * HV + hv, d_beta.to(dbeta.dtype.element_ty), mask=r < rows)
    if ACTIVATE:
        tl.store(d_gate + hv.to(tl.int64) * num_chunks + chunk, tl.sum(tl.where(valid, d_decay * decay, 0.0), 0))
        tl.store(d_gate + (HV + hv).to(tl.int64) * num_chunks + chunk, tl.sum(d_g, 0))


_tables, _gradients = Launcher(_table_kernel), Launcher(_gradient_kernel)
_gate_gradients = Launcher(_gate_gradient_kernel)


class Problem(NamedTuple):
    """What every launch needs to know: sizes, and inputs flattened to one stream of tokens."""

    q: Tensor  # [N, HK, K]
    k: Tensor  # [N, HK, K]
    v: Tensor  # [N, HV, V]
    g: Tensor  # [N, HV]
    beta: Tensor  # [N, HV]
    num_sequences: int
    length: int  # of a row; of the whole stream with documents
    num_chunks: int
    cu: Tensor | None
    table: Tensor
    first_chunk: Tensor
    constants: dict[str, int | bool]
    walks: Tensor | None = None  # of the pieces, where it is cut: see gated_delta_rule_pieces.py
    origin: int = 0  # the first chunk that states are kept of
    order: Tensor | None = None  # documents, longest first: whoever walks them side by side ends sooner


class Config(NamedTuple):
    """Launch configuration of one kernel. Every one in use was checked on the device: see tests and NOTES.md."""

    BV: int
    warps: int
    stages: int
    tma: bool = False


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] as [B * T, ...], a view where strides allow it, with a contiguous last dim."""
    x = x.flatten(0, 1)
    return x if x.ndim == 2 or x.stride(-1) == 1 else x.contiguous()


def check_heads(q: Tensor, v: Tensor) -> None:
    """Raise UnsupportedError for head dims or dtypes that no kernel here is made for."""
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"head dims {q.shape[-1]} and {v.shape[-1]}: the Triton kernels take at most {MAX_HEAD_DIM}"
        )
    if v.dtype not in DTYPES:
        raise UnsupportedError(f"v is {v.dtype}: the Triton kernels take bf16, fp16 and fp32")


def _problem(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu: Tensor | None, chunk_size: int) -> Problem:
    batch, length, key_heads, K = q.shape
    value_heads, V = v.shape[2:]
    if chunk_size not in CHUNK_SIZES:
        raise UnsupportedError(f"chunk_size {chunk_size} is not one of {CHUNK_SIZES}, which the Triton kernels have")
    check_heads(q, v)
    num_documents, order = None if cu is None else cu.shape[0] - 1, None
    total = batch * length
    chunks = num_chunks(batch, length, num_documents, chunk_size)
    if cu is None:
        table = first_chunk = q.new_empty(0, dtype=torch.int32)
    else:
        cu = cu.contiguous()
        table = torch.empty(chunks, 2, dtype=torch.int32, device=q.device)
        first_chunk, order = (torch.empty(cu.shape[0], dtype=torch.int32, device=q.device) for _ in range(2))
        _tables(
            cu.shape[0], (where(cu), kind(cu)), (cu, table, first_chunk, order, cu.shape[0] - 1, total, chunks),
            (chunk_size, 256),
        )  # fmt: skip
    # Dots narrower than 64 are the ones that Triton has miscompiled on Hopper: small heads are padded.
    constants = {
        "HK": key_heads, "HV": value_heads, "K": K, "V": V, "C": chunk_size, "DOCUMENTS": cu is not None,
        "BK": max(64, _power_of_2(K)),
    }  # fmt: skip
    return Problem(
        _flat(q), _flat(k), _flat(v), _flat(g), _flat(beta),
        batch if num_documents is None else num_documents, total if cu is not None else length, chunks,
        cu, table, first_chunk, constants, order=order,
    )  # fmt: skip


def _dot_precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _inverse_precision(dtype: torch.dtype, qk_l2norm: bool, beta_scale: float) -> str:
    """Precision of the products inside the inverse.

    Half precision serves (as well as the storage in 16 bits) for unit keys and beta below 1; keys of another length
    could overflow it, and beta up to 2 with alike keys makes an inverse that tf32's digits do not resolve either.
    """
    return "fp16" if dtype != torch.float32 and qk_l2norm and beta_scale == 1 else "tf32x3"


def _launch_chunks(
    p: Problem, A_log: Tensor | None, dt_bias: Tensor | None, gates: Tensor, Y: Tensor, P: Tensor | None,
    o: Tensor | None, scale: float, qk_l2norm: bool, beta_scale: float, invert: bool,
) -> None:  # fmt: skip
    merge = _inverse_precision(p.q.dtype, qk_l2norm, beta_scale)
    heads = p.constants["HV"]
    if p.num_chunks * heads == 0:
        return
    if P is None and merge == "fp16" and hopper.serves(p):
        launch_chunks(p, A_log, dt_bias, gates, Y, o, scale)
        return
    launch(_chunk_kernel, p.num_chunks * heads)(
        p.q, p.k, p.g, p.beta, A_log, dt_bias, p.table, gates, Y, P, o, p.length, scale, beta_scale,
        *p.q.stride()[:2], *p.k.stride()[:2], *p.g.stride(), *p.beta.stride(), **p.constants,
        BV=_power_of_2(p.constants["V"]), ACTIVATE=A_log is not None, SIGMOID=beta_scale != 0,
        NORMALISE=qk_l2norm, INVERT=invert, MERGE=merge, DOT=_dot_precision(p.q.dtype),
        num_warps=4, maxnreg=_chunk_registers(p, invert),
    )  # fmt: skip


def _chunk_registers(p: Problem, invert: bool) -> int | None:
    return 168 if p.q.dtype != torch.float32 and invert else None


def _scan_config(p: Problem) -> Config:
    """The slice of V that a scan's program takes: the wave model, with microseconds a chunk as measured on an H100."""
    if p.q.dtype == torch.float32:
        return Config(BV=16, warps=4, stages=2)
    if p.constants["BK"] > 128:
        return Config(BV=32, warps=4, stages=2)
    heads, V = p.num_sequences * p.constants["HV"], p.constants["V"]
    cost = {BV: _cdiv(heads * _cdiv(V, BV), NUM_SMS) * L for BV, L in ((32, 1.4), (64, 1.9))}
    return Config(BV=min(cost, key=lambda BV: cost[BV]), warps=4, stages=3, tma=True)


def _gradient_configs(p: Problem) -> tuple[Config, Config]:
    """For dQ, and for dK and dV."""
    wide = p.constants["BK"] > 128
    if p.q.dtype == torch.float32:
        config = Config(BV=16 if wide else 32, warps=8 if wide else 4, stages=1)
        return config, config
    if wide:
        return Config(BV=64, warps=8, stages=1), Config(BV=64, warps=8, stages=1)
    return Config(BV=128, warps=4, stages=1), Config(BV=64, warps=4, stages=2)


def _tma_serves(p: Problem, BV: int, *rows: Tensor) -> bool:
    """Whether the copy engine can fetch whole tiles of q, k and `rows` ([N, heads, dim] each)."""
    c = p.constants
    return c["BK"] == c["K"] and c["V"] % BV == 0 and p.q.element_size() == 2 and all(
        x.stride(1) == x.shape[2] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (p.q, p.k, *rows)
    )  # fmt: skip


def _row_descriptor(x: Tensor, C: int, cols: int) -> TensorDescriptor:
    """Of [C, cols] tiles of [N, heads, dim]."""
    return TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [C, cols])


def _matrix_descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Of [rows, cols] tiles of contiguous matrices."""
    return TensorDescriptor(x, [x.numel() // x.shape[-1], x.shape[-1]], [x.shape[-1], 1], [rows, cols])


def _descriptors(
    p: Problem, x: Tensor, out: Tensor, state: Tensor | None, Y: Tensor, P: Tensor | None, config: Config
) -> list[TensorDescriptor | None]:
    """TMA descriptors of q, k, x (v or do), out, the states, Y and P, or Nones where the copy engine can't serve."""
    out = out.flatten(0, 1)
    if not (config.tma and _tma_serves(p, config.BV, x, out)):
        return [None] * 7
    K, C = p.constants["K"], p.constants["C"]
    return [
        *(_row_descriptor(y, C, cols) for y, cols in ((p.q, K), (p.k, K), (x, config.BV), (out, config.BV))),
        None if state is None else _matrix_descriptor(state, K, config.BV),
        _matrix_descriptor(Y, C, C),
        None if P is None else _matrix_descriptor(P, C, C),
    ]


def _tiles(p: Problem, config: Config) -> int:
    return p.num_sequences * p.constants["HV"] * _cdiv(p.constants["V"], config.BV)


def _launch_scan(
    p: Problem, config: Config, gates: Tensor, Y: Tensor, P: Tensor | None, scale: float, initial: Tensor | None,
    final: Tensor | None, o: Tensor, h: Tensor | None,
) -> None:  # fmt: skip
    """Forward's scan (final given: o is the output) or backward's recomputation (h given: o receives U)."""
    if hopper.serves(p, p.v):
        hopper.launch_scan(p, gates, Y, scale, initial, final, o, h)
        return
    dot = _dot_precision(p.q.dtype)
    descriptors = _descriptors(p, p.v, o, h, Y, P, config)
    if tiles := _tiles(p, config):
        launch(_scan_kernel, tiles)(
            p.q, p.k, p.v, gates, Y, P, initial, final, o, h, *descriptors, p.cu, p.first_chunk, p.length,
            *p.q.stride()[:2], *p.k.stride()[:2], *p.v.stride()[:2], **p.constants, BV=config.BV,
            INITIAL=initial is not None, MODE="output" if h is None else "states", DOT=dot,
            TMA=descriptors[0] is not None, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip


def _launch_reverse_scan(
    p: Problem, config: Config, grad: Tensor, gates: Tensor, Y: Tensor, P: Tensor | None, scale: float,
    d_final: Tensor | None, d_initial: Tensor, z: Tensor, dh: Tensor, scaled: bool,
) -> None:  # fmt: skip
    """Write z (beta Z where that is to be scaled: Hopper's kernel can), dh and, where it is not empty, d_initial."""
    if hopper.serves(p, grad):
        hopper.launch_reverse_scan(p, grad, gates, Y, scale, d_final, d_initial, z, dh, scaled)
        return
    dot = _dot_precision(p.q.dtype)
    descriptors = _descriptors(p, grad, z, dh, Y, P, config)
    if tiles := _tiles(p, config):
        launch(_reverse_scan_kernel, tiles)(
            p.q, p.k, grad, gates, Y, P, d_final, d_initial, z, dh, *descriptors, p.cu, p.first_chunk, p.length,
            *p.q.stride()[:2], *p.k.stride()[:2], *grad.stride()[:2], **p.constants, BV=config.BV,
            FINAL=d_final is not None, INITIAL=d_initial.numel() > 0, DOT=dot, TMA=descriptors[0] is not None,
            STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip


def _launch_transition(p: Problem, gates: Tensor, Y: Tensor) -> Tensor:
    """Each sequence's transition [S, HV, K, K], fp32."""
    K = p.constants["K"]
    M = torch.empty(p.num_sequences, p.constants["HV"], K, K, dtype=torch.float32, device=p.k.device)
    p = p._replace(constants={**p.constants, "V": K})
    config = _scan_config(p)._replace(tma=False)
    if tiles := _tiles(p, config):
        launch(_scan_kernel, tiles)(
            p.q, p.k, p.k, gates, Y, None, None, M, M, None, *[None] * 7, p.cu, p.first_chunk, p.length,
            *p.q.stride()[:2], *p.k.stride()[:2], 0, 0, **p.constants, BV=config.BV, INITIAL=False, MODE="transition",
            DOT=_dot_precision(p.k.dtype), TMA=False, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip
    return M


def _num_pieces(p: Problem) -> int:
    """Into how many pieces forward cuts an average sequence: 1 unless most of the card would idle for long.

    So a sequence's last bits may depend on how many others share the call, never on what is in them.
    """
    c = p.constants
    programs = p.num_sequences * c["HV"] * _cdiv(c["V"], 64)
    if c["BK"] > 128 or programs == 0 or p.num_chunks < 128 * p.num_sequences:
        return 1
    pieces = NUM_SMS // programs
    return pieces if pieces >= 8 else 1  # walking twice, M, and more launches


def _forgets(qk_l2norm: bool, beta_scale: float) -> bool:
    """Whether no chunk can make a state longer: keys are of unit length and beta is at most 2."""
    return qk_l2norm and 0 < beta_scale <= 2


def _in_walks(p: Problem, scans: int, gates: Tensor) -> Problem:
    """The problem for Hopper's kernels, in pieces if the walks of so many scans at once leave half of the card."""
    programs = 2 * scans * p.num_sequences * p.constants["HV"]
    if programs == 0:
        return p
    num = min(NUM_SMS // programs, p.num_chunks // (WALK * p.num_sequences))
    # Forward's first piece has no lead. Of backward's two scans one has none there, the other at the last piece.
    return walks(p, num, gates, LEAD if scans == 1 else 0) if num > 1 else p


def _piece_starts(
    p: Problem, pieces: Problem, first_piece: Tensor, gates: Tensor, Y: Tensor, P: Tensor | None, scale: float,
    initial: Tensor | None, final: Tensor, scratch: Tensor,
) -> Tensor:  # fmt: skip
    """The states in front of the pieces; `scratch` has o's shape."""
    c = p.constants
    H = torch.empty(pieces.num_sequences, c["HV"], c["K"], c["V"], dtype=torch.float32, device=p.q.device)
    _launch_scan(pieces, _scan_config(pieces), gates, Y, P, scale, None, H, scratch, None)
    return fold(p, first_piece, H, _launch_transition(pieces, gates, Y), initial, final)


def _output_scan(
    p: Problem, gates: Tensor, Y: Tensor, P: Tensor | None, scale: float, initial: Tensor | None, final: Tensor,
    o: Tensor,
) -> None:  # fmt: skip
    if (num := _num_pieces(p)) == 1:
        _launch_scan(p, _scan_config(p), gates, Y, P, scale, initial, final, o, None)
        return
    pieces, first_piece = cut(p, num)
    starts = _piece_starts(p, pieces, first_piece, gates, Y, P, scale, initial, final, o)
    _launch_scan(pieces, _scan_config(pieces), gates, Y, P, scale, starts, torch.empty_like(starts), o, None)


def _gradient_scans(
    p: Problem, grad: Tensor, gates: Tensor, Y: Tensor, P: Tensor | None, scale: float, initial: Tensor | None,
    d_final: Tensor | None, d_initial: Tensor, U: Tensor, h: Tensor, z: Tensor, dh: Tensor, scaled: bool,
    forgets: bool, lead_in: Callable[[], None] | None,
) -> None:  # fmt: skip
    """Write U, h, z, dh and, where it is not empty, d_initial.

    `lead_in` is called for the scan that makes h: it may write `initial`. The other scan takes longer by more, and
    begins first, or the card would be full of what `lead_in` launches.
    """
    # Neither scan needs the other. Where both fit on the card they run side by side, in wide slices; Hopper's do so
    # always, as one's last programs leave room for the other's first.
    wide = Config(BV=64, warps=4, stages=3, tma=True)
    fits = p.q.element_size() == 2 and p.constants["BK"] <= 128 and 0 < 2 * _tiles(p, wide) <= NUM_SMS
    config = wide if fits else _scan_config(p)
    if not (p.q.is_cuda and (fits or P is None)):
        if lead_in is not None:
            lead_in()
        _launch_reverse_scan(p, config, grad, gates, Y, P, scale, d_final, d_initial, z, dh, scaled)
        _launch_scan(p, config, gates, Y, None, scale, initial, None, U, h)
        return
    if fits and P is None and forgets and p.walks is None:
        p = _in_walks(p, 2, gates)
    main, other = torch.cuda.current_stream(p.q.device), torch.cuda.Stream(p.q.device)
    other.wait_stream(main)
    _launch_reverse_scan(p, config, grad, gates, Y, P, scale, d_final, d_initial, z, dh, scaled)
    with torch.cuda.stream(other):
        if lead_in is not None:
            lead_in()
        _launch_scan(p, config, gates, Y, None, scale, initial, None, U, h)
    main.wait_stream(other)


def _padded(x: Tensor, *sizes: int) -> Tensor:
    """x with its last dims zero-padded to sizes."""
    pads = [pad for size, have in zip(reversed(sizes), reversed(x.shape), strict=False) for pad in (0, size - have)]
    return torch.nn.functional.pad(x, pads)


def _odd(K: int, V: int) -> bool:
    """Head dims that the kernels see padded: rows not a multiple of 32 bytes made masked loads fault on Hopper."""
    return K % 16 != 0 or V % 16 != 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool, beta_scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, the final state (fp32), and what backward needs beside the inputs: the gates' vectors and Y."""
    K, V = q.shape[3], v.shape[3]
    if _odd(K, V):
        K16, V16 = _cdiv(K, 16) * 16, _cdiv(V, 16) * 16
        state = None if initial_state is None else _padded(initial_state, K16, V16)
        o, final, gates, Y = forward(
            _padded(q, K16), _padded(k, K16), _padded(v, V16), g, beta, A_log, dt_bias, state, cu_seqlens, scale,
            qk_l2norm, beta_scale, chunk_size,
        )  # fmt: skip
        return o[..., :V].contiguous(), final[..., :K, :V].contiguous(), gates, Y
    p = _problem(q, k, v, g, beta, cu_seqlens, chunk_size)
    batch, length, heads = v.shape[:3]
    gates_shape, Y_shape = saved_shapes(v, cu_seqlens, chunk_size)
    gates = torch.empty(gates_shape, dtype=torch.float32, device=v.device)
    Y = torch.empty(Y_shape, dtype=v.dtype, device=v.device)
    P = None if hopper.serves(p, p.v) else torch.empty_like(Y)
    o = torch.empty(batch, length, heads, V, dtype=v.dtype, device=v.device)
    final = torch.empty(p.num_sequences, heads, K, V, dtype=torch.float32, device=v.device)
    initial = None if initial_state is None else initial_state.contiguous()
    _launch_chunks(p, A_log, dt_bias, gates, Y, P, o, scale, qk_l2norm, beta_scale, True)
    if P is None and _forgets(qk_l2norm, beta_scale):
        hopper.launch_scan(_in_walks(p, 1, gates), gates, Y, scale, initial, final, o, None)
    else:
        _output_scan(p, gates, Y, P, scale, initial, final, o)
    return o, final, gates, Y


def backward(
    do: Tensor | None, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    g_cumsum: Tensor, A: Tensor, scale: float, qk_l2norm: bool, beta_scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, g, beta, A_log, dt_bias and initial_state (empty where the input is absent)."""
    K, V = q.shape[3], v.shape[3]
    if _odd(K, V):
        K16, V16 = _cdiv(K, 16) * 16, _cdiv(V, 16) * 16
        do = None if do is None else _padded(do, V16)
        states = (dfinal_state, initial_state)
        dfinal_state, initial_state = (None if x is None else _padded(x, K16, V16) for x in states)
        dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dstate = backward(
            do, dfinal_state, _padded(q, K16), _padded(k, K16), _padded(v, V16), g, beta, A_log, dt_bias, initial_state,
            cu_seqlens, g_cumsum, A, scale, qk_l2norm, beta_scale, chunk_size,
        )  # fmt: skip
        dq, dk, dv = dq[..., :K].contiguous(), dk[..., :K].contiguous(), dv[..., :V].contiguous()
        dstate = dstate if initial_state is None else dstate[..., :K, :V].contiguous()
        return dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dstate
    gates, Y = g_cumsum, A
    p = _problem(q, k, v, g, beta, cu_seqlens, chunk_size)
    do = torch.zeros_like(v, memory_format=torch.contiguous_format) if do is None else do.to(v.dtype)
    grad = _flat(do)
    initial = None if initial_state is None else initial_state.contiguous()
    d_final = None if dfinal_state is None else dfinal_state.contiguous()
    d_initial = q.new_empty(0) if initial is None else torch.empty_like(initial)
    fast = hopper.serves(p, p.v, grad)
    P = None if fast else torch.empty_like(Y)
    if P is not None:
        _launch_chunks(p, A_log, dt_bias, gates, Y, P, None, scale, qk_l2norm, beta_scale, False)
    contiguous = torch.contiguous_format
    dq, dk, dv, dg, dbeta = (torch.empty_like(x, memory_format=contiguous) for x in (q, k, v, g, beta))
    d_gate = torch.empty(2, v.shape[2], p.num_chunks if A_log is not None else 0, dtype=torch.float32, device=q.device)
    whole = Part(p, grad, gates, Y, initial, d_final, d_initial, dq, dk, dv, dg, dbeta, d_gate, None)
    if fast and p.cu is not None:
        launch(_zero_tail_kernel, NUM_SMS)(
            p.cu, dq, dk, dv, p.num_sequences, p.length, KEYS=dq.shape[2] * K, VALUES=dv.shape[2] * V,
            BLOCK=_power_of_2(max(dq.shape[2] * K, dv.shape[2] * V)),
        )  # fmt: skip
    in_parts = fast and _forgets(qk_l2norm, beta_scale) and _has_large_states(p)
    finish: Callable[[], None] | None = None
    for part in _parts(whole, scale) if in_parts else (whole,):
        part = part if finish is None else part._replace(lead_in=finish)
        finish = _backward_of_part(part, P, A_log, dt_bias, scale, qk_l2norm, beta_scale)
    if finish is not None:
        finish()
    dA_log, ddt_bias = (q.new_empty(0), q.new_empty(0)) if A_log is None else d_gate.sum(-1).unbind()
    if A_log is not None and dt_bias is not None:
        dA_log, ddt_bias = dA_log.to(A_log.dtype), ddt_bias.to(dt_bias.dtype)
    return dq, dk, dv, dg, dbeta, dA_log, ddt_bias, d_initial


class Part(NamedTuple):
    """A problem, or a part of one as a problem of its own, with what backward reads and writes of it."""

    problem: Problem
    grad: Tensor  # [N, HV, V]
    gates: Tensor
    Y: Tensor
    initial: Tensor | None
    d_final: Tensor | None
    d_initial: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor  # holds Z until the last kernel
    dg: Tensor
    dbeta: Tensor
    d_gate: Tensor  # each chunk's share of the gradients of A_log and dt_bias, [2, HV, chunks]
    lead_in: Callable[[], None] | None  # of `_gradient_scans`


def _has_large_states(p: Problem) -> bool:
    """Whether the states of all chunks and their gradients take more than `STATES_BYTES`, and can be parted."""
    c = p.constants
    size = 2 * p.num_chunks * c["HV"] * c["K"] * c["V"] * p.v.element_size()
    return p.num_chunks > 1 and size > STATES_BYTES


def _parts(whole: Part, scale: float) -> tuple[Part, ...]:
    """Two parts in backward's order: half of the rows, of one row its halves, or half of the documents' chunks."""
    p, initial, d_final, d_initial = whole.problem, whole.initial, whole.d_final, whole.d_initial
    c, chunks, sequences = p.constants, p.num_chunks, p.num_sequences
    if p.cu is not None:
        return tuple(
            whole._replace(problem=half, d_gate=whole.d_gate[..., half.origin : half.origin + half.num_chunks])
            for half in reversed(halves(p, whole.gates))
        )
    first = chunks // 2 if sequences == 1 else chunks // sequences * (sequences // 2)
    if sequences > 1:
        rows, lengths = (sequences // 2, sequences - sequences // 2), (p.length, p.length)
        states = [_split(x, rows) for x in (initial, d_final, d_initial)]
    else:
        rows, lengths = (1, 1), (first * c["C"], p.length - first * c["C"])
        middle, d_middle = (
            torch.empty(1, c["HV"], c["K"], c["V"], dtype=torch.float32, device=p.q.device) for _ in range(2)
        )
        states = [(initial, middle), (d_middle, d_final), (d_initial, d_middle)]
    tokens = rows[0] * lengths[0], rows[1] * lengths[1]
    inputs = zip(*(_split(x, tokens) for x in (p.q, p.k, p.v, p.g, p.beta)), strict=True)
    dim, sizes = (0, rows) if sequences > 1 else (1, tokens)
    outputs = [_split(x, sizes, dim) for x in (whole.dq, whole.dk, whole.dv, whole.dg, whole.dbeta)]
    sizes = first, chunks - first
    kept = [_split(whole.gates, sizes), _split(whole.Y, sizes)]
    problems = [
        p._replace(q=q, k=k, v=v, g=g, beta=beta, num_sequences=num, length=length, num_chunks=size)
        for (q, k, v, g, beta), num, length, size in zip(inputs, rows, lengths, sizes, strict=True)
    ]
    before, behind = itertools.starmap(Part, zip(
        problems, _split(whole.grad, tokens), *kept, *states, *outputs, _split(whole.d_gate, sizes, -1), (None, None),
        strict=True,
    ))  # fmt: skip
    if sequences > 1:
        return behind, before
    last = last_walk(before.problem, first, whole.gates)
    walk = functools.partial(hopper.launch_scan, last, before.gates, before.Y, scale, initial, middle, whole.dv, None)
    return behind._replace(lead_in=walk), before


def _split(x: Tensor | None, sizes: tuple[int, int], dim: int = 0) -> tuple[Any, ...]:
    """Both parts of x, or twice x where it is absent or empty. This is faster than two slices."""
    return (x, x) if x is None or x.numel() == 0 else x.split_with_sizes(sizes, dim)


def _backward_of_part(
    part: Part, P: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None, scale: float, qk_l2norm: bool,
    beta_scale: float,
) -> Callable[[], None] | None:  # fmt: skip
    """Write the part's gradients; those of the gates when what is returned is called."""
    p, grad, gates, Y, initial, d_final, d_initial, dq, dk, dv, dg, dbeta, d_gate, lead_in = part
    c, fast, scaled = p.constants, P is None, P is None and beta_scale != 0
    # Z holds dV where it is scaled; a beta given as such may be zero, and dbeta needs Z.
    h, dh = (torch.empty(p.num_chunks, c["HV"], c["K"], c["V"], dtype=dv.dtype, device=dv.device) for _ in range(2))
    U = torch.empty_like(dv)
    forgets = _forgets(qk_l2norm, beta_scale)
    _gradient_scans(p, grad, gates, Y, P, scale, initial, d_final, d_initial, U, h, dv, dh, scaled, forgets, lead_in)
    gates = gates[p.origin : p.origin + p.num_chunks]
    configs = _gradient_configs(p)
    slices = [_cdiv(c["V"], config.BV) for config in configs]
    sums = torch.empty(p.num_chunks, c["HV"], max(slices), 3, c["C"], dtype=torch.float32, device=dv.device)
    if p.num_chunks == 0:
        return None
    if fast:
        launch_gradients(p, grad, U, dv, h, dh, gates, dq, dk, dv, sums, scale, qk_l2norm, scaled)
    partial_chunks = p.cu is not None or p.length % c["C"] > 0
    programs = (p.num_sequences if fast else p.num_chunks) * c["HK"]
    for side, config in enumerate(configs if partial_chunks or not fast else ()):
        tensors = p.q, p.k, grad, U, dv, h, dh, gates, p.table, p.cu, p.first_chunk, dq, dk, dv, sums
        strides = *p.q.stride()[:2], *p.k.stride()[:2], *grad.stride()[:2]
        _gradients(
            programs, (where(dv), *map(kind, tensors), strides),
            (*tensors, p.length, p.origin, scale, *strides),
            (*(c[name] for name in ("HK", "HV", "K", "V", "BK")), config.BV, c["C"], p.cu is not None, qk_l2norm,
             _dot_precision(dv.dtype), side, max(slices), config.stages, not fast, scaled),
            num_warps=config.warps,
        )  # fmt: skip
    strides = *p.g.stride(), *p.beta.stride()
    given = p.g, p.beta, A_log, dt_bias, p.table
    return functools.partial(
        _gate_gradients,
        p.num_chunks * c["HV"], (where(dv), *map(kind, (*given, dg, dbeta, d_gate)), strides),
        (*given, sums, dg, dbeta, d_gate, p.length, d_gate.stride(1), beta_scale, *strides),
        (c["HV"], *slices, c["C"], p.cu is not None, A_log is not None, beta_scale != 0, scaled), num_warps=1,
    )  # fmt: skip


def transition(
    k: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, cu_seqlens: Tensor | None,
    qk_l2norm: bool, beta_scale: float, chunk_size: int,
) -> Tensor:  # fmt: skip
    """Return each sequence's transition M [S, HV, K, K] (fp32): it takes a state S to M S + what its own values add.

    With forward's final state from no initial one, M sums up a whole range of chunks, so that ranges (documents of one
    stream, shards of one document on several cards) can be walked apart and put together afterwards. A gradient of the
    final state goes back as M^T dS.
    """
    batch, length, _, K = k.shape
    heads = g.shape[2]
    if K % 16:
        K16 = _cdiv(K, 16) * 16
        k = _padded(k, K16)
        M = transition(k, g, beta, A_log, dt_bias, cu_seqlens, qk_l2norm, beta_scale, chunk_size)
        return M[..., :K, :K].contiguous()
    values = k.new_empty(K).expand(batch, length, heads, K)  # for its shape: nothing reads it
    p = _problem(k, k, values, g, beta, cu_seqlens, chunk_size)
    gates_shape, Y_shape = saved_shapes(values, cu_seqlens, chunk_size)
    gates = torch.empty(gates_shape, dtype=torch.float32, device=k.device)
    Y = torch.empty(Y_shape, dtype=k.dtype, device=k.device)
    _launch_chunks(p, A_log, dt_bias, gates, Y, None, None, 1.0, qk_l2norm, beta_scale, True)
    return _launch_transition(p, gates, Y)
