"""Qwen3-Next: tokens to logits, and the training loss with its multi-token-prediction term.

Letters: B batch, T time, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from q3n_functional import cache as caches
from q3n_functional import layers
from q3n_functional.cache import Cache, State, Tentative
from q3n_functional.config import Config
from q3n_functional.feed_forward import RouterStatistics
from q3n_functional.layers import Context, context, decoder_layer, rms_norm
from q3n_functional.ops import linear_cross_entropy
from q3n_functional.packing import IGNORE, Documents, same_document, shift
from q3n_functional.params import LinearAttention, MultiTokenPrediction, Parameters


class Metrics(NamedTuple):
    """The parts of a loss, detached fp32 scalars. Cross-entropies are in nats a target."""

    cross_entropy: Tensor
    mtp_cross_entropy: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    num_targets: Tensor


def forward(params: Parameters, tokens_BT: Tensor, documents: Documents | None = None, *, config: Config) -> Tensor:
    """Logits [B, T, V] in the parameters' dtype; tokens_BT is int64 [B, T]."""
    h_BTD, _, _ = hidden_states(params, tokens_BT, documents, config=config)
    return linear(h_BTD, head(params))


def forward_cached(
    params: Parameters, tokens_BT: Tensor, cache: Cache, documents: Documents | None = None, *, config: Config
) -> tuple[Tensor, Cache]:
    """Logits [B, T, V] of tokens that continue the sequences of `cache`, and the cache behind them.

    Row b continues sequence b; with `documents`, document n continues sequence n, and an empty one leaves it as it is.
    `cache` must have room for the tokens; `q3n_functional.generate` checks that.
    """
    h_BTD, _, new_cache = hidden_states(params, tokens_BT, documents, cache, config=config)
    assert new_cache is not None
    return linear(h_BTD, head(params)), new_cache


def accept(params: Parameters, tentative: Cache, counts_B: Tensor, *, config: Config) -> Cache:
    """The cache behind the first `counts_B` (int32 [B], 0 to T) of each sequence's T tentative tokens.

    `tentative` is what `hidden_states(..., tentative=True)` returned. The cost is that of the linear layers' rule over
    T tokens: nothing else runs again.
    """
    states = tuple(
        layers.accept(cast(LinearAttention, p.mixer), state, counts_B, config=config)
        if isinstance(state, Tentative)
        else state
        for p, state in zip(params.layers, tentative.layers, strict=True)
    )
    return Cache(states, tentative.lengths_B + counts_B)


def head(params: Parameters) -> Tensor:
    """The output matrix [V, D]: the embedding where the head is tied."""
    return params.embed_tokens if isinstance(params.lm_head, tuple) else params.lm_head


def hidden_states(
    params: Parameters,
    tokens_BT: Tensor,
    documents: Documents | None = None,
    cache: Cache | None = None,
    *,
    config: Config,
    checkpoint_layers: bool = False,
    tentative: bool = False,
) -> tuple[Tensor, RouterStatistics, Cache | None]:
    """The normalised output of the last layer [B, T, D], the routers' statistics, and the cache behind the tokens.

    `checkpoint_layers` keeps only each layer's input for backward and computes the layer again there. With `tentative`
    the cache is one that `accept` cuts to the tokens that stay.
    """
    shared = _context(tokens_BT, documents, cache, config, tentative)
    h_BTD, statistics, states = _through_layers(params, tokens_BT, shared, cache, config, checkpoint_layers)
    return h_BTD, statistics, None if cache is None else _continued(cache, states, tokens_BT, documents, tentative)


