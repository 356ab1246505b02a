"""Rotary position embedding: inverse frequencies of every scaling type, and the rotation.

Shape letters: B batch, T time, H heads, K head dim, R half the number of rotated dims of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]

REQUIRED: dict[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
OPTIONAL: dict[RopeType, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """The `rope_parameters` of config.json, under the same names and with the same meaning.

    `rope_theta` is the base of the frequencies and `partial_rotary_factor` the share of each head that is rotated.
    `original_max_position_embeddings` is the length that the model was trained on before its context was extended,
    `factor` the extension. The other fields belong to one or two types; None leaves the type's own default.

    Raises:
        ValueError: an unknown `rope_type`, a field that the type needs and lacks or does not know, a value that is
            out of range.
    """

    rope_theta: float
    rope_type: RopeType = "default"
    partial_rotary_factor: float = 0.25
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_values(self)


def scaling_fields(rope: RopeParameters) -> dict[str, object]:
    """The fields beyond the base and the rotated share that are set, by name, in the order of the dataclass."""
    base = ("rope_theta", "rope_type", "partial_rotary_factor")
    fields = {name: value for name, value in vars(rope).items() if name not in base and value is not None}
    if rope.truncate:
        del fields["truncate"]
    return fields


def _check_fields(rope: RopeParameters) -> None:
    if rope.rope_type not in REQUIRED:
        raise ValueError(f"rope_type is {rope.rope_type!r}; supported are {', '.join(get_args(RopeType))}")
    required, given = REQUIRED[rope.rope_type], scaling_fields(rope)
    known = {*required, *OPTIONAL.get(rope.rope_type, ())}
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"rope_type {rope.rope_type!r} needs {', '.join(required)}; missing: {', '.join(missing)}")
    if surplus := [name for name in given if name not in known]:
        allowed = f"takes only {', '.join(sorted(known))}" if known else "takes no scaling fields"
        raise ValueError(f"rope_type {rope.rope_type!r} {allowed}; remove {', '.join(surplus)} or change rope_type")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(name: str, value: object, low: float, inclusive: bool) -> None:
    if not _is_number(value) or cast(float, value) < low or (cast(float, value) == low and not inclusive):
        limit = "at least" if inclusive else "greater than"
        raise ValueError(f"rope parameter {name} is {value!r}; it must be a finite number {limit} {low:g}")


def _check_values(rope: RopeParameters) -> None:
    _check_number("rope_theta", rope.rope_theta, 1.0, inclusive=False)
    _check_number("partial_rotary_factor", rope.partial_rotary_factor, 0.0, inclusive=False)
    given = scaling_fields(rope)
    for name in ("beta_fast", "beta_slow", "attention_factor", "low_freq_factor", "high_freq_factor"):
        _check_number(name, given.get(name, 1.0), 0.0, inclusive=False)
    for name in ("mscale", "mscale_all_dim"):
        _check_number(name, given.get(name, 1.0), 0.0, inclusive=True)
    _check_number("factor", given.get("factor", 1.0), 1.0, inclusive=True)
    for name in ("short_factor", "long_factor"):
        _check_row(name, given.get(name, ()))
    original = given.get("original_max_position_embeddings", 2)
    if not isinstance(original, int) or isinstance(original, bool) or original < 2:
        raise ValueError(f"original_max_position_embeddings is {original!r}; it must be an integer of at least 2")
    if not isinstance(rope.truncate, bool):
        raise ValueError(f"rope parameter truncate is {rope.truncate!r}; it must be true or false")
    _check_order(rope)


def _check_row(name: str, values: object) -> None:
    if not isinstance(values, tuple):
        raise ValueError(f"rope parameter {name} is {values!r}; it must be a tuple of numbers, one per frequency")
    for i, value in enumerate(values):
        _check_number(f"{name}[{i}]", value, 0.0, inclusive=False)


def _check_order(rope: RopeParameters) -> None:
    slow, fast = _yarn_betas(rope)
    if slow > fast:
        raise ValueError(f"beta_slow {slow:g} exceeds beta_fast {fast:g}; beta_fast must be the larger")
    if rope.rope_type == "llama3" and _number(rope.high_freq_factor) <= _number(rope.low_freq_factor):
        raise ValueError(
            f"high_freq_factor is {rope.high_freq_factor}; it must exceed low_freq_factor {rope.low_freq_factor}"
        )


def _number(value: float | None) -> float:
    assert value is not None, "checked by RopeParameters"
    return value


def rotary_dim(head_dim: int, rope: RopeParameters) -> int:
    """Number of dims at the head's start that are rotated, twice the number of frequencies."""
    return int(head_dim * rope.partial_rotary_factor)


