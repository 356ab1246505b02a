"""Small configurations and parameters that several tests share."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.utils._pytree as pytree

from q3n_functional import params
from q3n_functional.config import Config
from q3n_functional.rotary import RopeParameters

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "layer_types": ("linear_attention", "linear_attention", "linear_attention", "full_attention"),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": RopeParameters(rope_theta=10000.0),
    "max_position_embeddings": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_attention_chunk_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_nextn_predict_layers": 1,
    "initializer_range": 0.1,
    "router_aux_loss_coef": 0.01,
}


def small(**changes: Any) -> Config:
    """A model of four layers, mixture of experts and prediction module on, whose parts all differ in size."""
    return Config(**{**SMALL, **changes})


def perturbed(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> params.Parameters:
    """Parameters whose vectors (norms, decays) are random too: their initial zeros and ones would hide faults."""
    generator = torch.Generator().manual_seed(seed)

    def shake(leaf: torch.Tensor) -> torch.Tensor:
        return (leaf + 0.2 * torch.randn(leaf.shape, generator=generator) if leaf.ndim == 1 else leaf).to(dtype)

    return cast(params.Parameters, pytree.tree_map(shake, params.init(config, seed)))


def trainable(tree: params.Parameters) -> params.Parameters:
    """The same values as leaves that take gradients."""
    return cast(params.Parameters, pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), tree))


def slower(tree: params.Parameters, by: float = 4.0) -> params.Parameters:
    """The same model with decays slower by exp(by), so that a state that leaks or is lost shows in the results."""
    layers = tuple(
        layer._replace(mixer=layer.mixer._replace(A_log=layer.mixer.A_log - by))
        if isinstance(layer.mixer, params.LinearAttention)
        else layer
        for layer in tree.layers
    )
    return tree._replace(layers=layers)
