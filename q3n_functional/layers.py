"""The layers of Qwen3-Next as functions of their parameters.

Letters: B batch, T time, D model width, H query or value heads, G key/value heads,
N key heads of linear attention, K head dim, V value dim, R half of the rotated dims.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from q3n_functional import packing, params, rotary
from q3n_functional.cache import KeyValues, LinearState, State, Tentative
from q3n_functional.config import Config
from q3n_functional.feed_forward import RouterStatistics, mixture_of_experts, swiglu
from q3n_functional.float8 import Float8, projection
from q3n_functional.ops import (
    attention,
    causal_conv_qkv,
    gated_delta_rule,
    pre_norm,
    recurrent_gated_delta_rule,
    rms_norm_gated,
)
from q3n_functional.ops.registration import wide
from q3n_functional.ops.rms_norm import rms_norm
from q3n_functional.packing import Documents
from q3n_functional.parallel.context import (
    Crossing,
    carried_inputs,
    carried_rule,
    crossing,
    crossing_attention,
    piece,
)
from q3n_functional.parallel.placement import Parallel, enter_block, leave_block, own_groups


class Context(NamedTuple):
    """What every layer of one batch shares.

    documents: None where each row is one. cos_BTR, sin_BTR: of the rotated dims, fp32. valid_BT: which tokens the
    router's statistics count, None for all. lengths_N: int32, the tokens in the cache's rows, and slots: where it takes
    each token's keys and values, None without a cache. tentative: whether linear layers return a `Tentative` state.
    fresh: whether the cache has nothing yet, so that tokens see one another alone. parallel: the rank's place on a
    mesh, and crossing: how documents reach over the ends of its piece of the rows. float8: which products are in
    float8.
    """

    documents: Documents | None
    cos_BTR: Tensor
    sin_BTR: Tensor
    valid_BT: Tensor | None
    lengths_N: Tensor | None = None
    slots: Slots | None = None
    tentative: bool = False
    fresh: bool = False
    parallel: Parallel | None = None
    crossing: Crossing | None = None
    float8: Float8 = "none"


class Slots(NamedTuple):
    """Where a cache takes keys and values: row and position of every token, and which token to write there.

    rows_BT, positions_BT: int64. tokens_BT: the token's index in the flattened batch; None where each is its own. A
    token that is padding repeats another's entry, or has index -1 and leaves its place alone.
    """

    rows_BT: Tensor
    positions_BT: Tensor
    tokens_BT: Tensor | None = None


def context(
    tokens_BT: Tensor,
    documents: Documents | None,
    lengths_N: Tensor | None,
    config: Config,
    tentative: bool = False,
) -> Context:
    """The `Context` of a batch, packed or padded with `documents`.

    With `lengths_N`, the tokens in a cache, the batch continues its sequences: row b, or document n.
    """
    if documents is not None:
        if documents.positions_BT.shape != tokens_BT.shape:
            raise ValueError(
                f"documents lie in a batch of shape {tuple(documents.positions_BT.shape)}, but tokens have "
                f"{tuple(tokens_BT.shape)}; make them with the tokens' batch and length"
            )
        positions, totals = documents.positions_BT, packing.lengths(documents)
        slots = None
        if lengths_N is not None:
            rows, before = _rows(documents, lengths_N)
            positions, totals = positions + before, totals + before
            slots = _packed_slots(documents, rows, positions)
    else:
        positions, totals, slots = _row_positions(tokens_BT, lengths_N)
    cos, sin = rotary.cos_sin(
        positions, totals, config.head_dim, config.max_position_embeddings, config.rope_parameters
    )
    valid = None if documents is None else documents.valid_BT
    return Context(documents, cos, sin, valid, lengths_N, slots, tentative)


def on_ranks(shared: Context, tokens_BT: Tensor, parallel: Parallel | None, *, config: Config) -> Context:
    """The `Context` of the rank's piece of the rows that `shared` describes whole."""
    if parallel is None:
        return shared
    if parallel.cp.size == 1:
        return shared._replace(parallel=parallel)
    documents, across = crossing(shared.documents, tokens_BT, config.linear_conv_kernel_dim, parallel)
    return Context(
        documents,
        piece(shared.cos_BTR, parallel),
        piece(shared.sin_BTR, parallel),
        None if shared.valid_BT is None else piece(shared.valid_BT, parallel),
        parallel=parallel,
        crossing=across,
        float8=shared.float8,
    )


def _row_positions(tokens_BT: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor, Slots | None]:
    positions = torch.arange(tokens_BT.shape[1], dtype=torch.int32, device=tokens_BT.device).expand(tokens_BT.shape)
    if lengths_B is None:
        return positions, positions[:, -1:] + 1, None
    positions = positions + lengths_B[:, None]
    rows = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)[:, None].expand(tokens_BT.shape)
    return positions, positions[:, -1:] + 1, Slots(rows, positions.long())


