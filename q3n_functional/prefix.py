"""Caches of common beginnings: what sequences leave behind at the ends of blocks of tokens, bounded in bytes.

A store is a value: what changes it returns a new one. An entry is a block: the linear layers' states behind it, and the
keys and values of its own tokens alone, so that beginnings share those of the blocks that they have in common. It is
found by the hash of all tokens up to its end. The least recently used goes first; a block is used whenever one behind
it is, so a block never goes before those that need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, takewhile
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.utils._pytree as pytree

from q3n_functional.cache import Cache, KeyValues, State


class Store(NamedTuple):
    """Blocks of `block_size` tokens by digest, the least recently used first; together at most `max_bytes`."""

    block_size: int
    max_bytes: int
    blocks: Mapping[bytes, tuple[State, ...]] = MappingProxyType({})
    num_bytes: int = 0


def empty(block_size: int, max_bytes: int) -> Store:
    """A store without blocks. Raises ValueError for sizes that hold nothing."""
    if block_size < 1:
        raise ValueError(f"block_size must be 1 token or more, got {block_size}")
    if max_bytes < 0:
        raise ValueError(f"max_bytes must be 0 (nothing is kept) or more, got {max_bytes}")
    return Store(block_size, max_bytes)


def find(store: Store, tokens: Sequence[int]) -> tuple[Store, Cache | None]:
    """The cache [1] behind the longest beginning of `tokens` that is there, with no room for more; None for none.

    What is found counts as used. Where logits behind the tokens are wanted, leave out the last: it has to be read.
    """
    path = list(takewhile(store.blocks.__contains__, _digests(store, tokens)))
    if not path:
        return store, None
    blocks = [store.blocks[digest] for digest in path]
    device = pytree.tree_leaves(blocks[0])[0].device
    lengths_B = torch.tensor([len(path) * store.block_size], dtype=torch.int32, device=device)
    return _used(store, path), Cache(tuple(map(_joined, zip(*blocks, strict=True))), lengths_B)


def _joined(states: tuple[State, ...]) -> State:
    """A layer's state behind all of its blocks."""
    if isinstance(states[-1], KeyValues):
        return KeyValues(*(torch.cat(leaves, 1) for leaves in zip(*states, strict=True)))
    return states[-1]


def put(store: Store, tokens: Sequence[int], cache: Cache) -> Store:
    """`store` with the block that ends behind `tokens`, which `cache` [1] has taken in and nothing else.

    Nothing is put without the blocks before it, which may have gone to make room. Raises ValueError for tokens that
    are no whole number of blocks.
    """
    if not tokens or len(tokens) % store.block_size:
        raise ValueError(f"{len(tokens)} tokens are no whole number of blocks of {store.block_size}: cut them there")
    path = list(_digests(store, tokens))
    if any(digest not in store.blocks for digest in path[:-1]):
        return store
    if path[-1] not in store.blocks:
        block = tuple(_own(state, len(tokens) - store.block_size, len(tokens)) for state in cache.layers)
        store = store._replace(blocks={**store.blocks, path[-1]: block}, num_bytes=store.num_bytes + _size(block))
    return _bounded(_used(store, path))


def _own(state: State, start: int, end: int) -> State:
    """What a block keeps of a layer's state. Copies: views would keep the whole cache alive, and change with it."""
    if isinstance(state, KeyValues):
        return KeyValues(*(leaf[:, start:end].clone() for leaf in state))
    return cast(State, pytree.tree_map(torch.clone, state))


def _size(block: tuple[State, ...]) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(block))


def _digests(store: Store, tokens: Sequence[int]) -> Iterator[bytes]:
    """Of the beginnings of one block, two, and so on."""
    hashed = hashlib.sha256()
    bounds = range(0, len(tokens) + 1, store.block_size)
    for start, end in pairwise(bounds):
        hashed.update(np.asarray(tokens[start:end], "<i8").tobytes())
        yield hashed.digest()


def _used(store: Store, path: Sequence[bytes]) -> Store:
    """The blocks of `path` last, the first of them at the very end."""
    blocks = dict(store.blocks)
    for digest in reversed(path):
        blocks[digest] = blocks.pop(digest)
    return store._replace(blocks=blocks)


def _bounded(store: Store) -> Store:
    blocks, num_bytes = dict(store.blocks), store.num_bytes
    while num_bytes > store.max_bytes:
        num_bytes -= _size(blocks.pop(next(iter(blocks))))
    return store._replace(blocks=blocks, num_bytes=num_bytes)
