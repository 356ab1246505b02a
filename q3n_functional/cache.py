"""What sequences leave behind for their continuation: an immutable pytree, one entry a layer.

A cache is a value. Keeping the old one is a snapshot, going on from it is a rollback, and whatever is done to the
batch is one map over the leaves, whose first dim it is.

Letters: B batch, S capacity in tokens, G key/value heads, K head dim (or key dim), H value heads, V value dim,
C convolved channels, W convolution taps, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from q3n_functional.config import Config
from q3n_functional.params import path_name

Tree = TypeVar("Tree")


class LinearState(NamedTuple):
    """Of a Gated DeltaNet layer: the last inputs of the convolution [B, C, W-1] and the state [B, H, K, V]."""

    conv: Tensor
    recurrent: Tensor


class Tentative(NamedTuple):
    """Of a Gated DeltaNet layer whose last tokens may be taken back: the state before them, and what they bring.

    qkv_BTC: what the convolution reads. after_BTHKV: the recurrent state behind each of them, as `before` has it. That
    is the memory of T states, until `model.accept` has chosen one.
    """

    before: LinearState
    qkv_BTC: Tensor
    after_BTHKV: Tensor


class KeyValues(NamedTuple):
    """Of a full-attention layer: keys and values [B, S, G, K]; what lies behind `Cache.lengths` is not read."""

    k: Tensor
    v: Tensor


State = LinearState | KeyValues | Tentative


class Cache(NamedTuple):
    """The states of all layers and the number of tokens in them, int32 [B].

    In a tentative one, `lengths_B` does not count the tentative tokens; `model.accept` says how many of them stay.
    """

    layers: tuple[State, ...]
    lengths_B: Tensor


def empty(
    config: Config,
    batch: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    recurrent_dtype: torch.dtype | None = None,
) -> Cache:
    """The cache of `batch` sequences without tokens, with room for `capacity` tokens each.

    `dtype` is the activations'. Recurrent states are fp32 (fp64 for fp64 activations) where `recurrent_dtype` does not
    say otherwise: in bf16 they take half the memory, and every step rounds them.
    """

    def layer(kind: str) -> State:
        if kind == "linear_attention":
            return _linear_state(config, batch, dtype, device, recurrent_dtype)
        return key_values(config, batch, capacity, dtype, device)

    layers = tuple(layer(kind) for kind in config.layer_types)
    return Cache(layers, torch.zeros(batch, dtype=torch.int32, device=device))


def _linear_state(
    config: Config, batch: int, dtype: torch.dtype, device: torch.device | str, recurrent_dtype: torch.dtype | None
) -> LinearState:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    heads, value = config.linear_num_value_heads, config.linear_value_head_dim
    channels, taps = 2 * keys + heads * value, config.linear_conv_kernel_dim
    wide = recurrent_dtype or torch.promote_types(dtype, torch.float32)
    conv = torch.zeros(batch, channels, taps - 1, dtype=dtype, device=device)
    return LinearState(conv, torch.zeros(batch, heads, config.linear_key_head_dim, value, dtype=wide, device=device))


def key_values(
    config: Config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> KeyValues:
    """Room for the keys and values of one full-attention layer."""
    shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
    return KeyValues(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))


def capacity(cache: Cache) -> int | None:
    """Tokens that each sequence has room for; None where no layer keeps keys and values, and there is no limit."""
    sizes = (state.k.shape[1] for state in cache.layers if isinstance(state, KeyValues))
    return next(sizes, None)


def select(tree: Tree, rows: Tensor) -> Tree:
    """The sequences `rows` (int64), in that order: a subset, a permutation, or with repetitions."""
    return _map(lambda leaf: leaf.index_select(0, rows), tree)


def repeat(tree: Tree, times: int) -> Tree:
    """Every sequence `times` times, its copies side by side."""
    return _map(lambda leaf: leaf.repeat_interleave(times, 0), tree)


def concatenate(trees: Sequence[Tree]) -> Tree:
    """The sequences of all of them; capacities must agree (`resize`)."""
    return _map(lambda *leaves: torch.cat(leaves), *trees)


def place(tree: Tree, rows: Tensor, other: Tree) -> Tree:
    """`tree` with the sequences `rows` (int64, each once) replaced by those of `other`, in order."""
    return _map(lambda leaf, new: leaf.index_copy(0, rows, new), tree, other)


def chosen(rows_B: Tensor, new: Cache, old: Cache) -> Cache:
    """The sequences of `new`, which went on from `old`, where `rows_B` (bool) says so, and those of `old` elsewhere."""

    def one(now: State, before: State) -> State:
        # Keys and values behind a sequence's length are not read: nothing has to be taken back.
        return now if isinstance(now, KeyValues) else _map(lambda a, b: _where(rows_B, a, b), now, before)

    layers = tuple(one(*states) for states in zip(new.layers, old.layers, strict=True))
    return Cache(layers, _where(rows_B, new.lengths_B, old.lengths_B))


def _where(rows_B: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows_B.view(-1, *[1] * (new.ndim - 1)), new, old)


def resize(cache: Cache, capacity: int) -> Cache:
    """The same sequences with room for `capacity` tokens each; those in the cache must fit."""

    def resized(x_BSGK: Tensor) -> Tensor:
        return torch.nn.functional.pad(x_BSGK[:, :capacity], (0, 0, 0, 0, 0, max(capacity - x_BSGK.shape[1], 0)))

    layers = (KeyValues(*map(resized, s)) if isinstance(s, KeyValues) else s for s in cache.layers)
    return Cache(tuple(layers), cache.lengths_B)


def _map(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    return cast(Tree, pytree.tree_map(function, *trees))


def save(path: Path, cache: Cache) -> None:
    """Writes `cache` as one safetensors file, named `layers.N.conv` and so on."""
    leaves, _ = pytree.tree_flatten_with_path(cache)
    save_file({path_name(keys): leaf.contiguous() for keys, leaf in leaves}, path)


def load(path: Path, device: torch.device | str = "cpu") -> Cache:
    """The cache that `save` wrote. Raises ValueError for a file that holds something else."""
    with safe_open(path, "pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    states = [_state(tensors, f"layers.{i}.") for i in range(len({n.split(".")[1] for n in tensors if "." in n}))]
    known = {"lengths_B", *(f"layers.{i}.{field}" for i, s in enumerate(states) if s for field in s._fields)}
    if None in states or known != tensors.keys():
        raise ValueError(f"{path} is not a cache: it holds {', '.join(sorted(tensors)[:5])}")
    return Cache(tuple(s for s in states if s), tensors["lengths_B"])


def _state(tensors: dict[str, Tensor], prefix: str) -> LinearState | KeyValues | None:
    for kind in (LinearState, KeyValues):
        if all(prefix + field in tensors for field in kind._fields):
            return kind(*(tensors[prefix + field] for field in kind._fields))
    return None
