"""The store of common beginnings: what is found continues as if computed again; bounds, order of going, values."""

import pytest
import torch
import torch.utils._pytree as pytree

from q3n_functional import cache as caches
from q3n_functional import prefix
from q3n_functional.generate import prefill
from q3n_functional.model import forward, forward_cached
from tests.configs import perturbed, slower, small

LINEAR, FULL = "linear_attention", "full_attention"
BLOCK = 4


def config_of(**changes):
    return small(**{"num_hidden_layers": 3, "layer_types": (LINEAR, FULL, FULL), **changes})


def random_tokens(number, seed=0):
    return torch.randint(0, 64, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_near(actual, expected, relative=1e-5):
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def filled(tree, config, tokens, store):
    """The store with all blocks of `tokens`."""
    cache = caches.empty(config, 1, len(tokens), torch.float32)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        _, cache = prefill(tree, [tokens[end - BLOCK : end]], cache, config=config)
        store = prefix.put(store, tokens[:end], cache)
    return store


@pytest.mark.parametrize("kinds", [(LINEAR, FULL, FULL), (LINEAR,), (FULL,)])
@pytest.mark.parametrize("common", [0, 3, 4, 7, 11, 12, 15])
def test_what_is_found_continues_as_if_computed_again(kinds, common):
    config = config_of(layer_types=kinds, num_hidden_layers=len(kinds))
    tree, tokens = slower(perturbed(config)), random_tokens(12)
    store = filled(tree, config, tokens, prefix.empty(BLOCK, 10**9))
    text = [*tokens[:common], *(63 - t for t in tokens[common:]), *random_tokens(6, seed=1)]
    store, cache = prefix.find(store, text)
    length = common // BLOCK * BLOCK if common < 12 else 12
    if not length:
        assert cache is None
        return
    assert cache.lengths_B.tolist() == [length]
    _, again = prefill(tree, [text[:length]], caches.empty(config, 1, length, torch.float32), config=config)
    for actual, expected in zip(*map(pytree.tree_leaves, (cache, again)), strict=True):
        assert_near(actual, expected)
    later = torch.tensor([text[length:]])
    logits, _ = forward_cached(tree, later, caches.resize(cache, len(text)), config=config)
    assert_near(logits, forward(tree, torch.tensor([text]), config=config)[:, length:])


def test_blocks_are_copies():
    """What is done later to the buffers of a cache does not reach the store, nor the other way round."""
    config = config_of()
    tree, tokens = slower(perturbed(config)), random_tokens(BLOCK)
    _, cache = prefill(tree, [tokens], caches.empty(config, 1, 20, torch.float32), config=config)
    store = prefix.put(prefix.empty(BLOCK, 10**9), tokens, cache)
    _, found = prefix.find(store, tokens)
    kept = pytree.tree_map(torch.clone, found)
    pytree.tree_map(torch.Tensor.zero_, cache)
    _, found = prefix.find(store, tokens)
    assert all(map(torch.equal, pytree.tree_leaves(found), pytree.tree_leaves(kept)))
    held = sum(x.untyped_storage().nbytes() for x in pytree.tree_leaves(dict(store.blocks)))
    assert held == store.num_bytes


def test_a_store_is_a_value():
    config = config_of()
    tree, tokens = perturbed(config), random_tokens(8)
    nothing = prefix.empty(BLOCK, 10**9)
    store = filled(tree, config, tokens, nothing)
    assert len(nothing.blocks) == 0 == nothing.num_bytes
    before = list(store.blocks)
    prefix.find(store, tokens[:4])
    filled(tree, config, random_tokens(8, seed=1), store)
    assert list(store.blocks) == before
    assert len(before) == 2


def lengths(store, texts):
    return [0 if (c := prefix.find(store, text)[1]) is None else int(c.lengths_B) for text in texts]


def test_the_least_recently_used_goes_first_and_never_before_what_needs_it():
    config = config_of()
    tree = perturbed(config)
    first, second, third = (random_tokens(12, seed=n) for n in range(3))
    branch = [*first[:8], *second[:4]]
    one = filled(tree, config, first[:4], prefix.empty(BLOCK, 10**9)).num_bytes
    store = prefix.empty(BLOCK, 6 * one)
    for text in (first, second):
        store = filled(tree, config, text, store)
    assert lengths(store, (first, second)) == [12, 12]
    assert store.num_bytes == 6 * one
    store, _ = prefix.find(store, first[:8])
    store = filled(tree, config, third[:4], store)
    assert lengths(store, (first, second, third)) == [8, 12, 4]
    store = filled(tree, config, branch, store)
    assert lengths(store, (first, second, third, branch)) == [8, 8, 4, 12]
    store = filled(tree, config, third, store)
    assert lengths(store, (first, second, third, branch)) == [8, 0, 12, 12]
    assert store.num_bytes <= store.max_bytes
    for text in (first, second, third, branch):
        cache = prefix.find(store, text)[1]
        if cache is not None:
            assert caches.capacity(cache) == int(cache.lengths_B)


def test_the_end_of_a_beginning_goes_before_it_and_finding_is_using():
    config = config_of()
    tree = perturbed(config)
    first, *others = (random_tokens(12, seed=n) for n in range(4))
    one = filled(tree, config, first[:4], prefix.empty(BLOCK, 10**9)).num_bytes
    store = filled(tree, config, first, prefix.empty(BLOCK, 3 * one))
    store = filled(tree, config, others[0][:4], store)
    assert lengths(store, (first, *others)) == [8, 4, 0, 0]
    store = filled(tree, config, others[1][:4], store)
    assert lengths(store, (first, *others)) == [4, 4, 4, 0]
    store, _ = prefix.find(store, first)
    store = filled(tree, config, others[2][:4], store)
    assert lengths(store, (first, *others)) == [4, 0, 4, 4]


def test_a_store_too_small_keeps_nothing_but_what_fits():
    config = config_of()
    tree, tokens = perturbed(config), random_tokens(12)
    one = filled(tree, config, tokens[:4], prefix.empty(BLOCK, 10**9)).num_bytes
    assert not filled(tree, config, tokens, prefix.empty(BLOCK, one - 1)).blocks
    assert not filled(tree, config, tokens, prefix.empty(BLOCK, 0)).blocks
    assert lengths(filled(tree, config, tokens, prefix.empty(BLOCK, 2 * one)), [tokens]) == [8]


def test_what_is_refused():
    cache = caches.empty(config_of(), 1, 8, torch.float32)
    with pytest.raises(ValueError, match="block_size must be 1 token or more, got 0"):
        prefix.empty(0, 1)
    with pytest.raises(ValueError, match=r"max_bytes must be 0 \(nothing is kept\) or more, got -1"):
        prefix.empty(4, -1)
    for tokens in ([], [1, 2, 3]):
        with pytest.raises(ValueError, match="tokens are no whole number of blocks of 4: cut them there"):
            prefix.put(prefix.empty(4, 100), tokens, cache)
