"""Matrix products in float8 for training: both operands scaled to the range of 8 bits as they are met.

Activations and weights are e4m3, gradients e5m2, a scale a tensor: what torchao has by default and calls the fastest on
Hopper, and what Micikevicius et al. 2022 ("FP8 formats for deep learning") train with. Its other recipe, a scale a row,
quantises every operand twice, because the gradient's products sum over other dims; torch 2.11 lacks it on the CPU.
torchao.float8 itself swaps the nn.Linear of a module, which a tree of tensors has not; the product is torch._scaled_mm.
The scaling is plain operators rather than a custom op, so that a compiler fuses it with what stands before it.

Letters: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional

from q3n_functional.ops.float8_grouped_mm import CAPABILITIES
from q3n_functional.ops.registration import composite, transform_is_active

logger = logging.getLogger(__name__)

Float8 = Literal["none", "linears", "linears_and_experts"]
"""none: every product in the parameters' dtype; linears: those of `projection` in float8; linears_and_experts: those of
`float8_experts` too."""

MULTIPLE = 16
"""What the sizes of both operands must be multiples of."""
LEAST_CAPABILITY = (8, 9)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class _Scaled(NamedTuple):
    """`values * scale` is about the tensor. values: float8 [rows, columns]; scale: fp32 scalar."""

    values: Tensor
    scale: Tensor


def check_device(device: torch.device, float8: Float8 = "linears") -> None:
    """Raise ValueError for a CUDA card that has no such products in float8. (The CPU computes what one would.)"""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        has, needs = (".".join(map(str, x)) for x in (capability, LEAST_CAPABILITY))
        raise ValueError(
            f"float8 needs a card of compute capability {needs} or more, {torch.cuda.get_device_name(device)} has "
            f"{has}: set float8 to none"
        )
    if float8 == "linears_and_experts" and capability[0] not in CAPABILITIES:
        raise ValueError(
            f"experts in float8 need a card of compute capability 9 or 10, {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, capability))}: set float8 to linears"
        )


def projection(x: Tensor, w_NK: Tensor, float8: Float8) -> Tensor:
    """`x w^T` [..., N] of bf16 x [..., K] and w [N, K], in float8 where `float8` says so and the sizes allow.

    Each operand is divided by its largest magnitude over that of its format, sums are fp32, the result is bf16; so are
    the gradients, whose products are in float8 too, second derivatives raise. Saved for backward: x and w, no float8
    copy. A matrix whose N or K is no multiple of 16 stays in bf16, and the log says so once.

    Raises ValueError for other dtypes.
    """
    # A graph of any sizes is of one matrix all the same: `index` makes a number of what Dynamo has for its sizes.
    if float8 == "none" or not fits(*map(operator.index, w_NK.shape)):
        return functional.linear(x, w_NK)
    if x.dtype != torch.bfloat16 or w_NK.dtype != torch.bfloat16:
        raise ValueError(f"float8 products are of bfloat16 tensors, got {x.dtype} and {w_NK.dtype}: set bfloat16")
    y_MN = _product(x.flatten(0, -2), w_NK)
    return y_MN.view(*x.shape[:-1], w_NK.shape[0])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a graph cannot log
def fits(outputs: int, inputs: int) -> bool:
    """Whether products with such matrices can be in float8; the log says once which cannot."""
    if not outputs % MULTIPLE and not inputs % MULTIPLE:
        return True
    _say_once(f"matrices of {outputs} x {inputs} stay in bfloat16: float8 needs multiples of {MULTIPLE}")
    return False


@functools.cache
def _say_once(line: str) -> None:
    logger.info(line)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_MK: Tensor, w_NK: Tensor) -> Tensor:
        return _multiplied(_scaled(_padded(x_MK), E4M3), _scaled(w_NK, E4M3))[: x_MK.shape[0]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor, Tensor]:
        x_MK, w_NK = ctx.saved_tensors
        dy = _scaled(_padded(dy_MN), E5M2)
        dx_MK = _multiplied(dy, _transposed(_scaled(w_NK, E4M3)))[: x_MK.shape[0]]
        return dx_MK, _multiplied(_transposed(dy), _transposed(_scaled(_padded(x_MK), E4M3)))


# Under torch.func.grad Dynamo would trace `forward` alone and lose the gradient: it must not look inside.
torch.compiler.allow_in_graph(_Product)
_float8_product = composite("float8_product(Tensor x, Tensor w) -> Tensor", _Product.apply)


def _product(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    product: Callable[[Tensor, Tensor], Tensor] = _Product.apply
    return product(x_MK, w_NK) if transform_is_active() else _float8_product(x_MK, w_NK)


def _scaled(x: Tensor, dtype: torch.dtype) -> _Scaled:
    most = torch.finfo(dtype).max
    # Above what would make the quotient infinite; a tensor of zeros stays one.
    largest = x.abs().amax().float().clamp(min=1e-30)
    return _Scaled((x.float() * (most / largest)).clamp(-most, most).to(dtype), largest / most)


def _multiplied(a: _Scaled, b: _Scaled) -> Tensor:
    """`a b^T`; Hopper's float8 products read both along their rows."""
    # Not the fast accumulation, which keeps fewer bits of a sum than fp32 has.
    return torch._scaled_mm(a.values, b.values.t(), a.scale, b.scale, out_dtype=torch.bfloat16, use_fast_accum=False)


def _transposed(x: _Scaled) -> _Scaled:
    return _Scaled(x.values.t().contiguous(), x.scale)


def _padded(x_MK: Tensor) -> Tensor:
    """Rows of zeros behind those of x, which change no sum, where their number is no multiple of 16."""
    num = x_MK.shape[0]
    if statically_known_true(num % MULTIPLE == 0):
        return x_MK
    return functional.pad(x_MK, (0, 0, 0, -num % MULTIPLE))
