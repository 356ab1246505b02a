"""Configuration: reading and writing config.json and NeMo dicts, and what is refused."""

import json
from dataclasses import fields, replace

import pytest

from q3n_functional import config_json
from q3n_functional.config import PRESETS, Config, tiny
from q3n_functional.rotary import RopeParameters

transformers = pytest.importorskip("transformers")

LINEAR, FULL = "linear_attention", "full_attention"

# The keys that a version 4 file of the published model has.
V4 = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}


def without(content, *names):
    return {name: value for name, value in content.items() if name not in names}


def refused(match, **changes):
    with pytest.raises(ValueError, match=match):
        Config.from_json(V4 | changes)


def test_v4_file():
    config = Config.from_json(V4)
    assert config.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 12
    assert config.rope_parameters == RopeParameters(rope_theta=1e7, partial_rotary_factor=0.25)
    assert config.num_experts == 512
    assert config.num_nextn_predict_layers == 0
    assert dict(config.extra) == {
        "torch_dtype": '"bfloat16"',
        "transformers_version": '"4.57.0.dev0"',
        "use_cache": "true",
    }
    assert hash(config) == hash(Config.from_json(dict(reversed(V4.items()))))


def test_v5_file_means_the_same_as_v4():
    theirs = transformers.Qwen3NextConfig(**V4)
    v5 = json.loads(theirs.to_json_string(use_diff=False))
    assert "rope_theta" not in v5
    assert "full_attention_interval" not in v5
    assert replace(Config.from_json(v5), extra=()) == replace(Config.from_json(V4), extra=())


def test_v5_file_as_saved(tmp_path):
    transformers.Qwen3NextConfig(**V4, num_experts=8, num_experts_per_tok=2).save_pretrained(tmp_path)
    config = Config.from_json(tmp_path / "config.json")
    assert replace(config, extra=()) == replace(Config.from_json(V4), extra=(), num_experts=8, num_experts_per_tok=2)


def test_both_forms_where_they_agree():
    both = V4 | {
        "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }
    assert Config.from_json(both) == Config.from_json(V4)


def test_scaling_in_the_old_and_the_new_form():
    old = Config.from_json(V4 | {"rope_scaling": YARN})
    assert old.rope_parameters.rope_type == "yarn"
    assert Config.from_json(V4 | {"rope_scaling": without(YARN, "rope_type") | {"type": "yarn"}}) == old
    new = without(V4, "rope_theta", "rope_scaling", "partial_rotary_factor")
    assert Config.from_json(new | {"rope_parameters": YARN | {"type": "yarn", "rope_theta": 1e7}}) == old
    assert Config.from_json(new | {"rope_parameters": YARN | {"rope_theta": 1e7}, "rope_scaling": YARN}) == old


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name, tmp_path):
    config = PRESETS[name]()
    content = config.to_json(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == content
    assert Config.from_json(tmp_path / "config.json") == config
    assert list(content) == sorted(content)


def test_round_trip_keeps_everything():
    longrope = RopeParameters(
        rope_theta=5e5,
        rope_type="longrope",
        short_factor=(1.0,) * 4,
        long_factor=(2.0, 3.0, 4.0, 5.5),
        original_max_position_embeddings=512,
    )
    config = replace(
        tiny(),
        layer_types=(FULL, FULL, LINEAR, FULL),
        rope_parameters=longrope,
        linear_attention_chunk_size=32,
        linear_attention_use_recurrent=True,
        linear_attention_clip_val=0.5,
        mtp_loss_scaling_factor=0.3,
        mlp_only_layers=(1, 3),
        intermediate_size=96,
        eos_token_id=(1, 2),
        extra=(("architectures", '["Mine"]'), ("note", '{"a": [1, null]}')),
    )
    content = config.to_json()
    assert "full_attention_interval" not in content
    assert content["architectures"] == ["Mine"]
    assert Config.from_json(json.loads(json.dumps(content))) == config


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5])
def test_both_patterns_are_written(interval):
    content = replace(tiny(), layer_types=config_json.interval_layer_types(4, interval)).to_json()
    assert content["full_attention_interval"] == interval
    assert len(content["layer_types"]) == 4


