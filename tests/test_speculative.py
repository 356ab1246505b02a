"""Speculative decoding writes the text of plain decoding, whatever is drafted and however much of it is accepted."""

from functools import partial

import pytest
import torch
import torch.utils._pytree as pytree
from torch.nn.functional import pad

from q3n_functional import cache as caches
from q3n_functional import decode, speculative
from q3n_functional.generate import generate, pieces
from q3n_functional.model import head, hidden_states, multi_token_prediction, next_tokens
from q3n_functional.sampling import Options, noted, sample
from tests.configs import perturbed, slower, small

LINEAR, FULL = "linear_attention", "full_attention"
PROMPTS = ((3, 1, 4), (1,), (5, 9, 2, 6, 5, 3, 5), (8, 9), (7, 7, 7))
OPTIONS = (
    Options(temperature=0),
    Options(seed=5, repetition_penalty=1.3, presence_penalty=0.5),
    Options(seed=-1, top_k=12, temperature=3.0, logit_bias={7: 1.5}),
    Options(seed=2**40, top_p=0.9, min_p=0.02, frequency_penalty=0.7),
    Options(temperature=0, logit_bias={7: 20.0}, frequency_penalty=2.0),
)
NEW = (12, 20, 1, 15, 18)


def config_of(**changes):
    """Weights so small that model and module often agree: the noise is the same."""
    return small(**{"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), "initializer_range": 0.12, **changes})


def tree_of(config, dtype=torch.float32):
    return slower(perturbed(config, dtype=dtype))


def waiting(tree, config, num, prompts=PROMPTS, options=OPTIONS, new=NEW, stop_tokens=None, device="cpu"):
    limits = [len(p) + n for p, n in zip(prompts, new, strict=True)]
    capacity = max(limits) + num
    cache = caches.empty(config, len(prompts), capacity, tree.embed_tokens.dtype, device)
    running = decode.waiting(cache, prompts, options, stop_tokens or [()] * len(prompts), limits, config=config)
    return speculative.waiting(tree, running, num, capacity, config=config)


def joined(tree, state, config, prompts=PROMPTS, chunk_length=5, join=speculative.join, device="cpu"):
    shifted = [[*p[1:], 0] for p in prompts]
    draws = []
    for now, later in zip(pieces(prompts, chunk_length, device), pieces(shifted, chunk_length, device), strict=True):
        state, drawn = join(tree, state, now.tokens_1T, later.tokens_1T, *now[1:], config=config)
        draws.append(drawn.token_B[:, None])
    return state, draws


def run(tree, state, config, step=speculative.step, steps=20):
    draws = []
    for _ in range(steps):
        state, verified = step(tree, state, config=config)
        draws.append(verified.token_BT)
    return state, draws


def texts(draws):
    return [[token for token in row if token >= 0] for row in torch.cat(draws, 1).tolist()]


def alone(tree, config, row, **options):
    options = {"options": OPTIONS[row], "max_new_tokens": NEW[row], **options}
    return list(generate(tree, PROMPTS[row], config=config, **options))


@pytest.mark.parametrize(
    ("kinds", "num"),
    [((LINEAR, FULL), 1), ((LINEAR, FULL), 2), ((LINEAR, FULL), 6), ((LINEAR, LINEAR), 3), ((FULL, FULL), 3)],
)
def test_texts_are_those_of_plain_decoding(kinds, num):
    config = config_of(layer_types=kinds)
    tree = tree_of(config)
    state, first = joined(tree, waiting(tree, config, num), config)
    state, rest = run(tree, state, config)
    assert texts(first + rest) == [alone(tree, config, row) for row in range(len(PROMPTS))]
    assert state.running.finished_B.all()
    assert state.running.cache.lengths_B.tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, NEW, strict=True)]
    assert state.running.history.drawn_BV.sum(1).tolist() == list(NEW)
    # Rows that accept different numbers, some and not all; every step adds one token besides.
    steps = (torch.stack([(t >= 0).any(1) for t in rest])).sum(0)
    assert torch.equal(state.accepted_B, torch.tensor(NEW) - 1 - steps)
    assert torch.equal(state.drafted_B, num * steps)
    assert len(set(state.accepted_B.tolist())) > 2
    assert 0.1 < speculative.acceptance_rate(state) < 0.95


