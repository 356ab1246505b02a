"""The settings of a sequence's draws, without torch: commands show them before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Options:
    """How one sequence's tokens are drawn. Raises ValueError for a value out of range.

    Logits get the bias, the penalties in the order below and the temperature; then top_k, top_p (Holtzman et al. 2020)
    and min_p (Nguyen et al. 2024) leave tokens out, those that are equally likely together. The repetition penalty
    multiplies negative logits (Keskar et al. 2019). The command line's help is what stands here.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_k: draw among this many likeliest tokens; 0 for all.
        top_p: draw among the fewest likeliest tokens with this much probability together; 1 for all.
        min_p: draw among the tokens with at least this share of the likeliest one's probability.
        repetition_penalty: divides the logits of tokens in prompt and text; 1 for none.
        presence_penalty: subtracted once from the logits of tokens in the text.
        frequency_penalty: subtracted from the logits of tokens in the text as often as they are there.
        seed: the same seed writes the same text; any signed 64-bit integer.
        logit_bias: token ids and what is added to their logits, in pairs.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # As written, the comparisons refuse NaN too.
        _check("temperature", self.temperature, self.temperature >= 0, "0 (the likeliest token) or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1], 0 for all tokens")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0, 1 for none")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), abs(getattr(self, name)) <= 2, "in [-2, 2], 0 for none")
        _check("seed", self.seed, -(2**63) <= self.seed < 2**63, "a signed 64-bit integer")
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias of token {token}", bias, abs(bias) <= 100, "in [-100, 100]")

    @property
    def filtered(self) -> bool:
        """Whether some tokens may be left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def _check(name: str, value: float, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_bias(options: Options, vocab_size: int) -> None:
    """Raise ValueError for a logit bias of a token outside the vocabulary."""
    for token in options.logit_bias:
        _check("a token of logit_bias", token, 0 <= token < vocab_size, f"in [0, {vocab_size})")
