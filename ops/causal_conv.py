"""The short causal depthwise convolution in front of the delta rule.

Letters: B batch, T time, C channels, W taps, N sequences (rows, or documents when packed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops import sharding
from q3n_functional.ops.registration import (
    Impl,
    Outputs,
    check_documents,
    composite,
    define,
    differentiable,
    gradient,
    is_recorded,
    wide,
)


def causal_conv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`y[t] = silu(sum_j weight[:, j] * x[t - (W-1) + j])`, each sequence preceded by its initial state.

    x_BTC: [B, T, C]. weight_CW: [C, W], the last tap on the current token. initial_state: [N, C, W-1], the inputs
    before each sequence's first, oldest first; zeros where None. cu_seqlens: int32 [N+1], see
    `q3n_functional.packing`; None makes each row a sequence (N = B). Sums are fp32 (fp64 for fp64 inputs).

    Returns y [B, T, C] and the final state [N, C, W-1], the last W-1 inputs of each sequence with its initial state in
    front, both in x's dtype. Tokens after cu_seqlens[-1] give zeros. Saved for backward: the inputs.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(x_BTC, weight_CW, initial_state, cu_seqlens)
    y, state = _causal_conv(x_BTC, weight_CW, initial_state, cu_seqlens, impl)
    return y, state


def causal_conv_qkv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    channels: tuple[int, int, int],
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`causal_conv` of queries, keys and values that lie side by side: q, k, v and the final state.

    channels: of each of the three; q, k and v are views of y. Backward reads the three gradients where they lie, which
    that of a split would first copy into one tensor.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(x_BTC, weight_CW, initial_state, cu_seqlens)
    if len(channels) != 3 or sum(channels) != x_BTC.shape[2]:
        raise ValueError(f"channels must be three numbers that add up to {x_BTC.shape[2]}, got {tuple(channels)}")
    arguments = x_BTC, weight_CW, initial_state, cu_seqlens
    if is_recorded(*arguments):
        q, k, v, state = _causal_conv_qkv(*arguments, channels, impl)
    else:
        y, state = _causal_conv(*arguments, impl)
        q, k, v = y.split(channels, -1)
    return q, k, v, state


def _check(x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(f"x must be [B, T, C] and weight [C, W], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.shape[1] < 1:
        raise ValueError(f"weight must have at least one tap, got {tuple(weight.shape)}")
    check_documents(cu_seqlens, x.shape[0] * x.shape[1])
    num = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        wanted = (num, x.shape[2], weight.shape[1] - 1)
        if tuple(initial_state.shape) != wanted or initial_state.dtype != x.dtype:
            raise ValueError(
                f"initial_state must be {wanted} {x.dtype}, got {tuple(initial_state.shape)} {initial_state.dtype}"
            )


def _layout(x_BTC: Tensor, width: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where things lie once every sequence has its W-1 initial inputs in front of it.

    Returns the row of each of the B*T tokens, the row behind each sequence's last token [N], and which tokens belong
    to a sequence.
    """
    batch, length, _ = x_BTC.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=x_BTC.device) * length
    tokens = torch.arange(batch * length, device=x_BTC.device)
    ends = cu_seqlens[1:].long()
    sequence = torch.searchsorted(ends, tokens, right=True).clamp(max=ends.shape[0] - 1)
    numbers = torch.arange(1, ends.shape[0] + 1, device=x_BTC.device)
    return tokens + (sequence + 1) * (width - 1), ends + numbers * (width - 1), tokens < cu_seqlens[-1]


def _extend(
    x_BTC: Tensor, initial_state: Tensor | None, width: int, rows: Tensor, ends: Tensor, inside: Tensor
) -> Tensor:
    """The inputs in that layout: [B*T + N*(W-1), C] in the arithmetic's dtype."""
    x = x_BTC.flatten(0, 1).to(wide(x_BTC.dtype)).masked_fill(~inside[:, None], 0)
    extended = x.new_zeros(x.shape[0] + ends.shape[0] * (width - 1), x.shape[1])
    extended[rows] = x
    if initial_state is not None:
        extended[_initial_rows(ends, width)] = initial_state.mT.to(x.dtype)
    return extended


def _initial_rows(ends: Tensor, width: int) -> Tensor:
    """Rows [N, W-1] of the initial inputs: behind the sequence before."""
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return starts[:, None] + torch.arange(width - 1, device=ends.device)


def _sums(extended: Tensor, weight_CW: Tensor) -> Tensor:
    """The convolution before its activation, at every row: those of the initial inputs come out meaningless."""
    last, weight = weight_CW.shape[1] - 1, weight_CW.to(extended.dtype)
    total = extended * weight[:, last]
    for back in range(1, last + 1):
        total[back:].addcmul_(extended[:-back], weight[:, last - back])
    return total