def prefill(
    params: Parameters, tokens_BT: Tensor, documents: Documents, capacity: int, *, config: Config
) -> tuple[Tensor, Cache]:
    """Hidden states [B, T, D] of packed prompts, and the cache of all N of them with room for `capacity` tokens each.

    The same as `hidden_states` with an empty cache; but attention reads the packed tokens alone, not N rows of a cache.
    """
    shared = _context(tokens_BT, documents, None, config, False)
    h_BTD, _, states = _through_layers(params, tokens_BT, shared, None, config, False)
    lengths_N = documents.cu_seqlens.diff()
    return h_BTD, Cache(tuple(caches.unpacked(s, documents.cu_seqlens, capacity) for s in states), lengths_N)


def _through_layers(
    params: Parameters,
    tokens_BT: Tensor,
    shared: Context,
    cache: Cache | None,
    config: Config,
    checkpoint_layers: bool,
) -> tuple[Tensor, RouterStatistics, list[State]]:
    x_BTD, statistics, states = embedding(tokens_BT, params.embed_tokens), _no_statistics(params, config), []
    layer = functools.partial(decoder_layer, config=config)
    for i, p in enumerate(params.layers):
        state = None if cache is None else cache.layers[i]
        if checkpoint_layers:
            x_BTD, new_state, new = checkpoint(layer, p, x_BTD, shared, state, use_reentrant=False)
        else:
            x_BTD, new_state, new = layer(p, x_BTD, shared, state)
        statistics = _pooled(statistics, new)
        states.append(new_state)
    return rms_norm(x_BTD, params.norm, config.rms_norm_eps), statistics, states


def _context(
    tokens_BT: Tensor, documents: Documents | None, cache: Cache | None, config: Config, tentative: bool
) -> Context:
    if cache is None:
        return context(tokens_BT, documents, None, config)
    num, rows = len(cache.lengths_B), len(tokens_BT) if documents is None else len(documents.cu_seqlens) - 1
    if num != rows:
        raise ValueError(f"a cache of {num} sequences cannot be continued by {rows}: give each one row or document")
    if tentative and documents is not None:
        raise ValueError("tentative tokens lie in rows: documents cannot be given with them")
    return context(tokens_BT, documents, cache.lengths_B, config, tentative)


def _continued(
    cache: Cache, states: list[State], tokens_BT: Tensor, documents: Documents | None, tentative: bool
) -> Cache:
    if tentative:
        return Cache(tuple(states), cache.lengths_B)
    return Cache(
        tuple(states), cache.lengths_B + (tokens_BT.shape[1] if documents is None else documents.cu_seqlens.diff())
    )


def _no_statistics(params: Parameters, config: Config) -> RouterStatistics:
    zeros = params.norm.new_zeros(max(config.num_experts, 1), dtype=torch.float32)
    return RouterStatistics(zeros, zeros, zeros[0])


def _pooled(a: RouterStatistics, b: RouterStatistics | None) -> RouterStatistics:
    return a if b is None else RouterStatistics(*(x + y for x, y in zip(a, b, strict=True)))


def multi_token_prediction(
    p: MultiTokenPrediction,
    embed_tokens: Tensor,
    h_BTD: Tensor,
    tokens_BT: Tensor,
    documents: Documents | None = None,
    *,
    config: Config,
) -> tuple[Tensor, RouterStatistics | None]:
    """Hidden states [B, T, D] from which the shared head predicts the token after the next.

    At t it sees h_t and the embedding of token t+1 of the same document (DeepSeek-V3, section 2.2; names as in the
    published checkpoint). Where a document has no such token the result means nothing and is never a target.
    """
    shared = context(tokens_BT, documents, None, config)._replace(valid_BT=_has_next(tokens_BT, documents))
    e_BTD = rms_norm(
        embedding(shift(tokens_BT, documents, 1, 0), embed_tokens), p.pre_fc_norm_embedding, config.rms_norm_eps
    )
    h_BTD = rms_norm(h_BTD, p.pre_fc_norm_hidden, config.rms_norm_eps)
    x_BTD = linear(torch.cat([e_BTD, h_BTD], -1), p.fc)
    x_BTD, _, statistics = decoder_layer(p.layer, x_BTD, shared, None, config=config)
    return rms_norm(x_BTD, p.norm, config.rms_norm_eps), statistics


