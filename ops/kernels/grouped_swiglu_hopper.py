# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The experts' weight gradients for Hopper, in Gluon: what grouped_swiglu.py's `_weight_gradient_kernel` computes, in
16 bits and for widths that are whole tiles.

A program stays on each multiprocessor and takes tiles of 128 model dims and 256 inner dims of an expert's dgate, dup or
ddown, which a counter hands out since experts differ in size. Four warps gather rows of x or dy, 64 at a time and up to
STAGES such steps ahead, and have the copy engine fetch the same rows of da, db or w h. Two warpgroups multiply, 64 of
the model dims each, and leave the result to the copy engine while the next tile's rows arrive.

    dgate^T, dup^T, ddown = (x, x, dy)^T (da, db, w h)      over the expert's rows

Rows of the next expert, which the last step of an expert fetches too, meet zeros in place of x or dy.
"""

from __future__ import annotations

import torch
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
from q3n_functional.ops.kernels.launch import Constant, Launcher, is_hopper, where

STAGES = Constant(4)
LAG = Constant(2)  # steps whose gathered rows are still on their way when the next one's are asked for
COLS = 256  # of a tile of inner dims here, and of a tile of rows in grouped_swiglu_hopper_rows.py
MODEL_DIMS = 128
# Barriers: a stage holds its rows; a stage was read. Then the same of the two places where tiles are told.
FULL, EMPTY, TOLD, HEARD = Constant(0), Constant(4), Constant(8), Constant(10)
GROUP = Constant(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
ROWS = Constant(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
THREADS = Constant(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _told(info, n: gl.constexpr):
    """A number that the gathering warps left in shared memory."""
    return gl.max(info.slice(n, 1).load(gl.SliceLayout(1, GROUP)), 0)


@gluon.jit
def _tell(info, heard, told, tile, steps):
    mbarrier.wait(heard[0], heard[1])
    at = gl.arange(0, 4, THREADS)
    info.store(gl.where(at == 0, tile, steps))
    barrier()
    mbarrier.arrive(told, count=1)


@gluon.jit
def _place(tile, M_BLOCKS: gl.constexpr, N_BLOCKS: gl.constexpr):
    """Expert, which gradient, block of model dims and block of inner dims of a tile."""
    block = tile // M_BLOCKS
    return block // (3 * N_BLOCKS), block // N_BLOCKS % 3, tile % M_BLOCKS, block % N_BLOCKS


@gluon.jit
def _arrived(bars, step, announced):
    """Wait for all rows that were asked for, and announce the steps from `announced` on."""
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    for back in gl.static_range(LAG):
        at = step - LAG + back
        mbarrier.arrive(bars.index(FULL + (at + STAGES) % STAGES), count=1, pred=at >= announced)


@gluon.jit
def _gather(
    x, dy, order, ends, counter, inner_tma, num_rows, tiles, outer_s, inner_s, info_s, bars,
    J: gl.constexpr, D: gl.constexpr, M_BLOCKS: gl.constexpr, N_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Bring 64 rows of x or dy and of da, db or w h a step, and tell the others each tile and its steps; -1 ends."""
    row = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    thread = gl.arange(0, 128, THREADS)
    step = 0
    turn = 0
    announced = 0
    tile = gl.program_id(0)
    while tile < tiles:
        ticket = gl.atomic_add(counter + thread * 0, thread * 0 + 1, mask=thread == 0, sem="relaxed")
        e, part, m, n = _place(tile, M_BLOCKS, N_BLOCKS)
        end = gl.load(ends + e)
        start = gl.load(ends + e - 1, mask=e > 0, other=0)
        steps = (end - start + 63) // 64
        if steps <= LAG:  # or the others may wait for what later steps would announce
            _arrived(bars, step, announced)
            announced = step
        heard = bars.index(HEARD + turn % 2), (turn // 2 & 1) ^ 1
        _tell(info_s.index(turn % 2), heard, bars.index(TOLD + turn % 2), tile, steps)
        base = x
        if part == 2:
            base = dy
        col = m * 128 + gl.arange(0, 64, gl.SliceLayout(0, ROWS))
        slot = gl.load(order + start + row, mask=start + row < end, other=0)
        for k in range(0, steps):
            s = step % STAGES
            own = start + k * 64 + row < end
            at = base + (slot // J).to(gl.int64)[:, None] * D + col[None, :]
            after = start + (k + 1) * 64 + row
            slot = gl.load(order + after, mask=after < end, other=0)  # the next step's, to be there in time
            mbarrier.wait(bars.index(EMPTY + s), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bars.index(FULL + s), 64 * 256 * 2)
            tma.async_copy_global_to_shared(
                inner_tma, [part * num_rows + start + k * 64, n * 256], bars.index(FULL + s), inner_s.index(s)
            )
            async_copy.async_copy_global_to_shared(outer_s.index(2 * s), at, mask=own[:, None])
            async_copy.async_copy_global_to_shared(outer_s.index(2 * s + 1), at + 64, mask=own[:, None])
            async_copy.commit_group()
            async_copy.wait_group(LAG)
            fence_async_shared()
            barrier()
            ready = bars.index(FULL + (step + STAGES - LAG) % STAGES)
            mbarrier.arrive(ready, count=1, pred=step - LAG >= announced)
            step += 1
        turn += 1
        tile = gl.max(gl.where(thread == 0, ticket, -1), 0) + gl.num_programs(0)
    _arrived(bars, step, announced)
    heard = bars.index(HEARD + turn % 2), (turn // 2 & 1) ^ 1
    _tell(info_s.index(turn % 2), heard, bars.index(TOLD + turn % 2), -1, 0)


@gluon.jit
def halves(x):
    """The left and the right columns of x."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return gl.split(x.reshape([M, 2, N // 2]).permute((0, 2, 1)))


@gluon.jit
def _multiply(
    gate_tma, up_tma, down_tma, outer_s, inner_s, out_s, info_s, bars,
    HALF: gl.constexpr, D: gl.constexpr, F: gl.constexpr, M_BLOCKS: gl.constexpr, N_BLOCKS: gl.constexpr,
):  # fmt: skip
    """64 model dims of each tile, written a quarter of the inner dims at a time; dgate and dup are transposed."""
    step = 0
    turn = 0
    mbarrier.wait(bars.index(TOLD), 0)
    tile = _told(info_s.index(0), 0)
    while tile >= 0:
        steps = _told(info_s.index(turn % 2), 1)
        release(bars.index(HEARD + turn % 2))
        e, part, m, n = _place(tile, M_BLOCKS, N_BLOCKS)
        acc = gl.zeros([64, 256], gl.float32, GROUP)
        for _ in range(0, steps):
            s = step % STAGES
            mbarrier.wait(bars.index(FULL + s), step // STAGES & 1)
            acc = warpgroup_mma(outer_s.index(2 * s + HALF).permute((1, 0)), inner_s.index(s), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            release(bars.index(EMPTY + s))
            step += 1
        left, right = halves(acc.to(out_s.dtype))
        first, second = halves(left)
        third, fourth = halves(right)
        quarters = (first, second, third, fourth)
        d = m * 128 + HALF * 64
        for q in gl.static_range(4):
            out = out_s.index(2 * HALF + q % 2)
            tma.store_wait(1)
            barrier()
            f = n * 256 + 64 * q
            if part == 2:
                out.store(quarters[q])
            else:
                out.permute((1, 0)).store(quarters[q])
            fence_async_shared()
            barrier()
            if part == 0:
                tma.async_copy_shared_to_global(gate_tma, [e * F + f, d], out)
            elif part == 1:
                tma.async_copy_shared_to_global(up_tma, [e * F + f, d], out)
            else:
                tma.async_copy_shared_to_global(down_tma, [e * D + d, f], out)
        turn += 1
        mbarrier.wait(bars.index(TOLD + turn % 2), turn // 2 & 1)
        tile = _told(info_s.index(turn % 2), 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "tiles"])
def _weight_gradient_kernel(
    x, dy, order, ends, counter, inner_tma, gate_tma, up_tma, down_tma, num_rows, tiles,
    J: gl.constexpr, D: gl.constexpr, F: gl.constexpr,
):  # fmt: skip
    M_BLOCKS: gl.constexpr = D // 128
    N_BLOCKS: gl.constexpr = F // 256
    dtype: gl.constexpr = inner_tma.dtype
    outer_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], inner_tma.layout)
    inner_s = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], inner_tma.layout)
    out_s = gl.allocate_shared_memory(dtype, [4, 64, 64], inner_tma.layout)
    info_s = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [12, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(12):  # two arrive at all but where a tile is told: rows and copy engine, or both groups
        mbarrier.init(bars.index(n), count=1 if n == TOLD or n == TOLD + 1 else 2)
    fence_async_shared()
    barrier()
    gl.warp_specialize([
        (_multiply, (gate_tma, up_tma, down_tma, outer_s, inner_s, out_s, info_s, bars, 0, D, F, M_BLOCKS, N_BLOCKS)),
        (_multiply, (gate_tma, up_tma, down_tma, outer_s, inner_s, out_s, info_s, bars, 1, D, F, M_BLOCKS, N_BLOCKS)),
        (_gather, (x, dy, order, ends, counter, inner_tma, num_rows, tiles, outer_s, inner_s, info_s, bars,
                   J, D, M_BLOCKS, N_BLOCKS)),
    ], [4, 4], [216, 72])  # fmt: skip


_weight_gradients = Launcher(_weight_gradient_kernel)


def serves(width: int, inner: int, *tensors: Tensor) -> bool:
    """Whether Hopper's kernels can take experts of these widths and the tensors that they read whole."""
    return (
        tensors[0].dtype in (torch.bfloat16, torch.float16)
        and tensors[0].is_cuda
        and is_hopper(tensors[0].device)
        and width % COLS == 0
        and inner % COLS == 0
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
    )


def weight_gradients(
    x: Tensor, dy: Tensor, dhidden: Tensor, order: Tensor, ends: Tensor, gradients: list[Tensor], per_row: int
) -> None:
    """Write dgate, dup and ddown; `order` holds the slots, of which `per_row` belong to a row of x."""
    dgate, dup, ddown = gradients
    experts, inner, width = dgate.shape
    counter = torch.zeros(1, dtype=torch.int32, device=x.device)
    _weight_gradients(
        NUM_SMS, (where(x), x.dtype),
        (x, dy, order, ends, counter, matrix_tiles(dhidden, inner, 64, COLS), matrix_tiles(dgate, width, 64, 64),
         matrix_tiles(dup, width, 64, 64), matrix_tiles(ddown, inner, 64, 64), dhidden.shape[1],
         3 * experts * (width // MODEL_DIMS) * (inner // COLS)),
        (per_row, width, inner), num_warps=4,
    )  # fmt: skip
