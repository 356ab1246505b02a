# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The second half of a weight gradient: the programs' partial sums, added up in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import launch


@triton.jit(do_not_specialize=["num_partials"])
def _sum_kernel(
    partials, out, num_partials, C: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """out[c, w] = the sum of partials[:, w, c]."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, num_partials, ROWS):
        inside = (first + row < num_partials)[:, None] & (column < C * W)[None, :]
        at = partials + (first + row).to(tl.int64)[:, None] * (C * W) + column[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    at = out + (column % C) * W + column // C
    tl.store(at, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < C * W)


def sum_partials(partials_PWC: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, W] of `dtype` from fp32 partial sums [P, W, C]; P may be 0. Bitwise repeatable."""
    num, W, C = partials_PWC.shape
    out = torch.empty(C, W, dtype=dtype, device=partials_PWC.device)
    if out.numel():
        launch(_sum_kernel, triton.cdiv(C * W, 32))(partials_PWC, out, num, C=C, W=W, ROWS=128, COLS=32, num_warps=8)
    return out
