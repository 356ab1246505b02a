"""SwiGLU of many experts over tokens that are sorted by expert.

Letters: M routed tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from q3n_functional.ops.registration import Impl, Outputs, define, differentiable, gradient, wide


def grouped_swiglu(
    x_MD: Tensor, ends_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, impl: Impl = "auto"
) -> Tensor:
    """`down_e(silu(gate_e x) * up_e x)` for every token with its own expert e.

    x_MD: [M, D], the tokens of expert 0 first, then of expert 1, and so on. ends_E: int32 [E], the row behind each
    expert's last token; the last is M and an expert may have none. gate, up: [E, F, D]; down: [E, D, F]. All but
    ends_E share a dtype. No token is dropped whatever the load. Saved for backward: the inputs.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    if gate_EFD.shape != up_EFD.shape or gate_EFD.mT.shape != down_EDF.shape or x_MD.shape[1:] != gate_EFD.shape[2:]:
        raise ValueError(
            "x must be [M, D], gate and up [E, F, D], down [E, D, F], got "
            f"{', '.join(str(tuple(t.shape)) for t in (x_MD, gate_EFD, up_EFD, down_EDF))}"
        )
    if ends_E.shape != gate_EFD.shape[:1] or ends_E.dtype != torch.int32:
        raise ValueError(f"ends must be int32 [{gate_EFD.shape[0]}], got {ends_E.dtype} {tuple(ends_E.shape)}")
    dtypes = [t.dtype for t in (x_MD, gate_EFD, up_EFD, down_EDF)]
    if len(set(dtypes)) > 1:
        raise ValueError(f"x, gate, up and down must share a dtype, got {', '.join(map(str, dtypes))}")
    y: Tensor = _grouped_swiglu(x_MD, ends_E, gate_EFD, up_EFD, down_EDF, impl)
    return y


def _groups(ends_E: Tensor) -> list[tuple[int, slice]]:
    """Each expert that has tokens, with the rows of those."""
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < b]


def _forward(x: Tensor, ends: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    for e, rows in _groups(ends):
        y[rows] = (silu(x[rows] @ gate[e].mT) * (x[rows] @ up[e].mT)) @ down[e].mT
    return y


def _backward(dy: Tensor, x: Tensor, ends: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Outputs:
    dx, (dgate, dup, ddown) = x.new_empty(x.shape), (torch.zeros_like(w) for w in (gate, up, down))
    for e, rows in _groups(ends):
        products = (x[rows] @ gate[e].mT, x[rows] @ up[e].mT, dy[rows] @ down[e])
        a, b, dh = (y.to(wide(x.dtype)) for y in products)
        sigmoid = torch.sigmoid(a)
        results = (dh * b * sigmoid * (1 + a * (1 - sigmoid)), dh * a * sigmoid, a * sigmoid * b)
        da, db, h = (y.to(x.dtype) for y in results)
        dx[rows] = da @ gate[e] + db @ up[e]
        dgate[e], dup[e], ddown[e] = da.mT @ x[rows], db.mT @ x[rows], dy[rows].mT @ h
    return dx, dgate, dup, ddown


_grouped_swiglu_backward = gradient(
    define(
        "grouped_swiglu_backward",
        "(Tensor dy, Tensor x, Tensor ends, Tensor gate, Tensor up, Tensor down, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference=_backward,
        fake=lambda dy, x, ends, gate, up, down: tuple(t.new_empty(t.shape) for t in (x, gate, up, down)),
        kernel=None,
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_op(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    dx, *dweights = _grouped_swiglu_backward(dy, *ctx.saved_tensors, ctx.impl)
    return (dx, None, *dweights, None)


_grouped_swiglu = differentiable(
    define(
        "grouped_swiglu",
        "(Tensor x, Tensor ends, Tensor gate, Tensor up, Tensor down, str impl) -> Tensor",
        reference=_forward,
        fake=lambda x, ends, gate, up, down: x.new_empty(x.shape),
        kernel=None,
    ),
    _setup_context,
    _backward_of_op,
)
