"""A cache as a value: snapshots, rows, packed and ragged continuation, tentative tokens; all against recomputation."""

import itertools

import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import save_file

from q3n_functional import cache as caches
from q3n_functional.cache import KeyValues
from q3n_functional.model import accept, forward, forward_cached, head, hidden_states
from q3n_functional.packing import documents
from tests.configs import perturbed, slower, small

LINEAR, FULL = "linear_attention", "full_attention"
CAPACITY = 24


def config_of(**changes):
    return small(**{"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), **changes})


def random_tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def tree_of(config, dtype=torch.float32):
    return slower(perturbed(config, dtype=dtype))


def empty(config, batch=2, capacity=CAPACITY, dtype=torch.float32, **options):
    return caches.empty(config, batch, capacity, dtype, **options)


def continued(tree, cache, tokens, config, *cuts):
    logits, bounds = [], (0, *cuts, tokens.shape[1])
    for start, end in itertools.pairwise(bounds):
        step, cache = forward_cached(tree, tokens[:, start:end], cache, config=config)
        logits.append(step)
    return torch.cat(logits, 1), cache


def assert_near(actual, expected, relative=1e-5):
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def packed(rows, length):
    """Rows of tokens end to end in [1, length], and their documents."""
    ends = torch.tensor([0, *map(len, rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = torch.zeros(1, length, dtype=torch.long)
    tokens[0, : ends[-1]] = torch.cat(rows)
    return tokens, documents(ends, 1, length)


@pytest.mark.parametrize("tokens_between", [1, 5])
def test_later_steps_leave_an_old_cache_alone(tokens_between):
    """So a cache is a snapshot: keep it to roll back, and to continue it twice."""
    config = config_of()
    tree, tokens = tree_of(config), random_tokens(2, 20)
    _, cache = continued(tree, empty(config), tokens[:, :8], config)
    kept = pytree.tree_map(torch.clone, cache)
    other = random_tokens(2, tokens_between, seed=1)
    _, rejected = forward_cached(tree, other, cache, config=config)
    assert not torch.equal(rejected.layers[0].recurrent, cache.layers[0].recurrent)
    assert all(map(torch.equal, pytree.tree_leaves(cache), pytree.tree_leaves(kept)))
    expected, _ = continued(tree, kept, tokens[:, 8:], config)
    logits, _ = continued(tree, cache, tokens[:, 8:], config)
    assert torch.equal(logits, expected)
    assert_near(logits, forward(tree, tokens, config=config)[:, 8:])


OPERATIONS = {
    "permuted": (lambda c: caches.select(c, torch.tensor([2, 0, 1])), (2, 0, 1)),
    "selected": (lambda c: caches.select(c, torch.tensor([1])), (1,)),
    "repeated": (lambda c: caches.repeat(c, 2), (0, 0, 1, 1, 2, 2)),
    "concatenated": (lambda c: caches.concatenate([c, caches.select(c, torch.tensor([1, 0]))]), (0, 1, 2, 1, 0)),
    "placed": (lambda c: caches.place(c, torch.tensor([2, 0]), caches.select(c, torch.tensor([0, 1]))), (1, 1, 0)),
    "larger": (lambda c: caches.resize(c, 30), (0, 1, 2)),
    "smaller": (lambda c: caches.resize(c, 18), (0, 1, 2)),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_what_is_done_to_the_batch(case):
    config, (operation, rows) = config_of(), OPERATIONS[case]
    tree, tokens = tree_of(config), random_tokens(3, 12)
    _, cache = continued(tree, empty(config, 3), tokens, config)
    following = random_tokens(len(rows), 6, seed=1)
    logits, after = continued(tree, operation(cache), following, config, 3)
    whole = torch.cat([tokens[list(rows)], following], 1)
    assert_near(logits, forward(tree, whole, config=config)[:, 12:])
    assert after.lengths_B.tolist() == [18] * len(rows)


def test_rows_of_different_lengths():
    """Caches of prompts of several lengths, put together, go on side by side."""
    config = config_of()
    tree, prompts = tree_of(config), [random_tokens(1, n, seed=n) for n in (3, 11, 6)]
    together = caches.concatenate([continued(tree, empty(config, 1), p, config)[1] for p in prompts])
    assert together.lengths_B.tolist() == [3, 11, 6]
    following = random_tokens(3, 7, seed=1)
    logits, _ = continued(tree, together, following, config, 1, 2, 5)
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, following[row : row + 1]], 1)
        assert_near(logits[row], forward(tree, whole, config=config)[0, prompt.shape[1] :])


def test_packed_prompts_become_rows():
    """With an empty document, padding behind the last one, and a row that is filled to the capacity."""
    config = config_of(num_hidden_layers=3, layer_types=(LINEAR, FULL, LINEAR))
    tree, prompts = tree_of(config), [random_tokens(n, seed=n) for n in (3, 0, 14, 1, 6)]
    tokens, docs = packed(prompts, 31)
    h_BTD, _, cache = hidden_states(tree, tokens, docs, empty(config, 5, 14), config=config)
    assert cache.lengths_B.tolist() == [3, 0, 14, 1, 6]
    logits = h_BTD[0] @ head(tree).mT
    for row, (prompt, end) in enumerate(zip(prompts, docs.cu_seqlens[1:], strict=True)):
        if not len(prompt):
            continue
        expected, alone = continued(tree, empty(config, 1, 14), prompt[None], config)
        assert_near(logits[end - len(prompt) : end], expected[0])
        mine = caches.select(cache, torch.tensor([row]))
        n = len(prompt)
        for a, b in zip(mine.layers, alone.layers, strict=True):
            trim = isinstance(a, KeyValues)
            for x, y in zip(a, b, strict=True):
                assert_near(x[:, :n] if trim else x, y[:, :n] if trim else y)


@pytest.mark.parametrize("width", [2, 4])
def test_packed_continuation_equals_the_whole_for_all_split_points(width):
    """Each document goes on from its own row: by any number of tokens, by none, behind any number of them."""
    config = config_of(linear_conv_kernel_dim=width)
    tree, total = tree_of(config), 9
    rows = [random_tokens(total, seed=n) for n in range(total + 1)]
    expected = [forward(tree, row[None], config=config)[0] for row in rows]
    for m in range(total + 1):
        firsts = [row[: min(n, total)] for n, row in enumerate(rows)]
        nexts = [row[len(a) : len(a) + m] for a, row in zip(firsts, rows, strict=True)]
        rests = [row[len(a) + len(b) :] for a, b, row in zip(firsts, nexts, rows, strict=True)]
        cache, seen = empty(config, len(rows), total), [0] * len(rows)
        for parts in (firsts, nexts, rests):
            tokens, docs = packed(parts, max(sum(map(len, parts)), 1) + 3)
            logits, cache = forward_cached(tree, tokens, cache, docs, config=config)
            for n, part in enumerate(parts):
                end = docs.cu_seqlens[n + 1]
                if len(part):
                    assert_near(logits[0, end - len(part) : end], expected[n][seen[n] : seen[n] + len(part)])
                seen[n] += len(part)
        assert cache.lengths_B.tolist() == seen == [total] * len(rows)


def test_an_empty_step_leaves_a_cache_as_it_is():
    """Nothing but padding: also where the rows are full."""
    config = config_of()
    tree = tree_of(config)
    _, before = continued(tree, empty(config, 2, 7), random_tokens(2, 7), config)
    tokens, docs = packed([random_tokens(0)] * 2, 5)
    _, after = forward_cached(tree, tokens, before, docs, config=config)
    assert all(map(torch.equal, pytree.tree_leaves(before), pytree.tree_leaves(after)))


@pytest.mark.parametrize("clip", [5.0, 0.4])
@pytest.mark.parametrize("first", [0, 2, 9])
def test_any_number_of_tentative_tokens_can_stay(first, clip):
    config = config_of(linear_attention_clip_val=clip)
    tree, tokens, drafted = tree_of(config), random_tokens(6, 20), 5
    cache = empty(config, 6)
    if first:
        _, cache = continued(tree, cache, tokens[:, :first], config)
    h_BTD, _, tentative = hidden_states(
        tree, tokens[:, first : first + drafted], None, cache, config=config, tentative=True
    )
    expected = forward(tree, tokens, config=config)
    assert_near(h_BTD @ head(tree).mT, expected[:, first : first + drafted])
    counts = torch.arange(6, dtype=torch.int32)
    kept = accept(tentative, counts)
    assert kept.lengths_B.tolist() == [first + n for n in range(6)]
    for row, n in enumerate(counts.tolist()):
        mine = caches.select(kept, torch.tensor([row]))
        logits, _ = continued(tree, mine, tokens[row : row + 1, first + n :], config, 1, 4)
        assert_near(logits, expected[row : row + 1, first + n :])


def test_tentative_tokens_in_float64():
    config = config_of()
    tree, tokens = tree_of(config, torch.float64), random_tokens(2, 9)
    cache = empty(config, dtype=torch.float64)
    _, _, tentative = hidden_states(tree, tokens[:, :4], None, cache, config=config, tentative=True)
    kept = accept(tentative, torch.tensor([4, 1], dtype=torch.int32))
    for row, n in ((0, 4), (1, 1)):
        alone = caches.select(kept, torch.tensor([row]))
        logits, _ = forward_cached(tree, tokens[row : row + 1, n:], alone, config=config)
        assert_near(logits, forward(tree, tokens[row : row + 1], config=config)[:, n:], 1e-11)


def test_states_in_bf16_take_half_the_memory():
    config = config_of(layer_types=(LINEAR, LINEAR))
    tree, tokens = tree_of(config, torch.bfloat16), random_tokens(2, 12)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        before = empty(config, dtype=torch.bfloat16, recurrent_dtype=dtype)
        logits[dtype], after = continued(tree, before, tokens, config, *range(1, 12))
        assert [x.dtype for x in pytree.tree_leaves(after)] == [x.dtype for x in pytree.tree_leaves(before)]
        assert after.layers[0].recurrent.dtype == dtype
    assert_near(logits[torch.bfloat16].float(), logits[torch.float32].float(), 0.1)
    sizes = [empty(config, recurrent_dtype=d).layers[0].recurrent.nbytes for d in logits]
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize("types", [(LINEAR, FULL), (FULL, FULL), (LINEAR, LINEAR)])
def test_files_hold_a_cache(types, tmp_path):
    config = config_of(layer_types=types)
    tree = tree_of(config)
    _, cache = continued(tree, empty(config), random_tokens(2, 9), config)
    caches.save(tmp_path / "cache.safetensors", cache)
    again = caches.load(tmp_path / "cache.safetensors")
    assert pytree.tree_structure(again) == pytree.tree_structure(cache)
    assert all(map(torch.equal, pytree.tree_leaves(again), pytree.tree_leaves(cache)))


def test_a_file_of_something_else_is_refused(tmp_path):
    config = config_of()
    path = tmp_path / "cache.safetensors"
    caches.save(path, empty(config))
    tensors = {"lengths_B": torch.zeros(1), "layers.0.k": torch.zeros(1)}
    for wrong in (tensors, {**tensors, "layers.0.v": torch.zeros(1), "more": torch.zeros(1)}):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=r"cache.safetensors is not a cache: it holds .*layers.0.k"):
            caches.load(path)


def test_a_cache_is_continued_by_as_many_as_it_has():
    config = config_of()
    tree, cache = tree_of(config), empty(config, 2)
    docs = documents(torch.tensor([0, 3], dtype=torch.int32), 1, 3)
    with pytest.raises(ValueError, match="a cache of 2 sequences cannot be continued by 1: give each one row or doc"):
        forward_cached(tree, random_tokens(1, 3), cache, docs, config=config)
    with pytest.raises(ValueError, match="a cache of 2 sequences cannot be continued by 3"):
        forward_cached(tree, random_tokens(3, 3), cache, config=config)
    docs = documents(torch.tensor([0, 3, 3], dtype=torch.int32), 1, 3)
    with pytest.raises(ValueError, match="tentative tokens lie in rows: documents cannot be given with them"):
        hidden_states(tree, random_tokens(1, 3), docs, cache, config=config, tentative=True)


def test_one_graph_serves_packed_and_tentative_steps():
    config = config_of()
    tree = tree_of(config)

    def packed_step(tree, tokens, cache, cu_seqlens):
        docs = documents(cu_seqlens, 1, tokens.shape[1])
        return forward_cached(tree, tokens, cache, docs, config=config)

    def tentative_step(tree, tokens, cache, counts):
        h_BTD, _, tentative = hidden_states(tree, tokens, None, cache, config=config, tentative=True)
        return h_BTD, accept(tentative, counts)

    cases = (
        (packed_step, random_tokens(1, 9), torch.tensor([[0, 2, 9], [0, 4, 5]], dtype=torch.int32)),
        (tentative_step, random_tokens(2, 3), torch.tensor([[0, 2], [3, 1]], dtype=torch.int32)),
    )
    for step, tokens, arguments in cases:
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for argument in arguments:
                actual, expected = (f(tree, tokens, empty(config), argument) for f in (compiled, step))
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
