"""Routed experts: each token goes through a SwiGLU of each expert that was chosen for it, and the sum comes back.

Letters: T tokens, D model width, J experts a token, M = T*J routed tokens (a slot each, t*J + j), E experts, F expert
width. Sorted rows are slots in the order of their experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops.registration import Impl, Outputs, define, differentiable, gradient, wide


def grouped_swiglu(
    x_TD: Tensor,
    experts_TJ: Tensor,
    weights_TJ: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    rows_T: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`y[t] = sum_j weights[t, j] * down_e(silu(gate_e x[t]) * up_e x[t])` with `e = experts[t, j]`.

    rows_T: int32 [T], never decreasing, where several of experts' and weights' T rows are for one token: row t is for
    token rows[t] of x, [N, D], and y, [N, D], has the sums over a token's rows. Where it is None, N is T, and t is t.

    x_TD: [T, D]. experts_TJ: int32 or int64 [T, J], each in [0, E): whoever chooses them sees to that, checking would
    wait for the device. weights_TJ: [T, J], any floating dtype. gate, up: [E, F, D]; down: [E, D, F]. x, gate, up and
    down share a dtype. Returns y in it, like x. No token is dropped whatever the load; nothing waits for the device;
    only experts with tokens are read, and the others get gradients of zero. Sums are fp32 (fp64 for fp64 inputs);
    rounded to x's dtype are the pre-activations, the weighted activations, each expert's output, and, on Hopper and
    without CUDA, the gradient of the activations.

    Memory, in bytes a routed token at s bytes an element: saved for backward are 2 F s + 4, the pre-activations and the
    order, besides the inputs. For as long as they run, forward takes F s and backward 3 F s + F / 8 more, and both take
    D s for the experts' outputs, which on CUDA come in slices of columns: 512 MiB at most, or 256 columns.

    Raises ValueError for shapes or dtypes that do not fit. (Shazeer 2020, GLU variants; Gale et al. 2022, MegaBlocks:
    dropless grouped products; Tan et al. 2024, ScatterMoE: gathering and scattering inside the products.)
    """
    check(x_TD, experts_TJ, weights_TJ, gate_EFD, up_EFD, down_EDF, rows_T)
    y: Tensor = _grouped_swiglu(x_TD, experts_TJ, weights_TJ, gate_EFD, up_EFD, down_EDF, rows_T, impl)[0]
    return y


def check(
    x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, rows: Tensor | None
) -> None:
    """Raise ValueError for shapes or dtypes that do not fit."""
    if gate.shape != up.shape or gate.mT.shape != down.shape or x.shape[1:] != gate.shape[2:]:
        raise ValueError(
            "x must be [T, D], gate and up [E, F, D], down [E, D, F], got "
            f"{', '.join(str(tuple(t.shape)) for t in (x, gate, up, down))}"
        )
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int32):
        raise ValueError(f"rows must be int32 [T], got {rows.dtype} {tuple(rows.shape)}")
    like = x if rows is None else rows
    if experts.ndim != 2 or experts.shape[0] != like.shape[0] or experts.shape != weights.shape:
        raise ValueError(
            f"experts and weights must be [T, J] with the {like.shape[0]} {'tokens of x' if rows is None else 'rows'}, "
            f"got {tuple(experts.shape)} and {tuple(weights.shape)}"
        )
    if experts.dtype not in (torch.int32, torch.int64) or not weights.is_floating_point():
        raise ValueError(f"experts must be int32 or int64, weights floating, got {experts.dtype} and {weights.dtype}")
    dtypes = [t.dtype for t in (x, gate, up, down)]
    if len(set(dtypes)) > 1:
        raise ValueError(f"x, gate, up and down must share a dtype, got {', '.join(map(str, dtypes))}")


def _groups(order_M: Tensor, ends_E: Tensor) -> list[tuple[int, slice, Tensor]]:
    """Each expert that has tokens: its number, its sorted rows, and their slots."""
    ends = ends_E.tolist()
    rows = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return [(e, r, order_M[r].long()) for e, r in enumerate(rows) if r.start < r.stop]


