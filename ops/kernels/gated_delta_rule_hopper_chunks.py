# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The gates' vectors and Y of the gated delta rule for Hopper, in Gluon: what gated_delta_rule.py's `_chunk_kernel`
computes, for head dims of 128, chunks of 64, 16 bits, and inverses that half precision serves (unit keys, beta to 1).

One program takes a chunk and a key head: K K^T and the norms (the diagonals of K K^T and Q Q^T) serve all value heads
of the group, whose gates alone differ. With N = -M and J_n what of diag(beta) N joins blocks of n rows two by two, the
inverse X of I + diag(beta) M grows from blocks of 2, where it is I + J_1:

    X <- X + (X J_n) X        n = 2, 4, 8: each warp one block of 16 rows, in registers; n = 16: wgmma
    Y = Z + (Z J_32) X        Z = N X, X of blocks of 32

Up to 16 rows X^T is carried beside X: the right operand of a warp's mma wants the transposed fragment of the result, so
that neither ever moves between threads. The products of wgmma hold X less the identity, which is added in fp32. (A
power series over 16 rows would be shorter, but its terms reach thousands where keys are alike, and half precision loses
them; the blocks of X here stay of size one.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)

from q3n_functional.ops.kernels.gated_delta_rule_hopper import barrier, matrix_tiles, row_tiles
from q3n_functional.ops.kernels.launch import Constant, Launcher, kind, where

if TYPE_CHECKING:
    from q3n_functional.ops.kernels.gated_delta_rule import Problem

