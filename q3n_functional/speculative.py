"""Speculative decoding with the prediction module: N drafts a step, verified in one pass (Leviathan et al. 2023).

Each position draws its token with the noise that plain decoding has for it (see `q3n_functional.sampling`), and a draft
is accepted where it is that very token. So the text is plain decoding's, token by token, when sampling as well as when
greedy: a stronger property than an equal distribution, up to ties that rounding breaks. Drafts are drawn with the same
noise, which makes them agree whenever the two distributions do nearly.

The module (DeepSeek-V3, section 2.2) keeps keys and values over the model's true hidden states: what it wrote while it
drafted on its own is overwritten once the drafts are judged. Rows accept different numbers of drafts.

Letters: B batch, N drafts, T = N + 1 tokens of a pass (or those of a packed stream), D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from q3n_functional import cache as caches
from q3n_functional import decode
from q3n_functional.cache import Cache, KeyValues
from q3n_functional.config import Config
from q3n_functional.decode import Running, last
from q3n_functional.layers import context, decoder_layer
from q3n_functional.model import accept, head, hidden_states, with_next
from q3n_functional.ops.rms_norm import rms_norm
from q3n_functional.packing import Documents
from q3n_functional.params import MultiTokenPrediction, Parameters
from q3n_functional.sampling import Drawn, noted, sample


class Speculating(NamedTuple):
    """Sequences that are being written with drafts.

    running: as in plain decoding, with a capacity of `limit` + N. module: keys and values of the prediction module, of
    the tokens that `running.cache` has. drafts_BN: int64, what it expects behind the last token. drafted_B, accepted_B:
    int64, how many drafts were verified and how many of them stayed.
    """

    running: Running
    module: KeyValues
    drafts_BN: Tensor
    drafted_B: Tensor
    accepted_B: Tensor


class Verified(NamedTuple):
    """The tokens [B, T] that a step adds, -1 behind the last, and their log-probabilities by the model."""

    token_BT: Tensor
    logprob_BT: Tensor


def waiting(params: Parameters, running: Running, num_drafts: int, capacity: int, *, config: Config) -> Speculating:
    """Rows as `decode.waiting` makes them, whose prompts are not read yet, with room for `capacity` tokens.

    Raises ValueError for a model without the prediction module, or no drafts.
    """
    if not isinstance(params.mtp, MultiTokenPrediction):
        raise ValueError("the model has no prediction module (mtp) to draft with: decode without drafts")
    if num_drafts < 1:
        raise ValueError(f"num_drafts must be 1 or more, got {num_drafts}")
    batch, like = len(running.token_B), params.embed_tokens
    drafts_BN = torch.zeros(batch, num_drafts, dtype=torch.int64, device=like.device)
    module = caches.key_values(config, batch, capacity, like.dtype, like.device)
    return Speculating(running, module, drafts_BN, *(drafts_BN.new_zeros(batch) for _ in range(2)))


def join(
    params: Parameters,
    state: Speculating,
    tokens_1T: Tensor,
    next_1T: Tensor,
    cu_seqlens: Tensor,
    complete_B: Tensor,
    *,
    config: Config,
    filtered: bool = True,
    fresh: bool = False,
) -> tuple[Speculating, Drawn]:
    """`decode.join`, which also lets the module read; next_1T holds the prompts' tokens one place later."""
    docs, before = decode.among(tokens_1T, cu_seqlens, fresh), state.running
    h_1TD, cache = decode.hidden(params, tokens_1T, docs, before.cache, config=config, fresh=fresh)
    logits_BV = linear(last(h_1TD, cu_seqlens), head(params))
    running, drawn = decode.drawn(before, cache, logits_BV, complete_B, filtered=filtered)
    next_1T = _with_drawn(next_1T, cu_seqlens, complete_B, running.token_B)
    lengths_B = before.cache.lengths_B
    y_1TD, module = predict(params, h_1TD, next_1T, docs, lengths_B, state.module, config=config)
    num = state.drafts_BN.shape[1]
    drafts_BN, module = draft(params, running, module, last(y_1TD, cu_seqlens), num, config=config, filtered=filtered)
    drafts_BN = torch.where(complete_B[:, None], drafts_BN, state.drafts_BN)
    return Speculating(running, module, drafts_BN, state.drafted_B, state.accepted_B), drawn


