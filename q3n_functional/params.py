"""The parameter tree: what the leaves are called, their shapes, logical axes, storage and initial values.

A tree is nested NamedTuples. `spec(config)` has a `Spec` at every leaf, `init(config, seed)` a tensor; everything
else that needs to know about parameters (checkpoint names, placements, weight decay, counts) is read off the first.
Parts that a model lacks (a tied head, no prediction module) are the empty tuple, which has no leaves.

Axis letters: V vocabulary, D model width, Q query rows (heads x head dim), G key/value rows, N key rows and M value
rows of linear attention, H its value heads, K a head dim, C convolution taps, E experts, F expert width, R scores of
the router, W width of a dense or shared SwiGLU, X the concatenated pair that the prediction module projects. An axis
of length 1 is written 1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from q3n_functional.config import Config

Init = Literal["normal", "zeros", "ones", "log_uniform"]


class LinearAttention(NamedTuple):
    """Gated DeltaNet. Rows are flat and in head order; value head h reads key head h // (value heads / key heads)."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor
    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    out: Tensor


class FullAttention(NamedTuple):
    """Softmax attention with an output gate per query head and normalised queries and keys."""

    q: Tensor
    gate: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor
    k_norm: Tensor
    out: Tensor


class SwiGLU(NamedTuple):
    """`down(silu(gate(x)) * up(x))`; the experts' leaves carry a leading expert axis."""

    gate: Tensor
    up: Tensor
    down: Tensor


class MixtureOfExperts(NamedTuple):
    """Routed experts beside one shared expert that has a scalar gate."""

    router: Tensor
    experts: SwiGLU
    shared_expert: SwiGLU
    shared_expert_gate: Tensor


class DecoderLayer(NamedTuple):
    """One pre-norm residual layer."""

    input_layernorm: Tensor
    mixer: LinearAttention | FullAttention
    post_attention_layernorm: Tensor
    mlp: SwiGLU | MixtureOfExperts


class MultiTokenPrediction(NamedTuple):
    """The module that predicts the token after the next, sharing the embedding and the head."""

    pre_fc_norm_embedding: Tensor
    pre_fc_norm_hidden: Tensor
    fc: Tensor
    layer: DecoderLayer
    norm: Tensor


class Parameters(NamedTuple):
    """A whole model. `lm_head` is () when tied to the embedding, `mtp` is () without the prediction module."""

    embed_tokens: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: Tensor
    lm_head: Tensor | tuple[()]
    mtp: MultiTokenPrediction | tuple[()]


@dataclass(frozen=True)
class Spec:
    """What one leaf is: shape, a letter an axis, initial values, and its dtype where that is not the model's."""

    shape: tuple[int, ...]
    axes: str
    init: Init
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _leaf(axes: str, *shape: int, init: Init = "normal", dtype: torch.dtype | None = None) -> Tensor:
    # A tree of specs has the parameter tree's types, so that one set of NamedTuples serves both.
    return cast(Tensor, Spec(shape, axes, init, dtype))


def _norm(width: int, axis: str = "D") -> Tensor:
    return _leaf(axis, width, init="zeros")


def _linear_attention(c: Config) -> LinearAttention:
    key, value = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
    heads, width, taps = c.linear_num_value_heads, c.hidden_size, c.linear_conv_kernel_dim
    return LinearAttention(
        q=_leaf("ND", key, width),
        k=_leaf("ND", key, width),
        v=_leaf("MD", value, width),
        z=_leaf("MD", value, width),
        b=_leaf("HD", heads, width),
        a=_leaf("HD", heads, width),
        conv_q=_leaf("NC", key, taps),
        conv_k=_leaf("NC", key, taps),
        conv_v=_leaf("MC", value, taps),
        A_log=_leaf("H", heads, init="log_uniform", dtype=torch.float32),
        dt_bias=_leaf("H", heads, init="ones", dtype=torch.float32),
        norm=_leaf("K", c.linear_value_head_dim, init="ones", dtype=torch.float32),
        out=_leaf("DM", width, value),
    )


def _full_attention(c: Config) -> FullAttention:
    query, kv, width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size
    return FullAttention(
        q=_leaf("QD", query, width),
        gate=_leaf("QD", query, width),
        k=_leaf("GD", kv, width),
        v=_leaf("GD", kv, width),
        q_norm=_norm(c.head_dim, "K"),
        k_norm=_norm(c.head_dim, "K"),
        out=_leaf("DQ", width, query),
    )


