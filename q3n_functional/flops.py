"""What a training step costs: operations and compulsory bytes, region by region.

Letters: H heads, K key dim of a head, V its value dim, T tokens of a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from q3n_functional.config import Config
from q3n_functional.params import Spec, named_specs


class Cost(NamedTuple):
    """Of forward and backward together: multiplications plus additions, and bytes that must be read or written."""

    flops: float
    bytes: float

    def __add__(self, other: tuple[float, ...]) -> Cost:  # type: ignore[override]
        """The cost of both."""
        return Cost(self.flops + other[0], self.bytes + other[1])


def region_of(leaf: str, spec: Spec) -> str:
    """The region that multiplies by the parameter named `leaf`."""
    parts = leaf.split(".")
    if "experts" in parts:
        return "experts"
    if "shared_expert" in parts or parts[-1] == "shared_expert_gate":
        return "shared expert"
    if parts[-1] == "router":
        return "router"
    if leaf in ("embed_tokens", "lm_head"):
        return "loss" if leaf == "lm_head" else "embedding"
    return "dense feed-forward" if "W" in spec.axes else "projections"


def products(config: Config) -> dict[str, tuple[str, int, int]]:
    """By name of the parameter, every matrix that tokens are multiplied by: its region, rows and columns."""
    specs = named_specs(config)
    return {
        name: (region_of(name, leaf), leaf.shape[-2], leaf.shape[-1])
        for name, leaf in specs.items()
        if len(leaf.axes) > 1 and "C" not in leaf.axes and name != "embed_tokens"
    }


@lru_cache
def flops_per_token(config: Config, seq_len: int) -> float:
    """Multiplications and additions that a token costs in forward and backward, as MFU counts them.

    Three times the forward pass, whose operations are: 2 for every weight that the token meets in a matrix product or a
    convolution (of the experts, those that are chosen; the embedding is only looked up; the head is met again by the
    prediction module); 2 H K T for the scores and values of an attention layer of H heads of K over the causal half of
    T = `seq_len` tokens; and 6 H K V for the decay-free part of the delta rule's recurrence, which reads, writes and
    queries a state of K x V a head. Activation checkpointing recomputes more, which MFU does not count.
    """
    return sum(cost.flops for cost in costs(config, 1, seq_len).values())


def costs(config: Config, tokens: int, seq_len: int, itemsize: int = 2) -> dict[str, Cost]:
    """What `tokens` tokens in rows of `seq_len` cost in every region of a step but the optimizer.

    Activations and weights take `itemsize` bytes an element. Bytes are compulsory ones: forward reads inputs and
    weights and writes outputs, backward reads those and the outputs' gradients and writes gradients, each once, as if
    every region were one perfect kernel and nothing stayed in a cache between two of them.
    """
    found: dict[str, Cost] = {}

    def add(region: str, flops: float, elements: float) -> None:
        found[region] = found.get(region, Cost(0.0, 0.0)) + Cost(flops, elements * itemsize)

    for region, rows, columns, copies in _matrices(config):
        met = tokens * (config.num_experts_per_tok if region == "experts" else 1)
        # Three products of one size; weights are read twice, their gradient written once.
        activations = 3.0 * met * (rows + columns) if region != "experts" else 0.0
        weights = rows * columns * copies
        add(region, 6.0 * met * rows * columns, activations + 3.0 * weights)
    for region, flops, elements in _others(config, seq_len):
        add(region, 3.0 * tokens * flops, tokens * elements)
    return found


def _matrices(c: Config) -> list[tuple[str, int, int, int]]:
    """Region, rows, columns and number of every matrix; of experts all that there are, though a token meets few."""
    found = [
        (region, rows, columns, c.num_experts if region == "experts" else 1)
        for region, rows, columns in products(c).values()
    ]
    heads = c.tie_word_embeddings + c.num_nextn_predict_layers
    return found + [("loss", c.vocab_size, c.hidden_size, 1)] * heads


def _others(c: Config, seq_len: int) -> list[tuple[str, float, float]]:
    """Region, forward operations and elements moved in both directions, of a token, for all that is no product."""
    linear = c.layer_types.count("linear_attention")
    full = c.layer_types.count("full_attention") + c.num_nextn_predict_layers
    layers, width = linear + full, c.hidden_size
    key, value = (
        c.linear_num_key_heads * c.linear_key_head_dim,
        c.linear_num_value_heads * c.linear_value_head_dim,
    )
    query, shared = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sparse = sum(c.is_sparse(i) for i in range(c.num_hidden_layers)) + (
        c.num_nextn_predict_layers * (c.num_experts > 0)
    )
    state = c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    return [
        ("embedding", 0, 4 * width),
        ("conv", 2 * c.linear_conv_kernel_dim * linear * (2 * key + value), 5 * linear * (2 * key + value)),
        # Forward q, k, v in, o out; backward those three and do in, three gradients out.
        ("delta rule", linear * 6 * state, linear * (2 * key + 2 * value + 4 * key + 3 * value)),
        ("attention", full * 2 * query * seq_len, full * (2 * query + 2 * shared + 4 * query + 4 * shared)),
        # Tokens in and out, forward and backward; slots stay inside the perfect kernel.
        ("experts", 0, sparse * 5 * width),
        # Two of a layer and the residual beside each, the last one, q's and k's, and the gated one with its gate.
        ("norms", 0, 5 * width * (2 * layers + 1) + 5 * full * (query + shared) + 8 * linear * value),
    ]


def optimizer_cost(config: Config, gradient_bytes: int = 4, moment_bytes: int = 4) -> Cost:
    """AdamW on fp32 parameters: each and its moments are read and written once, gradients read twice for the norm."""
    numbers = sum(leaf.numel for leaf in named_specs(config).values())
    return Cost(0.0, numbers * (2.0 * 4 + 4.0 * moment_bytes + 2.0 * gradient_bytes))
