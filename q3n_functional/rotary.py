"""Rotary position embedding: inverse frequencies of every scaling type, and the rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """The `rope_parameters` of config.json."""

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


def cos_sin(
    positions_BT: Tensor, lengths_BT: Tensor | None, head_dim: int, max_position_embeddings: int, rope: RopeParameters
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, R/2] in fp32 of the rotated dims R = int(head_dim * partial_rotary_factor)."""
    dim = int(head_dim * rope.partial_rotary_factor)
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions_BT.device) / dim
    angles = positions_BT[..., None].float() * (1.0 / rope.rope_theta**exponent)
    return angles.cos(), angles.sin()


def rotate(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotate the first R dims of each head (half rotation, as NeoX pairs dims) and pass the others through."""
    half = cos_BTR.shape[-1]
    cos, sin = cos_BTR[:, :, None].to(x_BTHK.dtype), sin_BTR[:, :, None].to(x_BTHK.dtype)
    a, b, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
