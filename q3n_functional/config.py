"""The model's configuration: one frozen dataclass with Hugging Face's field names, its checks and the presets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from q3n_functional import config_json, config_nemo
from q3n_functional.rotary import RopeParameters, rotary_dim

LayerType = Literal["linear_attention", "full_attention"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and switches of a Qwen3-Next model, named as in Hugging Face's config.json.

    Hashable, so that it can be an argument of a compiled or cached function. `extra` holds the keys of a config.json
    that mean nothing to the model, as (key, JSON text) pairs, so that they can be written back.

    Raises:
        ValueError: a value out of range, or two that contradict each other; the message names both and the remedy.
    """

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

    def __post_init__(self) -> None:
        _check_types(self)
        _check_layers(self)
        _check_attention(self)
        _check_rope(self)
        _check_feed_forward(self)
        _check_tokens(self)
        config_json.check_extra(self.extra)

    @classmethod
    def from_json(cls, source: Path | str | Mapping[str, Any]) -> Config:
        """The configuration in a config.json of Qwen3-Next, as transformers 4 or 5, vLLM or SGLang write it.

        Layers are given by `layer_types` or by `full_attention_interval` (every n-th is full attention), the rotary
        embedding at the top level, in `rope_scaling` or in `rope_parameters`; both forms may be there if they agree.
        Absent fields have the defaults of transformers' `Qwen3NextConfig`, except `rope_theta`, which must be given.

        Args:
            source: the path of the file, or its content.

        Raises:
            ValueError: not JSON, another model type, a setting that this model does not have, fields that contradict
                each other, or a value that `Config` refuses.
        """
        content = source if isinstance(source, Mapping) else _parse(Path(source))
        return cls(**config_json.read(content))

    @classmethod
    def from_nemo(cls, source: Mapping[str, Any]) -> Config:
        """The configuration in a NeMo or Megatron dict with `transformer_layer_spec` "megatron_qwen3_next".

        Sizes have Megatron's names. `layer_types` is any list of "full" and "linear". `attention_head_type` "MQA"
        means one key/value head, "GQA" `num_query_groups` of them. `linear_attention_clip_val` limits beta to
        [0, clip], which matters below 1 only, since beta is a sigmoid. None counts as absent. As in Megatron, an
        absent `num_query_groups` is `num_attention_heads`, `kv_channels` their share of the width, `ffn_hidden_size`
        four widths, `rotary_base` 10000, and a model without `num_moe_experts` is dense; other absent keys have the
        values of transformers' `Qwen3NextConfig`.

        Raises:
            ValueError: an unknown key (with the names near it), a setting that this model does not have, keys that
                contradict each other, or a value that `Config` refuses.
        """
        return cls(**config_nemo.read(source))

    def to_json(self, path: Path | str | None = None) -> dict[str, Any]:
        """The content of a config.json that transformers 4 and 5, vLLM and SGLang read; written to `path` if given.

        Layers and rotary embedding are given in the old and the new form, since each reader knows only one. Fields
        that only this package has are written where they differ from their defaults; other readers ignore them, so a
        model with a `linear_attention_clip_val` below 1 computes something else there.
        """
        content = config_json.write(self)
        if path is not None:
            Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return content

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` has a mixture of experts rather than one dense SwiGLU."""
        return (
            layer not in self.mlp_only_layers and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        )


def _parse(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it must hold the object that transformers writes") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must hold one JSON object")
    return content


POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim", "linear_attention_chunk_size", "decoder_sparse_step"),
)
COUNTS = (
    *("intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "num_nextn_predict_layers"),
)
SWITCHES = ("linear_attention_use_recurrent", "norm_topk_prob", "output_router_logits", "tie_word_embeddings")
NUMBERS = ("linear_attention_clip_val", "router_aux_loss_coef", "mtp_loss_scaling_factor", "rms_norm_eps")
TUPLES = ("layer_types", "mlp_only_layers", "extra")


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _check_types(c: Config) -> None:
    for names, allowed, fits in (
        (POSITIVE, "a positive integer", lambda value: _is_integer(value, 1)),
        (COUNTS, "an integer of at least 0", lambda value: _is_integer(value, 0)),
        (SWITCHES, "true or false", lambda value: isinstance(value, bool)),
        ((*NUMBERS, "initializer_range"), "a finite number of at least 0", _is_number),
        (TUPLES, "a tuple", lambda value: isinstance(value, tuple)),
    ):
        for name in names:
            if not fits(getattr(c, name)):
                raise ValueError(f"{name} is {getattr(c, name)!r}; it must be {allowed}")
    if not isinstance(c.rope_parameters, RopeParameters):
        raise ValueError(f"rope_parameters is {c.rope_parameters!r}; it must be a RopeParameters")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _check_layers(c: Config) -> None:
    if len(c.layer_types) != c.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(c.layer_types)} entries but num_hidden_layers is {c.num_hidden_layers}; "
            "give one entry a layer"
        )
    for i, kind in enumerate(c.layer_types):
        if kind not in get_args(LayerType):
            raise ValueError(f"layer_types[{i}] is {kind!r}; it must be one of {', '.join(get_args(LayerType))}")
    for layer in c.mlp_only_layers:
        if not _is_integer(layer, 0) or layer >= c.num_hidden_layers:
            raise ValueError(
                f"mlp_only_layers contains {layer!r}; num_hidden_layers {c.num_hidden_layers} allows "
                f"0 to {c.num_hidden_layers - 1}"
            )
    if c.num_nextn_predict_layers > 1:
        raise ValueError(f"num_nextn_predict_layers is {c.num_nextn_predict_layers}; Qwen3-Next has 0 or 1")


def _check_multiple(c: Config, whole: str, part: str) -> None:
    if getattr(c, whole) % getattr(c, part):
        raise ValueError(
            f"{whole} is {getattr(c, whole)}; it must be a multiple of {part}, which is {getattr(c, part)}"
        )


def _check_attention(c: Config) -> None:
    _check_multiple(c, "num_attention_heads", "num_key_value_heads")
    _check_multiple(c, "linear_num_value_heads", "linear_num_key_heads")
    if c.linear_attention_clip_val == 0:
        raise ValueError("linear_attention_clip_val is 0, which would stop all writing to the state; it must exceed 0")


def _check_rope(c: Config) -> None:
    rope, dim = c.rope_parameters, rotary_dim(c.head_dim, c.rope_parameters)
    if dim % 2 or not 2 <= dim <= c.head_dim:
        raise ValueError(
            f"partial_rotary_factor {rope.partial_rotary_factor:g} of head_dim {c.head_dim} rotates {dim} dims; "
            f"it must be an even number from 2 to head_dim"
        )
    if rope.rope_type == "dynamic" and dim == 2:
        raise ValueError("rope_type 'dynamic' rotates 2 dims; its exponent dim / (dim - 2) needs at least 4")
    for name in ("short_factor", "long_factor"):
        row = getattr(rope, name)
        if row is not None and len(row) != dim // 2:
            raise ValueError(f"{name} has {len(row)} entries; {dim} rotated dims need {dim // 2}")


def _check_feed_forward(c: Config) -> None:
    if c.num_experts_per_tok > c.num_experts > 0:
        raise ValueError(
            f"num_experts_per_tok is {c.num_experts_per_tok}; it must not exceed num_experts, {c.num_experts}"
        )
    sparse = [c.is_sparse(i) for i in range(c.num_hidden_layers)]
    if not all(sparse) and c.intermediate_size == 0:
        raise ValueError(f"intermediate_size is 0, but layer {sparse.index(False)} is dense; it must be positive")
    if any(sparse) or (c.num_nextn_predict_layers and c.num_experts):
        for name in ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"):
            if getattr(c, name) == 0:
                raise ValueError(f"{name} is 0, but there are layers with {c.num_experts} experts; it must be positive")


def _check_tokens(c: Config) -> None:
    ends = c.eos_token_id if isinstance(c.eos_token_id, tuple) else (c.eos_token_id,)
    for name, ids in (("bos", (c.bos_token_id,)), ("eos", ends), ("pad", (c.pad_token_id,))):
        for token in ids:
            if token is not None and not _is_integer(token, 0):
                raise ValueError(f"{name}_token_id contains {token!r}; token ids are integers of at least 0")


def tiny() -> Config:
    """The demo: every kind of layer of Qwen3-Next at a size that learns on a CPU in minutes."""
    return Config(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=4,
        layer_types=("linear_attention", "linear_attention", "linear_attention", "full_attention"),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters=RopeParameters(rope_theta=10_000.0),
        max_position_embeddings=2048,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_nextn_predict_layers=1,
    )


def small() -> Config:
    """111 M parameters, every kind of layer, at head sizes that the kernels are made for: minutes on one GPU."""
    return dataclasses.replace(
        tiny(),
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=8,
        layer_types=tiny().layer_types * 2,
        num_attention_heads=8,
        head_dim=128,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
        shared_expert_intermediate_size=192,
    )


def qwen3_next_80b_a3b() -> Config:
    """The published Qwen3-Next-80B-A3B, multi-token prediction included."""
    return Config.from_json(
        {
            "model_type": "qwen3_next",
            "intermediate_size": 5120,
            "max_position_embeddings": 262_144,
            "rope_theta": 10_000_000.0,
            "num_nextn_predict_layers": 1,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
        }
    )


PRESETS: dict[str, Callable[[], Config]] = {"tiny": tiny, "small": small, "qwen3_next_80b_a3b": qwen3_next_80b_a3b}