def sort(experts_TJ: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The slots in the order of their experts [M], and the row behind each expert's last [E], both int32."""
    sorted_M, order_M = experts_TJ.flatten().sort(stable=True)
    numbers_E = torch.arange(num_experts, device=sorted_M.device, dtype=sorted_M.dtype)
    return order_M.to(torch.int32), torch.searchsorted(sorted_M, numbers_E, right=True, out_int32=True)


def _tokens(slots: Tensor, per_row: int, rows: Tensor | None) -> Tensor:
    """The tokens that slots are of."""
    return slots // per_row if rows is None else rows[slots // per_row].long()


def summed(y_MD: Tensor, shape_TJ: torch.Size, rows: Tensor | None, like: Tensor) -> Tensor:
    """The sums over each token's slots, which are in their own order, of the shape of `like`."""
    y_TD = y_MD.view(*shape_TJ, y_MD.shape[1]).sum(1, dtype=wide(y_MD.dtype))
    if rows is not None:
        y_TD = y_TD.new_zeros(like.shape).index_add(0, rows, y_TD)
    return y_TD.to(y_MD.dtype)


def _forward(
    x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, rows: Tensor | None
) -> Outputs:
    order, ends = sort(experts, gate.shape[0])
    y, hidden = x.new_empty(order.shape[0], x.shape[1]), x.new_empty(2, order.shape[0], gate.shape[1])
    weights = weights.to(wide(x.dtype)).flatten()
    for e, own, slots in _groups(order, ends):
        tokens = x[_tokens(slots, experts.shape[1], rows)]
        hidden[0, own], hidden[1, own] = tokens @ gate[e].mT, tokens @ up[e].mT
        a, b = hidden[:, own].to(weights.dtype)
        y[slots] = (a * torch.sigmoid(a) * b * weights[slots, None]).to(x.dtype) @ down[e].mT
    return summed(y, experts.shape, rows, x), hidden, order, ends


def _backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    hidden: Tensor,
    order: Tensor,
    ends: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    rows: Tensor | None,
) -> Outputs:
    dx, (dgate, dup, ddown) = x.new_empty(order.shape[0], x.shape[1]), (torch.zeros_like(w) for w in (gate, up, down))
    w, dw = weights.to(wide(x.dtype)).flatten(), hidden.new_empty(order.shape, dtype=wide(x.dtype))
    for e, own, slots in _groups(order, ends):
        tokens, dy_rows = (t[_tokens(slots, weights.shape[1], rows)] for t in (x, dy))
        a, b, dh = (t.to(w.dtype) for t in (*hidden[:, own], dy_rows @ down[e]))
        sigmoid = torch.sigmoid(a)
        h, scaled = a * sigmoid * b, dh * w[slots, None]
        dw[slots] = (dh * h).sum(-1)
        results = (scaled * b * sigmoid * (1 + a * (1 - sigmoid)), scaled * a * sigmoid, h * w[slots, None])
        da, db, h = (t.to(x.dtype) for t in results)
        dx[slots] = da @ gate[e] + db @ up[e]
        dgate[e], dup[e], ddown[e] = da.mT @ tokens, db.mT @ tokens, dy_rows.mT @ h
    dweights = dw.view(weights.shape).to(weights.dtype)
    return summed(dx, weights.shape, rows, x), dweights, dgate, dup, ddown


def _fake_forward(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, *rest: Tensor | None) -> Outputs:
    slots = experts.shape[0] * experts.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(2, slots, gate.shape[1]),
        experts.new_empty(slots, dtype=torch.int32),
        experts.new_empty(gate.shape[0], dtype=torch.int32),
    )


def _fake_backward(dy: Tensor, x: Tensor, weights: Tensor, *rest: Any) -> Outputs:
    return tuple(t.new_empty(t.shape) for t in (x, weights, *rest[-4:-1]))


_grouped_swiglu_backward = gradient(
    define(
        "grouped_swiglu_backward",
        "(Tensor dy, Tensor x, Tensor weights, Tensor hidden, Tensor order, Tensor ends, Tensor gate, Tensor up, "
        "Tensor down, Tensor? rows, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=_backward,
        fake=_fake_backward,
        kernel="grouped_swiglu:backward",
        # How many tokens other ranks send is not known while compiling: torch 2.11 cannot order hidden's strides then.
        layout=torch.Tag.flexible_layout,
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weights, gate, up, down, rows, ctx.impl = inputs
    ctx.save_for_backward(x, weights, *output[1:], gate, up, down, rows)
    ctx.mark_non_differentiable(*output[1:])


def _backward_of_op(ctx: Any, dy: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    dx, dweights, *dmatrices = _grouped_swiglu_backward(dy, *ctx.saved_tensors, ctx.impl)
    return (dx, None, dweights, *dmatrices, None, None)


_grouped_swiglu = differentiable(
    define(
        "grouped_swiglu",
        "(Tensor x, Tensor experts, Tensor weights, Tensor gate, Tensor up, Tensor down, Tensor? rows, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference=_forward,
        fake=_fake_forward,
        kernel="grouped_swiglu:forward",
    ),
    _setup_context,
    _backward_of_op,
)
