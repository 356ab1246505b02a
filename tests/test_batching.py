"""Continuous batching: whatever comes and goes, each request writes what it would write alone."""

import dataclasses
import random

import pytest
import torch

from q3n_functional import batching, tokenizer
from q3n_functional.batching import Engine, QueueFullError, Request
from q3n_functional.generate import generate
from q3n_functional.sampling import Options
from tests.configs import perturbed, slower, small

LINEAR, FULL = "linear_attention", "full_attention"
WORDS = tokenizer.train_bpe([], tokenizer.BYTES)
CONFIG = small(num_hidden_layers=2, layer_types=(LINEAR, FULL), initializer_range=0.2, vocab_size=tokenizer.BYTES)
TREE = slower(perturbed(CONFIG))
SYSTEM = list(range(40, 62))


def engine(kind=Engine, **changes):
    options = {"rows": 3, "capacity": 64, "chunk_length": 9, "block_size": 8, **changes}
    return kind(params=TREE, config=CONFIG, tokenizer=WORDS, **options)


def random_request(generator):
    """Half of them begin alike."""
    common = SYSTEM[: generator.choice([0, 0, 15, 16, 22])]
    prompt = common + [generator.randrange(257) for _ in range(generator.randrange(1, 14))]
    options = generator.choice(
        [
            Options(temperature=0),
            Options(seed=generator.randrange(1000)),
            Options(seed=generator.randrange(1000), top_k=20, presence_penalty=0.5),
            Options(seed=generator.randrange(1000), top_p=0.8, repetition_penalty=1.2, logit_bias={5: 3.0}),
        ]
    )
    stops = [generator.randrange(257) for _ in range(generator.choice([0, 0, 20]))]
    return Request(prompt=prompt, max_new_tokens=generator.randrange(1, 20), options=options, stop_tokens=stops)


def alone(request):
    """Tokens and text of the request by itself."""
    tokens = list(
        generate(
            TREE,
            request.prompt,
            config=CONFIG,
            max_new_tokens=request.max_new_tokens,
            options=request.options,
            stop_tokens=request.stop_tokens,
        )
    )
    return tokens, "".join(tokenizer.stream(WORDS, tokens, request.stop))


def check(request, events):
    """That a request's events are those of the request alone."""
    tokens, text = alone(request)
    assert "".join(e.text for e in events) == text
    drawn = [e.token for e in events]
    if drawn[-1] in request.stop_tokens:
        assert events[-1].finish_reason == "stop"
        assert drawn[:-1] == tokens
    elif not request.stop:
        assert events[-1].finish_reason == "length"
        assert drawn == tokens
    assert all(e.finish_reason is None for e in events[:-1])
    assert all(e.logprob < 0 for e in events)


def collected(found, events):
    for event in events:
        found.setdefault(event.id, []).append(event)


def drained(made, found=None):
    found = {} if found is None else found
    for _ in range(500):
        collected(found, made.step())
        if made.counts()[:2] == (0, 0):
            return found
    raise AssertionError("the engine does not come to an end")


def visited(made, generator, make=random_request):
    """Requests come at random, and some are cancelled; those that are not write what they would write alone."""
    requests, found, gone = {}, {}, set()
    for _ in range(120):
        if generator.random() < 0.4:
            request = make(generator)
            try:
                requests[made.submit(request)] = request
            except QueueFullError:
                assert made.counts().waiting == 5
        if requests and generator.random() < 0.1:
            chosen = generator.choice(list(requests)[-5:])
            finished = chosen in found and found[chosen][-1].finish_reason is not None
            assert made.cancel(chosen) == (not finished and chosen not in gone)
            gone |= set() if finished else {chosen}
        events = made.step()
        assert not {e.id for e in events} & gone
        assert int((~made._running.finished_B).sum()) <= made.counts().running
        collected(found, events)
    drained(made, found)
    assert len(requests) > 25
    assert len(gone) > 2
    for number, request in requests.items():
        if number not in gone:
            check(request, found[number])
    assert made.counts().drawn_tokens == sum(map(len, found.values()))


