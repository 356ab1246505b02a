# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The largest probabilities of each row in Triton, and the gradient: one launch each.

Numbers are compared as integers in the same order, where NaN is the largest and minus zero is zero. A program is one
warp with whole rows, so each of the J rounds, the largest left and the first place where it stands, is two reductions
within the warp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.registration import UnsupportedError

MAX_EXPERTS = 2048  # 64 registers a thread
ENTRIES = 512  # of the rows of a program
GONE = tl.constexpr(-(2**31))  # below every number that is there


@triton.jit
def _ordered(x):
    """int32 above GONE in the order of fp32 x."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _number(ordered):
    """What `_ordered` was made of."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    probabilities, weights, experts, num_rows, row_stride,
    J: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BE)[None, :]
    inside = (row < num_rows)[:, None] & (e < E)
    row = row.to(tl.int64)
    x = tl.load(probabilities + row[:, None] * row_stride + e, mask=inside, other=0.0)
    left = tl.where(e < E, _ordered(x), GONE)
    for j in range(J):
        largest = tl.max(left, 1)
        expert = tl.min(tl.where(left == largest[:, None], e, BE), 1)
        left = tl.where(e == expert[:, None], GONE, left)
        tl.store(weights + row * J + j, _number(largest), mask=row < num_rows)
        tl.store(experts + row * J + j, expert.to(tl.int64), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dweights, experts, dprobabilities, num_rows,
    J: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BE)[None, :]
    inside = (row < num_rows)[:, None] & (e < E)
    own = (row < num_rows)[:, None]
    row = row.to(tl.int64)[:, None]
    gradient = tl.zeros([ROWS, BE], tl.float32)
    for j in range(J):
        expert = tl.load(experts + row * J + j, mask=own, other=0)
        gradient = tl.where(e == expert, tl.load(dweights + row * J + j, mask=own, other=0.0), gradient)
    tl.store(dprobabilities + row * E + e, gradient, mask=inside)


def _check(probabilities: Tensor) -> None:
    if probabilities.dtype != torch.float32:
        raise UnsupportedError(f"probabilities are {probabilities.dtype}: the Triton kernels take fp32")
    if probabilities.shape[1] > MAX_EXPERTS:
        raise UnsupportedError(f"{probabilities.shape[1]} experts: the Triton kernels take at most {MAX_EXPERTS}")


def _launch(kernel, num_rows: int, num_experts: int, num: int, *args) -> None:
    block = triton.next_power_of_2(num_experts)
    rows = max(1, ENTRIES // block)
    launch(kernel, triton.cdiv(num_rows, rows))(*args, J=num, E=num_experts, BE=block, ROWS=rows, num_warps=1)


def forward(probabilities: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the largest probabilities and their experts, as `q3n_functional.ops.top_experts` says."""
    _check(probabilities)
    num_rows, num_experts = probabilities.shape
    weights, experts = (
        torch.empty(num_rows, num, dtype=dtype, device=probabilities.device) for dtype in (torch.float32, torch.int64)
    )
    if weights.numel():
        x = probabilities if probabilities.stride(1) == 1 else probabilities.contiguous()
        _launch(_forward_kernel, num_rows, num_experts, num, x, weights, experts, num_rows, x.stride(0))
    return weights, experts


def backward(dweights: Tensor, experts: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient of the probabilities."""
    _check(probabilities)
    num_rows, num_experts = probabilities.shape
    dprobabilities = torch.empty(num_rows, num_experts, dtype=torch.float32, device=probabilities.device)
    if dprobabilities.numel():
        tensors = (dweights.contiguous(), experts.contiguous(), dprobabilities)
        _launch(_backward_kernel, num_rows, num_experts, dweights.shape[1], *tensors, num_rows)
    return dprobabilities
