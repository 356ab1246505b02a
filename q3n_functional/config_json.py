"""Hugging Face's config.json of Qwen3-Next to the fields of `Config` and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from q3n_functional.rotary import RopeParameters, scaling_fields

if TYPE_CHECKING:
    from q3n_functional.config import Config

MODEL_TYPE = "qwen3_next"
ARCHITECTURES = ["Qwen3NextForCausalLM"]

# The class defaults of transformers 5.24's Qwen3NextConfig, which a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": (),
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
INTERVAL = 4
PARTIAL_ROTARY_FACTOR = 0.25

# Fields of ours that no other reader knows: written only where they differ from these, `Config`'s own defaults.
OWN_DEFAULTS: dict[str, Any] = {
    "linear_attention_chunk_size": 64,
    "linear_attention_use_recurrent": False,
    "linear_attention_clip_val": 5.0,
    "num_nextn_predict_layers": 0,
    "mtp_loss_scaling_factor": 0.1,
}

# Settings that other models have and this one does not: the only value each may have, and what that means.
FIXED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the activation is SiLU"),
    "attention_bias": (False, "projections have no bias"),
    "attention_dropout": (0.0, "there is no dropout"),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "attn_output_gate": (True, "attention always has an output gate"),
    "quantization_config": (None, "weights are not quantised; convert the checkpoint to bfloat16 first"),
    "compression_config": (None, "weights are not quantised; convert the checkpoint to bfloat16 first"),
    "per_layer_config": (None, "all layers of a kind have the same sizes"),
}

TOP_LEVEL_ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
LAYOUT = ("model_type", "layer_types", "full_attention_interval", "rope_scaling", "rope_parameters", *TOP_LEVEL_ROPE)


def read(source: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `Config` from the content of a config.json; see `Config.from_json`."""
    _check_model_type(source)
    _check_fixed(source)
    found = {name: source.get(name, default) for name, default in DEFAULTS.items()}
    found |= {name: source[name] for name in OWN_DEFAULTS if name in source}
    found = {name: _frozen(value) for name, value in found.items()}
    found["mlp_only_layers"] = found["mlp_only_layers"] or ()
    found["layer_types"] = _layer_types(source, found["num_hidden_layers"])
    found["rope_parameters"] = _rope_parameters(source)
    found["extra"] = _extra(source)
    return found


def write(config: Config) -> dict[str, Any]:
    """The content of a config.json, keys sorted; see `Config.to_json`."""
    content: dict[str, Any] = {"architectures": ARCHITECTURES, "model_type": MODEL_TYPE}
    content |= {name: _plain(getattr(config, name)) for name in DEFAULTS}
    own = {name: getattr(config, name) for name in OWN_DEFAULTS}
    content |= {name: value for name, value in own.items() if value != OWN_DEFAULTS[name]}
    content |= {name: value for name, (value, _) in FIXED.items()}
    content |= _written_layers(config.layer_types) | _written_rope(config.rope_parameters)
    content |= {name: json.loads(text) for name, text in config.extra}
    return dict(sorted(content.items()))


def check_extra(extra: Iterable[tuple[str, str]]) -> None:
    """Raise a ValueError if a kept key is one that `write` gives a value of its own, or is not JSON text."""
    for name, text in extra:
        if name in {*DEFAULTS, *OWN_DEFAULTS, *FIXED, *LAYOUT}:
            raise ValueError(f"extra contains {name!r}, which is a field of Config; set that field instead")
        try:
            json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra has {text!r} for {name!r}; it must be JSON text") from error


def interval_layer_types(num_layers: int, interval: int) -> tuple[str, ...]:
    """Layer types where every `interval`-th layer is full attention and the others are linear."""
    kinds = ("linear_attention", "full_attention")
    return tuple(kinds[(i + 1) % interval == 0] for i in range(num_layers))