@pytest.mark.parametrize("prefix_bytes", [0, 10**6, 10**9])
def test_random_joins_leaves_and_cancels(prefix_bytes):
    made = engine(prefix_bytes=prefix_bytes, max_queue=5)
    visited(made, random.Random(prefix_bytes))
    assert (made.counts().reused_tokens > 0) == (prefix_bytes > 0)
    assert made.counts()[-2:] == (0, 0)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_common_beginning_is_read_once(drafts):
    made = engine(prefix_bytes=10**9, chunk_length=100, drafts=drafts)
    requests = [Request(prompt=[*SYSTEM, n], max_new_tokens=3, options=Options(seed=n)) for n in range(4)]
    for number, request in enumerate(requests):
        made.submit(request)
        check(request, drained(made)[number])
        assert made.counts().reused_tokens == 16 * number
    # What was written is a beginning as well, but for the last token, which no cache has.
    text = alone(Request(prompt=SYSTEM, max_new_tokens=12, options=Options(seed=1)))[0]
    made.submit(Request(prompt=SYSTEM, max_new_tokens=12, options=Options(seed=1)))
    drained(made)
    before = made.counts().reused_tokens
    turn = Request(prompt=[*SYSTEM, *text, 1, 2], max_new_tokens=5)
    made.submit(turn)
    (events,) = drained(made).values()
    check(turn, events)
    assert made.counts().reused_tokens - before == 32


@pytest.mark.parametrize("stop", [("e",), ("zzz",), ("\x00", "\x01", "0"), ("ab", "b")])
def test_stop_strings_across_tokens(stop):
    """Texts of letters, whose stop strings are drawn a token at a time."""
    letters = dict.fromkeys(tokenizer.encode(WORDS, ["abcde0 é"])[0], 8.0)
    made, requests = engine(), {}
    for seed in range(6):
        options = Options(seed=seed, logit_bias=letters)
        request = Request(prompt=[seed], max_new_tokens=40, options=options, stop=stop)
        requests[made.submit(request)] = request
    found = drained(made)
    for number, request in requests.items():
        tokens, text = alone(request)
        whole = "".join(tokenizer.stream(WORDS, tokens))
        ended = any(s in whole for s in stop)
        assert "".join(e.text for e in found[number]) == text == whole[: len(text)]
        assert found[number][-1].finish_reason == ("stop" if ended else "length")
        assert not any(s in text for s in stop)
        assert ended or len(found[number]) == 40


def test_text_is_given_as_it_comes():
    made = engine()
    made.submit(Request(prompt=[1], max_new_tokens=9, options=Options(seed=1, logit_bias={65: 50.0, 66: 50.0})))
    pieces = [event.text for _ in range(8) for event in made.step()]
    assert len([p for p in pieces if p]) > 6


def test_prompts_are_read_between_steps():
    """A long prompt holds up nobody: those that write draw a token in each step."""
    made = engine(chunk_length=4)
    short = made.submit(Request(prompt=[1], max_new_tokens=30))
    made.step()
    long = made.submit(Request(prompt=[2] * 40, max_new_tokens=5))
    for _ in range(9):
        assert [e.id for e in made.step()] == [short]
    assert [e.id for e in made.step()] == [long, short, long]


def test_prompts_are_read_in_the_order_of_their_coming():
    """And never more than `chunk_length` tokens at once, whichever rows they have."""
    made = engine(chunk_length=4)
    ids = [made.submit(Request(prompt=[n] * 20, max_new_tokens=n)) for n in (1, 3, 2)]
    first, found = {}, {}
    for step in range(16):
        collected(found, made.step())
        first.update({n: step for n in found if n not in first})
        if step == 6:
            ids.append(made.submit(Request(prompt=[4] * 20, max_new_tokens=1)))
    assert first == {ids[0]: 4, ids[1]: 9, ids[2]: 14}
    assert drained(made, found).keys() == set(ids)


def test_the_end_of_a_prompt_is_read_again_and_pieces_end_with_blocks():
    made = engine(prefix_bytes=10**9, chunk_length=5)
    request = Request(prompt=[*SYSTEM, 1, 2], max_new_tokens=2, options=Options(seed=1))
    for reused in (0, 16):
        before = made.counts().reused_tokens
        number = made.submit(request)
        check(request, drained(made)[number])
        assert made.counts().reused_tokens - before == reused


