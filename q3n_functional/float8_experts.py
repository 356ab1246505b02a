"""The products of routed experts in float8 for training, but for the gradients of their weights.

Operands are e4m3 with a scale a row, along the dim that a product sums over; gradients of the weights are products of
bf16: the recipe that torchao calls rowwise_with_gw_hp. A row is scaled by itself, so that a token's numbers do not
depend on what others are in the batch.

As in `float8`, scaling is plain operators, which a compiler fuses with what stands before and behind them.

Letters: T tokens, D model width, J experts a token, M = T*J slots in the order of their experts, E experts, F expert
width, G = 2F; K what a product sums over, N its outputs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from q3n_functional.float8 import E4M3, fits
from q3n_functional.ops import float8_grouped_mm, grouped_swiglu
from q3n_functional.ops.grouped_swiglu import check, sort, summed
from q3n_functional.ops.registration import composite, transform_is_active

MOST = torch.finfo(E4M3).max


def experts(
    x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """`grouped_swiglu` [T, D], `y[t] = sum_j weights[t, j] * down_e(silu(gate_e x[t]) * up_e x[t])`, in float8.

    x: bf16 [T, D]. experts: int32 or int64 [T, J], each in [0, E). weights: [T, J], any floating dtype. gate, up: bf16
    [E, F, D]; down: bf16 [E, D, F]. On CUDA, E is at most 1023. Matrices whose F or D is no multiple of 16 stay in
    bf16, and the log says so once.

    In float8 are both products of forward and those that the gradients of the activations are made of; in bf16 the
    gradients of the matrices. Sums are fp32; rounded to bf16 are the pre-activations, the weighted activations, each
    expert's output, and the gradients of all three. Saved for backward: the inputs, the pre-activations and the order,
    no float8 copy. Nothing waits for the device, no sum depends on the order of threads; second derivatives raise.

    Raises ValueError for shapes or dtypes that do not fit. (Shazeer 2020, GLU variants; Micikevicius et al. 2022, FP8
    formats for deep learning.)
    """
    # A graph of any sizes is of one matrix all the same: `index` makes a number of what Dynamo has for its sizes.
    if not fits(*map(operator.index, gate_EFD.shape[1:])):
        return grouped_swiglu(x_TD, experts_TJ, weights_TJ, gate_EFD, up_EFD, down_EDF)
    check(x_TD, experts_TJ, weights_TJ, gate_EFD, up_EFD, down_EDF, None)
    if x_TD.dtype != torch.bfloat16:
        raise ValueError(f"float8 products are of bfloat16 tensors, got {x_TD.dtype}: set bfloat16")
    call: Callable[..., tuple[Tensor, ...]] = _Experts.apply if transform_is_active() else _float8_experts
    return call(x_TD, experts_TJ, weights_TJ, gate_EFD, up_EFD, down_EDF)[0]


class _Experts(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        order_M, ends_E = sort(experts_TJ, gate_EFD.shape[0])
        x_MD = _taken(_by_row(x_TD), order_M // experts_TJ.shape[1])
        hidden_MG = _product(x_MD, _stacked(_by_row(gate_EFD), _by_row(up_EFD)), ends_E)
        h_MF = _activations(hidden_MG, weights_TJ.flatten()[order_M])
        y_MD = _product(_by_row(h_MF), _by_row(down_EDF), ends_E)
        return summed(y_MD[_inverse(order_M)], experts_TJ.shape, None, x_TD), hidden_MG, order_M, ends_E

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x_TD, _, *others = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TD, *others, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor, dhidden_MG: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        if dhidden_MG is not None:  # nobody but this gradient uses the pre-activations
            raise NotImplementedError("float8_experts: second derivatives are not implemented")
        x_TD, weights_TJ, gate_EFD, up_EFD, down_EDF, hidden_MG, order_M, ends_E = ctx.saved_tensors
        tokens_M, inverse_M = order_M // weights_TJ.shape[1], _inverse(order_M)
        dh_MF = _product(_taken(_by_row(dy_TD), tokens_M), _by_row(down_EDF.mT), ends_E)
        weights_M = weights_TJ.flatten()[order_M]
        da_MF, db_MF, h_MF, dweights_M = _activation_gradients(dh_MF, hidden_MG, weights_M)
        dx_MD = _product(_by_row(da_MF, db_MF), _by_row(gate_EFD.mT, up_EFD.mT), ends_E)
        dx_TD = summed(dx_MD[inverse_M], weights_TJ.shape, None, x_TD)
        dweights_TJ = dweights_M[inverse_M].view(weights_TJ.shape).to(weights_TJ.dtype)
        x_MD = x_TD[tokens_M]
        pairs = (da_MF, x_MD), (db_MF, x_MD), (dy_TD[tokens_M], h_MF)
        return dx_TD, None, dweights_TJ, *(_weight_gradient(dy, x, ends_E) for dy, x in pairs)


# Under torch.func.grad Dynamo would trace `forward` alone and lose the gradient: it must not look inside.
torch.compiler.allow_in_graph(_Experts)
_float8_experts = composite(
    "float8_experts(Tensor x, Tensor experts, Tensor weights, Tensor gate, Tensor up, Tensor down) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _Experts.apply,
)


def _inverse(order_M: Tensor) -> Tensor:
    """Where each slot is in the order."""
    positions_M = torch.arange(order_M.shape[0], device=order_M.device)
    return torch.empty_like(positions_M).scatter(0, order_M.long(), positions_M)


def _activations(hidden_MG: Tensor, weights_M: Tensor) -> Tensor:
    a, b = hidden_MG.float().chunk(2, -1)
    return (a * torch.sigmoid(a) * b * weights_M.float()[:, None]).to(hidden_MG.dtype)


def _activation_gradients(dh_MF: Tensor, hidden_MG: Tensor, weights_M: Tensor) -> tuple[Tensor, ...]:
    """The gradients of both pre-activations [M, F], the weighted activations [M, F], the weights' gradients [M], fp32.

    `dh_MF` is the gradient of the weighted activations.
    """
    (a, b), dh, w = hidden_MG.float().chunk(2, -1), dh_MF.float(), weights_M.float()[:, None]
    sigmoid = torch.sigmoid(a)
    h, scaled = a * sigmoid * b, dh * w
    results = scaled * b * sigmoid * (1 + a * (1 - sigmoid)), scaled * a * sigmoid, h * w
    return *(x.to(hidden_MG.dtype) for x in results), (dh * h).sum(-1)


class _Rows(NamedTuple):
    """`values * scale[..., None]` is about the tensor. values: e4m3 [..., K], contiguous; scale: fp32 [...]."""

    values: Tensor
    scale: Tensor


def _by_row(*parts: Tensor) -> _Rows:
    """The rows of the parts side by side, each over its largest magnitude."""
    largest = functools.reduce(torch.maximum, [part.abs().amax(-1) for part in parts])
    # Above what would make the quotient infinite; a row of zeros stays one.
    scale = largest.float().clamp(min=1e-30) / MOST
    values = [(part.float() / scale[..., None]).to(E4M3) for part in parts]
    # Rows may have been the columns of a matrix.
    return _Rows(torch.cat(values, -1).contiguous(), scale.contiguous())


def _stacked(a: _Rows, b: _Rows) -> _Rows:
    return _Rows(torch.cat([a.values, b.values], -2), torch.cat([a.scale, b.scale], -1))


def _taken(x: _Rows, tokens_M: Tensor) -> _Rows:
    return _Rows(x.values[tokens_M], x.scale[tokens_M])


def _product(a_MK: _Rows, b_ENK: _Rows, ends_E: Tensor) -> Tensor:
    """Rows of a times the transposed matrix of their expert."""
    return float8_grouped_mm(a_MK.values, b_ENK.values, a_MK.scale, b_ENK.scale, ends_E)


def _weight_gradient(dy_MN: Tensor, x_MK: Tensor, ends_E: Tensor) -> Tensor:
    """The sums of `dy x^T` over each expert's rows, [E, N, K]; zeros where it has none."""
    dy_MN, x_MK = dy_MN.contiguous(), x_MK.contiguous()
    # Of `t()` Inductor would make rows as long as there are slots, whose bytes need not be the multiple of 16 that
    # grouped_mm asks for; it reads columns only of what it has written.
    dy_NM = dy_MN.as_strided((dy_MN.shape[1], dy_MN.shape[0]), (1, dy_MN.shape[1]))
    return grouped_mm(dy_NM, x_MK, offs=ends_E)
