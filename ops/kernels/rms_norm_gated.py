# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""RMS normalisation with a SiLU gate in Triton: forward and backward.

With n = x rstd, rstd = 1 / sqrt(mean(x^2) + eps), and s = sigmoid(gate), row by row:

    y = weight n gate s
    dn = dy weight gate s         dx = rstd (dn - n mean(dn n))
    dgate = dy weight n (s + gate s (1 - s))
    dweight = sum over rows of dy gate s n

A program takes several whole rows at a time. Backward reads its inputs once and computes all three gradients: a program
walks over tiles of rows, as many programs apart as there are, and leaves one partial sum of dweight behind. Which rows
a program takes depends on shapes alone, so repeated runs agree bit by bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.kernels.partial_sums import sum_partials
from q3n_functional.ops.kernels.sigmoid import sigmoid
from q3n_functional.ops.registration import UnsupportedError

MAX_WIDTH = 2048
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_SMS = 132  # of the card that the configurations below are meant for; results depend on it, so it is not asked


@triton.jit
def _starts(row, num_inner, outer, inner, FLAT: tl.constexpr):
    """Where each row begins: rows are numbered over an outer and an inner dim, each with its stride."""
    if FLAT:
        starts = row.to(tl.int64) * inner
    else:
        starts = (row // num_inner).to(tl.int64) * outer + (row % num_inner).to(tl.int64) * inner
    return starts[:, None]


@triton.jit
def _inverse_rms(x, eps, D: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]


@triton.jit(do_not_specialize=["num_rows", "num_inner"])
def _forward_kernel(
    x, gate, weight, y, num_rows, num_inner, eps, x_outer, x_inner, gate_outer, gate_inner,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)[None, :]
    mask = (row < num_rows)[:, None] & (d < D)
    xx = tl.load(x + _starts(row, num_inner, x_outer, x_inner, FLAT) + d, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + _starts(row, num_inner, gate_outer, gate_inner, FLAT) + d, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    out = w * (xx * _inverse_rms(xx, eps, D)) * (g * sigmoid(g))
    tl.store(y + row.to(tl.int64)[:, None] * D + d, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_inner", "num_programs"])
def _backward_kernel(
    dy, x, gate, weight, dx, dgate, partials, num_rows, num_inner, num_programs, eps,
    dy_outer, dy_inner, x_outer, x_inner, gate_outer, gate_inner,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    d = tl.arange(0, BD)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BD], tl.float32)
    for tile in range(pid, tl.cdiv(num_rows, ROWS), num_programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (d < D)
        xx = tl.load(x + _starts(row, num_inner, x_outer, x_inner, FLAT) + d, mask=mask, other=0.0)
        g = tl.load(gate + _starts(row, num_inner, gate_outer, gate_inner, FLAT) + d, mask=mask, other=0.0)
        grad = tl.load(dy + _starts(row, num_inner, dy_outer, dy_inner, FLAT) + d, mask=mask, other=0.0)
        xx = xx.to(tl.float32)
        g = g.to(tl.float32)
        grad = grad.to(tl.float32)
        rstd = _inverse_rms(xx, eps, D)
        normal = xx * rstd
        s = sigmoid(g)
        silu = g * s
        total += grad * silu * normal
        grad *= w
        d_normal = grad * silu
        d_x = rstd * (d_normal - normal * (tl.sum(d_normal * normal, 1) / D)[:, None])
        d_gate = grad * normal * (s + silu * (1.0 - s))
        at = row.to(tl.int64)[:, None] * D + d
        tl.store(dx + at, d_x.to(dx.dtype.element_ty), mask=mask)
        tl.store(dgate + at, d_gate.to(dgate.dtype.element_ty), mask=mask)
    d = tl.arange(0, BD)
    tl.store(partials + pid * D + d, tl.sum(total, 0), mask=d < D)


class Config(NamedTuple):
    """Launch configuration: entries of a tile of rows, warps, and programs to aim for."""

    entries: int
    warps: int
    programs: int


FORWARD = Config(entries=4096, warps=4, programs=0)
BACKWARD = Config(entries=2048, warps=4, programs=NUM_SMS * 8)


class Rows(NamedTuple):
    """Tensors of one shape as [outer, inner, D], and how to find their rows."""

    tensors: list[Tensor]
    strides: list[int]  # outer and inner of each
    num_rows: int
    num_inner: int
    flat: bool  # one stride, the inner, serves for both dims


def _rows(*tensors: Tensor) -> Rows:
    # The last dim but one stays apart: heads of a view into a wider projection have strides of their own.
    planes = [x.flatten(0, -3) if x.ndim > 2 else x[None] for x in tensors]
    planes = [x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in planes]
    outer, inner, _ = planes[0].shape
    flat = all(outer <= 1 or x.stride(0) == inner * x.stride(1) for x in planes)
    return Rows(planes, [s for x in planes for s in x.stride()[:2]], outer * inner, inner, flat)


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"x is {x.dtype}: the Triton kernels take bf16, fp16 and fp32")
    if x.shape[-1] > MAX_WIDTH:
        raise UnsupportedError(f"width {x.shape[-1]}: the Triton kernels take at most {MAX_WIDTH}")


def _constants(x: Tensor, rows: Rows, config: Config) -> dict[str, int | bool]:
    block = triton.next_power_of_2(x.shape[-1])
    return {
        "D": x.shape[-1], "BD": block, "ROWS": max(1, config.entries // block), "FLAT": rows.flat,
        "num_warps": config.warps, "num_stages": 1,
    }  # fmt: skip


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, config: Config = FORWARD) -> Tensor:
    """Return y, as `q3n_functional.ops.rms_norm_gated` says."""
    _check(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rows = _rows(x, gate)
        constants = _constants(x, rows, config)
        launch(_forward_kernel, triton.cdiv(rows.num_rows, constants["ROWS"]))(
            *rows.tensors, weight.contiguous(), y, rows.num_rows, rows.num_inner, eps, *rows.strides, **constants
        )
    return y


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, config: Config = BACKWARD
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and weight."""
    _check(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    if not x.numel():
        return dx, dgate, torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
    rows = _rows(dy, x, gate)
    constants = _constants(x, rows, config)
    programs = min(config.programs, triton.cdiv(rows.num_rows, constants["ROWS"]))
    partials = torch.empty(programs, 1, x.shape[-1], dtype=torch.float32, device=x.device)
    launch(_backward_kernel, programs)(
        *rows.tensors, weight.contiguous(), dx, dgate, partials, rows.num_rows, rows.num_inner, programs, eps,
        *rows.strides, **constants,
    )  # fmt: skip
    return dx, dgate, sum_partials(partials, weight.dtype).flatten()
