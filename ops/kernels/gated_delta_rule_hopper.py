# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The sequential kernels of the gated delta rule for Hopper, in Gluon: K = V = 128, chunks of 64, 16 bits.

The formulas are those of gated_delta_rule.py. A program walks one sequence, value head and slice of BV columns of V.
One warp fetches tiles by TMA, STAGES chunks ahead; four make P from them, a chunk ahead; the others walk. The state is
held transposed, S^T [BV, K], as two halves [BV, 64] along K, so that each left operand of a wgmma is in registers and
each right one is a tile as fetched:

    KS^T = S^T K^T     W^T = V^T - gam KS^T     U^T = W^T + (beta W^T) Y^T     S^T <- gam_last S^T + (dec beta U^T) K

What no later product waits for (Q S, P V', and in the reverse scan P^T dO and Q^T dO) is queued behind the products of
that chain, one behind each, and runs while the warps work on the chain's last result.

What ptxas asks for, or it makes the wgmmas wait (its messages C7515 and C7517): no wgmma in flight at the loop's edge;
and results are read behind a wait that comes after the last wgmma issued, hence the waits for what is long done.

Rows behind a sequence's end are fetched too: they may be NaN. They are zeroed in shared memory, but for q in the
forward scan, where they meet only rows of o that are not stored, and P's rows are zeroed as such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from q3n_functional.ops.kernels.launch import Constant, Launcher, is_hopper, kind, where

if TYPE_CHECKING:
    from q3n_functional.ops.kernels.gated_delta_rule import Problem

SCORES = Constant(72)  # registers of the warps that compute P


LAYOUTS = {2: gl.NVMMASharedLayout(128, 16, 2), 4: gl.NVMMASharedLayout(0, 32, 2)}
"""Of tiles in shared memory, by the bytes of an element."""
NUM_SMS = 132  # of the card that the choices here were measured on
# Triton 3.7 has another name for it than 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def release(empty):
    """Tell the copying warps that this warpgroup has read a buffer."""
    barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def _sequence(n, cu, first_chunk, T, DOCUMENTS: gl.constexpr):
    """First token, length and first chunk of a sequence."""
    if DOCUMENTS:
        start = gl.load(cu + n)
        length = gl.load(cu + n + 1) - start
        chunk = gl.load(first_chunk + n)
    else:
        start = n * T
        length = T
        chunk = n * ((T + 63) // 64)
    return start, length, chunk


@gluon.jit
def _zero_rows(tile, valid, COLS: gl.constexpr, WARPS: gl.constexpr):
    """Zero the rows of a tile in shared memory from row `valid` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [WARPS, 1], [1, 0])
    inside = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None] < valid
    tile.store(gl.where(inside, tile.load(layout), gl.zeros([64, COLS], tile.dtype, layout)))


@gluon.jit
def _store_rows(tile, pointer, stride, valid, COLS: gl.constexpr, WARPS: gl.constexpr):
    """Write the first `valid` rows of a tile in shared memory to rows of global memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [WARPS, 1], [1, 0])
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLS, gl.SliceLayout(0, layout))
    gl.store(pointer + rows[:, None] * stride + cols[None, :], tile.load(layout), mask=rows[:, None] < valid)


@gluon.jit
def _load_state(pointer, HALF: gl.constexpr, BV: gl.constexpr, mma: gl.constexpr):
    """Half of the transposed state; `pointer` stands at its first row and the slice's first column."""
    rows = gl.arange(0, BV, gl.SliceLayout(1, mma))
    cols = gl.arange(0, 64, gl.SliceLayout(0, mma))
    return gl.load(pointer + HALF * (64 * 128) + rows[:, None] + cols[None, :] * 128)


@gluon.jit
def _walk(start, length, chunk, walks, REVERSE: gl.constexpr):
    """What a walk of a piece takes; the chunks of that before its own; the sequences to begin with and to leave."""
    walks += 3 if REVERSE else 0
    tokens = gl.load(walks)
    lead = (tokens + 63) // 64
    length += tokens
    if not REVERSE:
        start -= lead * 64
        chunk -= lead
    return start, length, chunk, lead, gl.load(walks + 1), gl.load(walks + 2)


