"""Text behind a prompt: the prompt is read in pieces, then tokens are drawn one by one or by speculation.

Letters: B sequences, T tokens of a packed stream, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q3n_functional import cache as caches
from q3n_functional import decode, speculative
from q3n_functional.cache import Cache
from q3n_functional.config import Config
from q3n_functional.decode import Running
from q3n_functional.parallel.decode import own_heads
from q3n_functional.parallel.placement import Parallel
from q3n_functional.params import Parameters
from q3n_functional.sampling import Drawn, Options, check_bias
from q3n_functional.speculative import Speculating, Verified

logger = logging.getLogger(__name__)
Static = dict[str, Any]

CHUNK = 4096
"""Tokens of prompts that go through the model at once: what bounds the memory of activations."""


class Piece(NamedTuple):
    """A part of a packed stream of prompts.

    tokens_1T: int64. cu_seqlens: int32 [B+1], where each prompt's part of the piece begins and ends. complete_B: bool,
    the prompts whose last token it holds.
    """

    tokens_1T: Tensor
    cu_seqlens: Tensor
    complete_B: Tensor


def pieces(prompts: Sequence[Sequence[int]], chunk_length: int, device: torch.device | str = "cpu") -> Iterator[Piece]:
    """The prompts end to end, without padding, `chunk_length` tokens at a time."""
    if chunk_length < 1:
        raise ValueError(f"chunk_length must be 1 or more, got {chunk_length}")
    stream = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
    bounds = torch.tensor([0, *map(len, prompts)]).cumsum(0)
    for start in range(0, len(stream), chunk_length):
        end = min(start + chunk_length, len(stream))
        complete_B = (bounds[1:] > start) & (bounds[1:] <= end) & (bounds.diff() > 0)
        cu_seqlens = (bounds - start).clamp(0, end - start).int()
        yield Piece(*(x.to(device) for x in (stream[None, start:end], cu_seqlens, complete_B)))


def prefill(
    params: Parameters,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    parallel: Parallel | None = None,
    *,
    config: Config,
    chunk_length: int = CHUNK,
    extend: Callable[..., tuple[Tensor, Cache]] = decode.extend,
) -> tuple[Tensor, Cache]:
    """Logits [B, V] behind each prompt, and the cache behind them; prompt n continues sequence n of `cache`.

    Prompts of any lengths lie end to end. Of the activations `chunk_length` tokens are there at once, however many the
    prompts have. `extend` may be `torch.compile(decode.extend, fullgraph=True)`: one graph serves all lengths but 1,
    which has its own, and one a first piece of full length for an empty cache. A prompt without tokens leaves its
    sequence as it is, and its logits are zero. With `parallel`, that of `q3n_functional.parallel.decode`, `params` and
    `cache` are the rank's parts; the logits are whole.

    Raises ValueError where the prompts are not as many as the sequences, or have no room.
    """
    before = cache.lengths_B.tolist()
    _check_room(prompts, before, caches.capacity(cache))
    logits_BV = params.embed_tokens.new_zeros(len(prompts), config.vocab_size)
    for i, piece in enumerate(pieces(prompts, chunk_length, logits_BV.device)):
        fresh = not any(before) and _begins(i, piece, chunk_length)
        new_BV, cache = extend(params, piece.tokens_1T, piece.cu_seqlens, cache, parallel, config=config, fresh=fresh)
        logits_BV = torch.where(piece.complete_B[:, None], new_BV, logits_BV)
    return logits_BV, cache


def _begins(number: int, piece: Piece, chunk_length: int) -> bool:
    """Whether a piece for an empty cache is attended to as a whole row, by cuDNN on Hopper.

    That makes a plan for a length that it meets first, which pays for pieces of full length alone.
    """
    return number == 0 and piece.tokens_1T.shape[1] == chunk_length


def _check_room(prompts: Sequence[Sequence[int]], before: Sequence[int], room: int | None) -> None:
    if len(prompts) != len(before):
        raise ValueError(f"{len(prompts)} prompts cannot continue a cache of {len(before)} sequences")
    for row, (prompt, length) in enumerate(zip(prompts, before, strict=True)):
        if room is not None and length + len(prompt) > room:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens behind {length}, above the cache's capacity of {room}: "
                "make a larger one or `cache.resize` it"
            )


def generate(
    params: Parameters,
    prompt: Sequence[int],
    parallel: Parallel | None = None,
    *,
    config: Config,
    max_new_tokens: int,
    options: Options = Options(),  # noqa: B008  # immutable
    stop_tokens: Collection[int] = (),
    chunk_length: int = CHUNK,
    draft_tokens: int = 0,
    compile: bool = False,
) -> Iterator[int]:
    """Yield the tokens that continue `prompt`, as each is drawn; a stop token ends it and is not yielded.

    The same arguments give the same tokens on one device. The prompt is read `chunk_length` tokens at a time. With
    `draft_tokens` the prediction module drafts so many a step, which changes the speed and not the text; how many were
    accepted is logged. On CUDA a step is a CUDA graph; with `compile` it goes through torch.compile first, which takes
    a while. With `parallel`, that of `q3n_functional.parallel.decode`, `params` are the rank's shards: all ranks call
    this with the same arguments, and each yields all the tokens.

    Raises ValueError for a prompt that is empty or no sequence of integers, tokens or biases outside the vocabulary,
    more tokens than positions, or drafts without a prediction module or on a mesh; FloatingPointError, where it is
    drawn, for a token whose logits are not finite.
    """
    check(prompt, max_new_tokens, options, config)
    if chunk_length < 1:
        raise ValueError(f"chunk_length must be 1 or more, got {chunk_length}")
    check_drafts(draft_tokens, 1 if parallel is None else parallel.world.size)
    if not max_new_tokens:
        return iter(())
    like, limit = params.embed_tokens, len(prompt) + max_new_tokens
    cache = caches.empty(own_heads(config, parallel), 1, limit + draft_tokens, like.dtype, like.device)
    running = decode.waiting(cache, [prompt], [options], [stop_tokens], [limit], config=config)
    static = {"config": config, "filtered": options.filtered}
    if draft_tokens:
        state = speculative.waiting(params, running, draft_tokens, limit + draft_tokens, config=config)
        steps = _speculated(params, state, prompt, static, chunk_length, compile)
    else:
        steps = _plain(params, running, prompt, static | {"parallel": parallel}, chunk_length, compile)
    return _until(steps, frozenset(stop_tokens), max_new_tokens)


def check(prompt: Sequence[int], max_new_tokens: int, options: Options, config: Config) -> None:
    """Raise ValueError for what `generate` refuses."""
    check_bias(options, config.vocab_size)
    _check_integers(prompt, max_new_tokens)
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


def _check_integers(prompt: Any, max_new_tokens: Any) -> None:
    if not isinstance(prompt, Sequence):
        raise ValueError(f"the prompt is a {type(prompt).__name__}, it must be a list of tokens, such as x.tolist()")
    for name, values in (("max_new_tokens", [max_new_tokens]), ("a token of the prompt", prompt)):
        for value in values:
            try:
                operator.index(value)
            except TypeError as error:
                raise ValueError(f"{name} must be an integer, got {value!r:.40}") from error


def check_finite(logprob: float) -> None:
    """Raise FloatingPointError for the log-probability of a token that was drawn from NaN or infinity."""
    if not math.isfinite(logprob):
        raise FloatingPointError(
            f"the logits are not finite (a token's log-probability is {logprob}): the model's weights are not, or its "
            "numbers are too large for their dtype; take another checkpoint or dtype"
        )


def check_drafts(draft_tokens: int, ranks: int) -> None:
    """Raise ValueError for a number of drafts that so many ranks do not make."""
    if draft_tokens < 0:
        raise ValueError(f"draft_tokens must be 0 (none) or more, got {draft_tokens}")
    if draft_tokens and ranks > 1:
        raise ValueError(f"draft_tokens is {draft_tokens}, but {ranks} ranks make no drafts: leave them out")


@torch.no_grad()
def _plain(
    params: Parameters, running: Running, prompt: Sequence[int], static: Static, chunk_length: int, compile: bool
) -> Iterator[Drawn]:
    step = decode.repeated(partial(decode.step, **static), params, running, compile=compile)
    join = [decode.in_place(partial(decode.join, fresh=fresh, **static)) for fresh in (False, True)]
    for i, piece in enumerate(pieces([prompt], chunk_length, running.token_B.device)):
        drawn = join[_begins(i, piece, chunk_length)](params, running, *piece)
    yield drawn
    while True:
        yield step()


@torch.no_grad()
def _speculated(
    params: Parameters, state: Speculating, prompt: Sequence[int], static: Static, chunk_length: int, compile: bool
) -> Iterator[Drawn | Verified]:
    device = state.drafts_BN.device
    step = decode.repeated(partial(speculative.step, **static), params, state, compile=compile)
    join = [decode.in_place(partial(speculative.join, fresh=fresh, **static)) for fresh in (False, True)]
    later = pieces([[*prompt[1:], 0]], chunk_length, device)
    for i, (piece, after) in enumerate(zip(pieces([prompt], chunk_length, device), later, strict=True)):
        drawn = join[_begins(i, piece, chunk_length)](params, state, piece.tokens_1T, after.tokens_1T, *piece[1:])
    try:
        yield drawn
        while True:
            yield step()
    finally:
        accepted, drafted = int(state.accepted_B), int(state.drafted_B)
        rate = speculative.acceptance_rate(state)
        logger.info("accepted %d of %d drafts (%.0f %%)", accepted, drafted, 100 * rate)


def _until(steps: Iterator[Drawn | Verified], stop_tokens: frozenset[int], left: int) -> Iterator[int]:
    """The tokens of one row, up to a stop token or the last of those that are left; -1 is no token."""
    for drawn in steps:
        for token, logprob in zip(*(x.flatten().tolist() for x in drawn), strict=True):
            if token >= 0:
                check_finite(logprob)
                if token in stop_tokens:
                    return
                yield token
                left -= 1
        if not left:
            return