def test_states_and_probabilities_are_the_same_in_float64():
    """Where rounding cannot hide a state that is wrong."""
    config = config_of()
    tree = tree_of(config, torch.float64)
    state, _ = joined(tree, waiting(tree, config, 3), config)
    cache = caches.empty(config, len(PROMPTS), 40, torch.float64)
    limits = [len(p) + n for p, n in zip(PROMPTS, NEW, strict=True)]
    running = decode.waiting(cache, PROMPTS, OPTIONS, [()] * len(PROMPTS), limits, config=config)
    for piece in pieces(PROMPTS, 5):
        running, _ = decode.join(tree, running, *piece, config=config)
    logprobs = [[], []]
    for _ in range(20):
        state, verified = speculative.step(tree, state, config=config)
        running, drawn = decode.step(tree, running, config=config)
        logprobs[0].append(verified.logprob_BT)
        logprobs[1].append(drawn.logprob_B[:, None])
    for row in range(len(PROMPTS)):
        actual, expected = (torch.cat(x, 1)[row] for x in logprobs)
        torch.testing.assert_close(actual[actual != 0], expected[expected != 0], rtol=1e-6, atol=1e-6)
    mine, theirs = state.running.cache.layers[0].recurrent, running.cache.layers[0].recurrent
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def drafted(tree, config, running, row, tokens, num):
    """What the module drafts behind `tokens`, all of it computed again."""
    settings, history = (caches.select(x, torch.tensor([row])) for x in (running.settings, running.history))
    h_BTD, _, _ = hidden_states(tree, tokens, config=config)
    h_BTD, found = h_BTD[:, :-1], []
    for _ in range(num):
        e_BTD = tree.embed_tokens[next_tokens(tokens)]
        y_BTD, _ = multi_token_prediction(tree.mtp, e_BTD, pad(h_BTD, (0, 0, 0, 1)), tokens, config=config)
        draw = sample(y_BTD[:, -2] @ head(tree).mT, settings, history, torch.tensor([tokens.shape[1]]))
        found.append(int(draw.token_B))
        history = noted(history, draw.token_B)
        tokens, h_BTD = torch.cat([tokens, draw.token_B[None]], 1), torch.cat([h_BTD, y_BTD[:, -2:-1]], 1)
    return found


@pytest.mark.parametrize("num", [1, 3])
def test_drafts_come_from_true_hidden_states(num):
    """Behind the prompts and after every step."""
    config = config_of()
    tree = tree_of(config)
    state, draws = joined(tree, waiting(tree, config, num), config)
    for _ in range(5):
        for row, text in enumerate(texts(draws)):
            if not state.running.finished_B[row]:
                tokens = torch.tensor([[*PROMPTS[row], *text]])
                expected = drafted(tree, config, state.running, row, tokens, num)
                assert state.drafts_BN[row].tolist() == expected
        state, more = run(tree, state, config, steps=1)
        draws += more


def test_a_stop_token_within_the_drafts_ends_the_text():
    config = config_of()
    tree = tree_of(config)
    for row, every in ((1, 4), (4, 5)):
        whole = alone(tree, config, row)
        for stop in sorted(set(whole))[::every]:
            stops = [()] * len(PROMPTS)
            stops[row] = (stop,)
            state, first = joined(tree, waiting(tree, config, 4, stop_tokens=stops), config)
            state, rest = run(tree, state, config)
            assert texts(first + rest)[row] == whole[: whole.index(stop) + 1]
            assert state.running.cache.lengths_B[row] == len(PROMPTS[row]) + whole.index(stop)


def test_generate_drafts():
    config = config_of()
    tree = tree_of(config)
    for row in range(len(PROMPTS)):
        whole = alone(tree, config, row)
        assert alone(tree, config, row, draft_tokens=3, chunk_length=2) == whole
        assert alone(tree, config, row, draft_tokens=2, stop_tokens=whole[-1:]) == whole[: whole.index(whole[-1])]


def test_generate_says_how_many_drafts_were_accepted(caplog):
    caplog.set_level("INFO")
    config = config_of()
    text = alone(tree_of(config), config, 1, draft_tokens=2)
    accepted, drafted = (int(word) for word in caplog.messages[-1].split() if word.isdigit())
    assert caplog.messages[-1].startswith(f"accepted {accepted} of {drafted} drafts (")
    assert len(text) - 1 == accepted + drafted // 2


def test_one_graph_serves_all_steps():
    config = config_of()
    tree = tree_of(config)
    torch._dynamo.reset()
    step = torch.compile(speculative.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        state, first = joined(tree, waiting(tree, config, 2), config)
        _, rest = run(tree, state, config, step=step)
    torch._dynamo.reset()
    assert texts(first + rest) == [alone(tree, config, row) for row in range(len(PROMPTS))]


def test_what_is_refused():
    config = config_of(num_nextn_predict_layers=0)
    tree = tree_of(config)
    with pytest.raises(ValueError, match=r"the model has no prediction module .* decode without drafts"):
        generate(tree, [1], config=config, max_new_tokens=3, draft_tokens=2)
    config = config_of()
    with pytest.raises(ValueError, match=r"draft_tokens must be 0 .* or more, got -1"):
        generate(tree_of(config), [1], config=config, max_new_tokens=3, draft_tokens=-1)
    with pytest.raises(ValueError, match="num_drafts must be 1 or more, got 0"):
        waiting(tree_of(config), config, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_drafts_the_same_text(compiled):
    config = config_of()
    tree = pytree.tree_map(torch.Tensor.cuda, tree_of(config))
    state = waiting(tree, config, 3, device="cuda")
    with torch.no_grad():
        step = decode.repeated(partial(speculative.step, config=config), tree, state, compile=compiled)
        join = decode.in_place(partial(speculative.join, config=config))
        _, draws = joined(tree, state, config, join=lambda *a, config: (state, join(*a)), device="cuda")
        draws += [step().token_BT.clone() for _ in range(20)]
        plain, expected = joined(tree, waiting(tree, config, 3, device="cuda"), config, device="cuda")
        _, rest = run(tree, plain, config)
    assert texts(draws) == texts(expected + rest)