@gluon.jit
def _store_state(pointer, x, HALF: gl.constexpr, BV: gl.constexpr, mma: gl.constexpr):
    rows = gl.arange(0, BV, gl.SliceLayout(1, mma))
    cols = gl.arange(0, 64, gl.SliceLayout(0, mma))
    gl.store(pointer + HALF * (64 * 128) + rows[:, None] + cols[None, :] * 128, x)


@gluon.jit
def _narrow(x, dtype: gl.constexpr):
    """x in 16 bits. In assembly: the compiler would move the conversion to where it is used, and keep x for it."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=False, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=False, pack=2
        )


@gluon.jit
def _scale(x, by):
    """x * by, in assembly for the same reason."""
    return gl.inline_asm_elementwise("mul.f32 $0, $1, $2;", "=f,f,f", [x, by], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _widen(x):
    """x in 32 bits, converted here and not behind the next wait."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x], dtype=gl.float32, is_pure=False, pack=2
        )
    else:
        return x.to(gl.float32)


@gluon.jit
def _producer(
    n, row, tile, tiles, k_col, v_col, q_tma, k_tma, v_tma, Y_tma, gates_tma,
    k0, k1, q0, q1, vs, ys, xs, full, empty, SCORES: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    REVERSE: gl.constexpr,
):  # fmt: skip
    """Fetch the chunks' tiles. `row` and `tile` belong to the first chunk, `tiles` lie between two of them."""
    for i in range(0, n):
        s = i % STAGES
        bar = full.index(s)
        c = n - 1 - i if REVERSE else i
        r = row + c * 64
        t = tile + c * tiles
        mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        tma.async_copy_global_to_shared(k_tma, [r, k_col], bar, k0.index(s))
        tma.async_copy_global_to_shared(k_tma, [r, k_col + 64], bar, k1.index(s))
        tma.async_copy_global_to_shared(gates_tma, [t * 7, 0], bar, xs.index(s))
        tma.async_copy_global_to_shared(v_tma, [r, v_col], bar, vs.index(s))
        tma.async_copy_global_to_shared(Y_tma, [t * 64, 0], bar, ys.index(s))
        if SCORES:
            tma.async_copy_global_to_shared(q_tma, [r, k_col], bar, q0.index(s))
            tma.async_copy_global_to_shared(q_tma, [r, k_col + 64], bar, q1.index(s))


