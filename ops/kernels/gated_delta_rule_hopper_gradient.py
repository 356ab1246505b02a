# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The gradients of q, k, v and the gates of whole chunks, in Gluon for Hopper: what
gated_delta_rule.py's `_gradient_kernel` computes.

For head dims of 128, chunks of 64 and 16 bits. One program stays on each multiprocessor and walks chunks and key heads;
one of its warps has the copy engine fetch (do, U, Z), (S, dS), q and k ahead, three warpgroups compute:

    queries  dQ = scale gam (dO S^T) + D K        D = scale Gam * dO (beta U)^T on and below the diagonal
    keys     dK = (X + X^T) K + D^T Q + dec beta (U dS^T) - gam (dV S^T)        dV = beta Z
             X = -Gam * dV (beta U)^T below the diagonal

What z holds is dV (SCALED; then what is summed up for dbeta is beta times that), or Z, from which dV is made here.

The two groups of keys each take half of dK's columns; one makes X + X^T, the other D^T, and each reads the other's from
shared memory. What they add to the gradient of c are sums over rows only: X + X^T and K K^T are symmetric, so the sum
over a column of their product is that over the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from q3n_functional.ops.kernels.gated_delta_rule_hopper import NUM_SMS, barrier, matrix_tiles, release, row_tiles
from q3n_functional.ops.kernels.launch import Constant, Launcher, kind, where

if TYPE_CHECKING:
    from q3n_functional.ops.kernels.gated_delta_rule import Problem

