"""What a Qwen3-Next checkpoint calls its tensors, and how their rows are those of our leaves.

Every tensor on disk is read the same way: its rows are cut into equal groups, each group into one piece a leaf, and
the pieces of a leaf in the order of the groups are that leaf (or one expert of it). With one group and one leaf that
is the identity. Nothing but rows is moved, so reading and writing are exact inverses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from q3n_functional.config import Config
from q3n_functional.params import Spec, named_specs


class Rule(NamedTuple):
    """A tensor on disk, the leaves whose rows it holds, and the `Config` field that counts its groups (None: one)."""

    name: str
    leaves: tuple[str, ...]
    groups: str | None = None


LAYER = (
    Rule("input_layernorm.weight", ("input_layernorm",)),
    Rule("post_attention_layernorm.weight", ("post_attention_layernorm",)),
)
# The projections are grouped by key head, [q | k | v | z] and [b | a] of one after the other; the convolution is not.
LINEAR_ATTENTION = (
    Rule("in_proj_qkvz.weight", ("q", "k", "v", "z"), "linear_num_key_heads"),
    Rule("in_proj_ba.weight", ("b", "a"), "linear_num_key_heads"),
    Rule("conv1d.weight", ("conv_q", "conv_k", "conv_v")),
    Rule("A_log", ("A_log",)),
    Rule("dt_bias", ("dt_bias",)),
    Rule("norm.weight", ("norm",)),
    Rule("out_proj.weight", ("out",)),
)
# Queries and output gates alternate by head.
FULL_ATTENTION = (
    Rule("q_proj.weight", ("q", "gate"), "num_attention_heads"),
    Rule("k_proj.weight", ("k",)),
    Rule("v_proj.weight", ("v",)),
    Rule("q_norm.weight", ("q_norm",)),
    Rule("k_norm.weight", ("k_norm",)),
    Rule("o_proj.weight", ("out",)),
)
SWIGLU = (
    Rule("gate_proj.weight", ("gate",)),
    Rule("up_proj.weight", ("up",)),
    Rule("down_proj.weight", ("down",)),
)
MIXTURE_OF_EXPERTS = (
    Rule("gate.weight", ("router",)),
    Rule("shared_expert_gate.weight", ("shared_expert_gate",)),
)
TRUNK = (
    Rule("model.embed_tokens.weight", ("embed_tokens",)),
    Rule("model.norm.weight", ("norm",)),
)
HEAD = Rule("lm_head.weight", ("lm_head",))
TIED_HEAD = Rule("lm_head.weight", ("embed_tokens",))
MULTI_TOKEN_PREDICTION = (
    Rule("pre_fc_norm_embedding.weight", ("pre_fc_norm_embedding",)),
    Rule("pre_fc_norm_hidden.weight", ("pre_fc_norm_hidden",)),
    Rule("fc.weight", ("fc",)),
    Rule("norm.weight", ("norm",)),
)


@dataclass(frozen=True)
class Source:
    """One tensor on disk: its shape there, and `rows` of each of its `leaves` in every one of `groups`.

    `expert` is the index that the tensor has in leaves that stack experts.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    leaves: tuple[str, ...]
    rows: tuple[int, ...]
    expert: int | None = None

    def pieces(self, tensor: Tensor, leaves: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of views of equal shape, one of `tensor` (of this shape, contiguous) and one of the leaf it belongs to.

        Copying every second to its first writes the tensor, every first to its second reads it.
        """
        parts = tensor.view(self.groups, sum(self.rows), -1).split(self.rows, dim=1)
        for part, name, rows in zip(parts, self.leaves, self.rows, strict=True):
            leaf = leaves[name] if self.expert is None else leaves[name][self.expert]
            yield part, leaf.reshape(self.groups, rows, -1)

    def read(self, tensor: Tensor, shards: Mapping[str, Tensor], offsets: Mapping[str, tuple[int, ...]]) -> None:
        """Copies what `tensor` holds of shards of its leaves, which begin at `offsets` in them, and touches no more."""
        parts = tensor.view(self.groups, sum(self.rows), -1).split(self.rows, dim=1)
        for part, name, rows in zip(parts, self.leaves, self.rows, strict=True):
            shard, begin = shards[name], offsets[name]
            if self.expert is not None:
                if not begin[0] <= self.expert < begin[0] + shard.shape[0]:
                    continue
                shard, begin = shard[self.expert - begin[0]], begin[1:]
            _copy_rows(part, shard, rows, begin)


def _copy_rows(part: Tensor, shard: Tensor, rows: int, begin: tuple[int, ...]) -> None:
    """From [groups, rows, width], which is a leaf's rows group by group, to the shard that begins at `begin` in it."""
    first, last = begin[0], begin[0] + shard.shape[0]
    columns = slice(begin[1], begin[1] + shard.shape[1]) if shard.ndim > 1 else slice(None)
    for group in range(first // rows, -(-last // rows)):
        low, high = max(first, group * rows), min(last, (group + 1) * rows)
        source = part[group, low - group * rows : high - group * rows, columns]
        shard[low - first : high - first].copy_(source.reshape(high - low, *shard.shape[1:]))


def sources(config: Config, tied_head: bool = False) -> dict[str, Source]:
    """Every tensor that the checkpoint of `config` holds, by its name on disk.

    `tied_head` asks for an `lm_head.weight` although the configuration ties it to the embedding; some files have it.
    """
    specs = named_specs(config)
    found = [
        _source(rule, theirs, ours, expert, config, specs) for rule, theirs, ours, expert in _placed(config, specs)
    ]
    if tied_head and config.tie_word_embeddings:
        found.append(_source(TIED_HEAD, "", "", None, config, specs))
    return {source.name: source for source in found}


# A rule, the prefixes that its names have on disk and in the tree, and the expert that it is for.
Placed = tuple[Rule, str, str, int | None]


def _module(rules: tuple[Rule, ...], theirs: str, ours: str, expert: int | None = None) -> Iterator[Placed]:
    return ((rule, theirs, ours, expert) for rule in rules)


def _placed(config: Config, specs: Mapping[str, Spec]) -> Iterator[Placed]:
    yield from _module(TRUNK, "", "")
    for i, kind in enumerate(config.layer_types):
        yield from _decoder_layer(f"model.layers.{i}.", f"layers.{i}.", kind, config, specs)
    if not config.tie_word_embeddings:
        yield from _module((HEAD,), "", "")
    if config.num_nextn_predict_layers:
        yield from _module(MULTI_TOKEN_PREDICTION, "mtp.", "mtp.")
        yield from _decoder_layer("mtp.layers.0.", "mtp.layer.", "full_attention", config, specs)


def _decoder_layer(theirs: str, ours: str, kind: str, config: Config, specs: Mapping[str, Spec]) -> Iterator[Placed]:
    yield from _module(LAYER, theirs, ours)
    if kind == "linear_attention":
        yield from _module(LINEAR_ATTENTION, f"{theirs}linear_attn.", f"{ours}mixer.")
    else:
        yield from _module(FULL_ATTENTION, f"{theirs}self_attn.", f"{ours}mixer.")
    if f"{ours}mlp.router" not in specs:
        yield from _module(SWIGLU, f"{theirs}mlp.", f"{ours}mlp.")
        return
    yield from _module(MIXTURE_OF_EXPERTS, f"{theirs}mlp.", f"{ours}mlp.")
    yield from _module(SWIGLU, f"{theirs}mlp.shared_expert.", f"{ours}mlp.shared_expert.")
    for expert in range(config.num_experts):
        yield from _module(SWIGLU, f"{theirs}mlp.experts.{expert}.", f"{ours}mlp.experts.", expert)


def _source(
    rule: Rule, theirs: str, ours: str, expert: int | None, config: Config, specs: Mapping[str, Spec]
) -> Source:
    leaves = tuple(ours + leaf for leaf in rule.leaves)
    shapes = [specs[leaf].shape if expert is None else specs[leaf].shape[1:] for leaf in leaves]
    groups = 1 if rule.groups is None else int(getattr(config, rule.groups))
    width = shapes[0][1:] if rule.name != "conv1d.weight" else (1, *shapes[0][1:])  # the channel axis of nn.Conv1d
    return Source(
        name=theirs + rule.name,
        shape=(sum(shape[0] for shape in shapes), *width),
        groups=groups,
        leaves=leaves,
        rows=tuple(shape[0] // groups for shape in shapes),
        expert=expert,
    )
