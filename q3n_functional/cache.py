"""What a sequence leaves behind for its continuation: an immutable pytree, one entry a layer.

Letters: B batch, S capacity in tokens, G key/value heads, K head dim (or key dim), H value heads, V value dim,
C convolved channels, W convolution taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from q3n_functional.config import Config


class LinearState(NamedTuple):
    """Of a Gated DeltaNet layer: the last inputs of the convolution [B, C, W-1] and the state [B, H, K, V] in fp32."""

    conv: Tensor
    recurrent: Tensor


class KeyValues(NamedTuple):
    """Of a full-attention layer: keys and values [B, S, G, K]; what lies behind `Cache.lengths` is not read."""

    k: Tensor
    v: Tensor


class Cache(NamedTuple):
    """The states of all layers and the number of tokens in them, int32 [B]."""

    layers: tuple[LinearState | KeyValues, ...]
    lengths_B: Tensor


def empty(config: Config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Cache:
    """The cache of `batch` sequences without tokens, with room for `capacity` tokens each.

    `dtype` is the activations'; recurrent states are fp32 (fp64 for fp64 activations).
    """
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    heads, value = config.linear_num_value_heads, config.linear_value_head_dim
    wide = torch.promote_types(dtype, torch.float32)

    def layer(kind: str) -> LinearState | KeyValues:
        if kind == "linear_attention":
            channels, taps = 2 * keys + heads * value, config.linear_conv_kernel_dim
            conv = torch.zeros(batch, channels, taps - 1, dtype=dtype, device=device)
            state = torch.zeros(batch, heads, config.linear_key_head_dim, value, dtype=wide, device=device)
            return LinearState(conv, state)
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        return KeyValues(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    layers = tuple(layer(kind) for kind in config.layer_types)
    return Cache(layers, torch.zeros(batch, dtype=torch.int32, device=device))
