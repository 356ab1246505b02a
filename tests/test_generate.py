"""Prefill and decoding with an explicit cache equal the forward pass; sampling, stopping, what is refused."""

import pytest
import torch
import torch.utils._pytree as pytree

from q3n_functional import cache as caches
from q3n_functional import layers
from q3n_functional.cache import Cache, KeyValues
from q3n_functional.generate import generate, pieces, prefill
from q3n_functional.model import forward, forward_cached
from q3n_functional.rotary import RopeParameters
from q3n_functional.sampling import Options
from tests.configs import perturbed, slower, small

LINEAR, FULL = "linear_attention", "full_attention"
LENGTH = 23
GREEDY = Options(temperature=0)


def config_of(**changes):
    return small(**{"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), **changes})


def random_tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def tree_of(config, dtype=torch.float32):
    return slower(perturbed(config, dtype=dtype))


def run(tree, tokens, cache, *cuts, config):
    """Logits of `tokens` fed to `cache` in pieces that end at `cuts`, and the cache behind them."""
    logits, ends = [], (*cuts, tokens.shape[1])
    for start, end in zip((0, *cuts), ends, strict=True):
        step, cache = forward_cached(tree, tokens[:, start:end], cache, config=config)
        logits.append(step)
    return torch.cat(logits, 1), cache


def empty(config, batch=2, capacity=LENGTH, dtype=torch.float32, device="cpu"):
    return caches.empty(config, batch, capacity, dtype, device)


def on_cuda(function):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(function))


def assert_near(actual, expected, relative=1e-5):
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


VARIANTS = {
    "as small": {},
    "multi-query, two taps, three value heads": {
        **{"num_key_value_heads": 1, "linear_conv_kernel_dim": 2, "linear_num_value_heads": 6},
    },
    "recurrent and clipped": {"linear_attention_use_recurrent": True, "linear_attention_clip_val": 0.4},
    "only linear": {"layer_types": (LINEAR, LINEAR)},
    "only full": {"layer_types": (FULL, FULL)},
    "yarn": {
        "rope_parameters": RopeParameters(
            rope_theta=1e4, rope_type="yarn", factor=4.0, original_max_position_embeddings=16
        )
    },
}


def assert_splits_equal_the_whole(config, device="cpu"):
    """Prefill of k tokens, a continuation of m, then token by token."""
    tree, tokens = tree_of(config), random_tokens(2, LENGTH).to(device)
    tree = pytree.tree_map(lambda p: p.to(device), tree)
    with torch.no_grad():
        expected = forward(tree, tokens, config=config)
        for k in range(1, LENGTH):
            for m in (1, 3, 17):
                cuts = (k, *range(k + m, LENGTH))
                logits, cache = run(tree, tokens, empty(config, device=device), *cuts, config=config)
                assert_near(logits, expected)
                assert cache.lengths_B.tolist() == [LENGTH] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_split_equals_the_whole(variant):
    assert_splits_equal_the_whole(config_of(**VARIANTS[variant]))


@on_cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_split_equals_the_whole_on_a_device(variant):
    assert_splits_equal_the_whole(config_of(**VARIANTS[variant]), "cuda")


def test_splits_are_exact_in_float64():
    config = config_of()
    tree, tokens = tree_of(config, torch.float64), random_tokens(2, LENGTH)
    expected = forward(tree, tokens, config=config)
    for cuts in ((1,), (2, 3), (9, 22), tuple(range(1, LENGTH))):
        logits, _ = run(tree, tokens, empty(config, dtype=torch.float64), *cuts, config=config)
        assert_near(logits, expected, 1e-11)


def test_room_that_is_not_used_changes_nothing():
    config = config_of()
    tree, tokens = tree_of(config), random_tokens(2, LENGTH)
    expected, _ = run(tree, tokens, empty(config), 9, config=config)
    cache = empty(config, capacity=LENGTH + 9)
    poisoned = [KeyValues(*(x + 1e4 for x in s)) if isinstance(s, KeyValues) else s for s in cache.layers]
    logits, _ = run(tree, tokens, Cache(tuple(poisoned), cache.lengths_B), 9, config=config)
    assert_near(logits, expected)


def test_cached_bf16_has_the_dtypes_of_its_states():
    config = config_of()
    tree, tokens = tree_of(config, torch.bfloat16), random_tokens(1, 9)
    before = empty(config, 1, 9, torch.bfloat16)
    logits, after = run(tree, tokens, before, 4, 5, config=config)
    assert logits.dtype == torch.bfloat16
    assert [x.dtype for x in pytree.tree_leaves(after)] == [x.dtype for x in pytree.tree_leaves(before)]
    assert after.layers[0].recurrent.dtype == torch.float32
    assert pytree.tree_map(lambda x: x.shape, after) == pytree.tree_map(lambda x: x.shape, before)


def test_gradients_pass_through_the_cache():
    config = config_of()
    tree = pytree.tree_map(lambda leaf: leaf.requires_grad_(), tree_of(config, torch.float64))
    part = tree._replace(mtp=())
    tokens, cache = random_tokens(2, LENGTH), empty(config, dtype=torch.float64)
    weights = torch.randn(2, LENGTH, 64, dtype=torch.float64)
    results = (run(tree, tokens, cache, 9, 10, config=config)[0], forward(tree, tokens, config=config))
    actual, expected = (torch.autograd.grad((y * weights).sum(), pytree.tree_leaves(part)) for y in results)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, 1e-9)