def _forward(x_BTC: Tensor, weight_CW: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Outputs:
    width = weight_CW.shape[1]
    rows, ends, inside = _layout(x_BTC, width, cu_seqlens)
    extended = _extend(x_BTC, initial_state, width, rows, ends, inside)
    # A token outside every sequence still sees the last one's inputs through its taps.
    y = torch.nn.functional.silu(_sums(extended, weight_CW)[rows]).masked_fill_(~inside[:, None], 0)
    state = extended[_final_rows(ends, width)].mT
    return y.to(x_BTC.dtype).view(x_BTC.shape), state.to(x_BTC.dtype).contiguous()


def _backward(
    dy_BTC: Tensor | None,
    dstate: Tensor | None,
    x_BTC: Tensor,
    weight_CW: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Outputs:
    width = weight_CW.shape[1]
    rows, ends, inside = _layout(x_BTC, width, cu_seqlens)
    extended = _extend(x_BTC, initial_state, width, rows, ends, inside)
    if dy_BTC is None:
        dextended, dweight = torch.zeros_like(extended), torch.zeros_like(weight_CW)
    else:
        dsums = torch.zeros_like(extended)
        dsums[rows] = _silu_backward(dy_BTC, _sums(extended, weight_CW)[rows], inside)
        dextended, dweight = _sums_backward(dsums, extended, weight_CW)
    if dstate is not None:
        dextended[_final_rows(ends, width)] += dstate.mT.to(dextended.dtype)
    dx = dextended[rows].to(x_BTC.dtype).view(x_BTC.shape)
    if initial_state is None:
        return dx, dweight, x_BTC.new_empty(0)
    return dx, dweight, dextended[_initial_rows(ends, width)].mT.to(initial_state.dtype).contiguous()


def _final_rows(ends: Tensor, width: int) -> Tensor:
    """Rows [N, W-1] of each sequence's last inputs."""
    return ends[:, None] - torch.arange(width - 1, 0, -1, device=ends.device)


def _silu_backward(dy_BTC: Tensor, total: Tensor, inside: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(total)
    dtotal = dy_BTC.flatten(0, 1).to(total.dtype) * sigmoid * (1 + total * (1 - sigmoid))
    return dtotal.masked_fill_(~inside[:, None], 0)


def _sums_backward(dsums: Tensor, extended: Tensor, weight_CW: Tensor) -> tuple[Tensor, Tensor]:
    last, weight = weight_CW.shape[1] - 1, weight_CW.to(dsums.dtype)
    dextended, dtaps = dsums * weight[:, last], [(dsums * extended).sum(0)]
    for back in range(1, last + 1):
        dextended[:-back].addcmul_(dsums[back:], weight[:, last - back])
        dtaps.append((dsums[back:] * extended[:-back]).sum(0))
    return dextended, torch.stack(dtaps[::-1], 1).to(weight_CW.dtype)


def _fake_forward(x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Outputs:
    num = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(num, x.shape[2], weight.shape[1] - 1)


def _fake_backward(
    dy: Tensor | None,
    dstate: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Outputs:
    dinitial = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dinitial


_backward_op = define(
    "causal_conv_backward",
    "(Tensor? dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_fake_backward,
    kernel="causal_conv:backward",
)
_causal_conv_backward = gradient(_backward_op)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_op(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None and dstate is None:
        return (None,) * 5
    tensors = ctx.saved_tensors  # read once: checkpointing allows no more
    dx, dweight, dinitial = _causal_conv_backward(dy, dstate, *tensors, ctx.impl)
    return dx, dweight, None if tensors[2] is None else dinitial, None, None


_forward_op = define(
    "causal_conv",
    "(Tensor x, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens, str impl) -> (Tensor, Tensor)",
    reference=_forward,
    fake=_fake_forward,
    kernel="causal_conv:forward",
)
_causal_conv = differentiable(_forward_op, _setup_context, _backward_of_op, rows=("x", "initial_state"))

_qkv_backward_op = define(
    "causal_conv_qkv_backward",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? initial_state, "
    "Tensor? cu_seqlens, str impl) -> (Tensor, Tensor, Tensor)",
    reference=lambda dq, dk, dv, *rest: _backward(torch.cat([dq, dk, dv], -1), *rest),
    fake=lambda dq, dk, dv, *rest: _fake_backward(None, *rest),
    kernel="causal_conv:backward_of_parts",
)
_causal_conv_qkv_backward = gradient(_qkv_backward_op)


class _CausalConvQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.channels, ctx.impl = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        y, state = _forward_op(*tensors, ctx.impl)
        return *y.split(ctx.channels, -1), state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, initial, cu_seqlens = ctx.saved_tensors
        parts = [
            x.new_zeros(*x.shape[:2], size) if dy is None else dy
            for dy, size in zip(gradients[:3], ctx.channels, strict=True)
        ]
        dx, dweight, dinitial = _causal_conv_qkv_backward(
            *parts, gradients[3], x, weight, initial, cu_seqlens, ctx.impl
        )
        return dx, dweight, None if initial is None else dinitial, None, None, None


_causal_conv_qkv = composite(
    "causal_conv_qkv(Tensor x, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens, int[] channels, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _CausalConvQKV.apply,
)


_BY_ROWS = sharding.Split({"x": 0, "initial_state": 0}, (0, 0), ("x",), documents=False)
_BY_CHANNELS = sharding.Split({"x": 2, "weight": 0, "initial_state": 1}, (2, 1), ("x",))
_INPUTS = ("x", "weight", "initial_state")
sharding.register(_forward_op, (_BY_ROWS, _BY_CHANNELS))
sharding.register(
    _backward_op,
    (
        sharding.gradient_split(_BY_ROWS, _INPUTS, {"dy": 0, "dfinal_state": 0}),
        sharding.gradient_split(_BY_CHANNELS, _INPUTS, {"dy": 2, "dfinal_state": 1}),
    ),
    absent={2: "initial_state"},
)
sharding.register(
    _qkv_backward_op,
    (sharding.gradient_split(_BY_ROWS, _INPUTS, dict.fromkeys(("dq", "dk", "dv", "dfinal_state"), 0)),),
    absent={2: "initial_state"},
)