@gluon.jit
def _scores(
    n, length, scale, q0, q1, k0, k1, xs, ps, full, empty, ready,
    STAGES: gl.constexpr, SLOTS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Put the chunks' P into the tiles `ps` in turn; SLOTS is at most STAGES."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row: gl.constexpr = gl.SliceLayout(1, mma)
    col: gl.constexpr = gl.SliceLayout(0, mma)
    i = gl.arange(0, 64, row)[:, None]
    j = gl.arange(0, 64, col)[None, :]
    for turn in range(0, n):
        s = turn % STAGES
        c = n - 1 - turn if REVERSE else turn
        mbarrier.wait(full.index(s), (turn // STAGES) & 1)
        x = gl.zeros([64, 64], gl.float32, mma)
        x = warpgroup_mma(q0.index(s), k0.index(s).permute((1, 0)), x, use_acc=False, is_async=True)
        x = warpgroup_mma(q1.index(s), k1.index(s).permute((1, 0)), x, is_async=True)
        gates = xs.index(s).reshape([512])
        decay = gates.slice(0, 64).load(row)[:, None] - gates.slice(0, 64).load(col)[None, :]
        x = warpgroup_mma_wait(0, deps=[x])
        x *= gl.exp2(decay)  # above the diagonal, where this may be infinite, it is not used
        x *= (scale * gates.slice(384, 64).load(row))[:, None]
        x *= gates.slice(320, 64).load(col)[None, :]
        x = gl.where((i >= j) & (i < length - c * 64), x, 0.0)
        # The chunk whose tile this was has been read.
        before = turn - SLOTS
        mbarrier.wait(empty.index((turn + STAGES - SLOTS) % STAGES), (before // STAGES) & 1, pred=before >= 0)
        ps.index(turn % SLOTS).store(x.to(ps.dtype))
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready.index(turn % SLOTS), count=1)
        mbarrier.arrive(empty.index(s), count=1)


@gluon.jit
def _free(empty, pred):
    """Every warp is done with the last chunk's tiles, and what it stored has left shared memory."""
    tma.store_wait(0)
    barrier()
    mbarrier.arrive(empty, count=1, pred=pred)


@gluon.jit
def _scan_consumer(
    n, length, row, tile, tiles, v_col, lead, first, last, o_tma, h_tma, initial, final, o,
    k0, k1, q0, q1, vs, ys, ps, xs, outs, h0, h1, full, empty, ready,
    BV: gl.constexpr, STRIDE: gl.constexpr, INITIAL: gl.constexpr, OUTPUT: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Advance the state chunk by chunk; what a chunk's turn computes last is stored in the next one's.

    Nothing is stored of the first `lead` chunks. No state is loaded if `first` is below 0, none left if `last` is.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    col: gl.constexpr = gl.SliceLayout(0, mma)
    dtype: gl.constexpr = k0.dtype
    zero = gl.zeros([BV, 64], gl.float32, mma)
    NARROW: gl.constexpr = BV == 64  # then there are registers for more in flight
    S0 = zero
    S1 = zero
    if INITIAL and first >= 0:
        S0 = _load_state(initial, 0, BV, mma)
        S1 = _load_state(initial, 1, BV, mma)
    low0 = S0.to(dtype)
    low1 = S1.to(dtype)
    if not OUTPUT:
        mbarrier.wait(full.index(0), 0, pred=n > 0)
        decay = gl.where(n > 0, gl.exp2(xs.index(0).reshape([256]).slice(63, 1).load(col)), 1.0)
        S0 = _scale(S0, decay[None, :])
        S1 = _scale(S1, decay[None, :])
    out = gl.zeros([BV, 64], dtype, mma)
    for i in range(0, n):
        s = i % STAGES
        kk0 = k0.index(s)
        kk1 = k1.index(s)
        gates = xs.index(s).reshape([512 if OUTPUT else 256])
        A0 = gl.convert_layout(low0, left)
        A1 = gl.convert_layout(low1, left)
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        if length - i * 64 < 64:
            _zero_rows(kk0, length - i * 64, 64, WARPS)
            _zero_rows(kk1, length - i * 64, 64, WARPS)
            _zero_rows(vs.index(s), length - i * 64, BV, WARPS)
            fence_async_shared()
            barrier()
        KS = warpgroup_mma(A0, kk0.permute((1, 0)), zero, use_acc=False, is_async=True)
        KS = warpgroup_mma(A1, kk1.permute((1, 0)), KS, is_async=True)
        if OUTPUT and NARROW:
            QS = warpgroup_mma(A0, q0.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
        vv = vs.index(s).permute((1, 0)).load(mma)
        if NARROW:
            vv = _widen(vv)
        gam = gates.slice(128, 64).load(col)
        beta = gates.slice(64, 64).load(col)
        if OUTPUT and not NARROW:  # now, while there are registers
            _free(empty.index((i + STAGES - 1) % STAGES), i > 0)
            outs.permute((1, 0)).store(out)
            decay = gl.exp2(gates.slice(63, 1).load(col))
            S0 = _scale(S0, decay[None, :])
            S1 = _scale(S1, decay[None, :])
        KS = warpgroup_mma_wait(1 if OUTPUT and NARROW else 0, deps=[KS])
        W = vv.to(gl.float32) - gam[None, :] * KS
        A = gl.convert_layout((beta[None, :] * W).to(dtype), left)
        U = warpgroup_mma(A, ys.index(s).permute((1, 0)), W, is_async=True)
        if OUTPUT:
            if not NARROW:
                QS = warpgroup_mma(A0, q0.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
            QS = warpgroup_mma(A1, q1.index(s).permute((1, 0)), QS, is_async=True)
        if OUTPUT and NARROW:
            decay = gl.exp2(gates.slice(63, 1).load(col))
            S0 = _scale(S0, decay[None, :])
            S1 = _scale(S1, decay[None, :])
        # The last chunk's output, and this one's first state.
        if NARROW or not OUTPUT:
            _free(empty.index((i + STAGES - 1) % STAGES), i > 0)
            outs.permute((1, 0)).store(out)
        if not OUTPUT:
            h0.permute((1, 0)).store(low0)
            h1.permute((1, 0)).store(low1)
        rate = gates.slice(192, 64).load(col) * beta
        U = warpgroup_mma_wait(1 if OUTPUT else 0, deps=[U])
        A = gl.convert_layout((rate[None, :] * U).to(dtype), left)
        S0 = warpgroup_mma(A, kk0, S0, is_async=True)
        S1 = warpgroup_mma(A, kk1, S1, is_async=True)
        fence_async_shared()
        barrier()
        # To a row that does not exist nothing is stored.
        tma.async_copy_shared_to_global(o_tma, [gl.where(i > lead, row + i * 64 - 64, 1 << 30), v_col], outs)
        if OUTPUT:
            scale_gam = gates.slice(256, 64).load(col)
            beta = gates.slice(64, 64).load(col)  # again, or the products with it are moved before those of S
            U, QS = warpgroup_mma_wait(2, deps=[U, QS])
            A = gl.convert_layout((beta[None, :] * U).to(dtype), left)
            mbarrier.wait(ready.index(i % 2), (i // 2) & 1)
            PV = warpgroup_mma(A, ps.index(i % 2).permute((1, 0)), scale_gam[None, :] * QS, is_async=True)
            S0 = warpgroup_mma_wait(2, deps=[S0])
            low0 = _narrow(S0, dtype)
            S1 = warpgroup_mma_wait(1, deps=[S1])
            low1 = _narrow(S1, dtype)
            out = _narrow(warpgroup_mma_wait(0, deps=[PV]), dtype)
        else:
            state = gl.where(i >= lead, (tile + i * tiles) * 128, 1 << 30)
            tma.async_copy_shared_to_global(h_tma, [state, v_col % 128], h0)
            tma.async_copy_shared_to_global(h_tma, [state + 64, v_col % 128], h1)
            out = _narrow(U, dtype)
            # Not in the shadow of a product, as above: ptxas would wait for that.
            t = (i + 1) % STAGES
            mbarrier.wait(full.index(t), ((i + 1) // STAGES) & 1, pred=i + 1 < n)
            decay = gl.where(i + 1 < n, gl.exp2(xs.index(t).reshape([256]).slice(63, 1).load(col)), 1.0)
            S0 = warpgroup_mma_wait(1, deps=[S0])
            low0 = _narrow(S0, dtype)
            S0 = _scale(S0, decay[None, :])
            S1 = warpgroup_mma_wait(0, deps=[S1])
            low1 = _narrow(S1, dtype)
            S1 = _scale(S1, decay[None, :])
    tma.store_wait(0)
    if n > 0:
        barrier()
        outs.permute((1, 0)).store(out)
        barrier()
        _store_rows(outs, o + (n - 1).to(gl.int64) * (64 * STRIDE), STRIDE, length - (n - 1) * 64, BV, WARPS)
    if OUTPUT and last >= 0:
        _store_state(final, S0, 0, BV, mma)
        _store_state(final, S1, 1, BV, mma)


@gluon.jit(do_not_specialize=["T", "origin"])
def _scan_kernel(
    q_tma, k_tma, v_tma, Y_tma, gates_tma, o_tma, h_tma, initial, final, o, cu, first_chunk, order,
    walks, T, origin, scale,
    HK: gl.constexpr, HV: gl.constexpr, BV: gl.constexpr, DOCUMENTS: gl.constexpr, ORDERED: gl.constexpr,
    PIECES: gl.constexpr,
    INITIAL: gl.constexpr, OUTPUT: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Forward: o and the final states (OUTPUT), or the first states h of chunks from `origin` on, and U (to o)."""
    NV: gl.constexpr = 128 // BV
    dtype: gl.constexpr = k_tma.dtype
    GATES: gl.constexpr = 8 if OUTPUT else 4  # rows of gates: what the scan has no use for comes last
    BYTES: gl.constexpr = (5 if OUTPUT else 3) * 8192 + 128 * BV + 256 * GATES
    pid = gl.program_id(0)
    hv = (pid // NV) % HV
    k_col = hv // (HV // HK) * 128
    v_col = hv * 128 + pid % NV * BV
    first = pid // (NV * HV)
    if ORDERED:
        first = gl.load(order + first)
    start, length, chunk = _sequence(first, cu, first_chunk, T, DOCUMENTS)
    lead = 0
    last = first
    if PIECES:
        start, length, chunk, lead, first, last = _walk(start, length, chunk, walks + (first * HV + hv) * 6, False)
    n = (length + 63) // 64
    tile = chunk * HV + hv
    initial += (first * HV + hv).to(gl.int64) * (128 * 128) + pid % NV * BV
    final += (last * HV + hv).to(gl.int64) * (128 * 128) + pid % NV * BV
    k0 = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], k_tma.layout)
    k1 = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], k_tma.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 64, BV], v_tma.layout)
    ys = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], Y_tma.layout)
    xs = gl.allocate_shared_memory(gl.float32, [STAGES, GATES, 64], gates_tma.layout)
    outs = gl.allocate_shared_memory(dtype, [64, BV], o_tma.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if OUTPUT:
        q0 = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], q_tma.layout)
        q1 = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], q_tma.layout)
        ps = gl.allocate_shared_memory(dtype, [2, 64, 64], Y_tma.layout)
        h0 = outs
        h1 = outs
    else:
        q0 = k0
        q1 = k1
        ps = ys
        h0 = gl.allocate_shared_memory(dtype, [64, BV], h_tma.layout)
        h1 = gl.allocate_shared_memory(dtype, [64, BV], h_tma.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2 if OUTPUT else 1)
    for slot in gl.static_range(2):
        mbarrier.init(ready.index(slot), count=1)
    fence_async_shared()
    barrier()
    if OUTPUT:
        gl.warp_specialize([
            (_scan_consumer, (
                n, length, start, tile - origin * HV, HV, v_col, lead, first, last, o_tma, h_tma, initial, final,
                o + start.to(gl.int64) * (HV * 128) + v_col, k0, k1, q0, q1, vs, ys, ps, xs, outs, h0, h1,
                full, empty, ready, BV, HV * 128, INITIAL, OUTPUT, STAGES, WARPS,
            )),
            (_scores, (n, length, scale, q0, q1, k0, k1, xs, ps, full, empty, ready, STAGES, 2, False)),
            (_producer, (
                n, start, tile, HV, k_col, v_col, q_tma, k_tma, v_tma, Y_tma, gates_tma,
                k0, k1, q0, q1, vs, ys, xs, full, empty, OUTPUT, STAGES, BYTES, False,
            )),
        ], [4, 1], [SCORES, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_scan_consumer, (
                n, length, start, tile - origin * HV, HV, v_col, lead, first, last, o_tma, h_tma, initial, final,
                o + start.to(gl.int64) * (HV * 128) + v_col, k0, k1, q0, q1, vs, ys, ps, xs, outs, h0, h1,
                full, empty, ready, BV, HV * 128, INITIAL, OUTPUT, STAGES, WARPS,
            )),
            (_producer, (
                n, start, tile, HV, k_col, v_col, q_tma, k_tma, v_tma, Y_tma, gates_tma,
                k0, k1, q0, q1, vs, ys, xs, full, empty, OUTPUT, STAGES, BYTES, False,
            )),
        ], [1], [24])  # fmt: skip


@gluon.jit
def _reverse_scan_consumer(
    n, length, row, tile, tiles, v_col, lead, first, last, z_tma, dh_tma, d_final, d_initial, z,
    k0, k1, q0, q1, ds, ys, ps, xs, outs, h0, h1, full, empty, ready,
    BV: gl.constexpr, STRIDE: gl.constexpr, FINAL: gl.constexpr, INITIAL: gl.constexpr, SCALED: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As _scan_consumer, from the last chunk to the first; S is the gradient of the state here."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    col: gl.constexpr = gl.SliceLayout(0, mma)
    dtype: gl.constexpr = k0.dtype
    zero = gl.zeros([BV, 64], gl.float32, mma)
    S0 = zero
    S1 = zero
    if FINAL and last >= 0:
        S0 = _load_state(d_final, 0, BV, mma)
        S1 = _load_state(d_final, 1, BV, mma)
    low0 = S0.to(dtype)
    low1 = S1.to(dtype)
    tail = length % 64
    PG = zero
    G = gl.convert_layout(low0, left)
    if n > 0:
        mbarrier.wait(full.index(0), 0)
        if tail > 0:
            _zero_rows(k0.index(0), tail, 64, WARPS)
            _zero_rows(k1.index(0), tail, 64, WARPS)
            _zero_rows(q0.index(0), tail, 64, WARPS)
            _zero_rows(q1.index(0), tail, 64, WARPS)
            _zero_rows(ds.index(0), tail, BV, WARPS)
            fence_async_shared()
            barrier()
        grad = ds.index(0).permute((1, 0)).load(mma)
        scale_gam = xs.index(0).reshape([512]).slice(256, 64).load(col)
        G = gl.convert_layout((scale_gam[None, :] * grad.to(gl.float32)).to(dtype), left)
        mbarrier.wait(ready.index(0), 0)
        PG = warpgroup_mma(gl.convert_layout(grad, left), ps.index(0), zero, use_acc=False)
    out = gl.zeros([BV, 64], dtype, mma)
    for i in range(0, n):
        s = i % STAGES
        c = n - 1 - i
        kk0 = k0.index(s)
        kk1 = k1.index(s)
        gates = xs.index(s).reshape([512])
        A0 = gl.convert_layout(low0, left)
        A1 = gl.convert_layout(low1, left)
        KS = warpgroup_mma(A0, kk0.permute((1, 0)), zero, use_acc=False, is_async=True)
        KS = warpgroup_mma(A1, kk1.permute((1, 0)), KS, is_async=True)
        decay = gl.exp2(gates.slice(63, 1).load(col))
        S0 = _scale(S0, decay[None, :])
        S1 = _scale(S1, decay[None, :])
        S0 = warpgroup_mma(G, q0.index(s), S0, is_async=True)
        dec = gates.slice(192, 64).load(col)
        beta = gates.slice(64, 64).load(col)
        KS = warpgroup_mma_wait(1, deps=[KS])
        d_new = dec[None, :] * KS + PG
        A = gl.convert_layout((beta[None, :] * d_new).to(dtype), left)
        Z = warpgroup_mma(A, ys.index(s), d_new, is_async=True)
        S1 = warpgroup_mma(G, q1.index(s), S1, is_async=True)
        _free(empty.index((i + STAGES - 1) % STAGES), i > 0)
        outs.permute((1, 0)).store(out)
        h0.permute((1, 0)).store(low0)
        h1.permute((1, 0)).store(low1)
        rate = -gates.slice(128, 64).load(col) * beta
        Z = warpgroup_mma_wait(1, deps=[Z])
        A = gl.convert_layout((rate[None, :] * Z).to(dtype), left)
        S0 = warpgroup_mma(A, kk0, S0, is_async=True)
        S1 = warpgroup_mma(A, kk1, S1, is_async=True)
        out = _narrow(Z * beta[None, :] if SCALED else Z, dtype)
        fence_async_shared()
        barrier()
        # A tail's Z is stored below.
        stored = (i > lead) & ((i > 1) | (tail == 0))
        tma.async_copy_shared_to_global(z_tma, [gl.where(stored, row + c * 64 + 64, 1 << 30), v_col], outs)
        state = gl.where(i >= lead, (tile + c * tiles) * 128, 1 << 30)
        tma.async_copy_shared_to_global(dh_tma, [state, v_col % 128], h0)
        tma.async_copy_shared_to_global(dh_tma, [state + 64, v_col % 128], h1)
        # P^T dO and scale gam dO of the next chunk (behind the last one: of anything, and unused).
        t = (i + 1) % STAGES
        mbarrier.wait(full.index(t), ((i + 1) // STAGES) & 1, pred=c > 0)
        grad = ds.index(t).permute((1, 0)).load(mma)
        scale_gam = xs.index(t).reshape([512]).slice(256, 64).load(col)
        mbarrier.wait(ready.index((i + 1) % 3), ((i + 1) // 3) & 1, pred=c > 0)
        PG = warpgroup_mma(gl.convert_layout(grad, left), ps.index((i + 1) % 3), zero, use_acc=False, is_async=True)
        G = gl.convert_layout((scale_gam[None, :] * grad.to(gl.float32)).to(dtype), left)
        S0 = warpgroup_mma_wait(2, deps=[S0])
        low0 = _narrow(S0, dtype)
        S1 = warpgroup_mma_wait(1, deps=[S1])
        low1 = _narrow(S1, dtype)
        PG = warpgroup_mma_wait(0, deps=[PG])
        if (c == 0) | ((i == 0) & (tail > 0) & (lead == 0)):
            valid = gl.minimum(length - c * 64, 64)
            tma.store_wait(0)
            barrier()
            outs.permute((1, 0)).store(out)
            barrier()
            _store_rows(outs, z + c.to(gl.int64) * (64 * STRIDE), STRIDE, valid, BV, WARPS)
            barrier()
    if INITIAL and first >= 0:
        _store_state(d_initial, S0, 0, BV, mma)
        _store_state(d_initial, S1, 1, BV, mma)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "origin"])
def _reverse_scan_kernel(
    q_tma, k_tma, do_tma, Y_tma, gates_tma, z_tma, dh_tma, d_final, d_initial, z, cu, first_chunk, order,
    walks, T, origin, scale,
    HK: gl.constexpr, HV: gl.constexpr, BV: gl.constexpr, DOCUMENTS: gl.constexpr, ORDERED: gl.constexpr,
    PIECES: gl.constexpr,
    FINAL: gl.constexpr, INITIAL: gl.constexpr, SCALED: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Backward: the gradient of the state after each chunk from `origin` on (dh), Z, and that of the initial states.

    SCALED: z receives beta Z, which is dV.
    """
    NV: gl.constexpr = 128 // BV
    dtype: gl.constexpr = k_tma.dtype
    BYTES: gl.constexpr = 5 * 8192 + 128 * BV + 2048
    pid = gl.program_id(0)
    hv = (pid // NV) % HV
    k_col = hv // (HV // HK) * 128
    v_col = hv * 128 + pid % NV * BV
    last = pid // (NV * HV)
    if ORDERED:
        last = gl.load(order + last)
    start, length, chunk = _sequence(last, cu, first_chunk, T, DOCUMENTS)
    lead = 0
    first = last
    if PIECES:
        start, length, chunk, lead, last, first = _walk(start, length, chunk, walks + (last * HV + hv) * 6, True)
    n = (length + 63) // 64
    tile = chunk * HV + hv
    d_final += (last * HV + hv).to(gl.int64) * (128 * 128) + pid % NV * BV
    d_initial += (first * HV + hv).to(gl.int64) * (128 * 128) + pid % NV * BV
    k0 = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], k_tma.layout)
    k1 = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], k_tma.layout)
    q0 = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], q_tma.layout)
    q1 = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], q_tma.layout)
    ds = gl.allocate_shared_memory(dtype, [STAGES, 64, BV], do_tma.layout)
    ys = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], Y_tma.layout)
    ps = gl.allocate_shared_memory(dtype, [3, 64, 64], Y_tma.layout)
    xs = gl.allocate_shared_memory(gl.float32, [STAGES, 8, 64], gates_tma.layout)
    outs = gl.allocate_shared_memory(dtype, [64, BV], z_tma.layout)
    h0 = gl.allocate_shared_memory(dtype, [64, BV], dh_tma.layout)
    h1 = gl.allocate_shared_memory(dtype, [64, BV], dh_tma.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for slot in gl.static_range(3):
        mbarrier.init(ready.index(slot), count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize([
        (_reverse_scan_consumer, (
            n, length, start, tile - origin * HV, HV, v_col, lead, first, last, z_tma, dh_tma, d_final, d_initial,
            z + start.to(gl.int64) * (HV * 128) + v_col, k0, k1, q0, q1, ds, ys, ps, xs, outs, h0, h1,
            full, empty, ready, BV, HV * 128, FINAL, INITIAL, SCALED, STAGES, WARPS,
        )),
        (_scores, (n, length, scale, q0, q1, k0, k1, xs, ps, full, empty, ready, STAGES, 3, True)),
        (_producer, (
            n, start, tile, HV, k_col, v_col, q_tma, k_tma, do_tma, Y_tma, gates_tma,
            k0, k1, q0, q1, ds, ys, xs, full, empty, True, STAGES, BYTES, True,
        )),
    ], [4, 1], [SCORES, 24])  # fmt: skip


_scan, _reverse_scan = Launcher(_scan_kernel), Launcher(_reverse_scan_kernel)


def _can_be_fetched(x: Tensor) -> bool:
    """Whether the copy engine can fetch whole tiles of a [N, heads, 128] view in 16 bits."""
    token, head, _ = x.stride()
    return head == 128 and token % 8 == 0 and x.data_ptr() % 16 == 0


def serves(p: Problem, *rows: Tensor) -> bool:
    """Whether these kernels can take the problem; `rows` are the [N, heads, dim] views read beside q and k."""
    c, q = p.constants, p.q
    return (
        c["K"] == c["V"] == 128
        and c["C"] == 64
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.numel() > 0
        and q.is_cuda
        and is_hopper(q.device)
        and all(map(_can_be_fetched, (q, p.k, *rows)))
    )


def _descriptor(x: Tensor, length: int, width: int, stride: int, rows: int, cols: int) -> TensorDescriptor:
    """Of [rows, cols] tiles of a [length, width] matrix.

    Without the constructor's checks, which take longer than all else here: there are dozens in a call, hosts may be
    slow, and `serves` has checked what is not an allocation of this package.
    """
    tiles = TensorDescriptor.__new__(TensorDescriptor)
    tiles.base, tiles.layout = x, LAYOUTS[x.element_size()]
    tiles.shape, tiles.strides, tiles.block_shape = [length, width], [stride, 1], [rows, cols]
    return tiles


def row_tiles(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Of [rows, cols] tiles of [N, heads, dim] with heads side by side."""
    length, heads, dim = x.shape
    return _descriptor(x, length, heads * dim, x.stride(0), rows, cols)


def matrix_tiles(x: Tensor, width: int, rows: int, cols: int) -> TensorDescriptor:
    """Of [rows, cols] tiles of a contiguous tensor as a matrix of this width."""
    return _descriptor(x, x.numel() // width, width, width, rows, cols)


def _tables(p: Problem, other: Tensor) -> list[Tensor]:
    """Those of documents and walks, or `other` where the problem has none."""
    documents = (None, None) if p.cu is None else (p.cu, p.first_chunk)
    return [other if x is None else x for x in (*documents, p.order, p.walks)]


def _forms(p: Problem) -> tuple[bool, bool, bool]:
    """Which of the tables there are."""
    return p.cu is not None, p.order is not None, p.walks is not None


def launch_scan(
    p: Problem, gates: Tensor, Y: Tensor, scale: float, initial: Tensor | None, final: Tensor | None, o: Tensor,
    h: Tensor | None,
) -> None:  # fmt: skip
    """Forward's scan (final given: o is the output) or backward's recomputation (h given: o receives U)."""
    c = p.constants
    # Wide slices read less, narrow ones fill the card where there are few sequences and heads.
    BV, stages = (128, 2) if p.num_sequences * c["HV"] >= NUM_SMS else (64, 3)
    out = matrix_tiles(o, c["HV"] * 128, 64, BV)
    # A kernel takes no None: what a mode has no use for is another tensor of its kind.
    given = gates if initial is None else initial, gates if final is None else final, o, *_tables(p, gates)
    _scan(
        p.num_sequences * c["HV"] * (128 // BV), (where(o), *map(kind, given)),
        (row_tiles(p.q, 64, 64), row_tiles(p.k, 64, 64), row_tiles(p.v, 64, BV),
         matrix_tiles(Y, 64, 64, 64), matrix_tiles(gates, 64, 8 if h is None else 4, 64),
         out, out if h is None else matrix_tiles(h, 128, 64, BV),
         *given, p.length, p.origin, scale),
        (c["HK"], c["HV"], BV, *_forms(p), initial is not None, h is None, stages, BV // 16),
        num_warps=BV // 16,
    )  # fmt: skip


def launch_reverse_scan(
    p: Problem, grad: Tensor, gates: Tensor, Y: Tensor, scale: float, d_final: Tensor | None, d_initial: Tensor,
    z: Tensor, dh: Tensor, scaled: bool,
) -> None:  # fmt: skip
    """Write z (beta Z where that is to be scaled), dh and, where it is not empty, d_initial.

    `grad` is the gradient of o, [N, HV, V].
    """
    c = p.constants
    BV, stages = 64, 3
    begins = d_initial.numel() > 0
    given = gates if d_final is None else d_final, d_initial if begins else gates, z, *_tables(p, gates)
    _reverse_scan(
        p.num_sequences * c["HV"] * (128 // BV), (where(z), *map(kind, given)),
        (row_tiles(p.q, 64, 64), row_tiles(p.k, 64, 64), row_tiles(grad, 64, BV),
         matrix_tiles(Y, 64, 64, 64), matrix_tiles(gates, 64, 8, 64),
         matrix_tiles(z, c["HV"] * 128, 64, BV), matrix_tiles(dh, 128, 64, BV),
         *given, p.length, p.origin, scale),
        (c["HK"], c["HV"], BV, *_forms(p), d_final is not None, begins, scaled, stages, BV // 16),
        num_warps=BV // 16,
    )  # fmt: skip
