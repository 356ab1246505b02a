# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Three of the experts' products that give rows, for Hopper in Gluon: what grouped_swiglu.py's `_down_kernel`,
`_hidden_gradient_kernel` and `_input_gradient_kernel` compute, in 16 bits and for widths that are whole tiles.

    DOWN       (w h) down^T, to slots
    HIDDEN     dy down; then da, db, w h and dw; rows of dy are gathered
    INPUT      da gate + db up, to slots

A program stays on each multiprocessor and takes tiles of 128 rows and 256 columns in turn. Some of its warps fetch the
operands STAGES steps of 64 ahead, two groups multiply 64 rows each, and a third takes from shared memory what they left
there in 16 bits, while they are at the next tile. (Gate and up, made so too, took 5 to 7 % longer than in Triton.)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from q3n_functional.ops.kernels.gated_delta_rule_hopper import NUM_SMS, barrier, matrix_tiles, release
from q3n_functional.ops.kernels.grouped_swiglu_hopper import halves
from q3n_functional.ops.kernels.launch import Constant, Launcher, kind, where

DOWN, HIDDEN, INPUT = Constant(0), Constant(1), Constant(2)
STAGES = Constant(3)
# Barriers: a stage holds its operands; a stage was read; a group's result is there; it was taken.
FULL, EMPTY, MADE, TAKEN = Constant(0), Constant(3), Constant(6), Constant(8)
GROUP = Constant(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
FLAT = Constant(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
FLAT_ROW = Constant(gl.SliceLayout(1, FLAT.value))
FLAT_COL = Constant(gl.SliceLayout(0, FLAT.value))


@gluon.jit
def _num_steps(MODE: gl.constexpr, D: gl.constexpr, F: gl.constexpr):
    if MODE == DOWN:
        return F // 64
    elif MODE == INPUT:
        return 2 * F // 64
    else:
        return D // 64


@gluon.jit
def _fetch_matrices(b_tma, c_tma, b_s, bar, s, e, n, k, MODE: gl.constexpr, D: gl.constexpr, F: gl.constexpr):
    """The right operands of a step: 64 of the summed dim, two times 128 columns."""
    for half in gl.static_range(2):
        to = b_s.index(2 * s + half)
        col = n + 128 * half
        if MODE == HIDDEN:
            tma.async_copy_global_to_shared(b_tma, [e * D + k * 64, col], bar, to)
        elif MODE == DOWN:
            tma.async_copy_global_to_shared(b_tma, [e * D + col, k * 64], bar, to)
        elif k < F // 64:
            tma.async_copy_global_to_shared(b_tma, [e * F + k * 64, col], bar, to)
        else:
            tma.async_copy_global_to_shared(c_tma, [e * F + k * 64 - F, col], bar, to)


@gluon.jit
def _token_offsets(token_rows, order, row, last, J: gl.constexpr, D: gl.constexpr, INDIRECT: gl.constexpr):
    """Where the tokens of rows begin; rows behind the expert's last are that one's."""
    token = gl.load(order + gl.minimum(row, last)) // J
    if INDIRECT:
        token = gl.load(token_rows + token)
    return token.to(gl.int64)[:, None] * D


@gluon.jit
def _fetch_gathered(
    x, token_rows, order, ends, tiles, num_tiles, first_block, blocks, b_tma, c_tma, a_s, b_s, bars,
    J: gl.constexpr, D: gl.constexpr, F: gl.constexpr, INDIRECT: gl.constexpr,
):  # fmt: skip
    step = 0
    row = gl.arange(0, 64, FLAT_ROW)
    for t in range(gl.program_id(0), num_tiles * blocks, gl.num_programs(0)):
        e = gl.load(tiles + 2 * (t // blocks))
        if e >= 0:
            first = gl.load(tiles + 2 * (t // blocks) + 1)
            n = (first_block + t % blocks) * 256
            last = gl.load(ends + e) - 1
            upper = _token_offsets(token_rows, order, first + row, last, J, D, INDIRECT)
            lower = _token_offsets(token_rows, order, first + 64 + row, last, J, D, INDIRECT)
            for k in range(0, D // 64):
                s = step % STAGES
                bar = bars.index(FULL + s)
                mbarrier.wait(bars.index(EMPTY + s), (step // STAGES & 1) ^ 1)
                mbarrier.expect(bar, 64 * 256 * 2)
                _fetch_matrices(b_tma, c_tma, b_s, bar, s, e, n, k, HIDDEN, D, F)
                cols = x + (k * 64 + gl.arange(0, 64, FLAT_COL))[None, :]
                async_copy.async_copy_global_to_shared(a_s.index(2 * s), cols + upper)
                async_copy.async_copy_global_to_shared(a_s.index(2 * s + 1), cols + lower)
                async_copy.commit_group()
                async_copy.wait_group(1)  # the step before has arrived
                fence_async_shared()
                barrier()
                mbarrier.arrive(bars.index(FULL + (step + STAGES - 1) % STAGES), count=1, pred=step >= 1)
                step += 1
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    mbarrier.arrive(bars.index(FULL + (step + STAGES - 1) % STAGES), count=1, pred=step >= 1)


@gluon.jit
def _fetch_sorted(
    tiles, num_tiles, num_rows, first_block, blocks, a_tma, b_tma, c_tma, a_s, b_s, bars,
    MODE: gl.constexpr, D: gl.constexpr, F: gl.constexpr,
):  # fmt: skip
    step = 0
    for t in range(gl.program_id(0), num_tiles * blocks, gl.num_programs(0)):
        e = gl.load(tiles + 2 * (t // blocks))
        if e >= 0:
            first = gl.load(tiles + 2 * (t // blocks) + 1)
            n = (first_block + t % blocks) * 256
            for k in range(0, _num_steps(MODE, D, F)):
                s = step % STAGES
                bar = bars.index(FULL + s)
                mbarrier.wait(bars.index(EMPTY + s), (step // STAGES & 1) ^ 1)
                mbarrier.expect(bar, 64 * (128 + 256) * 2)
                row = first
                col = k * 64
                if MODE == INPUT:
                    row += gl.where(k < F // 64, 0, num_rows)
                    col -= gl.where(k < F // 64, 0, F)
                tma.async_copy_global_to_shared(a_tma, [row, col], bar, a_s.index(2 * s))
                tma.async_copy_global_to_shared(a_tma, [row + 64, col], bar, a_s.index(2 * s + 1))
                _fetch_matrices(b_tma, c_tma, b_s, bar, s, e, n, k, MODE, D, F)
                step += 1


@gluon.jit
def _leave(x, to, at: gl.constexpr):
    """x in two tiles of 64 columns."""
    left, right = halves(x.to(to.dtype))
    to.index(at).store(left)
    to.index(at + 1).store(right)


@gluon.jit
def _multiply(
    tiles, num_tiles, blocks, a_s, b_s, out_s, bars,
    HALF: gl.constexpr, MODE: gl.constexpr, D: gl.constexpr, F: gl.constexpr,
):  # fmt: skip
    step = 0
    turn = 0
    for t in range(gl.program_id(0), num_tiles * blocks, gl.num_programs(0)):
        if gl.load(tiles + 2 * (t // blocks)) >= 0:
            left = gl.zeros([64, 128], gl.float32, GROUP)
            right = gl.zeros([64, 128], gl.float32, GROUP)
            for k in range(0, _num_steps(MODE, D, F)):
                s = step % STAGES
                mbarrier.wait(bars.index(FULL + s), step // STAGES & 1)
                a = a_s.index(2 * s + HALF)
                b = b_s.index(2 * s)
                c = b_s.index(2 * s + 1)
                if MODE == DOWN:
                    left = warpgroup_mma(a, b.permute((1, 0)), left, is_async=True)
                    right = warpgroup_mma(a, c.permute((1, 0)), right, is_async=True)
                else:
                    left = warpgroup_mma(a, b, left, is_async=True)
                    right = warpgroup_mma(a, c, right, is_async=True)
                left, right = warpgroup_mma_wait(2, deps=[left, right])
                barrier()
                mbarrier.arrive(bars.index(EMPTY + (step + STAGES - 1) % STAGES), count=1, pred=k > 0)
                step += 1
            left, right = warpgroup_mma_wait(0, deps=[left, right])
            release(bars.index(EMPTY + (step + STAGES - 1) % STAGES))
            mbarrier.wait(bars.index(TAKEN + HALF), (turn & 1) ^ 1)
            _leave(left, out_s, 4 * HALF)
            _leave(right, out_s, 4 * HALF + 2)
            release(bars.index(MADE + HALF))
            turn += 1


@gluon.jit
def _sigmoid(x):
    root = gl.rsqrt(1.0 + gl.exp2(x * -1.4426950408889634))  # as in sigmoid.py
    return root * root


@gluon.jit
def _activation_gradients(out_s, at: gl.constexpr, first: gl.constexpr, a_all, b_all, to, plane, w, mask):
    """Write da, db and w h of 16 rows; return their share of dw."""
    dw = gl.zeros([16], gl.float32, FLAT_ROW)
    for q in gl.static_range(4):
        a = a_all[q].to(gl.float32)
        b = b_all[q].to(gl.float32)
        g = out_s.index(at + q).slice(first, 16).load(FLAT).to(gl.float32)
        s = _sigmoid(a)
        silu = a * s
        h = silu * b
        gl.store(to + 2 * plane + 64 * q, (h * w).to(out_s.dtype), mask=mask)
        dw += gl.sum(g * h, 1)
        g *= w
        gl.store(to + plane + 64 * q, (g * silu).to(out_s.dtype), mask=mask)
        gl.store(to + 64 * q, (g * b * (s + silu * (1.0 - s))).to(out_s.dtype), mask=mask)
    return dw


@gluon.jit
def _four(pointer, mask):
    """64 columns four times."""
    a = gl.load(pointer, mask=mask, other=0.0)
    b = gl.load(pointer + 64, mask=mask, other=0.0)
    c = gl.load(pointer + 128, mask=mask, other=0.0)
    return a, b, c, gl.load(pointer + 192, mask=mask, other=0.0)


@gluon.jit
def _finish(
    order, ends, tiles, num_tiles, num_rows, blocks, weights, hidden, out, dweights, out_s, bars,
    MODE: gl.constexpr, F: gl.constexpr,
):  # fmt: skip
    """Write what the groups made, 16 rows at a time."""
    turn = 0
    plane = num_rows.to(gl.int64) * F
    for t in range(gl.program_id(0), num_tiles * blocks, gl.num_programs(0)):
        e = gl.load(tiles + 2 * (t // blocks))
        if e >= 0:
            first = gl.load(tiles + 2 * (t // blocks) + 1)
            end = gl.load(ends + e)
            for half in gl.static_range(2):
                for part in gl.static_range(4):
                    row = first + (64 * half + 16 * part) + gl.arange(0, 16, FLAT_ROW)
                    mask = (row < end)[:, None]
                    slot = gl.load(order + gl.minimum(row, end - 1))
                    col = gl.arange(0, 64, FLAT_COL)[None, :]
                    if MODE == HIDDEN:
                        at = row.to(gl.int64)[:, None] * F + t % blocks * 256 + col
                        w = gl.load(weights + slot).to(gl.float32)[:, None]
                        a_all = _four(hidden + at, mask)
                        b_all = _four(hidden + plane + at, mask)
                    if part == 0:
                        mbarrier.wait(bars.index(MADE + half), turn & 1)
                    if MODE == HIDDEN:
                        dw = _activation_gradients(
                            out_s, 4 * half, 16 * part, a_all, b_all, out + at, plane, w, mask
                        )  # fmt: skip
                        gl.store(dweights + slot * blocks + t % blocks, dw, mask=row < end)
                    else:
                        to = out + slot.to(gl.int64)[:, None] * (blocks * 256) + t % blocks * 256 + col
                        for q in gl.static_range(4):
                            x = out_s.index(4 * half + q).slice(16 * part, 16).load(FLAT)
                            gl.store(to + 64 * q, x, mask=mask)
                release(bars.index(TAKEN + half))
            turn += 1


@gluon.jit(do_not_specialize=["num_rows", "num_tiles", "first_block", "blocks"])
def _rows_kernel(
    x, token_rows, order, ends, tiles, a_tma, b_tma, c_tma, weights, hidden, out, dweights, num_rows, num_tiles,
    first_block, blocks, MODE: gl.constexpr, J: gl.constexpr, D: gl.constexpr, F: gl.constexpr, INDIRECT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = b_tma.dtype
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], b_tma.layout)
    if MODE == DOWN:
        b_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 128, 64], b_tma.layout)
    else:
        b_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 128], b_tma.layout)
    out_s = gl.allocate_shared_memory(dtype, [8, 64, 64], b_tma.layout)
    bars = gl.allocate_shared_memory(gl.int64, [10, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(bars.index(FULL + n), count=2 if MODE == HIDDEN else 1)
        mbarrier.init(bars.index(EMPTY + n), count=2)
    for n in gl.static_range(2):
        mbarrier.init(bars.index(MADE + n), count=1)
        mbarrier.init(bars.index(TAKEN + n), count=1)
    fence_async_shared()
    barrier()
    if MODE == HIDDEN:
        gl.warp_specialize([
            (_multiply, (tiles, num_tiles, blocks, a_s, b_s, out_s, bars, 0, MODE, D, F)),
            (_multiply, (tiles, num_tiles, blocks, a_s, b_s, out_s, bars, 1, MODE, D, F)),
            (_finish, (order, ends, tiles, num_tiles, num_rows, blocks, weights, hidden, out, dweights, out_s, bars,
                       MODE, F)),
            (_fetch_gathered, (x, token_rows, order, ends, tiles, num_tiles, first_block, blocks, b_tma, c_tma,
                               a_s, b_s, bars, J, D, F, INDIRECT)),
        ], [4, 4, 4], [160, 136, 48])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (tiles, num_tiles, blocks, a_s, b_s, out_s, bars, 0, MODE, D, F)),
            (_multiply, (tiles, num_tiles, blocks, a_s, b_s, out_s, bars, 1, MODE, D, F)),
            (_finish, (order, ends, tiles, num_tiles, num_rows, blocks, weights, hidden, out, dweights, out_s, bars,
                       MODE, F)),
            (_fetch_sorted, (tiles, num_tiles, num_rows, first_block, blocks, a_tma, b_tma, c_tma, a_s, b_s, bars,
                             MODE, D, F)),
        ], [4, 4, 1], [160, 136, 48])  # fmt: skip


_rows = Launcher(_rows_kernel)


class Places(NamedTuple):
    """order [M], ends [E], the table of tiles of 128 rows, the tokens of rows where several are one's, rows' slots."""

    order: Tensor
    ends: Tensor
    tiles: Tensor
    token_rows: Tensor | None
    per_row: int


def hidden_gradient(
    places: Places, dy: Tensor, weights: Tensor, hidden: Tensor, down: Tensor, dhidden: Tensor, dweights: Tensor
) -> None:
    """Write dhidden [3, M, F] and dweights [T, J, blocks], a share of dw for each COLS of the inner dims."""
    _launch(
        HIDDEN, places, dy, None, (down, down), weights, hidden, dhidden, dweights, 0, dweights.shape[-1],
        down.shape[1], down.shape[2],
    )  # fmt: skip


def down_rows(places: Places, h: Tensor, down: Tensor, out: Tensor, first: int, blocks: int) -> None:
    """Write `blocks` times COLS columns from block `first` on of every slot's row."""
    _launch(DOWN, places, h, h, (down, down), None, h, out, None, first, blocks, down.shape[1], down.shape[2])


def input_gradient_rows(
    places: Places, dhidden: Tensor, gate: Tensor, up: Tensor, out: Tensor, first: int, blocks: int
) -> None:
    """As `down_rows`, of the gradient of x."""
    _launch(
        INPUT, places, dhidden, dhidden, (gate, up), None, dhidden, out, None, first, blocks, gate.shape[2],
        gate.shape[1],
    )  # fmt: skip


def _launch(
    mode: Constant, places: Places, x: Tensor, sorted_rows: Tensor | None, matrices: tuple[Tensor, Tensor],
    weights: Tensor | None, hidden: Tensor, out: Tensor, dweights: Tensor | None, first: int, blocks: int, width: int,
    inner: int,
) -> None:  # fmt: skip
    box = (128, 64) if mode is DOWN else (64, 128)
    right = [matrix_tiles(m, m.shape[2], *box) for m in matrices]
    left = right[0] if sorted_rows is None else matrix_tiles(sorted_rows, inner, 64, 64)
    # A kernel takes no None: what a mode has no use for is another tensor.
    none = places.ends
    given = none if weights is None else weights, none if dweights is None else dweights
    shared = none if places.token_rows is None else places.token_rows
    _rows(
        NUM_SMS, (where(x), x.dtype, *map(kind, (*given, shared))),
        (x, shared, *places[:3], left, *right, given[0], hidden, out, given[1], places.order.shape[0],
         places.tiles.shape[0], first, blocks),
        (mode.value, places.per_row, width, inner, places.token_rows is not None), num_warps=4,
    )  # fmt: skip
