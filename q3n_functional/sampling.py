"""Drawing tokens on the device: a pure function of logits, settings and history, for every sequence by itself.

A draw takes its randomness from a counter, (seed, position of the token), so a sequence's text is the same whoever its
neighbours in the batch are, wherever it was interrupted, and with or without speculation.

Letters: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from q3n_functional.sampling_options import Options as Options  # the name that users know
from q3n_functional.sampling_options import check_bias as check_bias


class Settings(NamedTuple):
    """`Options` of a batch as tensors: [B], and the logit bias [B, V]; fp32 but for top_k and seed, int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    seed: Tensor
    bias_BV: Tensor


class History(NamedTuple):
    """Which tokens stand in the prompts, bool [B, V], and how often each was drawn since, int32 [B, V]."""

    prompt_BV: Tensor
    drawn_BV: Tensor


_LEAST = 1e-20
"""Logits by a smaller temperature overflow fp32, and a smaller top_p may be 0 in it."""


def settings(options: Sequence[Options], vocab_size: int, device: torch.device | str = "cpu") -> Settings:
    """The settings of a batch. Raises ValueError for a logit bias of a token outside the vocabulary."""
    options = [_in_fp32(each) for each in options]
    bias_BV = torch.zeros(len(options), vocab_size)
    for row, each in enumerate(options):
        check_bias(each, vocab_size)
        for token, bias in each.logit_bias.items():
            bias_BV[row, token] = bias
    columns = [torch.tensor([getattr(each, name) for each in options]) for name in Settings._fields[:-1]]
    dtypes = [torch.int64 if name in ("top_k", "seed") else torch.float32 for name in Settings._fields[:-1]]
    leaves = [c.to(device, d) for c, d in zip(columns, dtypes, strict=True)]
    return Settings(*leaves, bias_BV.to(device))  # type: ignore[call-arg]


def _in_fp32(options: Options) -> Options:
    """Options that leave the same tokens, without the numbers that fp32 is too coarse for."""
    temperature = options.temperature if options.temperature >= _LEAST else 0.0
    return replace(options, temperature=temperature, top_p=max(options.top_p, _LEAST))


def history(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str = "cpu") -> History:
    """The history of sequences that are only prompts yet."""
    prompt_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        prompt_BV[row, torch.as_tensor(prompt, dtype=torch.long)] = True
    return History(prompt_BV.to(device), torch.zeros_like(prompt_BV, dtype=torch.int32, device=device))


def noted(history: History, token: Tensor, kept: Tensor | None = None) -> History:
    """The history behind a draw of each sequence [B] or several [B, T], of those in `kept` (bool, all where None)."""
    once = torch.ones_like(token) if kept is None else kept
    token_BT, once_BT = (x[:, None] if x.ndim == 1 else x for x in (token, once.to(torch.int32)))
    return History(history.prompt_BV, history.drawn_BV.scatter_add(1, token_BT, once_BT))


class Drawn(NamedTuple):
    """A token for each sequence, int64 [B], and its log-probability by the model, before all settings, fp32 [B]."""

    token_B: Tensor
    logprob_B: Tensor