def test_own_fields_are_written_only_where_they_differ():
    content = replace(tiny(), num_nextn_predict_layers=0).to_json()
    assert not config_json.OWN_DEFAULTS.keys() & content.keys()
    defaults = {field.name: field.default for field in fields(Config)}
    assert {name: defaults[name] for name in config_json.OWN_DEFAULTS} == config_json.OWN_DEFAULTS


SCALED = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512, "truncate": False, "beta_fast": 16.0},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "short_factor": (1.0,),
        "long_factor": (2.0,),
    },
}


@pytest.mark.parametrize("rope_type", SCALED)
@pytest.mark.parametrize("base", [make() for make in PRESETS.values()], ids=PRESETS)
def test_transformers_reads_every_field_as_we_do(base, rope_type):
    scaling = {k: v * (base.head_dim // 8) if isinstance(v, tuple) else v for k, v in SCALED[rope_type].items()}
    rope = RopeParameters(rope_theta=1e6, rope_type=rope_type, **scaling)
    config = replace(base, rope_parameters=rope, extra=(("use_cache", "false"),))
    content = json.loads(json.dumps(config.to_json()))
    theirs = transformers.Qwen3NextConfig(**content)
    for name in config_json.DEFAULTS:
        assert getattr(theirs, name) == content[name], name
    assert theirs.layer_types == content["layer_types"]
    assert theirs.use_cache is False
    assert theirs.architectures == ["Qwen3NextForCausalLM"]
    assert theirs.rope_parameters == content["rope_parameters"]


def test_the_defaults_are_those_of_transformers():
    theirs = transformers.Qwen3NextConfig()
    ours = Config.from_json({"model_type": "qwen3_next", "rope_theta": 10_000.0})
    content = ours.to_json()
    assert {name: getattr(theirs, name) for name in config_json.DEFAULTS} == {
        name: content[name] for name in config_json.DEFAULTS
    }
    assert theirs.layer_types == content["layer_types"]
    assert theirs.rope_parameters == content["rope_parameters"]


def test_json_that_contradicts_itself():
    refused(r"layer_types .* contradicts full_attention_interval 4", layer_types=[FULL] * 48)
    refused(
        r"rope_theta is 10000000 at the top level but 10000.0 in rope_parameters", rope_parameters={"rope_theta": 1e4}
    )
    refused(r"rope_type is 'yarn' in rope_scaling but 'linear'", rope_scaling={"type": "yarn", "rope_type": "linear"})
    refused(r"partial_rotary_factor is 0.25 .* but 0.5", rope_parameters={"partial_rotary_factor": 0.5})
    refused(
        r"original_max_position_embeddings is 8 .* but 262144", original_max_position_embeddings=8, rope_scaling=YARN
    )
    refused(
        r"layer_types has 48 entries but num_hidden_layers is 47",
        **{"num_hidden_layers": 47, "layer_types": [FULL] * 48, "full_attention_interval": None},
    )


def test_rope_theta_must_be_given():
    for change in ({}, {"rope_theta": None}, {"rope_parameters": {"rope_type": "default"}}):
        with pytest.raises(ValueError, match=r"rope_theta is missing.*10000000"):
            Config.from_json(without(V4, "rope_theta") | change)


def test_settings_of_other_models():
    refused(r"model_type is 'qwen3_5'; the only supported one is 'qwen3_next'", model_type="qwen3_5")
    refused(r"model_type is None", model_type=None)
    refused(r"hidden_act is 'gelu'; this model allows only 'silu'", hidden_act="gelu")
    refused(r"attention_bias is True; this model allows only False", attention_bias=True)
    refused(r"attention_dropout is 0.1; this model allows only 0.0", attention_dropout=0.1)
    refused(r"quantization_config is .*'fp8'.* convert", quantization_config={"quant_method": "fp8"})
    refused(r"attn_output_gate is False; this model allows only True", attn_output_gate=False)
    refused(r"per_layer_config is", per_layer_config={"0": {"hidden_size": 8}})
    refused(r"unknown rope parameter mrope_section", rope_scaling={"mrope_section": [11, 11, 10]})
    assert dict(Config.from_json(V4 | {"attn_output_gate": True}).extra)["attn_output_gate"] == "true"


def test_malformed_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        Config.from_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds a list"):
        Config.from_json(path)
    refused(r"num_hidden_layers is '48'; it must be a positive integer", num_hidden_layers="48")
    refused(r"full_attention_interval is 0; it must be a positive integer", full_attention_interval=0)
    refused(r"rope_scaling is 'yarn'; it must be an object", rope_scaling="yarn")
    refused(r"mlp_only_layers is 3; it must be a tuple", mlp_only_layers=3)
    refused(r"head_dim is None; it must be a positive integer", head_dim=None)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"vocab_size is 0; it must be a positive integer", {"vocab_size": 0}),
        (r"hidden_size is 1.5; it must be a positive integer", {"hidden_size": 1.5}),
        (r"num_experts is -1; it must be an integer of at least 0", {"num_experts": -1}),
        (r"norm_topk_prob is 1; it must be true or false", {"norm_topk_prob": 1}),
        (r"rms_norm_eps is nan; it must be a finite number", {"rms_norm_eps": float("nan")}),
        (r"layer_types is \['.*; it must be a tuple", {"layer_types": [FULL] * 4}),
        (r"layer_types has 1 entries but num_hidden_layers is 4", {"layer_types": (FULL,)}),
        (r"layer_types\[2\] is 'sliding'; it must be one of linear", {"layer_types": (FULL, FULL, "sliding", FULL)}),
        (
            r"linear_num_value_heads is 3; .* multiple of linear_num_key_heads, which is 2",
            {"linear_num_value_heads": 3},
        ),
        (r"num_attention_heads is 4; .* multiple of num_key_value_heads, which is 3", {"num_key_value_heads": 3}),
        (r"num_experts_per_tok is 9; it must not exceed num_experts, 8", {"num_experts_per_tok": 9}),
        (r"num_experts_per_tok is 0, but there are layers with 8 experts", {"num_experts_per_tok": 0}),
        (r"shared_expert_intermediate_size is 0", {"shared_expert_intermediate_size": 0}),
        (r"intermediate_size is 0, but layer 1 is dense", {"mlp_only_layers": (1,)}),
        (r"intermediate_size is 0, but layer 0 is dense", {"num_experts": 0}),
        (r"mlp_only_layers contains 4; num_hidden_layers 4 allows 0 to 3", {"mlp_only_layers": (4,)}),
        (r"num_nextn_predict_layers is 2; Qwen3-Next has 0 or 1", {"num_nextn_predict_layers": 2}),
        (r"linear_attention_clip_val is 0", {"linear_attention_clip_val": 0.0}),
        (r"eos_token_id contains -1", {"eos_token_id": (3, -1)}),
        (r"partial_rotary_factor 0.25 of head_dim 30 rotates 7 dims", {"head_dim": 30}),
        (r"rotates 48 dims", {"rope_parameters": RopeParameters(rope_theta=1e4, partial_rotary_factor=1.5)}),
        (r"rotates 0 dims", {"rope_parameters": RopeParameters(rope_theta=1e4, partial_rotary_factor=0.01)}),
        (r"rope_parameters is \{\}; it must be a RopeParameters", {"rope_parameters": {}}),
        (r"extra contains 'hidden_size', which is a field", {"extra": (("hidden_size", "8"),)}),
        (r"extra has 'none' for 'note'; it must be JSON text", {"extra": (("note", "none"),)}),
    ],
)
def test_every_way_of_making_a_config_is_checked(match, changes):
    with pytest.raises(ValueError, match=match):
        replace(tiny(), **changes)


