"""Qwen3-Next: tokens to logits, and the training loss with its multi-token-prediction term.

Letters: B batch, T time, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from q3n_functional import layers
from q3n_functional.cache import Cache, State, Tentative
from q3n_functional.config import Config
from q3n_functional.feed_forward import RouterStatistics
from q3n_functional.float8 import Float8
from q3n_functional.layers import Context, context, decoder_layer, on_ranks
from q3n_functional.ops.rms_norm import rms_norm
from q3n_functional.packing import IGNORE, Documents, same_document, shift
from q3n_functional.parallel import ahead
from q3n_functional.parallel.context import piece
from q3n_functional.parallel.embedding import embed_rows, goes_by_rows
from q3n_functional.parallel.placement import Parallel, cross_entropy, embed, summed, whole, worth
from q3n_functional.params import DecoderLayer, MultiTokenPrediction, Parameters
from q3n_functional.recompute import Recompute, recomputed


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


def accept(tentative: Cache, counts_B: Tensor) -> Cache:
    """The cache behind the first `counts_B` (int32 [B], 0 to T) of each sequence's T tentative tokens.

    `tentative` is what `hidden_states(..., tentative=True)` returned. The cost is that of copying one state of each
    linear layer: nothing runs again.
    """
    states = tuple(
        layers.accept(state, counts_B) if isinstance(state, Tentative) else state for state in tentative.layers
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
    tentative: bool = False,
    fresh: bool = False,
) -> tuple[Tensor, RouterStatistics, Cache | None]:
    """The normalised output of the last layer [B, T, D], the routers' statistics, and the cache behind the tokens.

    With `tentative` the cache is one that `accept` cuts to the tokens that stay. `fresh` says that `cache` has nothing
    yet, as the device alone would know: attention then goes the way of training. With `parallel`, that of
    `q3n_functional.parallel.decode`, `params` and `cache` are the rank's parts and the tokens are those of all ranks.
    """
    shared = _context(tokens_BT, documents, cache, config, tentative)._replace(fresh=fresh)
    shared = on_ranks(shared, tokens_BT, parallel, config=config)
    h_BTD, statistics, states = _through_layers(params, tokens_BT, shared, cache, config)
    new_cache = None if cache is None else _continued(cache, states, tokens_BT, documents, tentative)
    return h_BTD, _pooled(statistics, h_BTD, config), new_cache


def _through_layers(
    params: Parameters, tokens_BT: Tensor, shared: Context, cache: Cache | None, config: Config
) -> tuple[Tensor, list[RouterStatistics], list[State]]:
    x_BTD, statistics, states = embed(tokens_BT, params.embed_tokens, shared.parallel), [], []
    for i, p in enumerate(params.layers):
        x_BTD, state, new = decoder_layer(p, x_BTD, shared, None if cache is None else cache.layers[i], config=config)
        states.append(state)
        statistics += [] if new is None else [new]
    return rms_norm(x_BTD, params.norm, config.rms_norm_eps), statistics, states


def _pooled(statistics: Sequence[RouterStatistics], like: Tensor, config: Config) -> RouterStatistics:
    if not statistics:
        zeros = like.new_zeros(max(config.num_experts, 1), dtype=torch.float32)
        return RouterStatistics(zeros, zeros, zeros[0])
    return RouterStatistics(*(torch.stack(x).sum(0) for x in zip(*statistics, strict=True)))


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


def multi_token_prediction(
    p: MultiTokenPrediction,
    e_BTD: Tensor,
    h_BTD: Tensor,
    tokens_BT: Tensor,
    documents: Documents | None = None,
    parallel: Parallel | None = None,
    *,
    config: Config,
    recompute: Recompute = "none",
    float8: Float8 = "none",
) -> tuple[Tensor, RouterStatistics | None]:
    """Hidden states [B, T, D] from which the shared head predicts the token after the next.

    At t it sees h_t and e_t, the embedding of token t+1 of the same document, which `next_tokens` gives (DeepSeek-V3,
    section 2.2; names as in the published checkpoint). Where a document has no such token the result means nothing and
    is never a target. With `parallel`, `p` are the rank's shards.
    """
    layouts = None if parallel is None else cast(MultiTokenPrediction, parallel.layouts.mtp)
    shared = context(tokens_BT, documents, None, config)
    shared = shared._replace(valid_BT=_has_next(tokens_BT, documents), float8=float8)
    shared = on_ranks(shared, tokens_BT, parallel, config=config)
    p = _around_layer(p, layouts, parallel)
    x_BTD = with_next(p, h_BTD, e_BTD, config=config)
    x_BTD, statistics = layer(
        p.layer, x_BTD, shared, None if layouts is None else layouts.layer, config=config, recompute=recompute
    )
    return rms_norm(x_BTD, p.norm, config.rms_norm_eps), statistics


def next_tokens(tokens_BT: Tensor, documents: Documents | None = None) -> Tensor:
    """The token behind each in its document, 0 behind the last."""
    return shift(tokens_BT, documents, 1, 0)


def _around_layer(
    p: MultiTokenPrediction, layouts: MultiTokenPrediction | None, parallel: Parallel | None
) -> MultiTokenPrediction:
    """The prediction module with all but its layer as it is used."""
    if layouts is None:
        return p
    nothing: Any = ()
    return whole(p._replace(layer=nothing), layouts._replace(layer=nothing), parallel)._replace(layer=p.layer)


def with_next(p: MultiTokenPrediction, h_BTD: Tensor, e_BTD: Tensor, *, config: Config) -> Tensor:
    """What the prediction module's layer takes [B, T, D]: hidden states beside the embeddings of the next tokens."""
    e_BTD = rms_norm(e_BTD, p.pre_fc_norm_embedding, config.rms_norm_eps)
    h_BTD = rms_norm(h_BTD, p.pre_fc_norm_hidden, config.rms_norm_eps)
    return linear(torch.cat([e_BTD, h_BTD], -1), p.fc)


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