def sample(
    logits_BV: Tensor, settings: Settings, history: History, position_B: Tensor, *, filtered: bool = True
) -> Drawn:
    """Draw a token from each row of logits, to stand at `position_B` of its sequence.

    The draw is the largest of the logits with independent Gumbel noise (Gumbel 1954), which is hashed from seed,
    position and token: so two distributions that are near each other draw the same token most of the time, which is
    how drafts are accepted. `filtered` False leaves out top_k, top_p and min_p, whose search takes 64 passes.
    """
    logits_BV = logits_BV.float()
    x_BV = penalised(logits_BV, settings, history)
    greedy = settings.temperature[:, None] == 0
    warm_BV = x_BV / settings.temperature[:, None].where(~greedy, 1.0)
    if filtered:
        warm_BV = warm_BV.masked_fill(~kept(warm_BV, settings), -torch.inf)
    noise_BV = gumbel(settings.seed, position_B, x_BV.shape[1])
    token_B = torch.where(greedy, x_BV, warm_BV + noise_BV).argmax(-1)
    logprob_B = logits_BV.gather(1, token_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
    return Drawn(token_B, logprob_B)


def penalised(logits_BV: Tensor, settings: Settings, history: History) -> Tensor:
    """Logits with bias and penalties."""
    drawn_BV = history.drawn_BV.float()
    x_BV = logits_BV + settings.bias_BV
    repeated_BV = torch.where(
        x_BV > 0, x_BV / settings.repetition_penalty[:, None], x_BV * settings.repetition_penalty[:, None]
    )
    x_BV = torch.where(history.prompt_BV | (drawn_BV > 0), repeated_BV, x_BV)
    x_BV = x_BV - settings.presence_penalty[:, None] * (drawn_BV > 0)
    return x_BV - settings.frequency_penalty[:, None] * drawn_BV


def kept(logits_BV: Tensor, settings: Settings) -> Tensor:
    """bool [B, V]: the tokens that top_k leaves, of those the ones that top_p leaves, and of those min_p's."""
    order_BV = _order(logits_BV)
    top_k_B = settings.top_k.where(settings.top_k > 0, logits_BV.shape[1])
    stay_BV = order_BV >= _threshold(lambda above: above.sum(-1) >= top_k_B, order_BV)
    p_BV = logits_BV.masked_fill(~stay_BV, -torch.inf).softmax(-1)
    # Rounded, all the probabilities may sum to less than top_p: then nothing is left out.
    stay_BV &= order_BV >= _threshold(lambda above: (p_BV * above).sum(-1) >= settings.top_p, order_BV)
    stay_BV |= (settings.top_p >= 1)[:, None] & (p_BV > 0)
    return stay_BV & (p_BV >= settings.min_p[:, None] * p_BV.amax(-1, keepdim=True))


def _order(x_BV: Tensor) -> Tensor:
    """int64 in the order of fp32 numbers."""
    bits = (x_BV + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def _threshold(enough: Callable[[Tensor], Tensor], order_BV: Tensor) -> Tensor:
    """The largest number [B, 1] such that the entries at or above it are enough, found bit by bit without sorting."""
    low_B1 = torch.full_like(order_BV[:, :1], -(2**31))
    for bit in reversed(range(32)):
        middle_B1 = low_B1 + (1 << bit)
        low_B1 = torch.where(enough(order_BV >= middle_B1)[:, None], middle_B1, low_B1)
    return low_B1


def gumbel(seed_B: Tensor, position_B: Tensor, size: int) -> Tensor:
    """Draws [B, size] of the standard Gumbel distribution, fp32, a function of seed and position."""
    bits = philox(seed_B, position_B, size)
    # The largest draws come from the smallest uniforms, where fp32 is finest; none may round to 1.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


_MASK = 0xFFFFFFFF


def philox(seed_B: Tensor, position_B: Tensor, size: int) -> Tensor:
    """Random 32-bit integers, as int64 [B, size]: Philox 4x32 with ten rounds (Salmon et al. 2011).

    Key: seed. Counter: (position, block of four results, position's upper half, 0). In tensor arithmetic because
    torch's own generators take one seed for all rows (torch.func._random, experimental, is not in all versions that we
    run on).
    """
    block = torch.arange((size + 3) // 4, device=seed_B.device)[None]
    position, low, high = (x.long()[:, None] for x in (position_B, seed_B & _MASK, (seed_B >> 32) & _MASK))
    # The block is no word that the first round multiplies: Inductor would compute that product in 32 bits.
    counter: tuple[Tensor, ...] = (
        position & _MASK,
        block.expand(len(seed_B), -1),
        (position >> 32) & _MASK,
        torch.zeros_like(position),
    )
    for round_ in range(10):
        key = ((low + round_ * 0x9E3779B9) & _MASK, (high + round_ * 0xBB67AE85) & _MASK)
        counter = _round(counter, key)
    return torch.stack(torch.broadcast_tensors(*counter), -1).flatten(1)[:, :size]


def _round(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    a, b, c, d = counter
    above, low = _product(a, 0xD2511F53)
    other_above, other_low = _product(c, 0xCD9E8D57)
    return other_above ^ b ^ key[0], other_low, above ^ d ^ key[1], low


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of 32-bit numbers, within int64: compilers take that for granted."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK
