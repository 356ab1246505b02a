"""NeMo's and Megatron's names for a Qwen3-Next to the fields of `Config`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from q3n_functional.config_json import DEFAULTS, INTERVAL, PARTIAL_ROTARY_FACTOR, interval_layer_types
from q3n_functional.rotary import RopeParameters

LAYER_SPEC = "megatron_qwen3_next"
LAYER_TYPES = {"full": "full_attention", "linear": "linear_attention"}

# Megatron's name: ours.
RENAMED = {
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "num_query_groups": "num_key_value_heads",
    "encoder_seq_length": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "padded_vocab_size": "vocab_size",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
    "mtp_num_layers": "num_nextn_predict_layers",
}
SAME = (
    *("hidden_size", "num_attention_heads", "vocab_size", "linear_conv_kernel_dim", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads", "mtp_loss_scaling_factor"),
    *("linear_attention_clip_val", "linear_attention_chunk_size", "linear_attention_use_recurrent"),
)
# Settings of other models that a Qwen3-Next recipe spells out: the values that mean what this one does.
FIXED: dict[str, tuple[Any, ...]] = {
    "transformer_layer_spec": (LAYER_SPEC,),
    "experimental_attention_variant": ("gated_delta_net",),
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm", "rmsnorm"),
    "layernorm_zero_centered_gamma": (True,),
    "qk_layernorm": (True,),
    "attention_output_gate": (True,),
    "moe_shared_expert_gate": (True,),
    "gated_linear_unit": (True,),
    "activation": ("swiglu", "fast-swiglu"),
    "add_bias_linear": (False,),
    "bias": (False,),
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
}
OTHER = ("layer_types", "attention_head_type", "rotary_base", "rotary_percent")
KNOWN = (*RENAMED, *SAME, *FIXED, *OTHER)


def read(source: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `Config` from a NeMo or Megatron dict; see `Config.from_nemo`."""
    given = {name: value for name, value in source.items() if value is not None}
    _check_keys(given)
    found = _sizes(given)
    types = _layer_types(given.get("layer_types"))
    if types is not None:
        found.setdefault("num_hidden_layers", len(types))
    found = DEFAULTS | {"num_experts": 0} | _derived(found, given) | found
    found["layer_types"] = interval_layer_types(found["num_hidden_layers"], INTERVAL) if types is None else types
    found["rope_parameters"] = RopeParameters(
        rope_theta=given.get("rotary_base", 10_000.0),
        partial_rotary_factor=given.get("rotary_percent", PARTIAL_ROTARY_FACTOR),
    )
    return found


def _check_keys(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=3) or sorted(KNOWN)
            raise ValueError(f"unknown key {name!r}; did you mean {' or '.join(near)}?")
        if name in FIXED and value not in FIXED[name]:
            raise ValueError(f"{name} is {value!r}; this model allows only {' or '.join(map(repr, FIXED[name]))}")


def _sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {name: given[name] for name in SAME if name in given}
    for theirs, ours in RENAMED.items():
        if theirs not in given:
            continue
        value = given[theirs]
        # The sequence length of training stands in for the longest position, and may be shorter than it.
        if found.setdefault(ours, value) != value and theirs != "max_position_embeddings":
            raise ValueError(f"{theirs} is {value!r} but {ours} is {found[ours]!r}; they mean the same, keep one")
        found[ours] = value
    return found


def _derived(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron derives from the width and the heads where it is not given."""
    width, heads = (found.get(name, DEFAULTS[name]) for name in ("hidden_size", "num_attention_heads"))
    for name, value in (("hidden_size", width), ("num_attention_heads", heads)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    groups = _groups(given.get("attention_head_type"), given.get("num_query_groups"), heads)
    return {"intermediate_size": 4 * width, "head_dim": width // heads, "num_key_value_heads": groups}


def _groups(kind: str | None, groups: int | None, heads: int) -> int:
    if kind not in ("MQA", "GQA", None):
        raise ValueError(f"attention_head_type is {kind!r}; it must be 'MQA' or 'GQA'")
    if kind == "MQA" and groups not in (1, None):
        raise ValueError(
            f"attention_head_type 'MQA' has one key/value head but num_query_groups is {groups}; "
            "remove num_query_groups or say 'GQA'"
        )
    if kind == "GQA" and groups is None:
        raise ValueError("attention_head_type 'GQA' does not say how many key/value heads; give num_query_groups")
    return 1 if kind == "MQA" else heads if groups is None else groups


def _layer_types(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"layer_types is {given!r}; it must be a list with 'full' or 'linear' for each layer")
    for i, kind in enumerate(given):
        if kind not in list(LAYER_TYPES):
            raise ValueError(f"layer_types[{i}] is {kind!r}; it must be 'full' or 'linear'")
    return tuple(LAYER_TYPES[kind] for kind in given)