def _extra(source: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    known = {*DEFAULTS, *OWN_DEFAULTS, *FIXED, *LAYOUT}
    kept = {name: value for name, value in source.items() if name not in known}
    if kept.get("architectures") == ARCHITECTURES:
        del kept["architectures"]  # `write` says so by itself
    return tuple(sorted((name, json.dumps(value, sort_keys=True)) for name, value in kept.items()))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _check_model_type(source: Mapping[str, Any]) -> None:
    model_type = source.get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(f"model_type is {model_type!r}; the only supported one is {MODEL_TYPE!r}")


def _check_fixed(source: Mapping[str, Any]) -> None:
    for name, (allowed, meaning) in {**FIXED, **REFUSED}.items():
        if source.get(name) not in (None, allowed):
            raise ValueError(f"{name} is {source[name]!r}; this model allows only {allowed!r}: {meaning}")


def _layer_types(source: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    given, interval = source.get("layer_types"), source.get("full_attention_interval")
    if given is not None and interval is None:
        return cast(tuple[str, ...], _frozen(given))
    interval = INTERVAL if interval is None else interval
    for name, value in (("num_hidden_layers", num_layers), ("full_attention_interval", interval)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    implied = interval_layer_types(num_layers, interval)
    if given is not None and _frozen(given) != implied:
        raise ValueError(
            f"layer_types {given} contradicts full_attention_interval {interval} with {num_layers} layers, "
            f"which means {list(implied)}; remove one of the two"
        )
    return implied


def _written_layers(layer_types: tuple[str, ...]) -> dict[str, Any]:
    # Readers that know only the interval must not meet one for a pattern that it cannot say.
    content: dict[str, Any] = {"layer_types": list(layer_types)}
    for interval in range(1, len(layer_types) + 2):
        if layer_types == interval_layer_types(len(layer_types), interval):
            return content | {"full_attention_interval": interval}
    return content


def _rope_sources(source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The three places where a config.json may speak of the rotary embedding, in one vocabulary, nulls left out."""
    places = {"at the top level": {name: source.get(name) for name in TOP_LEVEL_ROPE}}
    for name in ("rope_scaling", "rope_parameters"):
        places[f"in {name}"] = source.get(name) or {}
        if not isinstance(places[f"in {name}"], Mapping):
            raise ValueError(f"{name} is {source[name]!r}; it must be an object or null")
    return {place: {k: v for k, v in content.items() if v is not None} for place, content in places.items()}


def _rope_parameters(source: Mapping[str, Any]) -> RopeParameters:
    merged: dict[str, tuple[Any, str]] = {}
    for place, content in _rope_sources(source).items():
        for key, value in content.items():
            name = "rope_type" if key == "type" else key
            other, other_place = merged.setdefault(name, (value, place))
            if other != value:
                raise ValueError(
                    f"{name} is {other!r} {other_place} but {value!r} {place}; keep one, or make them equal"
                )
    return _rope_from({name: value for name, (value, _) in merged.items()})


def _rope_from(given: dict[str, Any]) -> RopeParameters:
    known = [f.name for f in fields(RopeParameters)]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"unknown rope parameter {', '.join(unknown)}; known are {', '.join(known)}")
    if "rope_theta" not in given:
        raise ValueError(
            "rope_theta is missing; give the base that the weights were trained with at the top level or in "
            "rope_parameters (Qwen3-Next-80B-A3B: 10000000), since a wrong one spoils the model silently"
        )
    values: dict[str, Any] = {name: _frozen(value) for name, value in given.items()}
    return RopeParameters(**{"partial_rotary_factor": PARTIAL_ROTARY_FACTOR, **values})


def _written_rope(rope: RopeParameters) -> dict[str, Any]:
    base = {"rope_theta": rope.rope_theta, "partial_rotary_factor": rope.partial_rotary_factor}
    kind = {"rope_type": rope.rope_type} | {name: _plain(value) for name, value in scaling_fields(rope).items()}
    scaling = None if rope.rope_type == "default" else kind
    return base | {"rope_scaling": scaling, "rope_parameters": base | kind}