def layer(
    p: DecoderLayer,
    x_BTD: Tensor,
    shared: Context,
    layouts: Any = None,
    *,
    config: Config,
    recompute: Recompute = "none",
) -> tuple[Tensor, RouterStatistics | None]:
    """A layer as `loss` runs it: no state comes in or out, and backward computes again what `recompute` says.

    With `layouts`, `p` are the rank's shards, which are gathered here and again in backward; or they come whole where
    they are `gathered` before, and no copy of them is kept either.
    """

    def run(p: DecoderLayer, x_BTD: Tensor, shared: Context) -> tuple[Tensor, RouterStatistics | None]:
        p = p if layouts is None else whole(p, layouts, shared.parallel)
        y_BTD, _, statistics = decoder_layer(p, x_BTD, shared, None, config=config)
        return y_BTD, statistics

    shards = "" if layouts is None or shared.parallel is None else shared.parallel.fsdp.group
    return recomputed(recompute, run, p, x_BTD, shared, shards=shards)


def finish(
    params: Parameters,
    x_BTD: Tensor,
    e_BTD: Tensor | None,
    statistics: Sequence[RouterStatistics],
    tokens_BT: Tensor,
    documents: Documents | None,
    labels_BT: Tensor | None,
    num_targets: Tensor | None,
    parallel: Parallel | None,
    *,
    config: Config,
    z_loss_coef: float,
    recompute: Recompute,
    float8: Float8 = "none",
) -> tuple[Tensor, Metrics]:
    """The loss from what the last layer gives: final norm, head, prediction module. Of `params` no layer is read.

    e_BTD: embeddings of the next tokens, for the prediction module.
    """
    h_BTD = rms_norm(x_BTD, _outer(params, "norm", parallel), config.rms_norm_eps)
    first_BT, second_BT = (piece(targets(tokens_BT, documents, labels_BT, by=by), parallel) for by in (1, 2))
    own = summed(_counts([first_BT, second_BT]), "tokens", parallel)
    totals = (own if num_targets is None else num_targets).clamp(min=1)
    head_VD = _outer(params, "embed_tokens" if isinstance(params.lm_head, tuple) else "lm_head", parallel)
    main = cross_entropy(h_BTD, head_VD, first_BT, z_loss_coef, parallel)
    total, mtp = main.total / totals[0], torch.zeros_like(main.cross_entropy)
    if isinstance(params.mtp, MultiTokenPrediction):
        assert e_BTD is not None
        h2_BTD, new = multi_token_prediction(
            params.mtp, e_BTD, h_BTD, tokens_BT, documents, parallel,
            config=config, recompute=recompute, float8=float8,
        )  # fmt: skip
        statistics = [*statistics, *([] if new is None else [new])]
        second = cross_entropy(h2_BTD, head_VD, second_BT, 0.0, parallel)
        total, mtp = total + config.mtp_loss_scaling_factor * second.total / totals[1], second.cross_entropy / totals[1]
    pooled = _over_ranks(_pooled(statistics, x_BTD, config), parallel)
    aux_loss = load_balancing_loss(pooled) * own[0].clamp(min=1) / totals[0]
    # All ranks have the same: each counts its share.
    total = total + config.router_aux_loss_coef * aux_loss / (1 if parallel is None else parallel.world.size)
    parts = torch.stack([main.cross_entropy / totals[0], mtp, main.z_loss / totals[0]])
    entropy, mtp, z_loss = summed(parts, "world", parallel).unbind()
    return worth(total, parallel), Metrics(entropy, mtp, aux_loss.detach(), z_loss, own[0])