@pytest.mark.parametrize(
    ("match", "rope_type", "changes"),
    [
        (r"rope_type 'dynamic' rotates 2 dims", "dynamic", {"partial_rotary_factor": 1 / 16}),
        (
            r"long_factor has 3 entries; 8 rotated dims need 4",
            "longrope",
            {"short_factor": (1.0,) * 4, "long_factor": (1.0,) * 3},
        ),
    ],
)
def test_scaling_that_does_not_fit_the_head(match, rope_type, changes):
    rope = RopeParameters(rope_theta=1e4, rope_type=rope_type, **SCALED[rope_type] | changes)
    with pytest.raises(ValueError, match=match):
        replace(tiny(), rope_parameters=rope)


SEED = {
    "transformer_layer_spec": "megatron_qwen3_next",
    "layer_types": ["full", "linear", "full", "linear"],
    "linear_attention_clip_val": 5.0,
    "linear_attention_chunk_size": 64,
    "attention_head_type": "MQA",
}


def test_nemo_dict_of_five_keys():
    config = Config.from_nemo(SEED)
    assert config.layer_types == (FULL, LINEAR, FULL, LINEAR)
    assert config.num_key_value_heads == 1
    assert (config.linear_attention_clip_val, config.linear_attention_chunk_size) == (5.0, 64)
    assert config.linear_attention_use_recurrent is False
    assert config.num_experts == 0
    assert config.intermediate_size == 4 * config.hidden_size


