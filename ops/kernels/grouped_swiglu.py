# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Routed SwiGLU experts in Triton: grouped matrix products over tokens that are never laid out by expert.

With slot m = t*J + j holding expert e and weight w, a = gate_e x[t], b = up_e x[t], s = sigmoid(a), h = a s b:

    y[t] = sum_j down_e (w h)
    g = down_e^T dy[t]          dw = g . h           da = w g b s (1 + a (1 - s))          db = w g a s
    dx[t] = sum_j (gate_e^T da + up_e^T db)
    dgate_e = sum da x[t]^T     dup_e = sum db x[t]^T                 ddown_e = sum dy[t] (w h)^T    over e's slots

A stable counting sort gives every slot its row: counts of each block of slots, their sums over the blocks, places. A
table says which expert and first row each tile of BM rows belongs to; it has room for the worst case, and programs
beyond its end leave at once, so that nothing is read back and only experts with tokens are touched. Rows of x and dy
are gathered by the products' own loads, and the products that end in [T, D] write each row to its slot, where a last
kernel adds those of a token in order: no float atomics, so repeated runs agree bit by bit. These rows are made in
slices of columns, so that they never take more than SCRATCH_BYTES. Hopper has kernels of its own for all but the first
product, where experts have many rows (grouped_swiglu_hopper.py and grouped_swiglu_hopper_rows.py).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from q3n_functional.ops.kernels import grouped_swiglu_hopper as hopper
from q3n_functional.ops.kernels import grouped_swiglu_hopper_rows as hopper_rows
from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.kernels.sigmoid import sigmoid
from q3n_functional.ops.registration import UnsupportedError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCRATCH_BYTES = 512 * 2**20
MAX_EXPERTS = 8192
SORT_BLOCK = 128  # slots
FEW_SLOTS = 1024
TABLE_ENTRIES = 8192  # tiles times experts that a program of the table compares
SUM_ENTRIES = 2048