def test_text_is_that_of_the_forward_pass():
    config = config_of(initializer_range=0.2)
    tree, text = tree_of(config), random_tokens(1, 5)
    actual = list(generate(tree, text[0].tolist(), config=config, max_new_tokens=20, options=GREEDY))
    for _ in range(20):
        text = torch.cat([text, forward(tree, text, config=config)[:, -1:].argmax(-1)], 1)
    assert actual == text[0, 5:].tolist()
    assert len(set(actual)) > 3


def assert_ragged_prompts_equal_single_ones(chunk_length, device="cpu"):
    """In chunks, with an empty prompt, behind sequences of several lengths."""
    config = config_of(layer_types=(LINEAR, FULL))
    tree, sizes = pytree.tree_map(lambda p: p.to(device), tree_of(config)), ((0, 5), (9, 1), (3, 0), (2, 11))
    rows = [random_tokens(1, a + b, seed=a).to(device) for a, b in sizes]
    cache = empty(config, 4, device=device)
    _, cache = prefill(tree, [r[0, :a].tolist() for r, (a, _) in zip(rows, sizes, strict=True)], cache, config=config)
    prompts = [r[0, a:].tolist() for r, (a, _) in zip(rows, sizes, strict=True)]
    logits, after = prefill(tree, prompts, cache, config=config, chunk_length=chunk_length)
    assert after.lengths_B.tolist() == [a + b for a, b in sizes]
    for n, row in enumerate(rows):
        if prompts[n]:
            assert_near(logits[n], forward(tree, row, config=config)[0, -1])
        else:
            assert not logits[n].any()
        following = random_tokens(1, 4, seed=9).to(device)
        step, _ = forward_cached(tree, following, caches.select(after, torch.tensor([n], device=device)), config=config)
        assert_near(step, forward(tree, torch.cat([row, following], 1), config=config)[:, -4:])


@pytest.mark.parametrize("chunk_length", [1, 4, 7, 100])
def test_prefill_in_chunks_equals_the_whole(chunk_length):
    assert_ragged_prompts_equal_single_ones(chunk_length)


@on_cuda
@pytest.mark.parametrize("chunk_length", [1, 4, 7, 100])
def test_prefill_in_chunks_equals_the_whole_on_a_device(chunk_length):
    assert_ragged_prompts_equal_single_ones(chunk_length, "cuda")


