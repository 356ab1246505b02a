"""The model's configuration: one frozen dataclass with Hugging Face's field names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from q3n_functional.rotary import RopeParameters

LayerType = Literal["linear_attention", "full_attention"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and switches of a Qwen3-Next model, named as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[LayerType, ...]
    # full attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_parameters: RopeParameters
    max_position_embeddings: int
    # linear attention
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    linear_attention_chunk_size: int = 64
    linear_attention_use_recurrent: bool = False
    linear_attention_clip_val: float = 5.0
    # feed-forward
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False
    # multi-token prediction
    num_nextn_predict_layers: int = 0
    mtp_loss_scaling_factor: float = 0.1
    # the rest
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    extra: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` has a mixture of experts rather than one dense SwiGLU."""
        return (
            layer not in self.mlp_only_layers and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        )