class Stages(NamedTuple):
    """The functions that a loss is made of beside the embedding, as they are or each compiled by itself.

    With one compiled `layer` for all layers of a kind, compiling takes as long for 48 layers as for 4.
    """

    layer: Callable[..., tuple[Tensor, RouterStatistics | None]] = layer
    finish: Callable[..., tuple[Tensor, Metrics]] = finish
    ahead: bool = False
    """Whether ranks send for what a function reads while the one before it runs: `q3n_functional.parallel.ahead`."""
    reshard_after_forward: bool = True
    """Whether a function's whole parameters, with `ahead`, are gathered again in its backward rather than kept."""


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
    recompute: Recompute = "none",
    float8: Float8 = "none",
    stages: Stages = Stages(),  # noqa: B008  # immutable
) -> tuple[Tensor, Metrics]:
    """The training loss, an fp32 scalar, and its parts.

    Mean cross-entropy of the next token, plus `z_loss_coef` times the mean squared log-partition, plus
    `config.mtp_loss_scaling_factor` times the prediction module's cross-entropy, plus `config.router_aux_loss_coef`
    times the load-balancing loss pooled over all routers as transformers defines it.

    labels_BT: int64 [B, T], not shifted, IGNORE where a token is not to be learnt; the tokens where None.
    num_targets: what `count_targets` gave for a larger batch of which this is a part.
    parallel: with it, `params` are the rank's shards and the batch is the rank's rows, whole. The results are those of
    all ranks' rows together, the gradients those of the shards.
    recompute: what each layer computes again in backward rather than keeps; see `q3n_functional.recompute`.
    float8: the layers' products that are in float8; see `q3n_functional.float8`.
    """
    shared = context(tokens_BT, documents, None, config)._replace(float8=float8)
    # One look at the embedding serves the layers and the prediction module: its gradient is a table too.
    read_BT = piece(tokens_BT, parallel)
    predicts = isinstance(params.mtp, MultiTokenPrediction)
    if predicts:
        read_BT = torch.cat([read_BT, piece(next_tokens(tokens_BT, documents), parallel)])
    by_rows = goes_by_rows(read_BT, parallel)
    parts = _parts(params, by_rows)
    use: ahead.Use = partial(_used, parts)
    if stages.ahead and parallel is not None:
        use = ahead.begin(parts, _parts(parallel.layouts, by_rows), parallel, stages.reshard_after_forward)
        parallel = parallel._replace(gathered=True)
    shared = on_ranks(shared, tokens_BT, parallel, config=config)
    if by_rows and parallel is not None:
        x_BTD = embed_rows(read_BT, params.embed_tokens, parallel)
    else:
        x_BTD = embed(read_BT, use(0, _outer, "embed_tokens", parallel), parallel)
    x_BTD, e_BTD = x_BTD.chunk(2) if predicts else (x_BTD, None)
    statistics = []
    for i in range(len(params.layers)):
        layouts = parallel and parallel.layouts.layers[i]
        x_BTD, new = use(1 + i, stages.layer, x_BTD, shared, layouts, config=config, recompute=recompute)
        statistics += [] if new is None else [new]
    result: tuple[Tensor, Metrics] = use(
        len(params.layers) + 1, stages.finish,
        x_BTD, e_BTD, statistics, tokens_BT, documents, labels_BT, num_targets, parallel,
        config=config, z_loss_coef=z_loss_coef, recompute=recompute, float8=float8,
    )  # fmt: skip
    return result


def _parts(params: Parameters, by_rows: bool) -> tuple[Any, ...]:
    """What each function of a loss reads: the tree with the embedding alone, every layer, the tree for `finish`."""
    nothing: Any = ()
    first = Parameters(nothing if by_rows else params.embed_tokens, (), nothing, (), ())
    is_tied = isinstance(params.lm_head, tuple)
    behind = params._replace(embed_tokens=params.embed_tokens if is_tied else nothing, layers=())
    return first, *params.layers, behind


def _used(parts: Sequence[Any], number: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(parts[number], *arguments, **options)


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