def test_nemo_sizes():
    config = Config.from_nemo(
        SEED
        | {
            "attention_head_type": "GQA",
            "num_query_groups": 2,
            "linear_attention_use_recurrent": True,
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "kv_channels": None,
            "encoder_seq_length": 128,
            "max_position_embeddings": 256,
            "rotary_base": 1e6,
            "rotary_percent": 0.5,
            "layernorm_epsilon": 1e-5,
            "init_method_std": 0.01,
            "num_moe_experts": 8,
            "moe_router_topk": 3,
            "moe_ffn_hidden_size": 32,
            "moe_shared_expert_intermediate_size": 48,
            "moe_aux_loss_coeff": 0.01,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_conv_kernel_dim": 3,
            "mtp_num_layers": 1,
            "mtp_loss_scaling_factor": 0.2,
            "share_embeddings_and_output_weights": True,
            "padded_vocab_size": 512,
            "normalization": "RMSNorm",
        }
    )
    assert config == Config(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=4,
        layer_types=(FULL, LINEAR, FULL, LINEAR),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=RopeParameters(rope_theta=1e6, partial_rotary_factor=0.5),
        max_position_embeddings=256,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=3,
        linear_attention_use_recurrent=True,
        intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        router_aux_loss_coef=0.01,
        num_nextn_predict_layers=1,
        mtp_loss_scaling_factor=0.2,
        rms_norm_eps=1e-5,
        initializer_range=0.01,
        tie_word_embeddings=True,
    )
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("pattern", [["linear"] * 5, ["full"] * 2, ["full", "full", "linear", "linear", "full"]])
def test_nemo_any_pattern(pattern):
    config = Config.from_nemo(SEED | {"layer_types": pattern})
    assert [kind.removesuffix("_attention") for kind in config.layer_types] == pattern


def test_nemo_without_pattern_or_head_type():
    config = Config.from_nemo({"num_layers": 8, "hidden_size": 128, "num_attention_heads": 4})
    assert config.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 2
    assert (config.num_key_value_heads, config.head_dim) == (4, 32)
    assert config.rope_parameters.rope_theta == 10_000.0


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"unknown key 'num_layer'; did you mean num_layers", {"num_layer": 4}),
        (r"unknown key 'zzz'; did you mean activation or", {"zzz": 4}),
        (r"transformer_layer_spec is 'gpt'; .* only 'megatron_qwen3_next'", {"transformer_layer_spec": "gpt"}),
        (r"normalization is 'layernorm'; .* 'RMSNorm' or 'rmsnorm'", {"normalization": "layernorm"}),
        (r"attention_head_type is 'MHA'; it must be 'MQA' or 'GQA'", {"attention_head_type": "MHA"}),
        (r"'MQA' has one key/value head but num_query_groups is 2", {"num_query_groups": 2}),
        (r"'GQA' does not say how many", {"attention_head_type": "GQA"}),
        (r"layer_types\[1\] is 'linear_attention'; it must be 'full' or 'linear'", {"layer_types": ["full", LINEAR]}),
        (r"layer_types is 'full'; it must be a list", {"layer_types": "full"}),
        (r"layer_types has 4 entries but num_hidden_layers is 5", {"num_layers": 5}),
        (r"padded_vocab_size is 6 but vocab_size is 5; they mean the same", {"vocab_size": 5, "padded_vocab_size": 6}),
        (r"num_attention_heads is 0; it must be a positive integer", {"num_attention_heads": 0}),
        (r"linear_attention_clip_val is -1", {"linear_attention_clip_val": -1}),
    ],
)
def test_nemo_refusals(match, changes):
    with pytest.raises(ValueError, match=match):
        Config.from_nemo(SEED | changes)


def test_sparse_layers():
    config = replace(tiny(), decoder_sparse_step=2, mlp_only_layers=(3,), intermediate_size=64)
    assert [config.is_sparse(i) for i in range(4)] == [False, True, False, False]
