"""Writing text: prefill, one token at a time with an explicit cache, and sampling.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from q3n_functional import cache as caches
from q3n_functional.cache import Cache
from q3n_functional.config import Config
from q3n_functional.model import head, hidden_states
from q3n_functional.params import Parameters


def advance(params: Parameters, tokens_BT: Tensor, cache: Cache, *, config: Config) -> tuple[Tensor, Cache]:
    """Logits [B, V] behind the last of `tokens_BT`, which continue the sequences of `cache`, and the cache behind it.

    Prefill and decoding are both this function: T is the prompt's length in one and 1 in the other. `cache` must have
    room for T more tokens.
    """
    h_BTD, _, new_cache = hidden_states(params, tokens_BT, None, cache, config=config)
    assert new_cache is not None
    return linear(h_BTD[:, -1], head(params)), new_cache


def sample(
    logits_BV: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator
) -> Tensor:
    """Draw a token [B] from each row of logits.

    temperature 0 takes the largest logit. top_k keeps that many largest logits (0 keeps all); top_p then keeps the
    fewest tokens whose probabilities reach it (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], float("-inf"))
    probabilities_BV = _nucleus(logits_BV.softmax(-1), top_p) if top_p < 1 else logits_BV.softmax(-1)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]


def _nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    ordered, index = probabilities_BV.sort(-1, descending=True)
    # A token stays while the mass in front of it falls short of top_p, so the most likely one always does.
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
    return torch.zeros_like(ordered).scatter(-1, index, kept)


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a setting out of range."""
    if not temperature >= 0:  # as written, this refuses NaN too
        raise ValueError(f"temperature must be 0 (the likeliest token) or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {top_p}")


def generate(
    params: Parameters,
    prompt: Sequence[int],
    *,
    config: Config,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yield the tokens that continue `prompt`, as each is drawn; a stop token ends it and is not yielded.

    The same arguments give the same tokens on one device. Raises ValueError for an empty prompt, a token outside the
    vocabulary, a setting out of range, or more tokens than the model has positions.
    """
    check_sampling(temperature, top_k, top_p)
    _check_prompt(prompt, max_new_tokens, config)
    return _generated(params, prompt, config, max_new_tokens, temperature, top_k, top_p, seed, frozenset(stop_tokens))


def _check_prompt(prompt: Sequence[int], max_new_tokens: int, config: Config) -> None:
    if not prompt:
        raise ValueError("the prompt has no tokens: give at least one, such as the beginning-of-text token")
    if max(prompt) >= config.vocab_size or min(prompt) < 0:
        raise ValueError(
            f"the prompt's tokens must lie in [0, {config.vocab_size}), got {min(prompt)} to {max(prompt)}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    total = len(prompt) + max_new_tokens
    if total > config.max_position_embeddings:
        raise ValueError(
            f"{len(prompt)} prompt tokens and max_new_tokens {max_new_tokens} make {total}, above "
            f"max_position_embeddings {config.max_position_embeddings}: shorten one of them"
        )


@torch.no_grad()
def _generated(
    params: Parameters,
    prompt: Sequence[int],
    config: Config,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_tokens: frozenset[int],
) -> Iterator[int]:
    like = params.embed_tokens
    generator = torch.Generator(like.device).manual_seed(seed)
    cache = caches.empty(config, 1, len(prompt) + max_new_tokens, like.dtype, like.device)
    tokens_BT = torch.tensor([list(prompt)], device=like.device)
    for _ in range(max_new_tokens):
        logits_BV, cache = advance(params, tokens_BT, cache, config=config)
        token_B = sample(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        token = int(token_B)
        if token in stop_tokens:
            return
        yield token
        tokens_BT = token_B[:, None]