@pytest.mark.parametrize("sizes", [(12,), (5, 7, 0)])
@pytest.mark.parametrize(("chunk_length", "fresh"), [(12, [True]), (4, [True, False, False]), (13, [False])])
def test_a_first_full_piece_is_attended_to_as_a_row(monkeypatch, chunk_length, fresh, sizes):
    """Without looking into the empty cache; a single prompt then is no document either."""
    config, given = config_of(layer_types=(LINEAR, FULL)), []
    tree, prompts = tree_of(config), [random_tokens(1, size, seed=size)[0].tolist() for size in sizes]
    attend = layers.attention
    monkeypatch.setattr(layers, "attention", lambda *x: (given.append([y is None for y in x[3:]]), attend(*x))[1])
    logits, after = prefill(tree, prompts, empty(config, len(sizes)), config=config, chunk_length=chunk_length)
    assert given == [[len(sizes) == 1] if begins else [False, False] for begins in fresh]
    assert after.lengths_B.tolist() == list(sizes)
    for n, prompt in enumerate(filter(None, prompts)):
        row, following = torch.tensor([prompt]), random_tokens(1, 4, seed=9)
        assert_near(logits[n], forward(tree, row, config=config)[0, -1])
        step, _ = forward_cached(tree, following, caches.select(after, torch.tensor([n])), config=config)
        assert_near(step, forward(tree, torch.cat([row, following], 1), config=config)[:, -4:])


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_text_does_not_depend_on_the_pieces_of_its_prompt(draft_tokens):
    config = config_of(num_nextn_predict_layers=1)
    tree, prompt = tree_of(config), random_tokens(1, 9, seed=3)[0].tolist()
    texts = [
        list(generate(tree, prompt, config=config, max_new_tokens=9, chunk_length=size, draft_tokens=draft_tokens))
        for size in (3, 9, 100)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 3


def test_pieces_of_prompts():
    found = list(pieces([[1, 2, 3], [], [4], [5, 6, 7, 8]], 3))
    assert [p.tokens_1T.tolist() for p in found] == [[[1, 2, 3]], [[4, 5, 6]], [[7, 8]]]
    assert [p.cu_seqlens.tolist() for p in found] == [[0, 3, 3, 3, 3], [0, 0, 0, 1, 3], [0, 0, 0, 0, 2]]
    assert [p.complete_B.tolist() for p in found] == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_a_prompt_needs_its_own_sequence_and_room():
    config = config_of()
    tree = tree_of(config)
    with pytest.raises(ValueError, match="3 prompts cannot continue a cache of 2 sequences"):
        prefill(tree, [[1]] * 3, empty(config), config=config)
    _, cache = prefill(tree, [[1] * 9, [2]], empty(config, capacity=12), config=config)
    with pytest.raises(ValueError, match="prompt 0 has 4 tokens behind 9, above the cache's capacity of 12: make a la"):
        prefill(tree, [[1] * 4, [2] * 4], cache, config=config)
    with pytest.raises(ValueError, match="chunk_length must be 1 or more, got 0"):
        prefill(tree, [[1], [2]], cache, config=config, chunk_length=0)


def test_the_seed_repeats_the_text():
    config = config_of()
    tree = tree_of(config)

    def text(seed):
        return list(generate(tree, [1, 2], config=config, max_new_tokens=12, options=Options(seed=seed)))

    assert text(3) == text(3) != text(4)


def test_stop_tokens_end_the_text():
    config = config_of()
    tree = tree_of(config)
    text = list(generate(tree, [5], config=config, max_new_tokens=12, options=Options(seed=1)))
    assert len(text) == 12
    stop = text[6]
    ended = list(
        generate(tree, [5], config=config, max_new_tokens=12, options=Options(seed=1), stop_tokens=[stop, 10_000])
    )
    assert ended == text[: text.index(stop)]
    assert list(generate(tree, [5], config=config, max_new_tokens=0)) == []


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_logits_that_are_not_finite_are_an_error(draft_tokens):
    config = config_of(num_nextn_predict_layers=1, eos_token_id=0)
    tree = tree_of(config)
    tree = tree._replace(lm_head=tree.lm_head * torch.nan)
    with pytest.raises(FloatingPointError, match=r"logits are not finite \(a token's log-probability is nan\)"):
        list(generate(tree, [1], config=config, max_new_tokens=3, stop_tokens=[0], draft_tokens=draft_tokens))


def test_what_is_refused():
    config = config_of()
    tree = tree_of(config)
    for prompt, options, message in (
        ([], {}, "the prompt has no tokens: give at least one"),
        ([64], {}, r"the prompt's tokens must lie in \[0, 64\), got 64 to 64"),
        ([3, -1], {}, r"the prompt's tokens must lie in \[0, 64\), got -1 to 3"),
        (
            [1],
            {"max_new_tokens": 256},
            "1 prompt tokens and max_new_tokens 256 make 257, above max_position_emb",
        ),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ([1, "a"], {}, "a token of the prompt must be an integer, got 'a'"),
        (torch.tensor([1]), {}, r"the prompt is a Tensor, it must be a list of tokens, such as x.tolist\(\)"),
        ([1], {"options": Options(logit_bias={64: 1})}, r"a token of logit_bias must be in \[0, 64\), got 64"),
        ([1], {"chunk_length": 0}, "chunk_length must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(tree, prompt, **{"config": config, "max_new_tokens": 3, **options})
