"""Running batches: every row as if it were alone, finished rows left alone, one graph, in place and as a CUDA graph."""

from functools import partial

import pytest
import torch
import torch.utils._pytree as pytree

from q3n_functional import cache as caches
from q3n_functional import decode
from q3n_functional.cache import KeyValues
from q3n_functional.generate import generate, pieces
from q3n_functional.model import forward, forward_cached
from q3n_functional.sampling import Options
from tests.configs import perturbed, slower, small

LINEAR, FULL = "linear_attention", "full_attention"
CAPACITY = 40
PROMPTS = ((3, 1, 4), (1,), (5, 9, 2, 6, 5, 3, 5), (8, 9))
OPTIONS = (
    Options(temperature=0),
    Options(seed=5, repetition_penalty=1.3, presence_penalty=0.5),
    Options(seed=-1, top_k=12, temperature=0.8, logit_bias={7: 1.5}),
    Options(seed=2**40, top_p=0.9, min_p=0.02, frequency_penalty=0.7),
)
NEW = (12, 20, 1, 15)


def config_of(**changes):
    return small(**{"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), "initializer_range": 0.2, **changes})


def tree_of(config, dtype=torch.float32):
    return slower(perturbed(config, dtype=dtype))


def waiting(config, prompts=PROMPTS, options=OPTIONS, new=NEW, stop_tokens=None, device="cpu"):
    cache = caches.empty(config, len(prompts), CAPACITY, torch.float32, device)
    limits = [len(p) + n for p, n in zip(prompts, new, strict=True)]
    return decode.waiting(cache, prompts, options, stop_tokens or [()] * len(prompts), limits, config=config)


def joined(tree, running, config, prompts=PROMPTS, chunk_length=5, join=decode.join):
    """The batch behind its prompts, and what was drawn at each row's end."""
    parts = []
    for piece in pieces(prompts, chunk_length):
        running, drawn = join(tree, running, *piece, config=config)
        parts.append(drawn)
    return running, parts


def texts(draws):
    """Of each row, what was drawn over all the steps."""
    rows = torch.stack([d.token_B for d in draws], 1).tolist()
    return [[token for token in row if token >= 0] for row in rows]


def run(tree, running, config, steps=20, step=decode.step):
    draws = []
    for _ in range(steps):
        running, drawn = step(tree, running, config=config)
        draws.append(drawn)
    return running, draws


def alone(tree, config, row, **options):
    options = {"options": OPTIONS[row], "max_new_tokens": NEW[row], **options}
    return list(generate(tree, PROMPTS[row], config=config, **options))


@pytest.mark.parametrize("kinds", [(LINEAR, FULL), (LINEAR, LINEAR), (FULL, FULL)])
def test_ragged_rows_write_what_they_write_alone(kinds):
    config = config_of(layer_types=kinds)
    tree = tree_of(config)
    running, first = joined(tree, waiting(config), config)
    running, rest = run(tree, running, config)
    found = texts(first + rest)
    assert [len(text) for text in found] == list(NEW)
    assert found == [alone(tree, config, row) for row in range(4)]
    assert running.finished_B.all()
    assert running.cache.lengths_B.tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, NEW, strict=True)]
    assert running.history.drawn_BV.sum(1).tolist() == list(NEW)


def test_every_split_ends_in_the_forward_passes_probabilities():
    """Prefill of k tokens in pieces, a cached forward of m, then decoding: log-probabilities of the full forward."""
    config, length = config_of(), 8
    tree = tree_of(config)
    text = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    for k in range(1, length):
        for m in range(1, length - k):
            running = waiting(config, [text[0, :k].tolist()], [Options(seed=k)], [length + 4 - k])
            for piece in pieces([text[0, :k].tolist()], 3):
                _, cache = decode.extend(tree, piece.tokens_1T, piece.cu_seqlens, running.cache, config=config)
                running = running._replace(cache=cache)
            logits, cache = forward_cached(tree, text[:, k : k + m], running.cache, config=config)
            running, first = decode.drawn(running, cache, logits[:, -1], torch.tensor([True]))
            running, draws = run(tree, running, config, length + 3 - k - m)
            draws = [first, *draws]
            whole = torch.cat([text[:, : k + m], *(d.token_B[:, None] for d in draws)], 1)
            table = forward(tree, whole, config=config).log_softmax(-1)[0, k + m - 1 : -1]
            expected = table.gather(1, whole[0, k + m :, None])[:, 0]
            torch.testing.assert_close(torch.cat([d.logprob_B for d in draws]), expected, rtol=1e-5, atol=1e-5)