MMA = Constant(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
LEFT = Constant(gl.DotOperandLayout(0, MMA.value, 2))
ROW = Constant(gl.SliceLayout(1, MMA.value))
COL = Constant(gl.SliceLayout(0, MMA.value))
# Four blocks of 16 x 16, one a warp.
BLOCKS = Constant(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1, 1], instr_shape=[1, 16, 8]))
BLOCKS_LEFT = Constant(gl.DotOperandLayout(0, BLOCKS.value, 2))
BLOCKS_RIGHT = Constant(gl.DotOperandLayout(1, BLOCKS.value, 2))
BLOCKS_ROW = Constant(gl.SliceLayout(2, BLOCKS.value))
BLOCKS_COL = Constant(gl.SliceLayout(1, BLOCKS.value))
# A vector of 64, whole in every warp: its scan needs no other warp.
VECTOR = Constant(gl.BlockedLayout([2], [32], [4], [0]))
SHARED_VECTOR = Constant(gl.SwizzledSharedLayout(1, 1, 1, [0]))
HALF = Constant(gl.NVMMASharedLayout(128, 16, 2))
FLAT = Constant(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _chunk_range(chunk, table, T, DOCUMENTS: gl.constexpr):
    """First token and length of a chunk."""
    if DOCUMENTS:
        start = gl.load(table + 2 * chunk)
        length = gl.load(table + 2 * chunk + 1)
    else:
        row_chunks = (T + 63) // 64
        first = chunk % row_chunks * 64
        start = chunk // row_chunks * T + first
        length = gl.minimum(T - first, 64)
    return start, length


@gluon.jit
def _decay_and_step(x, b, A_log, dt_bias, hv, ACTIVATE: gl.constexpr):
    """The log-decays and beta as the rule uses them; beta_scale is 1 here."""
    if ACTIVATE:
        x += gl.load(dt_bias + hv).to(gl.float32)
        small = gl.exp(-gl.abs(x))
        # log(1 + small), accurate near zero, where 1 + small would lose it
        series = small * (1 - small * (0.5 - small * (0.33333334 - small * 0.25)))
        softplus = gl.maximum(x, 0.0) + gl.where(small < 1e-2, series, gl.log(1 + small))
        x = -gl.exp(gl.load(A_log + hv).to(gl.float32)) * softplus
    return x, 1 / (1 + gl.exp(-b))


@gluon.jit
def _product(a0, a1, b0, b1):
    """a b^T of [64, 128] tiles given as halves of 64 columns."""
    zero = gl.zeros([64, 64], gl.float32, MMA)
    x = warpgroup_mma(a0, b0.permute((1, 0)), zero, use_acc=False)
    return warpgroup_mma(a1, b1.permute((1, 0)), x)


@gluon.jit
def _inverse_norms(square, i, j, length):
    """Inverse norms of rows from their products with each other; rows behind the end count as zero."""
    total = gl.sum(gl.where(i == j, square, 0.0), 1)
    rows = gl.arange(0, 64, ROW)
    return gl.rsqrt(gl.where(rows < length, total, 0.0) + 1e-6)


@gluon.jit
def _inverse_of_blocks(L, Lt):
    """Inverse of I - L, less I, for blocks of 16 strictly below the diagonal; Lt is L transposed."""
    zero = gl.zeros([4, 16, 16], gl.float32, BLOCKS)
    i = gl.arange(0, 16, gl.SliceLayout(0, BLOCKS_ROW))[None, :, None]
    j = gl.arange(0, 16, gl.SliceLayout(0, BLOCKS_COL))[None, None, :]
    one = gl.where(i == j, 1.0, zero)
    X = one + gl.where(i // 2 == j // 2, L, 0.0)
    Xt = one + gl.where(i // 2 == j // 2, Lt, 0.0)
    for level in gl.static_range(1, 4):
        joint = (i >> level != j >> level) & (i >> (level + 1) == j >> (level + 1))
        J = gl.where(joint, L, 0.0).to(gl.float16)
        Jt = gl.where(joint, Lt, 0.0).to(gl.float16)
        low = X.to(gl.float16)
        low_t = Xt.to(gl.float16)
        J_right = gl.convert_layout(Jt.permute((0, 2, 1)), BLOCKS_RIGHT)
        right = gl.convert_layout(low_t.permute((0, 2, 1)), BLOCKS_RIGHT)
        XJ = mma_v2(gl.convert_layout(low, BLOCKS_LEFT), J_right, zero)
        X = mma_v2(gl.convert_layout(XJ.to(gl.float16), BLOCKS_LEFT), right, X)
        if level < 3:
            Jt_right = gl.convert_layout(J.permute((0, 2, 1)), BLOCKS_RIGHT)
            right_t = gl.convert_layout(low.permute((0, 2, 1)), BLOCKS_RIGHT)
            XJt = mma_v2(gl.convert_layout(low_t, BLOCKS_LEFT), Jt_right, zero)
            Xt = mma_v2(gl.convert_layout(XJt.to(gl.float16), BLOCKS_LEFT), right_t, Xt)
    return X - one


@gluon.jit(do_not_specialize=["T"])
def _whole_group_chunk_kernel(
    q_tma, k_tma, Y_tma, g, beta, A_log, dt_bias, table, gates, o, T, scale,
    g_token, g_head, beta_token, beta_head,
    HK: gl.constexpr, HV: gl.constexpr, DOCUMENTS: gl.constexpr, ACTIVATE: gl.constexpr, ZERO: gl.constexpr,
):  # fmt: skip
    """Gates and Y of one chunk and the value heads of a key head; zeros to the rows of o behind the documents."""
    dtype: gl.constexpr = k_tma.dtype
    HEADS: gl.constexpr = HV // HK
    pid = gl.program_id(0)
    chunk = pid // HK
    hk = pid % HK
    hv = hk * HEADS  # the first
    start, length = _chunk_range(chunk, table, T, DOCUMENTS)
    k0 = gl.allocate_shared_memory(dtype, [64, 64], k_tma.layout)
    k1 = gl.allocate_shared_memory(dtype, [64, 64], k_tma.layout)
    q0 = gl.allocate_shared_memory(dtype, [64, 64], q_tma.layout)
    q1 = gl.allocate_shared_memory(dtype, [64, 64], q_tma.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    fence_async_shared()
    barrier()
    mbarrier.expect(bars.index(0), 2 * 8192)
    tma.async_copy_global_to_shared(k_tma, [start, hk * 128], bars.index(0), k0)
    tma.async_copy_global_to_shared(k_tma, [start, hk * 128 + 64], bars.index(0), k1)
    mbarrier.expect(bars.index(1), 2 * 8192)
    tma.async_copy_global_to_shared(q_tma, [start, hk * 128], bars.index(1), q0)
    tma.async_copy_global_to_shared(q_tma, [start, hk * 128 + 64], bars.index(1), q1)

    r = gl.arange(0, 64, VECTOR)
    valid = r < length
    tile = chunk * HV + hv
    gates += tile.to(gl.int64) * 448
    i = gl.arange(0, 64, ROW)[:, None]
    j = gl.arange(0, 64, COL)[None, :]
    g += (start.to(gl.int64) * g_token + hv * g_head) + r * g_token
    beta += (start.to(gl.int64) * beta_token + hv * beta_head) + r * beta_token
    x_next = gl.load(g, mask=valid, other=0.0).to(gl.float32)
    b_next = gl.load(beta, mask=valid, other=0.0).to(gl.float32)
    if ZERO and length < 0:
        rows = gl.arange(0, 64, gl.SliceLayout(1, FLAT))[:, None]
        cols = gl.arange(0, 128, gl.SliceLayout(0, FLAT))[None, :]
        zeros = gl.zeros([64, 128], o.dtype.element_ty, FLAT)
        for turn in range(0, HEADS):
            at = o + (start.to(gl.int64) * (HV * 128) + (hv + turn) * 128)
            gl.store(at + rows * (HV * 128) + cols, zeros, mask=rows + cols * 0 < -length)
    mbarrier.wait(bars.index(0), 0)
    KK = _product(k0, k1, k0, k1)
    r_k = _inverse_norms(KK, i, j, length)
    rk_col = gl.convert_layout(r_k, COL)
    rk_vector = gl.convert_layout(r_k, VECTOR)
    N = gl.where((i > j) & (i < length), -KK * r_k[:, None] * rk_col[None, :], 0.0)
    on_diagonal = gl.reshape(i // 16 == j // 16, [4, 16, 4, 16])
    # The blocks on the diagonal, symmetric (both triangles hold).
    symmetric = gl.where((i < length) & (j < length) & (i != j), -KK * r_k[:, None] * rk_col[None, :], 0.0)
    diagonal = gl.where(on_diagonal, gl.reshape(symmetric, [4, 16, 4, 16]), 0.0)
    wide: gl.constexpr = diagonal.type.layout
    blocks = gl.convert_layout(gl.sum(diagonal, 2), BLOCKS)
    mbarrier.wait(bars.index(1), 0)
    rq_vector = gl.convert_layout(_inverse_norms(_product(q0, q1, q0, q1), i, j, length), VECTOR)
    # Every warp has read q and k: their place is that of X, J and the next X.
    barrier()
    xs = k0._reinterpret(gl.float16, [64, 64], HALF)
    j16 = k1._reinterpret(gl.float16, [64, 64], HALF)
    j32 = q0._reinterpret(gl.float16, [64, 64], HALF)
    ws = q1._reinterpret(gl.float16, [64, 64], HALF)
    ys = gl.allocate_shared_memory(dtype, [64, 64], Y_tma.layout)
    bs = gl.allocate_shared_memory(gl.float32, [64], SHARED_VECTOR)
    cs = gl.allocate_shared_memory(gl.float32, [64], SHARED_VECTOR)
    block_i = gl.arange(0, 16, gl.SliceLayout(0, BLOCKS_ROW))[None, :, None]
    block_j = gl.arange(0, 16, gl.SliceLayout(0, BLOCKS_COL))[None, None, :]
    for turn in tl.range(0, HEADS, disable_licm=True):
        x, b = _decay_and_step(x_next, b_next, A_log, dt_bias, hv + turn, ACTIVATE)
        more = valid & (turn + 1 < HEADS)
        g += g_head
        beta += beta_head
        x_next = gl.load(g, mask=more, other=0.0).to(gl.float32)
        b_next = gl.load(beta, mask=more, other=0.0).to(gl.float32)
        x = gl.where(valid, x * 1.4426950408889634, 0.0)  # exp2 is one instruction, exp five
        c = gl.associative_scan(x, 0, _add)
        b = gl.where(valid, b, 0.0)
        last = gl.sum(gl.where(r == 63, c, 0.0), 0)
        cs.store(c)
        bs.store(b)
        gl.store(gates + r, c)
        gl.store(gates + 64 + r, b)
        gl.store(gates + 128 + r, gl.where(valid, gl.exp2(c) * rk_vector, 0.0))
        gl.store(gates + 192 + r, gl.where(valid, gl.exp2(last - c) * rk_vector, 0.0))
        gl.store(gates + 256 + r, gl.where(valid, scale * gl.exp2(c) * rq_vector, 0.0))
        gl.store(gates + 320 + r, rk_vector)
        gl.store(gates + 384 + r, rq_vector)
        gates += 448
        tma.store_wait(0)  # the last head's Y has left shared memory
        barrier()
        c_row = cs.load(ROW)
        c_col = cs.load(COL)
        N_gated = N * gl.exp2(gl.where(i >= j, c_row[:, None] - c_col[None, :], float("-inf")))
        L = N_gated * bs.load(ROW)[:, None]
        c_blocks = cs.reshape([4, 16])
        b_blocks = bs.reshape([4, 16])
        fall = gl.expand_dims(c_blocks.load(BLOCKS_ROW), 2) - gl.expand_dims(c_blocks.load(BLOCKS_COL), 1)
        decayed = blocks * gl.exp2(-gl.abs(fall))
        lower = gl.where(block_i > block_j, decayed * gl.expand_dims(b_blocks.load(BLOCKS_ROW), 2), 0.0)
        upper = gl.where(block_i < block_j, decayed * gl.expand_dims(b_blocks.load(BLOCKS_COL), 1), 0.0)
        J = gl.where((i // 16 != j // 16) & (i // 32 == j // 32), L, 0.0).to(gl.float16)
        j16.store(J)
        j32.store(gl.where(i // 32 != j // 32, L, 0.0).to(gl.float16))
        X_blocks = gl.convert_layout(_inverse_of_blocks(lower, upper), gl.SliceLayout(2, wide))
        X = gl.where(on_diagonal, gl.expand_dims(X_blocks, 2), 0.0)
        X = gl.convert_layout(gl.reshape(X, [64, 64]), MMA)
        low = X.to(gl.float16)
        xs.store(low)
        fence_async_shared()
        barrier()
        zero = gl.zeros([64, 64], gl.float32, MMA)
        # J as rounded on both sides: with alike keys the sums cancel.
        XJ = warpgroup_mma(gl.convert_layout(low, LEFT), j16, J.to(gl.float32))
        X = warpgroup_mma(gl.convert_layout(XJ.to(gl.float16), LEFT), xs, X + XJ)
        ws.store(X.to(gl.float16))
        fence_async_shared()
        barrier()
        Z = warpgroup_mma(gl.convert_layout(N_gated.to(gl.float16), LEFT), ws, N_gated)
        ZJ = warpgroup_mma(gl.convert_layout(Z.to(gl.float16), LEFT), j32, zero, use_acc=False)
        Y = warpgroup_mma(gl.convert_layout(ZJ.to(gl.float16), LEFT), ws, Z + ZJ)
        ys.store(Y.to(dtype))
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(Y_tma, [(tile + turn) * 64, 0], ys)
    tma.store_wait(0)


_whole_group_chunks = Launcher(_whole_group_chunk_kernel)


def launch_chunks(
    p: Problem, A_log: Tensor | None, dt_bias: Tensor | None, gates: Tensor, Y: Tensor, o: Tensor | None, scale: float
) -> None:
    """Write gates, Y and the zeros of o behind the documents; keys are of unit length and beta = sigmoid(beta)."""
    c = p.constants
    none = gates  # a kernel takes no None: what a call has no use for is another tensor
    strides = *p.g.stride(), *p.beta.stride()
    _whole_group_chunks(
        p.num_chunks * c["HK"],
        (where(Y), Y.dtype, kind(p.g), kind(p.beta), kind(A_log), kind(dt_bias), o is None, strides),
        (row_tiles(p.q, 64, 64), row_tiles(p.k, 64, 64), matrix_tiles(Y, 64, 64, 64), p.g, p.beta,
         none if A_log is None else A_log, none if dt_bias is None else dt_bias,
         p.table if p.cu is not None else none, gates, none if o is None else o, p.length, scale, *strides),
        (c["HK"], c["HV"], p.cu is not None, A_log is not None, o is not None and p.cu is not None), num_warps=4,
    )  # fmt: skip
