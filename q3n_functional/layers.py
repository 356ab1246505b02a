"""The layers of Qwen3-Next as functions of their parameters.

Letters: B batch, T time, D model width, S keys that a query may see, H query or value heads, G key/value heads,
N key heads of linear attention, K head dim, V value dim, R half of the rotated dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from q3n_functional import packing, params, rotary
from q3n_functional.cache import KeyValues, LinearState
from q3n_functional.config import Config
from q3n_functional.feed_forward import RouterStatistics, mixture_of_experts, swiglu
from q3n_functional.ops import causal_conv, gated_delta_rule, recurrent_gated_delta_rule, rms_norm_gated
from q3n_functional.ops.registration import wide
from q3n_functional.packing import Documents


class Context(NamedTuple):
    """What every layer of one batch shares.

    documents: None where each row is one. cos_BTR, sin_BTR: of the rotated dims, fp32. mask_BTS: which keys each query
    sees, None for the plain causal triangle. valid_BT: which tokens the router's statistics count, None for all.
    positions_BT: where the cache takes new keys and values, None without a cache.
    """

    documents: Documents | None
    cos_BTR: Tensor
    sin_BTR: Tensor
    mask_BTS: Tensor | None
    valid_BT: Tensor | None
    positions_BT: Tensor | None


def context(
    tokens_BT: Tensor, documents: Documents | None, lengths_B: Tensor | None, capacity: int, config: Config
) -> Context:
    """The `Context` of a batch: packed or padded with `documents`, continuing sequences with `lengths_B` [B]."""
    if documents is not None:
        if documents.positions_BT.shape != tokens_BT.shape:
            raise ValueError(
                f"documents lie in a batch of shape {tuple(documents.positions_BT.shape)}, but tokens have "
                f"{tuple(tokens_BT.shape)}; make them with the tokens' batch and length"
            )
        positions, totals = documents.positions_BT, packing.lengths(documents)
        mask: Tensor | None = _document_mask(documents)
    else:
        positions, totals, mask = _row_positions(tokens_BT, lengths_B, capacity)
    cos, sin = rotary.cos_sin(
        positions, totals, config.head_dim, config.max_position_embeddings, config.rope_parameters
    )
    valid = None if documents is None else documents.valid_BT
    return Context(documents, cos, sin, mask, valid, None if lengths_B is None else positions)


def _row_positions(tokens_BT: Tensor, lengths_B: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor | None]:
    positions = torch.arange(tokens_BT.shape[1], dtype=torch.int32, device=tokens_BT.device).expand(tokens_BT.shape)
    if lengths_B is None:
        return positions, positions[:, -1:] + 1, None
    positions = positions + lengths_B[:, None]
    return positions, positions[:, -1:] + 1, _cache_mask(positions, capacity)


def _document_mask(documents: Documents) -> Tensor:
    segments, length = documents.segment_ids_BT, documents.segment_ids_BT.shape[1]
    time = torch.arange(length, device=segments.device)
    return (segments[:, :, None] == segments[:, None, :]) & (time[:, None] >= time)


def _cache_mask(positions_BT: Tensor, capacity: int) -> Tensor:
    return torch.arange(capacity, device=positions_BT.device) <= positions_BT[:, :, None]


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (1 + weight)` over the last dim, in fp32; the weight is stored around zero."""
    x = x_BTD.to(wide(x_BTD.dtype))
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight_D.to(x.dtype))).to(x_BTD.dtype)


def gated_delta_net(
    p: params.LinearAttention, x_BTD: Tensor, context: Context, state: LinearState | None, *, config: Config
) -> tuple[Tensor, LinearState]:
    """Linear attention: projections, short convolution, gated delta rule, gated norm (Yang et al. 2024).

    `state` is what the sequences left behind before these tokens, zeros where None. Returns [B, T, D] and the state
    behind the last token of every sequence.
    """
    c, cu_seqlens = config, None if context.documents is None else context.documents.cu_seqlens
    qkv_BTC = linear(x_BTD, torch.cat([p.q, p.k, p.v]))
    taps = torch.cat([p.conv_q, p.conv_k, p.conv_v])
    qkv_BTC, conv = causal_conv(qkv_BTC, taps, None if state is None else state.conv, cu_seqlens)
    q, k, v = qkv_BTC.split([p.q.shape[0], p.k.shape[0], p.v.shape[0]], dim=-1)
    q_BTNK, k_BTNK = (_heads(x, c.linear_key_head_dim) for x in (q, k))
    o_BTHV, recurrent = _delta_rule(p, x_BTD, q_BTNK, k_BTNK, _heads(v, c.linear_value_head_dim), cu_seqlens, state, c)
    z_BTHV = _heads(linear(x_BTD, p.z), c.linear_value_head_dim)
    y = rms_norm_gated(o_BTHV, z_BTHV, p.norm, c.rms_norm_eps)
    return linear(y.flatten(2), p.out), LinearState(conv, recurrent)