def _has_next(tokens_BT: Tensor, documents: Documents | None) -> Tensor:
    if documents is not None:
        return same_document(documents, 1)
    length = tokens_BT.shape[1]
    return (torch.arange(length, device=tokens_BT.device) < length - 1).expand(tokens_BT.shape)


def targets(
    tokens_BT: Tensor, documents: Documents | None = None, labels_BT: Tensor | None = None, *, by: int = 1
) -> Tensor:
    """The label `by` tokens later in the same document, IGNORE where there is none. Labels default to the tokens."""
    return shift(tokens_BT if labels_BT is None else labels_BT, documents, by, IGNORE)


def count_targets(tokens_BT: Tensor, documents: Documents | None = None, labels_BT: Tensor | None = None) -> Tensor:
    """fp32 [2]: how many targets the head and the prediction module have in this batch.

    Summed over micro-batches and given to `loss`, it makes their gradients add up to those of one large batch.
    """
    counts = [(targets(tokens_BT, documents, labels_BT, by=by) != IGNORE).sum() for by in (1, 2)]
    return torch.stack(counts).to(torch.float32)


def loss(
    params: Parameters,
    tokens_BT: Tensor,
    documents: Documents | None = None,
    labels_BT: Tensor | None = None,
    num_targets: Tensor | None = None,
    *,
    config: Config,
    z_loss_coef: float = 0.0,
    checkpoint_layers: bool = False,
) -> tuple[Tensor, Metrics]:
    """The training loss, an fp32 scalar, and its parts.

    Mean cross-entropy of the next token, plus `z_loss_coef` times the mean squared log-partition, plus
    `config.mtp_loss_scaling_factor` times the prediction module's cross-entropy, plus `config.router_aux_loss_coef`
    times the load-balancing loss pooled over all routers as transformers defines it.

    labels_BT: int64 [B, T], not shifted, IGNORE where a token is not to be learnt; the tokens where None.
    num_targets: what `count_targets` gave for a larger batch of which this is a part.
    """
    h_BTD, statistics, _ = hidden_states(
        params, tokens_BT, documents, config=config, checkpoint_layers=checkpoint_layers
    )
    own = count_targets(tokens_BT, documents, labels_BT)
    totals = (own if num_targets is None else num_targets).clamp(min=1)
    main_BT = targets(tokens_BT, documents, labels_BT)
    main, cross_entropy, z_loss = (
        x / totals[0] for x in linear_cross_entropy(h_BTD, head(params), main_BT, z_loss_coef)
    )
    mtp_loss = torch.zeros_like(cross_entropy)
    if isinstance(params.mtp, MultiTokenPrediction):
        h2_BTD, new = multi_token_prediction(
            params.mtp, params.embed_tokens, h_BTD, tokens_BT, documents, config=config
        )
        statistics = _pooled(statistics, new)
        later_BT = targets(tokens_BT, documents, labels_BT, by=2)
        mtp_loss = linear_cross_entropy(h2_BTD, head(params), later_BT).total / totals[1]
    aux_loss = load_balancing_loss(statistics) * own[0].clamp(min=1) / totals[0]
    total = main + config.mtp_loss_scaling_factor * mtp_loss + config.router_aux_loss_coef * aux_loss
    return total, Metrics(*(x.detach() for x in (cross_entropy, mtp_loss, aux_loss, z_loss, own[0])))


def load_balancing_loss(statistics: RouterStatistics) -> Tensor:
    """`E sum_e f_e P_e`: f_e assignments and P_e mean probability a token (Fedus et al. 2021); balance gives top-k."""
    tokens = statistics.tokens.clamp(min=1)
    fraction_E, probability_E = statistics.assignments_E / tokens, statistics.probabilities_E / tokens
    return fraction_E.shape[0] * (fraction_E * probability_E).sum()