def _with_drawn(next_1T: Tensor, cu_seqlens: Tensor, complete_B: Tensor, token_B: Tensor) -> Tensor:
    """next_1T with what was drawn behind the prompts that are complete."""
    length = next_1T.shape[1]
    place_B = torch.where(complete_B, cu_seqlens[1:].long() - 1, length)
    return torch.nn.functional.pad(next_1T[0], (0, 1)).scatter(0, place_B, token_B)[None, :length]


def predict(
    params: Parameters,
    h_BTD: Tensor,
    next_BT: Tensor,
    documents: Documents | None,
    lengths_B: Tensor,
    module: KeyValues,
    *,
    config: Config,
) -> tuple[Tensor, KeyValues]:
    """`model.multi_token_prediction` continuing `module` behind `lengths_B` tokens: hidden states [B, T, D]."""
    p = params.mtp
    assert isinstance(p, MultiTokenPrediction)
    shared = context(next_BT, documents, lengths_B, config)
    x_BTD = with_next(p, h_BTD, embedding(next_BT, params.embed_tokens), config=config)
    y_BTD, after, _ = decoder_layer(p.layer, x_BTD, shared, module, config=config)
    assert isinstance(after, KeyValues)
    return rms_norm(y_BTD, p.norm, config.rms_norm_eps), after


def draft(
    params: Parameters,
    running: Running,
    module: KeyValues,
    y_BD: Tensor,
    num_drafts: int,
    *,
    config: Config,
    filtered: bool = True,
) -> tuple[Tensor, KeyValues]:
    """Tokens [B, N] that are expected behind the last one; y_BD is what the module gives there.

    Behind the first the module takes its own output for the hidden state; those keys and values count for nothing.
    """
    drafts: list[Tensor] = []
    history, lengths_B = running.history, running.cache.lengths_B
    for i in range(num_drafts):
        if i:
            token_B1, behind_B = drafts[-1][:, None], lengths_B + (i - 1)
            y_B1D, module = predict(params, y_BD[:, None], token_B1, None, behind_B, module, config=config)
            history, y_BD = noted(history, drafts[-1]), y_B1D[:, 0]
        logits_BV = linear(y_BD, head(params))
        drafts.append(sample(logits_BV, running.settings, history, lengths_B + (i + 1), filtered=filtered).token_B)
    return torch.stack(drafts, 1), module


def step(
    params: Parameters, state: Speculating, *, config: Config, filtered: bool = True, block_size: int = 0
) -> tuple[Speculating, Verified]:
    """Every row that is not finished adds its last token, the drafts that are right, and one more: 1 to T tokens.

    With `block_size`, a step ends where the cache has taken in a whole number of such blocks, so that no end of a block
    is passed over whose cache somebody wants to keep.
    """
    running, num = state.running, state.drafts_BN.shape[1]
    tokens_BT = torch.cat([running.token_B[:, None], state.drafts_BN], 1)
    h_BTD, _, tentative = hidden_states(params, tokens_BT, None, running.cache, config=config, tentative=True)
    assert tentative is not None
    drawn = _draws(running, state.drafts_BN, linear(h_BTD, head(params)), filtered)
    ended_BT = _ended(running, drawn.token_BT)
    last_BT = ended_BT | _block_ends(running, ended_BT, block_size)
    counts_B = _counts(running, state.drafts_BN, drawn.token_BT, last_BT)
    cache = accept(tentative, counts_B)
    stays_BT = torch.arange(num + 1, device=counts_B.device) < counts_B[:, None]
    after = _advanced(running, cache, drawn.token_BT, ended_BT, stays_BT, counts_B)
    lengths_B = running.cache.lengths_B
    y_BTD, module = predict(params, h_BTD, drawn.token_BT, None, lengths_B, state.module, config=config)
    y_BD = y_BTD[torch.arange(len(counts_B), device=counts_B.device), (counts_B - 1).clamp(min=0)]
    drafts_BN, module = draft(params, after, module, y_BD, num, config=config, filtered=filtered)
    drafted_B = state.drafted_B + num * (~running.finished_B)
    accepted_B = state.accepted_B + (counts_B - 1).clamp(min=0)
    verified = Verified(drawn.token_BT.masked_fill(~stays_BT, -1), drawn.logprob_BT.masked_fill(~stays_BT, 0.0))
    return Speculating(after, module, drafts_BN, drafted_B, accepted_B), verified