def _delta_rule(
    p: params.LinearAttention,
    x_BTD: Tensor,
    q_BTNK: Tensor,
    k_BTNK: Tensor,
    v_BTHV: Tensor,
    cu_seqlens: Tensor | None,
    state: LinearState | None,
    c: Config,
) -> tuple[Tensor, Tensor]:
    a, beta, beta_scale = linear(x_BTD, p.a), linear(x_BTD, p.b), 1.0
    if c.linear_attention_clip_val < 1:
        beta, beta_scale = torch.sigmoid(beta.to(wide(beta.dtype))).clamp(0, c.linear_attention_clip_val), 0.0
    inputs = (q_BTNK, k_BTNK, v_BTHV, a, beta, None if state is None else state.recurrent, cu_seqlens)
    if c.linear_attention_use_recurrent or x_BTD.shape[1] == 1:
        return recurrent_gated_delta_rule(
            *inputs, qk_l2norm=True, A_log=p.A_log, dt_bias=p.dt_bias, beta_scale=beta_scale
        )
    return gated_delta_rule(
        *inputs,
        qk_l2norm=True,
        A_log=p.A_log,
        dt_bias=p.dt_bias,
        beta_scale=beta_scale,
        chunk_size=c.linear_attention_chunk_size,
    )


def _heads(x_BTC: Tensor, dim: int) -> Tensor:
    return x_BTC.view(*x_BTC.shape[:2], x_BTC.shape[2] // dim, dim)


def gated_attention(
    p: params.FullAttention, x_BTD: Tensor, context: Context, state: KeyValues | None, *, config: Config
) -> tuple[Tensor, KeyValues]:
    """Causal softmax attention with normalised, partly rotated queries and keys, and a sigmoid gate on its output.

    `state` holds the keys and values of earlier tokens; the result's holds these tokens' too.
    """
    q_BTHK, gate_BTHK, k_BTGK, v_BTGK = (_heads(linear(x_BTD, w), config.head_dim) for w in (p.q, p.gate, p.k, p.v))
    q_BTHK = _rotated(q_BTHK, p.q_norm, context, config)
    k_BTGK = _rotated(k_BTGK, p.k_norm, context, config)
    if state is not None and context.positions_BT is not None:
        k_BTGK = _written(state.k, k_BTGK, context.positions_BT)
        v_BTGK = _written(state.v, v_BTGK, context.positions_BT)
    mask = None if context.mask_BTS is None else context.mask_BTS[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    o_BHTK = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    y_BTQ = (o_BHTK.transpose(1, 2) * torch.sigmoid(gate_BTHK)).flatten(2)
    return linear(y_BTQ, p.out), KeyValues(k_BTGK, v_BTGK)


def _rotated(x_BTHK: Tensor, weight_K: Tensor, context: Context, config: Config) -> Tensor:
    return rotary.rotate(rms_norm(x_BTHK, weight_K, config.rms_norm_eps), context.cos_BTR, context.sin_BTR)


def _written(cached_BSGK: Tensor, new_BTGK: Tensor, positions_BT: Tensor) -> Tensor:
    index = positions_BT.long()[..., None, None].expand(-1, -1, *new_BTGK.shape[2:])
    return cached_BSGK.scatter(1, index, new_BTGK)


def decoder_layer(
    p: params.DecoderLayer,
    x_BTD: Tensor,
    context: Context,
    state: LinearState | KeyValues | None,
    *,
    config: Config,
) -> tuple[Tensor, LinearState | KeyValues, RouterStatistics | None]:
    """Mixer, then feed-forward, each on the normalised residual. The statistics are None for a dense layer."""
    normed = rms_norm(x_BTD, p.input_layernorm, config.rms_norm_eps)
    mixed_BTD, new_state = _mixer(p.mixer, normed, context, state, config)
    x_BTD = x_BTD + mixed_BTD
    normed = rms_norm(x_BTD, p.post_attention_layernorm, config.rms_norm_eps)
    if isinstance(p.mlp, params.SwiGLU):
        return x_BTD + swiglu(p.mlp, normed), new_state, None
    y_BTD, statistics = mixture_of_experts(p.mlp, normed, context.valid_BT, config=config)
    return x_BTD + y_BTD, new_state, statistics


def _mixer(
    p: params.LinearAttention | params.FullAttention,
    x_BTD: Tensor,
    context: Context,
    state: LinearState | KeyValues | None,
    config: Config,
) -> tuple[Tensor, LinearState | KeyValues]:
    if isinstance(p, params.LinearAttention):
        assert not isinstance(state, KeyValues)
        return gated_delta_net(p, x_BTD, context, state, config=config)
    assert not isinstance(state, LinearState)
    return gated_attention(p, x_BTD, context, state, config=config)