def needs_lengths(rope: RopeParameters) -> bool:
    """Whether the frequencies depend on the length of the text, so that `cos_sin` must be given lengths."""
    return rope.rope_type in ("dynamic", "longrope")


def attention_factor(max_position_embeddings: int, rope: RopeParameters) -> float:
    """What cosines and sines are multiplied by, so that attention is as sharp over a longer context.

    yarn: 0.1 ln(factor) + 1 (arXiv 2309.00071), or a ratio of two such terms where both mscale are given.
    longrope: sqrt(1 + ln(factor) / ln(original length)) (arXiv 2402.13753). 1 for the other types.
    """
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "yarn":
        return _yarn_attention_factor(_number(rope.factor), rope)
    if rope.rope_type == "longrope":
        original = _number(rope.original_max_position_embeddings)
        factor = max_position_embeddings / original if rope.factor is None else rope.factor
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0


def _yarn_attention_factor(factor: float, rope: RopeParameters) -> float:
    if rope.mscale and rope.mscale_all_dim:
        return (0.1 * rope.mscale * math.log(factor) + 1) / (0.1 * rope.mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def inverse_frequencies(
    lengths_BT: Tensor | None,
    head_dim: int,
    max_position_embeddings: int,
    rope: RopeParameters,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angle per position of each rotated pair, fp32: [R], or [B, T, R] where `needs_lengths(rope)`.

    The formulas are those of transformers' `modeling_rope_utils`. Where a type depends on the length, transformers
    takes one length for the whole batch, the largest position plus one, and `dynamic` also remembers it between
    calls. Here it is the length of the token's own document, so a document's rotation is the same whatever is
    batched or packed with it, and equal to transformers' for that document alone.

    Args:
        lengths_BT: int, the length of the document that each token belongs to; read only where `needs_lengths(rope)`.
        head_dim: dims of a head, of which `rotary_dim(head_dim, rope)` are rotated.
        max_position_embeddings: the configuration's; `dynamic` starts to scale beyond it.
        rope: base, type and scaling.
        device: where the frequencies are made, if `lengths_BT` does not say.

    Raises:
        ValueError: lengths are needed and absent.
    """
    dim = rotary_dim(head_dim, rope)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    if needs_lengths(rope) and lengths_BT is None:
        raise ValueError(f"lengths_BT is None, but rope_type {rope.rope_type!r} depends on each document's length")
    if rope.rope_type == "linear":
        return 1.0 / rope.rope_theta**exponents / _number(rope.factor)
    if rope.rope_type == "llama3":
        return _llama3(exponents, rope)
    if rope.rope_type == "yarn":
        return _yarn(exponents, dim, rope)
    if rope.rope_type == "dynamic":
        return _dynamic(exponents, cast(Tensor, lengths_BT), dim, max_position_embeddings, rope)
    if rope.rope_type == "longrope":
        return _longrope(exponents, cast(Tensor, lengths_BT), rope)
    return 1.0 / rope.rope_theta**exponents


def _llama3(exponents: Tensor, rope: RopeParameters) -> Tensor:
    # Long waves are stretched, short ones kept, and those between the two limits mixed by `smooth`.
    frequencies = 1.0 / rope.rope_theta**exponents
    low, high, factor = _number(rope.low_freq_factor), _number(rope.high_freq_factor), _number(rope.factor)
    turns = _number(rope.original_max_position_embeddings) * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def _yarn_betas(rope: RopeParameters) -> tuple[float, float]:
    return rope.beta_slow or 1.0, rope.beta_fast or 32.0


def _yarn(exponents: Tensor, dim: int, rope: RopeParameters) -> Tensor:
    # Pairs that turn more than beta_fast times over the original length are kept, those below beta_slow stretched.
    slow, fast = _yarn_betas(rope)
    low, high = _turning_pair(fast, dim, rope), _turning_pair(slow, dim, rope)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=exponents.device)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    wavelengths = rope.rope_theta**exponents
    return 1.0 / (_number(rope.factor) * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _turning_pair(turns: float, dim: int, rope: RopeParameters) -> float:
    """Index (a fraction) of the pair that turns `turns` times over the original length."""
    original = _number(rope.original_max_position_embeddings)
    return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))


def _dynamic(exponents: Tensor, lengths_BT: Tensor, dim: int, limit: int, rope: RopeParameters) -> Tensor:
    # 1 + factor * (ratio - 1) is exactly 1 up to the limit, where a short document must see the unscaled base.
    ratio_BT1 = (lengths_BT[..., None].float() / limit).clamp(min=1)
    base_BT1 = rope.rope_theta * (1 + _number(rope.factor) * (ratio_BT1 - 1)) ** (dim / (dim - 2))
    return 1.0 / base_BT1**exponents


def _longrope(exponents: Tensor, lengths_BT: Tensor, rope: RopeParameters) -> Tensor:
    assert rope.short_factor is not None, "checked by RopeParameters"
    assert rope.long_factor is not None, "checked by RopeParameters"
    is_long_BT1 = lengths_BT[..., None] > _number(rope.original_max_position_embeddings)
    factors_BTR = torch.where(is_long_BT1, _row(rope.long_factor, exponents), _row(rope.short_factor, exponents))
    return 1.0 / (factors_BTR * rope.rope_theta**exponents)


def _row(values: Sequence[float], like: Tensor) -> Tensor:
    # Filled on the device: torch.tensor(values) would copy from the host, which waits for the stream.
    return torch.cat([torch.full_like(like[:1], value) for value in values])


def cos_sin(
    positions_BT: Tensor, lengths_BT: Tensor | None, head_dim: int, max_position_embeddings: int, rope: RopeParameters
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, scaled by `attention_factor`: two fp32 tensors [B, T, R].

    Args:
        positions_BT: int, each token's position in its own document.
        lengths_BT: int, the length of each token's document; read only where `needs_lengths(rope)`, else may be None.
        head_dim, max_position_embeddings, rope: as in `inverse_frequencies`.

    Raises:
        ValueError: `needs_lengths(rope)` and `lengths_BT` is None.
    """
    frequencies = inverse_frequencies(lengths_BT, head_dim, max_position_embeddings, rope, positions_BT.device)
    angles_BTR = positions_BT[..., None].float() * frequencies
    scale = attention_factor(max_position_embeddings, rope)
    return angles_BTR.cos() * scale, angles_BTR.sin() * scale


def rotate(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotate the first 2R dims of each head and pass the others through; computed in fp32, returned in x's dtype.

    Dim i is paired with dim i + R (the half rotation of GPT-NeoX), as in transformers' Qwen3-Next.
    """
    half = cos_BTR.shape[-1]
    cos_BT1R, sin_BT1R = cos_BTR[:, :, None], sin_BTR[:, :, None]
    a, b, rest = x_BTHK[..., :half], x_BTHK[..., half : 2 * half], x_BTHK[..., 2 * half :]
    rotated = torch.cat([a * cos_BT1R - b * sin_BT1R, b * cos_BT1R + a * sin_BT1R], dim=-1)
    return torch.cat([rotated.to(x_BTHK.dtype), rest], dim=-1)
