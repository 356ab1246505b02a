"""The gated delta rule: a linear-attention state that decays, and is corrected towards each new value.

For every value head, with the state S [K, V] in fp32,

    S = exp(g_t) S;   u = beta_t (v_t - S^T k_t);   S = S + k_t u^T;   o_t = scale S^T q_t

(Yang, Kautz, Hatamizadeh 2024, Gated Delta Networks; the decay comes before the error is taken.) Two ops compute it:
`gated_delta_rule` in chunks, for training and prefill, and `recurrent_gated_delta_rule` token by token, for decoding.
The arithmetic of the PyTorch reference is in `q3n_functional.ops.reference_gated_delta_rule`.

Letters: B batch, T time, H value heads, N key heads, K key dim, V value dim, C chunk; S sequences (the rows, or the
documents of `cu_seqlens`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from q3n_functional.ops import reference_gated_delta_rule as reference
from q3n_functional.ops import sharding
from q3n_functional.ops.chunks import saved_shapes
from q3n_functional.ops.registration import Impl, Outputs, check_documents, define, differentiable, gradient, wide


def gated_delta_rule(
    q_BTNK: Tensor,
    k_BTNK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_scale: float = 0.0,
    chunk_size: int = 64,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The rule over whole sequences, in chunks of `chunk_size` tokens.

    q, k: [B, T, N, K]; v: [B, T, H, V] of the same dtype; value head h reads key head h // (H // N).
    g: [B, T, H], the log-decay, at most 0; or, with `A_log` and `dt_bias` [H], the projection `a` from which it is
    made here: g = -exp(A_log) softplus(a + dt_bias).
    beta: [B, T, H] in [0, 2]; or, with `beta_scale` 1 or 2, its logits: beta = beta_scale sigmoid(logits).
    initial_state: [S, H, K, V] fp32 (fp64 with fp64 inputs), zeros where None.
    cu_seqlens: int32 [S+1], see `q3n_functional.packing`; None makes each row a sequence (S = B).
    scale: of the queries, K ** -0.5 where None. qk_l2norm: x / sqrt(sum(x^2) + 1e-6) on q and k first.

    Returns o [B, T, H, V] in v's dtype and the final state [S, H, K, V]; both carry gradients, to the initial state
    too. Tokens after cu_seqlens[-1] give zeros, in gradients as well. Saved for backward: the inputs, vectors of
    the gates (28 bytes a token and head) and a row of the inverse (C elements of v's dtype a token and head).

    Raises ValueError for shapes or dtypes that do not fit. Second derivatives and forward mode are not implemented.
    """
    _check(q_BTNK, k_BTNK, v_BTHV, g_BTH, beta_BTH, initial_state, cu_seqlens, A_log, dt_bias)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}; 64 suits most sizes")
    scale = q_BTNK.shape[-1] ** -0.5 if scale is None else scale
    tensors = (q_BTNK, k_BTNK, v_BTHV, g_BTH, beta_BTH, A_log, dt_bias, initial_state, cu_seqlens)
    o, state, _, _ = _chunked(*tensors, scale, qk_l2norm, beta_scale, chunk_size, impl)
    return o, state