def _rows(documents: Documents, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's row of the cache and the tokens already in that row; of the last row on padding."""
    rows_BT = documents.segment_ids_BT.clamp(max=lengths_N.shape[0] - 1).long()
    return rows_BT, lengths_N[rows_BT]


def _packed_slots(documents: Documents, rows_BT: Tensor, positions_BT: Tensor) -> Slots:
    # Padding writes the last valid token's entry once more: equal values need no order.
    tokens = torch.arange(rows_BT.numel(), device=rows_BT.device).view(rows_BT.shape)
    tokens = torch.minimum(tokens, documents.cu_seqlens[-1] - 1)
    rows, positions = (x.flatten()[tokens].long() for x in (rows_BT, positions_BT))
    return Slots(rows, positions.where(tokens >= 0, 0), tokens)


def gated_delta_net(
    p: params.LinearAttention, x_BTD: Tensor, context: Context, state: LinearState | None, *, config: Config
) -> tuple[Tensor, LinearState | Tentative]:
    """Linear attention: projections, short convolution, gated delta rule, gated norm (Yang et al. 2024).

    `state` is what the sequences left behind before these tokens, zeros where None. Returns [B, T, D] and the state
    behind the last token of every sequence.
    """
    qkv_BTC = _qkv(p, x_BTD, context)
    a_BTH, b_BTH = linear(x_BTD, torch.cat([p.a, p.b])).chunk(2, -1)
    o_BTHV, new = _delta_rule(p, qkv_BTC, a_BTH, b_BTH, context, state, config)
    z_BTHV = _heads(projection(x_BTD, p.z, context.float8), config.linear_value_head_dim)
    gated_BTC = rms_norm_gated(o_BTHV, z_BTHV, p.norm, config.rms_norm_eps).flatten(2)
    y_BTD = projection(gated_BTC, p.out, context.float8)
    return y_BTD, Tentative(state, qkv_BTC, new.recurrent) if context.tentative and state is not None else new


def _qkv(p: params.LinearAttention, x_BTD: Tensor, context: Context) -> Tensor:
    """[B, T, C]: one product for many tokens; for a decoding step's few, joining the matrices takes longer."""
    if x_BTD.shape[1] > 1 and not context.tentative:
        return projection(x_BTD, torch.cat([p.q, p.k, p.v]), context.float8)
    return torch.cat([projection(x_BTD, w, context.float8) for w in (p.q, p.k, p.v)], -1)


def _delta_rule(
    p: params.LinearAttention,
    qkv_BTC: Tensor,
    a_BTH: Tensor,
    b_BTH: Tensor,
    context: Context,
    state: LinearState | None,
    c: Config,
) -> tuple[Tensor, LinearState]:
    """The convolution and the rule behind it: output [B, T, H, V] and the state behind the tokens.

    Of tentative tokens, the recurrent state behind each: [B, T, H, K, V].
    """
    cu_seqlens = None if context.documents is None else context.documents.cu_seqlens
    inputs, carry = None if state is None else state.conv, _passed_on(context)
    if carry is not None:
        inputs = carried_inputs(qkv_BTC, *carry)
    weight_CW, channels = torch.cat([p.conv_q, p.conv_k, p.conv_v]), (len(p.q), len(p.k), len(p.v))
    q, k, v, conv = causal_conv_qkv(qkv_BTC, weight_CW, channels, inputs, cu_seqlens)
    q_BTNK, k_BTNK = (_heads(x, c.linear_key_head_dim) for x in (q, k))
    beta, beta_scale = b_BTH, 1.0
    if c.linear_attention_clip_val < 1:
        beta, beta_scale = torch.sigmoid(beta.to(wide(beta.dtype))).clamp(0, c.linear_attention_clip_val), 0.0
    before = None if state is None else state.recurrent.to(wide(v.dtype))
    rule: Callable[..., tuple[Tensor, Tensor]] = recurrent_gated_delta_rule
    if context.tentative:
        rule = functools.partial(rule, every_state=True)
    elif not (c.linear_attention_use_recurrent or v.shape[1] == 1):
        rule = functools.partial(gated_delta_rule, chunk_size=c.linear_attention_chunk_size)

    def ruled(v_BTHV: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        return rule(
            q_BTNK, k_BTNK, v_BTHV, a_BTH, beta, before, cu_seqlens,
            qk_l2norm=True, A_log=p.A_log, dt_bias=p.dt_bias, beta_scale=beta_scale,
        )  # fmt: skip

    v_BTHV = _heads(v, c.linear_value_head_dim)
    o_BTHV, after = ruled(v_BTHV, before) if carry is None else carried_rule(ruled, v_BTHV, q_BTNK.shape[3], *carry)
    return o_BTHV, LinearState(conv, after if state is None else after.to(state.recurrent.dtype))


def _passed_on(context: Context) -> tuple[int, Crossing, Parallel] | None:
    """The number of sequences and how their state comes from other ranks, None where it does not."""
    if context.crossing is None or context.parallel is None or context.documents is None:
        return None
    return context.documents.cu_seqlens.shape[0] - 1, context.crossing, context.parallel


def accept(state: Tentative, counts_B: Tensor) -> LinearState:
    """The state behind the first `counts_B` of the tentative tokens of each sequence: nothing is computed again."""
    before, rows_B = state.before, torch.arange(len(counts_B), device=counts_B.device)
    after_BHKV = state.after_BTHKV[rows_B, (counts_B - 1).clamp(min=0)]
    recurrent = torch.where((counts_B > 0)[:, None, None, None], after_BHKV, before.recurrent)
    inputs_BCT = torch.cat([before.conv, state.qkv_BTC.mT], -1)
    last_BW = counts_B.long()[:, None] + torch.arange(before.conv.shape[2], device=counts_B.device)
    conv = inputs_BCT.gather(2, last_BW[:, None].expand(-1, inputs_BCT.shape[1], -1))
    return LinearState(conv, recurrent)


def _heads(x_BTC: Tensor, dim: int) -> Tensor:
    return x_BTC.view(*x_BTC.shape[:2], x_BTC.shape[2] // dim, dim)


def gated_attention(
    p: params.FullAttention, x_BTD: Tensor, context: Context, state: KeyValues | None, *, config: Config
) -> tuple[Tensor, KeyValues]:
    """Causal softmax attention with normalised, partly rotated queries and keys, and a sigmoid gate on its output.

    `state` holds the keys and values of earlier tokens; the result's holds these tokens' too.
    """
    k_GD, v_GD = (own_groups(w, config, context.parallel) for w in (p.k, p.v))
    projected = [projection(x_BTD, w, context.float8) for w in (p.q, p.gate, k_GD, v_GD)]
    q_BTHK, gate_BTHK, k_BTGK, v_BTGK = (_heads(x, config.head_dim) for x in projected)
    q_BTHK = _rotated(q_BTHK, p.q_norm, context, config)
    k_BTGK = _rotated(k_BTGK, p.k_norm, context, config)
    kept = KeyValues(k_BTGK, v_BTGK)
    if state is not None and context.slots is not None:
        kept = KeyValues(*(_written(old, new, context.slots) for old, new in zip(state, kept, strict=True)))
    cu_seqlens = None if context.documents is None else context.documents.cu_seqlens
    if context.crossing is not None and context.parallel is not None:
        o_BTHK = crossing_attention(q_BTHK, k_BTGK, v_BTGK, context.crossing, context.parallel)
    elif state is None or context.fresh:
        o_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, cu_seqlens)
    else:
        o_BTHK = attention(q_BTHK, *kept, cu_seqlens, context.lengths_N)
    y_BTQ = (o_BTHK * torch.sigmoid(gate_BTHK)).flatten(2)
    return projection(y_BTQ, p.out, context.float8), kept


def _rotated(x_BTHK: Tensor, weight_K: Tensor, context: Context, config: Config) -> Tensor:
    return rotary.rotate(rms_norm(x_BTHK, weight_K, config.rms_norm_eps), context.cos_BTR, context.sin_BTR)


def _written(cached_NSGK: Tensor, new_BTGK: Tensor, slots: Slots) -> Tensor:
    if slots.tokens_BT is not None:
        old = cached_NSGK[slots.rows_BT, slots.positions_BT]
        new_BTGK = torch.where(slots.tokens_BT[..., None, None] >= 0, new_BTGK.flatten(0, 1)[slots.tokens_BT], old)
    return cached_NSGK.index_put((slots.rows_BT, slots.positions_BT), new_BTGK)


def decoder_layer(
    p: params.DecoderLayer,
    x_BTD: Tensor,
    context: Context,
    state: State | None,
    *,
    config: Config,
) -> tuple[Tensor, State, RouterStatistics | None]:
    """Mixer, then feed-forward, each on the normalised residual. The statistics are None for a dense layer."""
    parallel = context.parallel
    x_BTD, normed = pre_norm(x_BTD, p.input_layernorm, config.rms_norm_eps)
    mixed_BTD, new_state = _mixer(p.mixer, enter_block(normed, parallel), context, state, config)
    x_BTD, normed = pre_norm(x_BTD + leave_block(mixed_BTD, parallel), p.post_attention_layernorm, config.rms_norm_eps)
    normed = enter_block(normed, parallel)
    if isinstance(p.mlp, params.SwiGLU):
        return x_BTD + leave_block(swiglu(p.mlp, normed, context.float8), parallel), new_state, None
    y_BTD, statistics = mixture_of_experts(
        p.mlp, normed, context.valid_BT, parallel, config=config, float8=context.float8
    )
    return x_BTD + leave_block(y_BTD, parallel), new_state, statistics


def _mixer(
    p: params.LinearAttention | params.FullAttention,
    x_BTD: Tensor,
    context: Context,
    state: State | None,
    config: Config,
) -> tuple[Tensor, State]:
    if isinstance(p, params.LinearAttention):
        assert state is None or isinstance(state, LinearState)
        return gated_delta_net(p, x_BTD, context, state, config=config)
    assert state is None or isinstance(state, KeyValues)
    return gated_attention(p, x_BTD, context, state, config=config)