def _swiglu(width: int, inner: int) -> SwiGLU:
    return SwiGLU(_leaf("WD", inner, width), _leaf("WD", inner, width), _leaf("DW", width, inner))


def _experts(num: int, width: int, inner: int) -> SwiGLU:
    rows = _leaf("EFD", num, inner, width)
    return SwiGLU(rows, rows, _leaf("EDF", num, width, inner))


def _mixture_of_experts(c: Config) -> MixtureOfExperts:
    return MixtureOfExperts(
        router=_leaf("RD", c.num_experts, c.hidden_size),
        experts=_experts(c.num_experts, c.hidden_size, c.moe_intermediate_size),
        shared_expert=_swiglu(c.hidden_size, c.shared_expert_intermediate_size),
        shared_expert_gate=_leaf("1D", 1, c.hidden_size),
    )


def _decoder_layer(c: Config, mixer: LinearAttention | FullAttention, sparse: bool) -> DecoderLayer:
    mlp = _mixture_of_experts(c) if sparse else _swiglu(c.hidden_size, c.intermediate_size)
    return DecoderLayer(_norm(c.hidden_size), mixer, _norm(c.hidden_size), mlp)


def _multi_token_prediction(c: Config) -> MultiTokenPrediction:
    width = c.hidden_size
    return MultiTokenPrediction(
        pre_fc_norm_embedding=_norm(width),
        pre_fc_norm_hidden=_norm(width),
        fc=_leaf("DX", width, 2 * width),
        layer=_decoder_layer(c, _full_attention(c), c.num_experts > 0),
        norm=_norm(width),
    )


def spec(config: Config) -> Parameters:
    """The tree of `Spec` leaves of `config`'s model; costs no memory at any size."""
    layers = tuple(
        _decoder_layer(
            config,
            _linear_attention(config) if kind == "linear_attention" else _full_attention(config),
            config.is_sparse(i),
        )
        for i, kind in enumerate(config.layer_types)
    )
    vocabulary = _leaf("VD", config.vocab_size, config.hidden_size)
    return Parameters(
        embed_tokens=vocabulary,
        layers=layers,
        norm=_norm(config.hidden_size),
        lm_head=() if config.tie_word_embeddings else vocabulary,
        mtp=_multi_token_prediction(config) if config.num_nextn_predict_layers else (),
    )


def path_name(path: pytree.KeyPath) -> str:
    """The dotted name of a leaf, such as `layers.3.mixer.q`."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", None))) for key in path)


def named_leaves(tree: Parameters) -> dict[str, Tensor]:
    """Leaves by dotted name, in tree order; of specs where `tree` is a tree of specs."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def named_specs(config: Config) -> dict[str, Spec]:
    """The `Spec` of every leaf by dotted name, in tree order."""
    return cast(dict[str, Spec], named_leaves(spec(config)))


def count(config: Config) -> int:
    """Number of parameters, prediction module included."""
    return sum(leaf.numel for leaf in named_specs(config).values())


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def init_leaf(name: str, leaf: Spec, seed: int, std: float) -> Tensor:
    """The initial fp32 values of one leaf on the CPU, a function of its name and `seed` alone.

    Matrices are normal with standard deviation `std`; A_log is the logarithm of U(0.01, 16), as transformers draws it.
    """
    if leaf.init == "zeros":
        return torch.zeros(leaf.shape)
    if leaf.init == "ones":
        return torch.ones(leaf.shape)
    generator, values = _generator(name, seed), torch.empty(leaf.shape)
    if leaf.init == "log_uniform":
        return values.uniform_(0.01, 16.0, generator=generator).log_()
    return values.normal_(0.0, std, generator=generator)


def init(
    config: Config, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Parameters:
    """Random parameters, the same on every device and in every order of creation.

    `dtype` is the storage of the leaves that name none themselves; A_log, dt_bias and the gated norm's weight are
    always fp32, because their rounding error would be multiplied along the sequence.
    """

    def make(path: pytree.KeyPath, leaf: Tensor) -> Tensor:
        wanted = cast(Spec, leaf)
        values = init_leaf(path_name(path), wanted, seed, config.initializer_range)
        return values.to(device, wanted.dtype or dtype)

    return cast(Parameters, pytree.tree_map_with_path(make, spec(config)))