def recurrent_gated_delta_rule(
    q_BTNK: Tensor,
    k_BTNK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_scale: float = 0.0,
    every_state: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` one token after the other: for one or a few tokens a sequence, as in decoding.

    Arguments, results and errors are those of `gated_delta_rule`. Its gradient is computed in chunks of 64.

    every_state: the second result is the state behind every token, [B, T, H, K, V], for tokens that may be taken back.
    That is for rows, not `cu_seqlens`, and has no gradient.
    """
    _check(q_BTNK, k_BTNK, v_BTHV, g_BTH, beta_BTH, initial_state, cu_seqlens, A_log, dt_bias)
    scale = q_BTNK.shape[-1] ** -0.5 if scale is None else scale
    tensors = (q_BTNK, k_BTNK, v_BTHV, g_BTH, beta_BTH, A_log, dt_bias, initial_state)
    scalars = (scale, qk_l2norm, beta_scale, impl)
    if every_state and cu_seqlens is not None:
        raise ValueError("the state behind every token is given for rows: every_state takes no cu_seqlens")
    o, state = _every_state(*tensors, *scalars) if every_state else _recurrent(*tensors, cu_seqlens, *scalars)
    return o, state


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q and k must be [B, T, N, K] and v [B, T, H, V], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"{v.shape[2]} value heads are not a multiple of {q.shape[2]} key heads")
    if g.shape != v.shape[:3] or beta.shape != v.shape[:3]:
        raise ValueError(f"g and beta must be {tuple(v.shape[:3])}, got {tuple(g.shape)} and {tuple(beta.shape)}")
    _check_state(q, v, initial_state, cu_seqlens)
    for name, leaf in (("A_log", A_log), ("dt_bias", dt_bias)):
        if (leaf is None) != (A_log is None) or (leaf is not None and leaf.shape != v.shape[2:3]):
            raise ValueError(
                f"A_log and dt_bias must both be given, as ({v.shape[2]},), or neither; "
                f"{name} is {None if leaf is None else tuple(leaf.shape)}"
            )


def _check_state(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check_documents(cu_seqlens, q.shape[0] * q.shape[1])
    if initial_state is None:
        return
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wanted, dtype = (num, v.shape[2], q.shape[3], v.shape[3]), wide(v.dtype)
    if tuple(initial_state.shape) != wanted or initial_state.dtype != dtype:
        raise ValueError(
            f"initial_state must be {wanted} {dtype}, got {tuple(initial_state.shape)} {initial_state.dtype}"
        )


_ROW_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state"
)
_TENSORS = f"{_ROW_TENSORS}, Tensor? cu_seqlens"
_SCALARS = "float scale, bool qk_l2norm, float beta_scale"


def _fake_recurrent(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    cu_seqlens = rest[5]
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_empty(num, v.shape[2], q.shape[3], v.shape[3], dtype=wide(v.dtype))
    return v.new_empty(v.shape), state


def _fake_every_state(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    states = v.new_empty(*v.shape[:3], q.shape[3], v.shape[3], dtype=wide(v.dtype))
    return v.new_empty(v.shape), states


def _fake_chunked(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Outputs:
    chunk_size, dtype = rest[-1], wide(v.dtype)
    gates, inverse = saved_shapes(v, rest[5], chunk_size)
    return (
        *_fake_recurrent(q, k, v, *rest),
        v.new_empty(gates, dtype=dtype),
        v.new_empty(inverse, dtype=v.dtype if v.device.type == "cuda" else dtype),
    )


def _fake_backward(do: Tensor | None, dstate: Tensor | None, *rest: Any) -> Outputs:
    inputs, q = rest[:8], rest[0]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


_chunked_op = define(
    "gated_delta_rule",
    f"({_TENSORS}, {_SCALARS}, int chunk_size, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake_chunked,
    kernel="gated_delta_rule:forward",
)
_backward_op = define(
    "gated_delta_rule_backward",
    f"(Tensor? do, Tensor? dfinal_state, {_TENSORS}, Tensor gates, Tensor inverse, {_SCALARS}, int chunk_size, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
    kernel="gated_delta_rule:backward",
)
_backward = gradient(_backward_op)


def _input_gradients(inputs: tuple[Tensor | None, ...], gradients: Outputs) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else dx for x, dx in zip(inputs[:8], gradients, strict=True))


def _chunked_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9], *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.scalars = inputs[9:]


def _chunked_backward(ctx: Any, do: Tensor | None, dstate: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if do is None and dstate is None:
        return (None,) * 14
    tensors = ctx.saved_tensors  # read once: checkpointing allows no more
    gradients = _backward(do, dstate, *tensors, *ctx.scalars)
    return (*_input_gradients(tensors, gradients), None, *(None for _ in ctx.scalars))


_ROWS = ("q", "k", "v", "g", "beta", "initial_state")
_chunked = differentiable(_chunked_op, _chunked_context, _chunked_backward, rows=_ROWS)


def _recurrent_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9])
    *ctx.scalars, ctx.impl = inputs[9:]


def _recurrent_backward(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None and dstate is None:
        return (None,) * 13
    tensors, chunked = ctx.saved_tensors, (*ctx.scalars, 64, ctx.impl)
    _, _, gates, inverse = _chunked(*tensors, *chunked)
    gradients = _backward(do, dstate, *tensors, gates, inverse, *chunked)
    return (*_input_gradients(tensors, gradients), None, None, None, None, None)


_recurrent_op = define(
    "recurrent_gated_delta_rule",
    f"({_TENSORS}, {_SCALARS}, str impl) -> (Tensor, Tensor)",
    reference=reference.recurrent,
    fake=_fake_recurrent,
    kernel="recurrent_gated_delta_rule:recurrent_forward",
)
_recurrent = differentiable(_recurrent_op, _recurrent_context, _recurrent_backward, rows=_ROWS)


def _every_state_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("recurrent_gated_delta_rule has no gradient with every_state: take the last state alone")


_every_state_op = define(
    "recurrent_gated_delta_rule_every_state",
    f"({_ROW_TENSORS}, {_SCALARS}, str impl) -> (Tensor, Tensor)",
    reference=reference.recurrent_every_state,
    fake=_fake_every_state,
    kernel="recurrent_gated_delta_rule:recurrent_every_state",
)
_every_state = differentiable(_every_state_op, lambda *unused: None, _every_state_backward, rows=_ROWS)

_INPUTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
_BY_ROWS = sharding.Split(dict.fromkeys(_ROWS, 0), (0, 0), ("q",), documents=False)
_BY_HEADS = sharding.Split(
    {**dict.fromkeys(_ROWS, 2), "A_log": 0, "dt_bias": 0, "initial_state": 1}, (2, 1), ("q", "v")
)
sharding.register(_recurrent_op, (_BY_ROWS, _BY_HEADS))
sharding.register(_every_state_op, (_BY_ROWS, _BY_HEADS._replace(outputs=(2, 2))))
sharding.register(_chunked_op, (_BY_ROWS._replace(outputs=(0, 0, 0, 0)), _BY_HEADS._replace(outputs=(2, 1, 1, 1))))
sharding.register(
    _backward_op,
    (
        sharding.gradient_split(_BY_ROWS, _INPUTS, {"do": 0, "dfinal_state": 0, "gates": 0, "inverse": 0}),
        sharding.gradient_split(_BY_HEADS, _INPUTS, {"do": 2, "dfinal_state": 1, "gates": 1, "inverse": 1}),
    ),
    absent={5: "A_log", 6: "dt_bias", 7: "initial_state"},
)
