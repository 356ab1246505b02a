"""The operators of Qwen3-Next as custom ops of torch: `torch.ops.q3n.*` behind one checked function each."""

from q3n_functional.ops.attention import attention
from q3n_functional.ops.causal_conv import causal_conv, causal_conv_qkv
from q3n_functional.ops.embedding import embedding
from q3n_functional.ops.float8_grouped_mm import float8_grouped_mm
from q3n_functional.ops.gated_delta_rule import gated_delta_rule, recurrent_gated_delta_rule
from q3n_functional.ops.grouped_swiglu import grouped_swiglu
from q3n_functional.ops.linear_cross_entropy import linear_cross_entropy
from q3n_functional.ops.linear_log_partition import linear_log_partition
from q3n_functional.ops.piece_attention import piece_attention
from q3n_functional.ops.rms_norm import pre_norm
from q3n_functional.ops.rms_norm_gated import rms_norm_gated
from q3n_functional.ops.router_logits import router_logits
from q3n_functional.ops.top_experts import top_experts

__all__ = [
    "attention",
    "causal_conv",
    "causal_conv_qkv",
    "embedding",
    "float8_grouped_mm",
    "gated_delta_rule",
    "grouped_swiglu",
    "linear_cross_entropy",
    "linear_log_partition",
    "piece_attention",
    "pre_norm",
    "recurrent_gated_delta_rule",
    "rms_norm_gated",
    "router_logits",
    "top_experts",
]