def test_a_finished_row_stays_as_it_is():
    """Its states, its length, what it counted; also where its prompt filled all but the last place."""
    config = config_of()
    tree, prompts = tree_of(config), [[1, 2, 3], list(range(CAPACITY - 1))]
    running, _ = joined(tree, waiting(config, prompts, OPTIONS[:2], [9, 1]), config, prompts)
    assert running.finished_B.tolist() == [False, True]
    after, draws = run(tree, running, config, 5)
    assert all(d.token_B[1] == -1 and d.logprob_B[1] == 0 and d.token_B[0] >= 0 for d in draws)
    mine = [
        caches.select(r._replace(cache=r.cache._replace(layers=r.cache.layers[:1])), torch.tensor([1]))
        for r in (running, after)
    ]
    assert all(map(torch.equal, *map(pytree.tree_leaves, mine)))
    kept = CAPACITY - 1
    for x, y in zip(running.cache.layers[1], after.cache.layers[1], strict=True):
        assert torch.equal(x[1, :kept], y[1, :kept])


def test_stop_tokens_finish_a_row():
    config = config_of()
    tree = tree_of(config)
    whole = alone(tree, config, 1)
    stop = next(token for token in whole[3:] if whole.count(token) == 1)
    running, first = joined(tree, waiting(config, stop_tokens=[(), (stop, 10_000), (), ()]), config)
    _, draws = run(tree, running, config)
    found = texts(first + draws)
    assert found[1] == whole[: whole.index(stop) + 1]
    assert found[3] == alone(tree, config, 3)
    assert alone(tree, config, 1, stop_tokens=[stop]) == found[1][:-1]


def test_rows_of_a_running_batch_move():
    """Permuted half-way, and one of them put into another batch."""
    config = config_of()
    tree = tree_of(config)
    running, first = joined(tree, waiting(config), config)
    running, draws = run(tree, running, config, 4)
    begun = texts(first + draws)
    _, rest = run(tree, caches.select(running, torch.tensor([3, 0, 1, 2])), config)
    assert begun[3] + texts(rest)[0] == alone(tree, config, 3)
    assert begun[1] + texts(rest)[2] == alone(tree, config, 1)
    other = caches.place(waiting(config), torch.tensor([2]), caches.select(running, torch.tensor([1])))
    _, rest = run(tree, other, config)
    assert [len(t) for t in texts(rest)] == [0, 0, NEW[1] - len(begun[1]), 0]
    assert begun[1] + texts(rest)[2] == alone(tree, config, 1)


def test_rows_join_while_others_run():
    config = config_of()
    tree, late = tree_of(config), ([], [], PROMPTS[2], PROMPTS[3])
    running, draws = joined(tree, waiting(config), config, [*PROMPTS[:2], [], []])
    for piece in pieces(late, 2):
        running, drawn = decode.step(tree, running, config=config)
        draws.append(drawn)
        running, drawn = decode.join(tree, running, *piece, config=config)
        draws.append(drawn)
    _, rest = run(tree, running, config)
    assert texts(draws + rest) == [alone(tree, config, row) for row in range(4)]


def test_one_graph_serves_all_steps_and_all_pieces():
    config = config_of()
    tree = tree_of(config)
    torch._dynamo.reset()
    step, join = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (decode.step, decode.join))
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        torch._dynamo.mark_dynamic((piece := next(pieces(PROMPTS, 5))).tokens_1T, 1)
        join(tree, waiting(config), *piece, config=config)
        running, first = joined(tree, waiting(config), config, chunk_length=7, join=join)
        _, draws = run(tree, running, config, step=step)
    torch._dynamo.reset()
    assert texts(first + draws) == [alone(tree, config, row) for row in range(4)]


@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_is_the_same(compiled, monkeypatch):
    config = config_of()
    tree = tree_of(config)
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
    state, _ = joined(tree, waiting(config), config)
    state = pytree.tree_map(torch.clone, state)
    running, leaves = state, pytree.tree_leaves(state)
    places = [x.data_ptr() for x in leaves]
    with torch.no_grad():
        step = decode.repeated(partial(decode.step, config=config), tree, state, compile=compiled)
        for _ in range(6):
            running, expected = decode.step(tree, running, config=config)
            assert torch.equal(step().token_B, expected.token_B)
    torch._dynamo.reset()
    assert [x.data_ptr() for x in pytree.tree_leaves(state)] == places
    for actual, wanted in zip(state.cache.layers, running.cache.layers, strict=True):
        if not isinstance(actual, KeyValues):
            torch.testing.assert_close(actual, wanted)
    assert torch.equal(state.history.drawn_BV, running.history.drawn_BV)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_writes_the_same_text(compiled):
    config = config_of()
    tree = pytree.tree_map(torch.Tensor.cuda, tree_of(config))
    state = waiting(config, device="cuda")
    running, draws = state, []
    with torch.no_grad():
        step = decode.repeated(partial(decode.step, config=config), tree, state, compile=compiled)
        join = decode.in_place(partial(decode.join, config=config))
        for piece in pieces(PROMPTS, 5, "cuda"):
            draws.append(join(tree, state, *piece))
        for _ in range(20):
            draws.append(pytree.tree_map(torch.clone, step()))
        expected = []
        running = waiting(config, device="cuda")
        for piece in pieces(PROMPTS, 5, "cuda"):
            running, drawn = decode.join(tree, running, *piece, config=config)
            expected.append(drawn)
        _, rest = run(tree, running, config)
    assert texts(draws) == texts(expected + rest)
