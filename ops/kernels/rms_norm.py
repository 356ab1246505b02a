# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The gradient of RMS normalisation and of the residual stream around the block, in Triton.

With n = x rstd, rstd = 1 / sqrt(mean(x^2) + eps), and dn = dy (1 + weight), row by row:

    dx = rstd (dn - n mean(dn n)) + dresidual
    dweight = sum over rows of dy n

A program walks over rows, as many programs apart as there are, each whole in registers, and leaves one partial sum of
dweight behind. Which rows a program takes depends on shapes alone, so repeated runs agree bit by bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.kernels.partial_sums import sum_partials
from q3n_functional.ops.kernels.rows import as_rows
from q3n_functional.ops.registration import UnsupportedError

MAX_WIDTH = 8192
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_SMS = 132  # of the card that the configuration below is meant for; results depend on it, so it is not asked


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _backward_kernel(
    dy, dresidual, x, weight, dx, partials, num_rows, num_programs, eps, dy_row, dresidual_row, x_row,
    D: tl.constexpr, BD: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    d = tl.arange(0, BD)
    inside = d < D
    w = 1.0 + tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BD], tl.float32)
    for row in range(pid, num_rows, num_programs):
        at = tl.cast(row, tl.int64)
        xx = tl.load(x + at * x_row + d, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + at * dy_row + d, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            passed = tl.load(dresidual + at * dresidual_row + d, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(xx * xx, 0) / D + eps)
        normal = xx * rstd
        total += grad * normal
        grad *= w
        out = rstd * (grad - normal * (tl.sum(grad * normal, 0) / D))
        if RESIDUAL:
            out += passed
        tl.store(dx + at * D + d, out.to(dx.dtype.element_ty), mask=inside)
    tl.store(partials + pid * D + d, total, mask=inside)


class Config(NamedTuple):
    """Launch configuration: entries of a row that a warp takes, and programs to aim for."""

    entries: int
    programs: int


CONFIG = Config(entries=512, programs=NUM_SMS * 5)


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, eps: float, config: Config = CONFIG
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, as `q3n_functional.ops.rms_norm` says."""
    width = x.shape[-1]
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"x is {x.dtype}: the Triton kernel takes bf16, fp16 and fp32")
    if width > MAX_WIDTH:
        raise UnsupportedError(f"width {width}: the Triton kernel takes at most {MAX_WIDTH}")
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx, torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
    flat = [as_rows(t) for t in (dy, x if dresidual is None else dresidual, x)]
    programs, block = min(config.programs, len(flat[0])), triton.next_power_of_2(width)
    partials = torch.empty(programs, 1, width, dtype=torch.float32, device=x.device)
    launch(_backward_kernel, programs)(
        *flat, weight.contiguous(), dx, partials, len(flat[0]), programs, eps, *(t.stride(0) for t in flat),
        D=width, BD=block, RESIDUAL=dresidual is not None, num_warps=max(1, min(16, block // config.entries)),
    )  # fmt: skip
    return dx, sum_partials(partials, weight.dtype).flatten()