def _draws(running: Running, drafts_BN: Tensor, logits_BTV: Tensor, filtered: bool) -> Verified:
    """What plain decoding would draw at each position if all drafts before it are right.

    So the drafts are the history, and all positions are drawn at once, as the rows R = B T of one batch.
    """
    batch, length = logits_BTV.shape[:2]
    index_T = torch.arange(length, device=logits_BTV.device)
    before_RN = (index_T[:-1] < index_T[:, None]).repeat(batch, 1)
    history = noted(caches.repeat(running.history, length), drafts_BN.repeat_interleave(length, 0), before_RN)
    position_R = (running.cache.lengths_B[:, None] + index_T + 1).flatten()
    settings = caches.repeat(running.settings, length)
    drawn = sample(logits_BTV.flatten(0, 1), settings, history, position_R, filtered=filtered)
    return Verified(*(x.view(batch, length) for x in drawn))


def _ended(running: Running, token_BT: Tensor) -> Tensor:
    """bool [B, T]: whether the sequence would end with this token."""
    behind_T = torch.arange(2, token_BT.shape[1] + 2, device=token_BT.device)
    full_BT = running.cache.lengths_B[:, None] + behind_T >= running.limit_B[:, None]
    return running.ends_BV.gather(1, token_BT) | full_BT


def _block_ends(running: Running, like_BT: Tensor, block_size: int) -> Tensor:
    """bool [B, T]: whether the cache ends with a block once it has taken in so many tokens."""
    if not block_size:
        return torch.zeros_like(like_BT)
    taken_T = torch.arange(1, like_BT.shape[1] + 1, device=like_BT.device)
    return (running.cache.lengths_B[:, None] + taken_T) % block_size == 0


def _counts(running: Running, drafts_BN: Tensor, token_BT: Tensor, last_BT: Tensor) -> Tensor:
    """int32 [B]: how many of the drawn tokens stand, up to one of `last_BT`; as many tokens then enter the cache."""
    goes_on_BN = (drafts_BN == token_BT[:, :-1]) & ~last_BT[:, :-1]
    num = drafts_BN.shape[1]
    counts_B = 1 + torch.where(goes_on_BN, num, torch.arange(num, device=token_BT.device)).amin(1)
    return counts_B.masked_fill(running.finished_B, 0).int()


def _advanced(
    running: Running, cache: Cache, token_BT: Tensor, ended_BT: Tensor, stays_BT: Tensor, counts_B: Tensor
) -> Running:
    last_B1 = (counts_B.long() - 1).clamp(min=0)[:, None]
    token_B, ended_B = (x.gather(1, last_B1)[:, 0] for x in (token_BT, ended_BT))
    finished_B = running.finished_B
    return Running(
        cache,
        torch.where(finished_B, running.token_B, token_B),
        noted(running.history, token_BT, stays_BT),
        running.settings,
        running.ends_BV,
        running.limit_B,
        finished_B | ended_B,
    )


def acceptance_rate(state: Speculating) -> float:
    """The share of all drafts so far that stayed; waits for the device."""
    return float(state.accepted_B.sum()) / max(int(state.drafted_B.sum()), 1)