def test_without_a_tokenizer_there_are_tokens():
    made = dataclasses.replace(engine(), tokenizer=None)
    request = Request(prompt=[3, 4], max_new_tokens=6, options=Options(seed=3))
    made.submit(request)
    (events,) = drained(made).values()
    assert [e.token for e in events] == alone(request)[0]
    assert {e.text for e in events} == {""}
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        made.submit(Request(prompt=[1], max_new_tokens=1, stop=("a",)))


@pytest.mark.parametrize("drafts", [0, 2])
def test_no_tensor_is_made_anew(drafts):
    """What a CUDA graph reads and writes stays where it is."""
    made = engine(prefix_bytes=10**6, drafts=drafts)
    leaves = torch.utils._pytree.tree_leaves(made._state)
    places = [x.data_ptr() for x in leaves]
    for seed in range(4):
        made.submit(Request(prompt=[seed] * 9, max_new_tokens=7))
    drained(made)
    assert [x.data_ptr() for x in torch.utils._pytree.tree_leaves(made._state)] == places


@pytest.mark.parametrize("drafts", [0, 2])
def test_one_graph_serves_all_requests(monkeypatch, drafts):
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
    with torch._dynamo.config.patch(error_on_recompile=True):
        made = engine(compile=True, drafts=drafts)
        requests = {}
        for n in range(5):
            request = Request(prompt=[n] * (n + 1), max_new_tokens=4 + n, options=Options(seed=n))
            requests[made.submit(request)] = request
        found = drained(made)
    torch._dynamo.reset()
    for number, request in requests.items():
        check(request, found[number])


@pytest.mark.parametrize("drafts", [0, 2])
def test_logits_that_are_not_finite_fail_their_request_alone(drafts):
    embedding = TREE.embed_tokens.clone()
    embedding[7] = torch.nan
    params = TREE._replace(embed_tokens=embedding)
    made = dataclasses.replace(engine(rows=1, drafts=drafts, prefix_bytes=10**9), params=params)
    other = Request(prompt=[1, 2, 3], max_new_tokens=9, options=Options(seed=3))
    failed, number = made.submit(Request(prompt=[*SYSTEM, 7], max_new_tokens=9, stop_tokens=[0])), made.submit(other)
    found = drained(made)
    assert [(e.finish_reason, e.text) for e in found[failed]] == [("error", "")]
    check(other, found[number])


def test_what_is_refused():
    made = engine(max_queue=1)
    for request, message in (
        (Request(prompt=[], max_new_tokens=1), "the prompt has no tokens"),
        (Request(prompt=[257], max_new_tokens=1), r"tokens must lie in \[0, 257\)"),
        (Request(prompt=[1], max_new_tokens=0), "max_new_tokens must be 1 or more, got 0"),
        (
            Request(prompt=[1] * 60, max_new_tokens=5),
            "60 prompt tokens and max_new_tokens 5 make 65, above the engine's capacity of 64: shorten one of them",
        ),
        (Request(prompt=[1], max_new_tokens=2.5), "max_new_tokens must be an integer, got 2.5"),
        (Request(prompt=[1], max_new_tokens=300), "max_position_embeddings 256"),
        (Request(prompt=[1], max_new_tokens=1, options=Options(logit_bias={257: 1})), "a token of logit_bias must be"),
        (Request(prompt=[1], max_new_tokens=1, stop=("a", "")), "stop strings need a tokenizer, and none may be emp"),
    ):
        with pytest.raises(ValueError, match=message):
            made.submit(request)
    made.submit(Request(prompt=[1], max_new_tokens=1))
    with pytest.raises(batching.QueueFullError, match="1 requests wait, the most that may: try again later"):
        made.submit(Request(prompt=[1], max_new_tokens=1))
    assert not made.cancel(99)
    for name in ("rows", "capacity", "max_queue", "chunk_length"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            engine(**{name: 0})
