"""Qwen3-Next: tokens to logits, and the training loss with its multi-token-prediction term.

Letters: B batch, T time, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from q3n_functional import cache as caches
from q3n_functional import layers
from q3n_functional.cache import Cache, State, Tentative
from q3n_functional.config import Config
from q3n_functional.feed_forward import RouterStatistics
from q3n_functional.layers import Context, context, decoder_layer, on_ranks, rms_norm
from q3n_functional.packing import IGNORE, Documents, same_document, shift
from q3n_functional.parallel.context import piece
from q3n_functional.parallel.placement import Parallel, cross_entropy, embed, summed, whole, worth
from q3n_functional.params import DecoderLayer, LinearAttention, MultiTokenPrediction, Parameters


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
    parallel: Parallel | None = None,
    *,
    config: Config,
    checkpoint_layers: bool = False,
    tentative: bool = False,
) -> tuple[Tensor, RouterStatistics, Cache | None]:
    """The normalised output of the last layer [B, T, D], the routers' statistics, and the cache behind the tokens.

    `checkpoint_layers` keeps only each layer's input for backward and computes the layer again there. With `tentative`
    the cache is one that `accept` cuts to the tokens that stay. With `parallel`, which takes no cache, `params` are the
    rank's shards, tokens are whole rows, and the rank's piece of the output comes back.
    """
    if cache is not None and parallel is not None:
        raise ValueError("a cache is of one device: give it or `parallel`, not both")
    shared = on_ranks(_context(tokens_BT, documents, cache, config, tentative), tokens_BT, parallel, config=config)
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
    parallel = shared.parallel
    table_VD, norm_D = _outer(params, "embed_tokens", parallel), _outer(params, "norm", parallel)
    x_BTD, statistics, states = (
        embed(piece(tokens_BT, parallel), table_VD, parallel),
        _no_statistics(params, config),
        [],
    )
    for i, p in enumerate(params.layers):
        layer = functools.partial(_layer, layouts=parallel and parallel.layouts.layers[i], config=config)
        state = None if cache is None else cache.layers[i]
        if checkpoint_layers:
            x_BTD, new_state, new = checkpoint(layer, p, x_BTD, shared, state, use_reentrant=False)
        else:
            x_BTD, new_state, new = layer(p, x_BTD, shared, state)
        statistics = _pooled(statistics, new)
        states.append(new_state)
    return rms_norm(x_BTD, norm_D, config.rms_norm_eps), statistics, states


def _layer(
    p: DecoderLayer, x_BTD: Tensor, shared: Context, state: State | None, *, layouts: Any, config: Config
) -> tuple[Tensor, State, RouterStatistics | None]:
    return decoder_layer(whole(p, layouts, shared.parallel), x_BTD, shared, state, config=config)


def _outer(params: Parameters, name: str, parallel: Parallel | None) -> Any:
    """A part of the tree outside the layers, as it is used."""
    return whole(getattr(params, name), parallel and getattr(parallel.layouts, name), parallel)


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
    parallel: Parallel | None = None,
    *,
    config: Config,
) -> tuple[Tensor, RouterStatistics | None]:
    """Hidden states [B, T, D] from which the shared head predicts the token after the next.

    At t it sees h_t and the embedding of token t+1 of the same document (DeepSeek-V3, section 2.2; names as in the
    published checkpoint). Where a document has no such token the result means nothing and is never a target.
    """
    shared = context(tokens_BT, documents, None, config)._replace(valid_BT=_has_next(tokens_BT, documents))
    shared = on_ranks(shared, tokens_BT, parallel, config=config)
    next_BT = piece(shift(tokens_BT, documents, 1, 0), parallel)
    e_BTD = rms_norm(embed(next_BT, embed_tokens, parallel), p.pre_fc_norm_embedding, config.rms_norm_eps)
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
    return _counts([targets(tokens_BT, documents, labels_BT, by=by) for by in (1, 2)])


def _counts(targets_BT: list[Tensor]) -> Tensor:
    return torch.stack([(x != IGNORE).sum() for x in targets_BT]).to(torch.float32)


def loss(
    params: Parameters,
    tokens_BT: Tensor,
    documents: Documents | None = None,
    labels_BT: Tensor | None = None,
    num_targets: Tensor | None = None,
    parallel: Parallel | None = None,
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
    parallel: with it, `params` are the rank's shards and the batch is the rank's rows, whole. The results are those of
    all ranks' rows together, the gradients those of the shards.
    """
    h_BTD, statistics, _ = hidden_states(
        params, tokens_BT, documents, parallel=parallel, config=config, checkpoint_layers=checkpoint_layers
    )
    first_BT, second_BT = (piece(targets(tokens_BT, documents, labels_BT, by=by), parallel) for by in (1, 2))
    own = summed(_counts([first_BT, second_BT]), "tokens", parallel)
    totals = (own if num_targets is None else num_targets).clamp(min=1)
    head_VD = _outer(params, "embed_tokens" if isinstance(params.lm_head, tuple) else "lm_head", parallel)
    main = cross_entropy(h_BTD, head_VD, first_BT, z_loss_coef, parallel)
    total, mtp = main.total / totals[0], torch.zeros_like(main.cross_entropy)
    if isinstance(params.mtp, MultiTokenPrediction):
        mtp_params, table_VD = _outer(params, "mtp", parallel), _outer(params, "embed_tokens", parallel)
        h2_BTD, new = multi_token_prediction(mtp_params, table_VD, h_BTD, tokens_BT, documents, parallel, config=config)
        statistics = _pooled(statistics, new)
        second = cross_entropy(h2_BTD, head_VD, second_BT, 0.0, parallel)
        total, mtp = total + config.mtp_loss_scaling_factor * second.total / totals[1], second.cross_entropy / totals[1]
    aux_loss = load_balancing_loss(_over_ranks(statistics, parallel)) * own[0].clamp(min=1) / totals[0]
    # All ranks have the same: each counts its share.
    total = total + config.router_aux_loss_coef * aux_loss / (1 if parallel is None else parallel.world.size)
    parts = torch.stack([main.cross_entropy / totals[0], mtp, main.z_loss / totals[0]])
    entropy, mtp, z_loss = summed(parts, "world", parallel).unbind()
    return worth(total, parallel), Metrics(entropy, mtp, aux_loss.detach(), z_loss, own[0])


def _over_ranks(statistics: RouterStatistics, parallel: Parallel | None) -> RouterStatistics:
    if parallel is None:
        return statistics
    num = statistics.assignments_E.shape[0]
    sums = summed(torch.cat([*statistics[:2], statistics.tokens[None]]), "tokens", parallel)
    return RouterStatistics(sums[:num], sums[num:-1], sums[-1])


def load_balancing_loss(statistics: RouterStatistics) -> Tensor:
    """`E sum_e f_e P_e`: f_e assignments and P_e mean probability a token (Fedus et al. 2021); balance gives top-k."""
    tokens = statistics.tokens.clamp(min=1)
    fraction_E, probability_E = statistics.assignments_E / tokens, statistics.probabilities_E / tokens
    return fraction_E.shape[0] * (fraction_E * probability_E).sum()