@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(experts, counts, num_slots, BE: tl.constexpr, BLOCK: tl.constexpr):
    """counts[block, e]: how many slots of the block chose expert e."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + slot, mask=slot < num_slots, other=0).to(tl.int32)
    found = tl.histogram(expert, BE, mask=slot < num_slots)
    tl.store(counts + block * BE + tl.arange(0, BE), found)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_kernel(counts, totals, num_blocks, BE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Replace counts by their sums over the blocks before, and leave those over all in totals."""
    e = tl.program_id(0) * COLS + tl.arange(0, COLS)
    before = tl.zeros([COLS], tl.int32)
    for first in range(0, num_blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        at = counts + block[:, None] * BE + e[None, :]
        inside = (block < num_blocks)[:, None] & (e < BE)[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        before += tl.sum(count, 0)
    tl.store(totals + e, before, mask=e < BE)


@triton.jit
def _write_tiles(size, end, tiles, first, num_tiles, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
                 TILES: tl.constexpr):  # fmt: skip
    """tiles[n] = (expert, first row) or (-1, 0) for TILES numbers n from `first` on."""
    e = tl.arange(0, BE)
    num = (size + BM - 1) // BM
    last = tl.cumsum(num, 0)
    tile = first + tl.arange(0, TILES)
    expert = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    row = (end - size)[None, :] + (tile[:, None] - (last - num)[None, :]) * BM
    row = tl.sum(tl.where(e[None, :] == expert[:, None], row, 0), 1)
    expert = tl.where(expert < E, expert, -1)
    tl.store(tiles + 2 * tile, expert, mask=tile < num_tiles)
    tl.store(tiles + 2 * tile + 1, row, mask=tile < num_tiles)


@triton.jit(do_not_specialize=["num_tiles"])
def _tiles_kernel(
    sizes, ends, tiles, num_tiles,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """The table; and ends, if it is the experts' sizes that are given."""
    e = tl.arange(0, BE)
    if SIZES:
        size = tl.load(sizes + e, mask=e < E, other=0)
        end = tl.cumsum(size, 0)
        if tl.program_id(0) == 0:
            tl.store(ends + e, end, mask=e < E)
    else:
        end = tl.load(ends + e, mask=e < E, other=0)
        size = tl.where(e < E, end - tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0), 0)
    _write_tiles(size, end, tiles, tl.program_id(0) * TILES, num_tiles, E, BE, BM, TILES)


@triton.jit(do_not_specialize=["num_slots"])
def _place_kernel(experts, before, ends, order, num_slots, BE: tl.constexpr, BLOCK: tl.constexpr):
    """order[row of the slot] = slot: behind the experts before, the blocks before, and the block's slots before."""
    block = tl.program_id(0)
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    slot, other = block * BLOCK + i, block * BLOCK + j
    inside = slot < num_slots
    expert = tl.load(experts + slot, mask=inside, other=0).to(tl.int32)
    others = tl.load(experts + other, mask=other < num_slots, other=-1).to(tl.int32)
    rank = tl.sum(((expert[:, None] == others[None, :]) & (j[None, :] < i[:, None])).to(tl.int32), 1)
    row = rank + tl.load(before + block * BE + expert, mask=inside, other=0)
    row += tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    tl.store(order + row, slot, mask=inside)


@triton.jit(do_not_specialize=["num_slots", "num_tiles"])
def _sort_few_kernel(
    experts, order, ends, tiles, num_slots, num_tiles,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """All of it in one launch, for so few slots that every program can look at all: decoding waits for launches."""
    pid = tl.program_id(0)
    blocks = (num_slots + BLOCK - 1) // BLOCK
    i = pid * BLOCK + tl.arange(0, BLOCK)
    if pid < blocks:
        expert = tl.load(experts + i, mask=i < num_slots, other=0).to(tl.int32)[:, None]
        row = tl.zeros([BLOCK], tl.int32)
        for first in range(0, num_slots, 32):
            slot = first + tl.arange(0, 32)
            other = tl.load(experts + slot, mask=slot < num_slots, other=E).to(tl.int32)[None, :]
            before = (other < expert) | ((other == expert) & (slot[None, :] < i[:, None]))
            row += tl.sum(before.to(tl.int32), 1)
        tl.store(order + row, i, mask=i < num_slots)
    else:
        size = tl.zeros([BE], tl.int32)
        for first in range(0, num_slots, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            expert = tl.load(experts + slot, mask=slot < num_slots, other=0).to(tl.int32)
            size += tl.histogram(expert, BE, mask=slot < num_slots)
        end = tl.cumsum(size, 0)
        if pid == blocks:
            tl.store(ends + tl.arange(0, BE), end, mask=tl.arange(0, BE) < E)
        _write_tiles(size, end, tiles, (pid - blocks) * TILES, num_tiles, E, BE, BM, TILES)


@triton.jit
def _tile(base, tma, row, col, limit, NUM_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
          TMA: tl.constexpr):  # fmt: skip
    """Rows [row, row + ROWS) and columns [col, col + COLS) of a contiguous matrix; zeros from row `limit` on.

    The copy engine (TMA) gives whatever lies there instead: what comes of those rows is thrown away by the caller.
    """
    if TMA:
        return tma.load([row, col])
    r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    mask = (r < limit)[:, None]
    if NUM_COLS % COLS != 0:
        mask = mask & (c < NUM_COLS)[None, :]
    return tl.load(base + r.to(tl.int64)[:, None] * NUM_COLS + c[None, :], mask=mask, other=0.0)


@triton.jit
def _gathered(rows, col, NUM_COLS: tl.constexpr, COLS: tl.constexpr):
    """Columns [col, col + COLS) of the rows that `rows` [ROWS, 1] points at."""
    c = col + tl.arange(0, COLS)
    if NUM_COLS % COLS == 0:
        return tl.load(rows + c[None, :])
    return tl.load(rows + c[None, :], mask=(c < NUM_COLS)[None, :], other=0.0)


@triton.jit
def _slots(order, first, end, BM: tl.constexpr):
    """The slots of a tile's rows, which of them are its own (others repeat the last), and the rows."""
    row = first + tl.arange(0, BM)
    return tl.load(order + tl.minimum(row, end - 1)), row < end, row.to(tl.int64)


@triton.jit
def _tokens(rows, slot, J: tl.constexpr):
    """The tokens that slots are of."""
    token = slot // J
    if rows is not None:
        token = tl.load(rows + token)
    return token.to(tl.int64)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x, weights, token_rows, order, ends, tiles, gate, up, gate_tma, up_tma, hidden, h, num_rows, x_row,
    J: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """a and b of a tile, kept in hidden, and w h."""
    BLOCKS: tl.constexpr = (F + BN - 1) // BN
    pid = tl.program_id(0)
    e = tl.load(tiles + 2 * (pid // BLOCKS))
    if e >= 0:
        n = (pid % BLOCKS) * BN
        slot, own, row = _slots(order, tl.load(tiles + 2 * (pid // BLOCKS) + 1), tl.load(ends + e), BM)
        rows = x + _tokens(token_rows, slot, J)[:, None] * x_row
        acc_a = tl.zeros([BM, BN], tl.float32)
        acc_b = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, D, BK, num_stages=STAGES):
            tokens = _gathered(rows, k, D, BK)
            acc_a = tl.dot(
                tokens, tl.trans(_tile(gate, gate_tma, e * F + n, k, e * F + F, D, BN, BK, TMA)), acc_a,
                input_precision=DOT,
            )  # fmt: skip
            acc_b = tl.dot(
                tokens, tl.trans(_tile(up, up_tma, e * F + n, k, e * F + F, D, BN, BK, TMA)), acc_b,
                input_precision=DOT,
            )  # fmt: skip
        col = n + tl.arange(0, BN)
        at = row[:, None] * F + col[None, :]
        mask = own[:, None] & (col < F)[None, :]
        a = acc_a.to(hidden.dtype.element_ty)
        b = acc_b.to(hidden.dtype.element_ty)
        tl.store(hidden + at, a, mask=mask)
        tl.store(hidden + num_rows.to(tl.int64) * F + at, b, mask=mask)
        w = tl.load(weights + slot).to(tl.float32)
        a = a.to(tl.float32)
        out = a * sigmoid(a) * b.to(tl.float32) * w[:, None]
        tl.store(h + at, out.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "first_block", "blocks"])
def _down_kernel(
    h, order, ends, tiles, down, h_tma, down_tma, out, num_rows, first_block, blocks,
    D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`blocks` blocks of columns of down_e (w h) from block first_block on, each row at its slot of out."""
    pid = tl.program_id(0)
    e = tl.load(tiles + 2 * (pid // blocks))
    if e >= 0:
        n = (first_block + pid % blocks) * BN
        first = tl.load(tiles + 2 * (pid // blocks) + 1)
        slot, own, _ = _slots(order, first, tl.load(ends + e), BM)
        acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, F, BK, num_stages=STAGES):
            rows = _tile(h, h_tma, first, k, num_rows, F, BM, BK, TMA)
            weight = _tile(down, down_tma, e * D + n, k, e * D + D, F, BN, BK, TMA)
            acc = tl.dot(rows, tl.trans(weight), acc, input_precision=DOT)
        col = (pid % blocks) * BN + tl.arange(0, BN)
        at = out + slot.to(tl.int64)[:, None] * (blocks * BN) + col[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=own[:, None])


@triton.jit(do_not_specialize=["num_tokens", "first_block", "blocks"])
def _sum_kernel(
    parts, y, starts, num_tokens, first_block, blocks,
    J: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`blocks` blocks of BN columns of y from block first_block on: the sum of the slots of each token."""
    pid = tl.program_id(0)
    token = ((pid // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = ((pid % blocks) * BN + tl.arange(0, BN))[None, :]
    mask = (token < num_tokens) & (first_block * BN + col < D)
    total = tl.zeros([ROWS, BN], tl.float32)
    if starts is None:
        for j in tl.static_range(J):
            total += tl.load(parts + (token * J + j) * (blocks * BN) + col, mask=mask, other=0.0).to(tl.float32)
    else:
        begin = tl.load(starts + token, mask=token < num_tokens, other=0).to(tl.int64) * J
        end = tl.load(starts + token + 1, mask=token < num_tokens, other=0).to(tl.int64) * J
        for j in range(0, tl.max(end - begin)):
            at = parts + (begin + j) * (blocks * BN) + col
            total += tl.load(at, mask=mask & (begin + j < end), other=0.0).to(tl.float32)
    tl.store(y + token * D + first_block * BN + col, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _activation_gradient(g, w, hidden, dhidden, num_rows, row, own, n, F: tl.constexpr, COLS: tl.constexpr):
    """Write da, db and w h of COLS columns from n on; return their share of dw."""
    col = n + tl.arange(0, COLS)
    at = row[:, None] * F + col[None, :]
    mask = own[:, None] & (col < F)[None, :]
    plane = num_rows.to(tl.int64) * F
    out = dhidden.dtype.element_ty
    a = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(hidden + plane + at, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(a)
    silu = a * s
    h = silu * b
    tl.store(dhidden + 2 * plane + at, (h * w).to(out), mask=mask)
    dw = tl.sum(g * h, 1)
    g *= w
    tl.store(dhidden + plane + at, (g * silu).to(out), mask=mask)
    tl.store(dhidden + at, (g * b * (s + silu * (1.0 - s))).to(out), mask=mask)
    return dw


@triton.jit
def _activation_gradients(g, w, hidden, dhidden, num_rows, row, own, n, F: tl.constexpr, BM: tl.constexpr,
                          COLS: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """The same a piece at a time: the whole tile's activations would not fit into the registers."""
    if PIECES == 1:
        dw = _activation_gradient(g, w, hidden, dhidden, num_rows, row, own, n, F, COLS)
    else:
        HALF: tl.constexpr = COLS // 2
        FEWER: tl.constexpr = PIECES // 2
        left, right = tl.split(tl.permute(tl.reshape(g, [BM, 2, HALF]), [0, 2, 1]))
        dw = _activation_gradients(left, w, hidden, dhidden, num_rows, row, own, n, F, BM, HALF, FEWER)
        dw += _activation_gradients(right, w, hidden, dhidden, num_rows, row, own, n + HALF, F, BM, HALF, FEWER)
    return dw


@triton.jit(do_not_specialize=["num_rows"])
def _hidden_gradient_kernel(
    dy, weights, token_rows, order, ends, tiles, down, down_tma, hidden, dhidden, dweights, num_rows, dy_row,
    J: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """da, db and w h of a tile, one behind the other in dhidden, and its share of dw."""
    BLOCKS: tl.constexpr = (F + BN - 1) // BN
    PIECES: tl.constexpr = 8 if BN == 256 else 2
    pid = tl.program_id(0)
    e = tl.load(tiles + 2 * (pid // BLOCKS))
    if e >= 0:
        n = (pid % BLOCKS) * BN
        slot, own, row = _slots(order, tl.load(tiles + 2 * (pid // BLOCKS) + 1), tl.load(ends + e), BM)
        rows = dy + _tokens(token_rows, slot, J)[:, None] * dy_row
        g = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, D, BK, num_stages=STAGES):
            grad = _gathered(rows, k, D, BK)
            g = tl.dot(grad, _tile(down, down_tma, e * D + k, n, e * D + D, F, BK, BN, TMA), g, input_precision=DOT)
        w = tl.load(weights + slot).to(tl.float32)[:, None]
        dw = _activation_gradients(g, w, hidden, dhidden, num_rows, row, own, n, F, BM, BN, PIECES)
        tl.store(dweights + slot * BLOCKS + pid % BLOCKS, dw, mask=own)


@triton.jit(do_not_specialize=["num_rows", "first_block", "blocks"])
def _input_gradient_kernel(
    dhidden, order, ends, tiles, gate, up, dhidden_tma, gate_tma, up_tma, out, num_rows, first_block, blocks,
    D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`blocks` blocks of columns of gate_e^T da + up_e^T db from block first_block on, each row at its slot of out."""
    ROUNDED: tl.constexpr = (F + BK - 1) // BK * BK
    pid = tl.program_id(0)
    e = tl.load(tiles + 2 * (pid // blocks))
    if e >= 0:
        n = (first_block + pid % blocks) * BN
        first = tl.load(tiles + 2 * (pid // blocks) + 1)
        slot, own, _ = _slots(order, first, tl.load(ends + e), BM)
        acc = tl.zeros([BM, BN], tl.float32)
        # One loop over both: of two products a turn, the second would wait for the first one's sum.
        for k in tl.range(0, 2 * ROUNDED, BK, num_stages=STAGES):
            row, base, tma, f = first, gate, gate_tma, k
            if k >= ROUNDED:
                row, base, tma, f = num_rows + first, up, up_tma, k - ROUNDED
            rows = _tile(dhidden, dhidden_tma, row, f, 2 * num_rows, F, BM, BK, TMA)
            weight = _tile(base, tma, e * F + f, n, e * F + F, D, BK, BN, TMA)
            acc = tl.dot(rows, weight, acc, input_precision=DOT)
        col = (pid % blocks) * BN + tl.arange(0, BN)
        at = out + slot.to(tl.int64)[:, None] * (blocks * BN) + col[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=own[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _weight_gradient_kernel(
    x, dy, dhidden, order, ends, dgate, dup, ddown, num_rows, x_row, dy_row,
    J: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of BM inner and BN model dims of one expert's dgate, dup or ddown."""
    M_BLOCKS: tl.constexpr = (F + BM - 1) // BM
    N_BLOCKS: tl.constexpr = (D + BN - 1) // BN
    pid = tl.program_id(0)
    part = (pid // (M_BLOCKS * N_BLOCKS)) % 3
    e = pid // (3 * M_BLOCKS * N_BLOCKS)
    f = (pid // N_BLOCKS) % M_BLOCKS * BM + tl.arange(0, BM)
    d = (pid % N_BLOCKS) * BN + tl.arange(0, BN)
    end = tl.load(ends + e)
    start = tl.load(ends + e - 1, mask=e > 0, other=0)
    base = x
    if part == 2:
        base = dy
    stride = tl.where(part == 2, dy_row, x_row)
    plane = dhidden + part.to(tl.int64) * num_rows * F
    acc = tl.zeros([BM, BN], tl.float32)
    for first in tl.range(start, end, BK, num_stages=STAGES):
        row = first + tl.arange(0, BK)
        own = row < end
        left = own[:, None] & (f < F)[None, :] if F % BM != 0 else own[:, None]
        right = own[:, None] & (d < D)[None, :] if D % BN != 0 else own[:, None]
        token = tl.load(order + row, mask=own, other=0) // J
        inner = tl.load(plane + row.to(tl.int64)[:, None] * F + f[None, :], mask=left, other=0.0)
        outer = tl.load(base + token.to(tl.int64)[:, None] * stride + d[None, :], mask=right, other=0.0)
        acc = tl.dot(tl.trans(inner), outer, acc, input_precision=DOT)
    matrix = e.to(tl.int64) * D * F
    mask = (f < F)[:, None] & (d < D)[None, :]
    if part == 2:
        at = ddown + matrix + d[None, :] * F + f[:, None]
        tl.store(at, acc.to(ddown.dtype.element_ty), mask=mask)
    else:
        to = dgate
        if part == 1:
            to = dup
        at = to + matrix + f[:, None] * D + d[None, :]
        tl.store(at, acc.to(dgate.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """How one kernel is launched: rows and columns of a program's tile, its steps over the summed dim, warps."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


class Config(NamedTuple):
    """A launch for each kernel; all but the last tile sorted rows and share BM."""

    gate_up: Tile
    down: Tile
    hidden_gradient: Tile
    input_gradient: Tile
    weight_gradient: Tile
    tma: bool = True
    hopper: bool = False  # whether Hopper's kernels are taken where they can be
    scratch: int = SCRATCH_BYTES


# By the rows that an expert has on average: below the first bound, between the two, above.
BOUNDS = (8, 96)
CONFIGS = (
    Config(Tile(16, 32, 128, 4, 4), Tile(16, 32, 128, 4, 4), Tile(16, 32, 128, 4, 4), Tile(16, 64, 64, 4, 4),
           Tile(64, 128, 16, 4, 3)),
    Config(Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3),
           Tile(128, 128, 32, 8, 3)),
    Config(Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 3), Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 4),
           Tile(256, 128, 64, 8, 6), hopper=True),  # seven do not fit where rows are not aligned
)  # fmt: skip
_PLAIN = Tile(32, 32, 32, 4, 2)
FP32 = Config(_PLAIN, _PLAIN, _PLAIN, _PLAIN, _PLAIN, tma=False)


class Problem(NamedTuple):
    """What all kernels of one call share."""

    num_slots: int
    num_tiles: int
    num_experts: int
    rows: Tensor | None
    constants: dict[str, int]  # J, D, F
    dot: str
    config: Config


class Sorted(NamedTuple):
    """order [M], ends [E] and the table of tiles."""

    order: Tensor
    ends: Tensor
    tiles: Tensor


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _config(dtype: torch.dtype, rows: int) -> Config:
    return FP32 if dtype == torch.float32 else CONFIGS[sum(rows >= bound for bound in BOUNDS)]


def _problem(x: Tensor, weights: Tensor, gate: Tensor, rows: Tensor | None, config: Config | None) -> Problem:
    (num_experts, inner, width), (tokens, per_token) = gate.shape, weights.shape
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"x is {x.dtype}: the Triton kernels take bf16, fp16 and fp32")
    if num_experts > MAX_EXPERTS:
        raise UnsupportedError(f"{num_experts} experts: the Triton kernels take at most {MAX_EXPERTS}")
    slots = tokens * per_token
    config = config or _config(x.dtype, slots // max(num_experts, 1))
    tile = config.gate_up.BM
    # Of the experts with tokens each leaves at most tile - 1 rows of its last tile unused.
    tiles = (slots + min(num_experts, slots) * (tile - 1)) // tile
    dot = "tf32x3" if x.dtype == torch.float32 else "tf32"
    rows = None if rows is None else rows.contiguous()
    return Problem(slots, tiles, num_experts, rows, {"J": per_token, "D": width, "F": inner}, dot, config)


def _launch(kernel, programs: int, tile: Tile, *args, **constants) -> None:
    shape = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "STAGES": tile.stages}
    launch(kernel, programs)(*args, **constants, **shape, num_warps=tile.warps)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _descriptors(config: Config, *matrices: tuple[Tensor, int, int]) -> list[TensorDescriptor | None]:
    """TMA descriptors of contiguous matrices or stacks of them, by blocks; all None where the copy engine can't."""
    legal = config.tma and all(
        x.shape[-1] % cols == 0 and x.data_ptr() % 16 == 0 and (x.ndim == 2 or x.shape[1] % rows == 0)
        for x, rows, cols in matrices
    )
    return [
        TensorDescriptor(x, [x.numel() // x.shape[-1], x.shape[-1]], [x.shape[-1], 1], [rows, cols]) if legal else None
        for x, rows, cols in matrices
    ]


def _hopper_places(p: Problem, places: Sorted) -> hopper_rows.Places:
    return hopper_rows.Places(*places, p.rows, p.constants["J"])


def _table(p: Problem) -> dict[str, int]:
    """Sizes of the table of tiles, for the kernels that write it."""
    bins = 1 << max(4, (p.num_experts - 1).bit_length())
    return {"E": p.num_experts, "BE": bins, "BM": p.config.gate_up.BM, "TILES": max(1, TABLE_ENTRIES // bins)}


def _tile_table(p: Problem, sizes: Tensor | None, ends: Tensor) -> Tensor:
    tiles, table = torch.empty(p.num_tiles, 2, dtype=torch.int32, device=ends.device), _table(p)
    launch(_tiles_kernel, _cdiv(p.num_tiles, table["TILES"]))(
        sizes, ends, tiles, p.num_tiles, **table, SIZES=sizes is not None
    )
    return tiles


def _sort(p: Problem, experts: Tensor) -> Sorted:
    table, blocks, experts = _table(p), _cdiv(p.num_slots, SORT_BLOCK), experts.contiguous()
    order, ends = (torch.empty(n, dtype=torch.int32, device=experts.device) for n in (p.num_slots, p.num_experts))
    if p.num_slots <= FEW_SLOTS:
        tiles = torch.empty(p.num_tiles, 2, dtype=torch.int32, device=experts.device)
        launch(_sort_few_kernel, blocks + _cdiv(p.num_tiles, table["TILES"]))(
            experts, order, ends, tiles, p.num_slots, p.num_tiles, **table, BLOCK=SORT_BLOCK, num_warps=8
        )
        return Sorted(order, ends, tiles)
    bins = table["BE"]
    counts = torch.empty(blocks + 1, bins, dtype=torch.int32, device=experts.device)
    launch(_count_kernel, blocks)(experts, counts, p.num_slots, BE=bins, BLOCK=SORT_BLOCK)
    launch(_scan_kernel, _cdiv(bins, 16))(counts, counts[blocks], blocks, BE=bins, ROWS=256, COLS=16)
    tiles = _tile_table(p, counts[blocks], ends)
    launch(_place_kernel, blocks)(experts, counts, ends, order, p.num_slots, BE=bins, BLOCK=SORT_BLOCK, num_warps=8)
    return Sorted(order, ends, tiles)


def _slices(p: Problem, tile: Tile, itemsize: int) -> list[tuple[int, int]]:
    """(first, number) of the blocks of columns that are made at a time."""
    blocks = _cdiv(p.constants["D"], tile.BN)
    most = max(1, p.config.scratch // (p.num_slots * tile.BN * itemsize))
    step = _cdiv(blocks, _cdiv(blocks, most))
    return [(first, min(step, blocks - first)) for first in range(0, blocks, step)]


def _summed(p: Problem, tile: Tile, like: Tensor, write) -> Tensor:
    """The sums over each token's slots of what `write(programs, out, first, number)` writes, slice by slice."""
    y, tokens = torch.empty(like.shape, dtype=like.dtype, device=like.device), like.shape[0]
    slices = _slices(p, tile, y.element_size())
    scratch = torch.empty(p.num_slots * slices[0][1] * tile.BN, dtype=y.dtype, device=y.device)
    rows, starts = max(1, SUM_ENTRIES // tile.BN), None
    if p.rows is not None:
        numbers = torch.arange(tokens + 1, dtype=torch.int32, device=y.device)
        starts = torch.searchsorted(p.rows, numbers, out_int32=True)
    for first, number in slices:
        write(p.num_tiles * number, scratch, first, number)
        launch(_sum_kernel, _cdiv(tokens, rows) * number)(
            scratch, y, starts, tokens, first, number, J=p.constants["J"], D=p.constants["D"], BN=tile.BN, ROWS=rows
        )
    return y


def forward(
    x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, rows: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the pre-activations [2, M, F], order [M] and ends [E], as `ops.grouped_swiglu` has them."""
    p = _problem(x, weights, gate, rows, config)
    if not p.num_slots or not gate.numel():
        order, ends = (torch.zeros(n, dtype=torch.int32, device=x.device) for n in (p.num_slots, p.num_experts))
        return x.new_zeros(x.shape), x.new_zeros(2, p.num_slots, gate.shape[1]), order, ends
    places = _sort(p, experts)
    hidden, h = _hidden(p, _rows(x), weights.contiguous(), places, gate.contiguous(), up.contiguous())
    return _output(p, x, h, places, down.contiguous()), hidden, places.order, places.ends


def _hidden(p: Problem, x: Tensor, weights: Tensor, places: Sorted, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The pre-activations [2, M, F] and the weighted activations [M, F]."""
    tile, inner = p.config.gate_up, gate.shape[1]
    hidden, h = (torch.empty(*n, p.num_slots, inner, dtype=x.dtype, device=x.device) for n in ((2,), ()))
    tma = _descriptors(p.config, (gate, tile.BN, tile.BK), (up, tile.BN, tile.BK))
    _launch(
        _gate_up_kernel, p.num_tiles * _cdiv(inner, tile.BN), tile, x, weights, p.rows, *places, gate, up, *tma, hidden,
        h, p.num_slots, x.stride(0), **p.constants, DOT=p.dot, TMA=tma[0] is not None,
    )  # fmt: skip
    return hidden, h


def _output(p: Problem, x: Tensor, h: Tensor, places: Sorted, down: Tensor) -> Tensor:
    tile = p.config.down
    if p.config.hopper and hopper.serves(p.constants["D"], p.constants["F"], h, down):
        make = functools.partial(hopper_rows.down_rows, _hopper_places(p, places), h, down)
        return _summed(p, tile._replace(BN=hopper.COLS), x, lambda programs, *out: make(*out))
    tma = _descriptors(p.config, (h, tile.BM, tile.BK), (down, tile.BN, tile.BK))

    def write(programs: int, out: Tensor, first: int, number: int) -> None:
        _launch(
            _down_kernel, programs, tile, h, *places, down, *tma, out, p.num_slots, first, number,
            D=p.constants["D"], F=p.constants["F"], DOT=p.dot, TMA=tma[0] is not None,
        )  # fmt: skip

    return _summed(p, tile, x, write)


def backward(
    dy: Tensor, x: Tensor, weights: Tensor, hidden: Tensor, order: Tensor, ends: Tensor, gate: Tensor, up: Tensor,
    down: Tensor, rows: Tensor | None = None, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weights, gate, up and down."""
    p = _problem(x, weights, gate, rows, config)
    if not p.num_slots or not gate.numel():
        dx, dweights, dgate, dup, ddown = (t.new_zeros(t.shape) for t in (x, weights, gate, up, down))
        return dx, dweights, dgate, dup, ddown
    dy, x = _rows(dy), _rows(x)
    weights, hidden, order, ends, gate, up, down = (
        t.contiguous() for t in (weights, hidden, order, ends, gate, up, down)
    )
    places = Sorted(order, ends, _tile_table(p, None, ends))
    dhidden, dweights = _hidden_gradient(p, dy, weights, hidden, places, down)
    dgate, dup, ddown = _weight_gradients(p, dy, x, dhidden, places, gate)
    return _input_gradient(p, x, dhidden, places, gate, up), dweights, dgate, dup, ddown


def _hidden_gradient(
    p: Problem, dy: Tensor, weights: Tensor, hidden: Tensor, places: Sorted, down: Tensor
) -> tuple[Tensor, Tensor]:
    """da, db and the weighted activations [3, M, F], and the gradient of the weights."""
    tile, inner = p.config.hidden_gradient, hidden.shape[2]
    blocks = _cdiv(inner, tile.BN)
    dhidden = torch.empty(3, *hidden.shape[1:], dtype=hidden.dtype, device=hidden.device)
    parts = torch.empty(*weights.shape, blocks, dtype=torch.float32, device=hidden.device)
    if p.config.hopper and hopper.serves(p.constants["D"], inner, dy, down):
        hopper_rows.hidden_gradient(_hopper_places(p, places), dy, weights, hidden, down, dhidden, parts)
        return dhidden, parts.sum(-1).to(weights.dtype)
    (tma,) = _descriptors(p.config, (down, tile.BK, tile.BN))
    _launch(
        _hidden_gradient_kernel, p.num_tiles * blocks, tile, dy, weights, p.rows, *places, down, tma, hidden, dhidden,
        parts, p.num_slots, dy.stride(0), **p.constants, DOT=p.dot, TMA=tma is not None,
    )  # fmt: skip
    return dhidden, parts.sum(-1).to(weights.dtype)


def _weight_gradients(p: Problem, dy: Tensor, x: Tensor, dhidden: Tensor, places: Sorted, gate: Tensor) -> list[Tensor]:
    tile, (experts, inner, width) = p.config.weight_gradient, gate.shape
    shapes = ((experts, inner, width), (experts, inner, width), (experts, width, inner))
    gradients = [torch.empty(shape, dtype=gate.dtype, device=gate.device) for shape in shapes]
    constants, order = p.constants, places.order
    if p.rows is not None:  # one indirection in the loop, not two
        constants, order = {**constants, "J": 1}, p.rows[order // constants["J"]]
    if p.config.hopper and hopper.serves(width, inner, x, dy):
        hopper.weight_gradients(x, dy, dhidden, order, places.ends, gradients, constants["J"])
        return gradients
    programs = 3 * experts * _cdiv(inner, tile.BM) * _cdiv(width, tile.BN)
    _launch(
        _weight_gradient_kernel, programs, tile, x, dy, dhidden, order, places.ends, *gradients, p.num_slots,
        x.stride(0), dy.stride(0), **constants, DOT=p.dot,
    )  # fmt: skip
    return gradients


def _input_gradient(p: Problem, x: Tensor, dhidden: Tensor, places: Sorted, gate: Tensor, up: Tensor) -> Tensor:
    tile, rows = p.config.input_gradient, dhidden.flatten(0, 1)
    if p.config.hopper and hopper.serves(p.constants["D"], p.constants["F"], dhidden, gate, up):
        make = functools.partial(hopper_rows.input_gradient_rows, _hopper_places(p, places), dhidden, gate, up)
        return _summed(p, tile._replace(BN=hopper.COLS), x, lambda programs, *out: make(*out))
    tma = _descriptors(p.config, (rows, tile.BM, tile.BK), (gate, tile.BK, tile.BN), (up, tile.BK, tile.BN))

    def write(programs: int, out: Tensor, first: int, number: int) -> None:
        _launch(
            _input_gradient_kernel, programs, tile, dhidden, *places, gate, up, *tma, out, p.num_slots, first, number,
            D=p.constants["D"], F=p.constants["F"], DOT=p.dot, TMA=tma[0] is not None,
        )  # fmt: skip

    return _summed(p, tile, x, write)