# Barriers: buffers of q; k (2); do, U, Z and gates (2); S and dS. Then what the groups of keys hand to each other.
Q, K, ROWS, STATES = Constant(0), Constant(1), Constant(3), Constant(5)
MATRIX, SUMS = Constant(6), Constant(8)
EMPTY = Constant(10)  # from here on they say that a buffer was read
STATES_AT = Constant(6)
MMA = Constant(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
OPERAND = Constant(gl.DotOperandLayout(0, MMA.value, 2))
ROW = Constant(gl.SliceLayout(1, MMA.value))
COL = Constant(gl.SliceLayout(0, MMA.value))
FLAT = Constant(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _chunk_at(tile, table, T, HK: gl.constexpr, DOCUMENTS: gl.constexpr):
    """Chunk, key head, first token and length of a tile."""
    chunk = tile // HK
    if DOCUMENTS:
        start = gl.load(table + 2 * chunk)
        length = gl.load(table + 2 * chunk + 1)
    else:
        row_chunks = (T + 63) // 64
        first = chunk % row_chunks * 64
        start = chunk // row_chunks * T + first
        length = gl.minimum(T - first, 64)
    return chunk, tile % HK, start, length


@gluon.jit
def _told(info, n: gl.constexpr):
    """A number that the copying warp left in shared memory."""
    return gl.max(info.slice(n, 1).load(ROW), 0)


@gluon.jit
def _tell(info, chunk, start, hk):
    at = gl.arange(0, 4, gl.BlockedLayout([4], [32], [1], [0]))
    info.store(gl.where(at == 0, chunk, gl.where(at == 1, start, hk)))
    barrier()


@gluon.jit
def _product(a, b):
    """a b^T, begun; a and b as halves of 64 columns."""
    zero = gl.zeros([64, 64], gl.float32, MMA)
    x = warpgroup_mma(a.index(0), b.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(a.index(1), b.index(1).permute((1, 0)), x, is_async=True)


@gluon.jit
def _times(a, b):
    """a b, begun."""
    return warpgroup_mma(a, b, gl.zeros([64, 64], gl.float32, MMA), use_acc=False, is_async=True)


@gluon.jit
def _rows(x):
    return gl.expand_dims(x, 1)


@gluon.jit
def _cols(x):
    return gl.expand_dims(x, 0)


@gluon.jit
def _dot_rows(x, y):
    return gl.sum(x * y.to(gl.float32), 1)


@gluon.jit
def _store(pointer, start, HEADS: gl.constexpr, head, first: gl.constexpr, x, layout: gl.constexpr):
    """Write the rows of x to columns `first` and on of a head of [N, HEADS, 128]."""
    pointer += start.to(gl.int64) * (HEADS * 128) + (head * 128 + first)
    row = gl.arange(0, x.shape[0], gl.SliceLayout(1, layout)) * (HEADS * 128)
    at = _rows(row) + _cols(gl.arange(0, x.shape[1], gl.SliceLayout(0, layout)))
    gl.store(pointer + at, x.to(pointer.dtype.element_ty))


@gluon.jit
def _copy(
    tiles, table, T, q_tma, k_tma, do_tma, u_tma, z_tma, h_tma, dh_tma, gates_tma,
    tiles_s, halves_s, gates_s, info_s, bars,
    HK: gl.constexpr, HV: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """Fetch the tiles of whole chunks, and tell the others chunk, first token and key head with each k; -1 ends."""
    n = 0
    m = 0
    for tile in tl.range(gl.program_id(0), tiles, gl.num_programs(0), disable_licm=True):
        chunk, hk, start, length = _chunk_at(tile, table, T, HK, DOCUMENTS)
        if length == 64:
            for turn in tl.range(0, HV // HK, disable_licm=True):
                hv = hk * (HV // HK) + turn
                state = chunk * HV + hv
                s = n % 2
                bar = bars.index(ROWS + s)
                mbarrier.wait(bars.index(EMPTY + ROWS + s), (n // 2 & 1) ^ 1)
                mbarrier.expect(bar, 3 * 64 * 128 * 2 + 2 * 128 * 4)
                tma.async_copy_global_to_shared(do_tma, [start, hv * 128], bar, tiles_s.index(3 * s))
                tma.async_copy_global_to_shared(u_tma, [start, hv * 128], bar, tiles_s.index(3 * s + 1))
                tma.async_copy_global_to_shared(z_tma, [start, hv * 128], bar, tiles_s.index(3 * s + 2))
                tma.async_copy_global_to_shared(gates_tma, [state, 0], bar, gates_s.index(2 * s))
                tma.async_copy_global_to_shared(gates_tma, [state, 320], bar, gates_s.index(2 * s + 1))
                if turn == 0:
                    bar = bars.index(K + m % 2)
                    mbarrier.wait(bars.index(EMPTY + K + m % 2), (m // 2 & 1) ^ 1)
                    _tell(info_s.index(m % 2), chunk, start, hk)
                    mbarrier.expect(bar, 64 * 128 * 2)
                    tma.async_copy_global_to_shared(k_tma, [start, hk * 128], bar, halves_s.index(2 + 2 * (m % 2)))
                    tma.async_copy_global_to_shared(k_tma, [start, hk * 128 + 64], bar, halves_s.index(3 + 2 * (m % 2)))
                    mbarrier.wait(bars.index(EMPTY + Q), (m & 1) ^ 1)
                    mbarrier.expect(bars.index(Q), 64 * 128 * 2)
                    tma.async_copy_global_to_shared(q_tma, [start, hk * 128], bars.index(Q), halves_s.index(0))
                    tma.async_copy_global_to_shared(q_tma, [start, hk * 128 + 64], bars.index(Q), halves_s.index(1))
                mbarrier.wait(bars.index(EMPTY + STATES), (n & 1) ^ 1)
                mbarrier.expect(bars.index(STATES), 2 * 128 * 128 * 2)
                for half in gl.static_range(2):
                    row = state * 128 + 64 * half
                    tma.async_copy_global_to_shared(
                        h_tma, [row, 0], bars.index(STATES), tiles_s.index(STATES_AT + half)
                    )
                    tma.async_copy_global_to_shared(
                        dh_tma, [row, 0], bars.index(STATES), tiles_s.index(STATES_AT + 2 + half)
                    )
                n += 1
            m += 1
    mbarrier.wait(bars.index(EMPTY + K + m % 2), (m // 2 & 1) ^ 1)
    _tell(info_s.index(m % 2), -1, 0, 0)
    mbarrier.arrive(bars.index(K + m % 2), count=1)


@gluon.jit
def _store_scaled(dv, start, HV: gl.constexpr, hv, Z, c_b):
    """Write dV = beta Z."""
    for piece in gl.static_range(0, 64, 16):
        step = c_b.slice(64 + piece, 16).load(gl.SliceLayout(1, FLAT))
        rows = Z.slice(piece, 16).load(FLAT).to(gl.float32) * _rows(step)
        _store(dv, start + piece, HV, hv, 0, rows, FLAT)


@gluon.jit
def _queries(
    scale, dq, dv, sums, tiles_s, halves_s, gates_s, info_s, bars,
    HK: gl.constexpr, HV: gl.constexpr, NORMALISE: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """dQ and, where z does not hold it yet, dV: the others have more to do."""
    dtype: gl.constexpr = tiles_s.dtype
    i = _rows(gl.arange(0, 64, ROW))
    j = _cols(gl.arange(0, 64, COL))
    n = 0
    m = 0
    mbarrier.wait(bars.index(K), 0)
    chunk = _told(info_s.index(0), 0)
    while chunk >= 0:
        start = _told(info_s.index(m % 2), 1)
        hk = _told(info_s.index(m % 2), 2)
        dQ0 = gl.zeros([64, 64], gl.float32, MMA)
        dQ1 = gl.zeros([64, 64], gl.float32, MMA)
        k0 = halves_s.index(2 + 2 * (m % 2))
        k1 = halves_s.index(3 + 2 * (m % 2))
        for turn in tl.range(0, HV // HK, disable_licm=True):
            hv = hk * (HV // HK) + turn
            s = n % 2
            mbarrier.wait(bars.index(ROWS + s), n // 2 & 1)
            c_b = gates_s.index(2 * s).reshape([128])
            r_kq = gates_s.index(2 * s + 1).reshape([128])
            do = tiles_s.index(3 * s)
            G = _times(do, tiles_s.index(3 * s + 1).permute((1, 0)))
            c = c_b.slice(0, 64).load(ROW)
            r_q = r_kq.slice(64, 64).load(ROW)
            G = warpgroup_mma_wait(0, deps=[G])
            decay = _rows(c) - _cols(c_b.slice(0, 64).load(COL))
            D = G * gl.exp2(gl.where(i >= j, decay, float("-inf")))
            D *= _cols(scale * c_b.slice(64, 64).load(COL) * r_kq.slice(0, 64).load(COL))
            low = D.to(dtype)
            if turn == 0:
                mbarrier.wait(bars.index(Q), m & 1)
            QK = _times(halves_s.index(0), k0.permute((1, 0)))
            QK = warpgroup_mma(halves_s.index(1), k1.permute((1, 0)), QK, is_async=True)
            QK = warpgroup_mma_wait(0, deps=[QK])
            d_c = gl.sum(gl.where(i > j, D * QK, 0.0), 1)
            D_low = gl.convert_layout(low, OPERAND)
            mbarrier.wait(bars.index(STATES), n & 1)
            x0 = _times(do, tiles_s.index(STATES_AT + 0).permute((1, 0)))
            gam = gl.exp2(c) * scale
            x0 = warpgroup_mma_wait(0, deps=[x0])
            d_c += _dot_rows(x0, halves_s.index(0).load(MMA)) * gam
            dQ0 += x0 * _rows(gam)
            x1 = _times(do, tiles_s.index(STATES_AT + 1).permute((1, 0)))
            x1 = warpgroup_mma_wait(0, deps=[x1])
            d_c += _dot_rows(x1, halves_s.index(1).load(MMA)) * gam
            dQ1 += x1 * _rows(gam)
            dQ0 = warpgroup_mma(D_low, k0, dQ0, is_async=True)
            release(bars.index(EMPTY + STATES))
            gl.store(sums + (chunk * HV + hv).to(gl.int64) * 384 + gl.arange(0, 64, ROW), d_c * r_q)
            if not SCALED:
                _store_scaled(dv, start, HV, hv, tiles_s.index(3 * s + 2), c_b)
            dQ0 = warpgroup_mma_wait(0, deps=[dQ0])
            dQ1 = warpgroup_mma(D_low, k1, dQ1, is_async=True)
            dQ1 = warpgroup_mma_wait(0, deps=[dQ1])
            if turn == HV // HK - 1:
                if NORMALISE:
                    q0 = halves_s.index(0).load(MMA)
                    q1 = halves_s.index(1).load(MMA)
                    along = (_dot_rows(dQ0, q0) + _dot_rows(dQ1, q1)) * r_q * r_q
                    dQ0 = (dQ0 - q0.to(gl.float32) * _rows(along)) * _rows(r_q)
                    dQ1 = (dQ1 - q1.to(gl.float32) * _rows(along)) * _rows(r_q)
                # Loads of q may be under way when the copy engine is told that it may write there: ptxas moves their
                # uses behind the barrier, and the barrier orders them with other loads and stores only.
                fence_async_shared()
                release(bars.index(EMPTY + Q))
                mbarrier.arrive(bars.index(EMPTY + K + m % 2), count=1)
                _store(dq, start, HK, hk, 0, dQ0, MMA)
                _store(dq, start, HK, hk, 64, dQ1, MMA)
            release(bars.index(EMPTY + ROWS + s))
            n += 1
        m += 1
        mbarrier.wait(bars.index(K + m % 2), m // 2 & 1)
        chunk = _told(info_s.index(m % 2), 0)


@gluon.jit
def _mirrored(Z, U, k0, k1, c_b, r_kq, i, j, SCALED: gl.constexpr):
    """X + X^T, with the rows of k normalised on the right; what it adds to the gradient of c; dbeta."""
    ZU = _times(Z, U.permute((1, 0)))
    UZ = _times(U, Z.permute((1, 0)))
    ZU, UZ = warpgroup_mma_wait(0, deps=[ZU, UZ])
    d_beta = gl.sum(gl.where(i == j, ZU, 0.0), 1)
    if SCALED:  # Z's rows have their factor
        ZU *= _cols(c_b.slice(64, 64).load(COL))
        UZ *= _rows(c_b.slice(64, 64).load(ROW))
    X = gl.where(i >= j, ZU, UZ)
    decay = _rows(c_b.slice(0, 64).load(ROW)) - _cols(c_b.slice(0, 64).load(COL))
    decay = gl.where(i >= j, decay, -decay)
    X *= gl.exp2(gl.where(i == j, float("-inf"), decay))
    if SCALED:
        X *= _cols(-r_kq.slice(0, 64).load(COL))
    else:
        X *= _rows(c_b.slice(64, 64).load(ROW))
        X *= _cols(-c_b.slice(64, 64).load(COL) * r_kq.slice(0, 64).load(COL))
    low = X.to(Z.dtype)
    KK = _times(k0, k0.permute((1, 0)))
    KK = warpgroup_mma(k1, k1.permute((1, 0)), KK, is_async=True)
    KK = warpgroup_mma_wait(0, deps=[KK])
    pair = X * KK
    d_c = gl.sum(gl.where(i > j, pair, -pair), 1)
    return low, d_c, d_beta


@gluon.jit
def _transposed(do, U, k0, k1, halves_s, scale, c_b, r_kq, i, j):
    """D^T, with the rows of q normalised on the right, and what it adds to the gradient of c."""
    G = _times(U, do.permute((1, 0)))
    KQ = _times(k0, halves_s.index(0).permute((1, 0)))
    KQ = warpgroup_mma(k1, halves_s.index(1).permute((1, 0)), KQ, is_async=True)
    G, KQ = warpgroup_mma_wait(0, deps=[G, KQ])
    decay = _cols(c_b.slice(0, 64).load(COL)) - _rows(c_b.slice(0, 64).load(ROW))
    D = G * gl.exp2(gl.where(j >= i, decay, float("-inf")))
    D *= _rows(c_b.slice(64, 64).load(ROW))
    D *= _cols(scale * r_kq.slice(64, 64).load(COL))
    return D.to(do.dtype), -gl.sum(gl.where(j > i, D * KQ, 0.0), 1)


@gluon.jit
def _keys(
    scale, dk, sums, tiles_s, halves_s, gates_s, sums_s, info_s, bars,
    HALF: gl.constexpr, HK: gl.constexpr, HV: gl.constexpr, NORMALISE: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Half of the columns of dK, and what they add to the gradient of c."""
    i = _rows(gl.arange(0, 64, ROW))
    j = _cols(gl.arange(0, 64, COL))
    n = 0
    m = 0
    mbarrier.wait(bars.index(K), 0)
    chunk = _told(info_s.index(0), 0)
    while chunk >= 0:
        start = _told(info_s.index(m % 2), 1)
        hk = _told(info_s.index(m % 2), 2)
        dK = gl.zeros([64, 64], gl.float32, MMA)
        k0 = halves_s.index(2 + 2 * (m % 2))
        k1 = halves_s.index(3 + 2 * (m % 2))
        if HALF == 0:
            mine = k0
            other = halves_s.index(0)
            own = k0
        else:
            mine = halves_s.index(1)
            other = k1
            own = k1
        for turn in tl.range(0, HV // HK, disable_licm=True):
            hv = hk * (HV // HK) + turn
            s = n % 2
            mbarrier.wait(bars.index(ROWS + s), n // 2 & 1)
            c_b = gates_s.index(2 * s).reshape([128])
            r_kq = gates_s.index(2 * s + 1).reshape([128])
            U = tiles_s.index(3 * s + 1)
            Z = tiles_s.index(3 * s + 2)
            if turn == 0:
                mbarrier.wait(bars.index(Q), m & 1)
            if HALF == 0:
                low, d_c, d_beta = _mirrored(Z, U, k0, k1, c_b, r_kq, i, j, SCALED)
            else:
                low, d_c = _transposed(tiles_s.index(3 * s), U, k0, k1, halves_s, scale, c_b, r_kq, i, j)
                d_beta = gl.zeros([64], gl.float32, ROW)
            mbarrier.wait(bars.index(EMPTY + MATRIX + HALF), (n & 1) ^ 1)
            halves_s.index(6 + HALF).store(low)
            fence_async_shared()
            release(bars.index(MATRIX + HALF))
            y = _times(gl.convert_layout(low, OPERAND), mine)
            mbarrier.wait(bars.index(MATRIX + 1 - HALF), n & 1)
            y = warpgroup_mma(halves_s.index(7 - HALF), other, y, is_async=True)
            mbarrier.wait(bars.index(STATES), n & 1)
            xU = _times(U, tiles_s.index(STATES_AT + 2 + HALF).permute((1, 0)))
            y = warpgroup_mma_wait(1, deps=[y])
            dK += y
            # <S, dS>, in pieces that the registers hold
            inner = gl.zeros([16, 128], gl.float32, FLAT)
            for piece in gl.static_range(4):
                part = tiles_s.index(STATES_AT + HALF).slice(16 * piece, 16).load(FLAT).to(gl.float32)
                inner += part * tiles_s.index(STATES_AT + 2 + HALF).slice(16 * piece, 16).load(FLAT).to(gl.float32)
            c = c_b.slice(0, 64).load(ROW)
            step = c_b.slice(64, 64).load(ROW)
            r_k = r_kq.slice(0, 64).load(ROW)
            last = gl.sum(gl.where(gl.arange(0, 64, ROW) == 63, c, 0.0), 0)
            at_last = gl.exp2(last) * gl.sum(gl.sum(inner, 1), 0)
            dec = gl.exp2(last - c) * step
            gam = gl.exp2(c) if SCALED else gl.exp2(c) * step
            xU = warpgroup_mma_wait(0, deps=[xU])
            rows = own.load(MMA)
            to_last = _dot_rows(xU, rows) * (dec * r_k)
            dK += xU * _rows(dec)
            xZ = _times(Z, tiles_s.index(STATES_AT + HALF).permute((1, 0)))
            at_last += gl.sum(to_last, 0)
            xZ = warpgroup_mma_wait(0, deps=[xZ])
            to_last += _dot_rows(xZ, rows) * (gam * r_k)
            dK -= xZ * _rows(gam)
            release(bars.index(EMPTY + STATES))
            mbarrier.arrive(bars.index(EMPTY + MATRIX + 1 - HALF), count=1)
            d_c = d_c * r_k - to_last + gl.where(gl.arange(0, 64, ROW) == 63, at_last, 0.0)
            at = sums + (chunk * HV + hv).to(gl.int64) * 384 + HALF * 192 + gl.arange(0, 64, ROW)
            gl.store(at + 64, d_c)
            gl.store(at + 128, d_beta)
            if turn == HV // HK - 1:
                if NORMALISE:
                    along = _dot_rows(dK, rows)
                    sums_s.index(HALF).store(along)
                    release(bars.index(SUMS + HALF))
                    mbarrier.wait(bars.index(SUMS + 1 - HALF), m & 1)
                    along = (along + sums_s.index(1 - HALF).load(ROW)) * r_k * r_k
                    dK = (dK - rows.to(gl.float32) * _rows(along)) * _rows(r_k)
                release(bars.index(EMPTY + Q))
                mbarrier.arrive(bars.index(EMPTY + K + m % 2), count=1)
                _store(dk, start, HK, hk, 64 * HALF, dK, MMA)
            release(bars.index(EMPTY + ROWS + s))
            n += 1
        m += 1
        mbarrier.wait(bars.index(K + m % 2), m // 2 & 1)
        chunk = _told(info_s.index(m % 2), 0)


@gluon.jit(do_not_specialize=["T", "num_chunks"])
def _whole_chunk_gradient_kernel(
    q_tma, k_tma, do_tma, u_tma, z_tma, h_tma, dh_tma, gates_tma, table, dq, dk, dv, sums, T, num_chunks, scale,
    HK: gl.constexpr, HV: gl.constexpr, DOCUMENTS: gl.constexpr, NORMALISE: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_tma.dtype
    # Few allocations, because every one costs a warpgroup registers: (do, U, Z) twice, S and dS by halves of their
    # rows; by halves of their columns q, k twice, and the two matrices that the groups of keys exchange.
    tiles_s = gl.allocate_shared_memory(dtype, [10, 64, 128], q_tma.layout)
    halves_s = gl.allocate_shared_memory(dtype, [8, 64, 64], q_tma.layout)
    gates_s = gl.allocate_shared_memory(gl.float32, [4, 1, 128], gates_tma.layout)
    sums_s = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    info_s = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [18, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(18):
        mbarrier.init(bars.index(n), count=3 if n >= EMPTY and n < EMPTY + MATRIX else 1)
    fence_async_shared()
    barrier()
    tiles = num_chunks * HK
    gl.warp_specialize([
        (_queries, (scale, dq, dv, sums, tiles_s, halves_s, gates_s, info_s, bars, HK, HV, NORMALISE, SCALED)),
        (_keys, (scale, dk, sums, tiles_s, halves_s, gates_s, sums_s, info_s, bars, 0, HK, HV, NORMALISE, SCALED)),
        (_keys, (scale, dk, sums, tiles_s, halves_s, gates_s, sums_s, info_s, bars, 1, HK, HV, NORMALISE, SCALED)),
        (_copy, (tiles, table, T, q_tma, k_tma, do_tma, u_tma, z_tma, h_tma, dh_tma, gates_tma,
                 tiles_s, halves_s, gates_s, info_s, bars, HK, HV, DOCUMENTS)),
    ], [4, 4, 1], [152, 152, 24])  # fmt: skip


_whole_chunk_gradients = Launcher(_whole_chunk_gradient_kernel)


def launch_gradients(
    p: Problem, grad: Tensor, U: Tensor, Z: Tensor, h: Tensor, dh: Tensor, gates: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, sums: Tensor, scale: float, normalise: bool, scaled: bool,
) -> None:  # fmt: skip
    """Write dq, dk, dv (which may be Z's memory, and is Z where that is scaled) and sums [chunks, HV, 2, 3, 64] of the
    chunks that have all their rows."""
    c = p.constants
    width = c["HV"] * 128
    _whole_chunk_gradients(
        min(NUM_SMS, p.num_chunks * c["HK"]), (where(dv), dv.dtype, kind(p.table)),
        (row_tiles(p.q, 64, 64), row_tiles(p.k, 64, 64), row_tiles(grad, 64, 128), matrix_tiles(U, width, 64, 128),
         matrix_tiles(Z, width, 64, 128), matrix_tiles(h, 128, 64, 128), matrix_tiles(dh, 128, 64, 128),
         matrix_tiles(gates, 448, 1, 128), p.table, dq, dk, dv, sums, p.length, p.num_chunks, scale),
        (c["HK"], c["HV"], p.cu is not None, normalise, scaled), num_warps=4,
    )  # fmt: skip
