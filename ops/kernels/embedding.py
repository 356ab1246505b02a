# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The gradient of an embedding table in Triton: every row is written once, with the sum over its tokens or with zeros.

The tokens are sorted, equal ones in their order, so each row of the table has a range of them. A program takes some
rows and columns, writes the zeros, and walks over the ranges of the others, several tokens at a time; what it adds in
which order depends on the tokens alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.kernels.rows import as_rows
from q3n_functional.ops.registration import UnsupportedError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS, COLUMNS, TOKENS = 32, 512, 8
"""Of the table, of the table, and at a time: what a program takes."""


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dx, order, numbers, starts, dtable, num_rows, dx_row,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    d = (pid % TILES) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < D
    first = (pid // TILES) * ROWS
    row = first + tl.arange(0, ROWS)
    begins = tl.load(starts + row, mask=row < num_rows, other=0)
    empty = (begins == tl.load(starts + row + 1, mask=row < num_rows, other=0)) & (row < num_rows)
    zeros = tl.zeros([ROWS, COLUMNS], dtable.dtype.element_ty)
    tl.store(dtable + row.to(tl.int64)[:, None] * D + d[None, :], zeros, mask=empty[:, None] & inside[None, :])
    i = tl.load(starts + first)
    last = tl.load(starts + tl.minimum(first + ROWS, num_rows))
    while i < last:
        number = tl.load(numbers + i)
        end = tl.load(starts + number + 1)
        total = tl.zeros([COLUMNS], tl.float32)
        for at in range(i, end, TOKENS):
            place = at + tl.arange(0, TOKENS)
            token = tl.load(order + place, mask=place < end, other=0)
            mask = (place < end)[:, None] & inside[None, :]
            total += tl.sum(tl.load(dx + token[:, None] * dx_row + d[None, :], mask=mask, other=0.0).to(tl.float32), 0)
        tl.store(dtable + number.to(tl.int64) * D + d, total.to(dtable.dtype.element_ty), mask=inside)
        i = end


def backward(dx_MD: Tensor, rows_M: Tensor, num: int) -> Tensor:
    """Return the gradient of the table, as `q3n_functional.ops.embedding` says."""
    if dx_MD.dtype not in DTYPES:
        raise UnsupportedError(f"dx is {dx_MD.dtype}: the Triton kernel takes bf16, fp16 and fp32")
    width = dx_MD.shape[1]
    dtable = torch.empty(num, width, dtype=dx_MD.dtype, device=dx_MD.device)
    if not dtable.numel():
        return dtable
    dx = as_rows(dx_MD)
    # The fewer bits of a key, the fewer passes over them.
    sorted_M, order_M = rows_M.to(torch.int32).sort(stable=True)
    numbers = torch.arange(num + 1, dtype=torch.int32, device=dx.device)
    starts = torch.searchsorted(sorted_M, numbers, out_int32=True)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    launch(_backward_kernel, triton.cdiv(num, ROWS) * triton.cdiv(width, columns))(
        dx, order_M, sorted_M, starts, dtable, num, dx.stride(0), D=width, ROWS=ROWS, COLUMNS=columns, TOKENS=TOKENS,
        num_warps=4,
    )  # fmt: skip
    return dtable
