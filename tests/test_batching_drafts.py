"""Continuous batching with drafts: a request's text and its end are those of the request alone, in fewer steps."""

import dataclasses
import random

import pytest
import torch
import torch.utils._pytree as pytree

from q3n_functional import tokenizer
from q3n_functional.batching import Engine, Request
from q3n_functional.sampling import Options
from tests.configs import perturbed, small
from tests.test_batching import CONFIG, SYSTEM, TREE, WORDS, alone, check, drained, engine, visited
from tests.test_speculative import drafted

LETTERS = dict.fromkeys(tokenizer.encode(WORDS, ["abcdef0 é"])[0], 9.0)
AGREED = Options(temperature=0, logit_bias={65: 100.0})
"""Settings by which model and module draw the same, whatever they say."""


def random_request(generator):
    """Among few letters drafts are right now and then, also the likeliest letter, which frequency then rules out."""
    common = SYSTEM[: generator.choice([0, 0, 15, 16, 22])]
    prompt = common + [generator.randrange(257) for _ in range(generator.randrange(1, 14))]
    seed = generator.randrange(1000)
    options = generator.choice(
        [
            Options(temperature=0, logit_bias=LETTERS),
            Options(temperature=0, logit_bias={5: 30.0, 9: 30.0}, frequency_penalty=2.0),
            Options(seed=seed, logit_bias=LETTERS),
            Options(seed=seed, logit_bias=LETTERS, top_k=4, presence_penalty=0.5),
            Options(seed=seed, logit_bias=LETTERS, top_p=0.8, repetition_penalty=1.2),
        ]
    )
    new, stop = generator.randrange(1, 27), generator.choice([(), ("e0",), ("ab", "c")])
    stops = generator.choice([(), generator.sample(sorted(LETTERS), 1)])
    return Request(prompt=prompt, max_new_tokens=new, options=options, stop_tokens=stops, stop=stop)


@pytest.mark.parametrize(("drafts", "prefix_bytes"), [(1, 0), (3, 10**6), (6, 10**9)])
def test_random_joins_leaves_and_cancels(drafts, prefix_bytes):
    made = engine(drafts=drafts, prefix_bytes=prefix_bytes, max_queue=5)
    visited(made, random.Random(drafts), random_request)
    counts = made.counts()
    assert (counts.reused_tokens > 0) == (prefix_bytes > 0)
    assert 40 < counts.accepted_tokens < 0.7 * counts.drafted_tokens


class Checked(Engine):
    """Before every step each row has the drafts that come of its tokens alone."""

    def _write(self):
        for number, row in enumerate(self._batch):
            if row is not None and not row.reading:
                expected = drafted(TREE, CONFIG, self._running, number, torch.tensor([row.tokens]), self.drafts)
                assert self._state.drafts_BN[number].tolist() == expected
        return super()._write()


def test_drafts_are_those_of_the_request_alone():
    """Whoever comes and goes, and however the prompt was read: in pieces, beside others' steps, or from the store."""
    made, generator = engine(Checked, drafts=3, prefix_bytes=10**9, max_queue=99), random.Random(1)
    for _ in range(10):
        made.submit(dataclasses.replace(random_request(generator), stop=(), stop_tokens=()))
    drained(made)
    assert made.counts().drafted_tokens > 3 * 40
    assert made.counts().reused_tokens > 30


def test_the_store_knows_the_token_behind_a_block():
    """The module's keys and values have seen it: a block is another's only where that goes on alike."""
    made = engine(drafts=2, prefix_bytes=10**9)
    for last, reused in ((1, 0), (2, 8), (1, 16)):
        before = made.counts().reused_tokens
        request = Request(prompt=[*SYSTEM[:16], last], max_new_tokens=3, options=Options(seed=last))
        number = made.submit(request)
        check(request, drained(made)[number])
        assert made.counts().reused_tokens - before == reused


def runs(made):
    """How many tokens each step adds, of the one request there is."""
    sizes = []
    while made.counts()[:2] != (0, 0):
        sizes.append(len(made.step()))
    return sizes


def test_the_last_token_lies_within_a_run():
    """A row takes no place behind its limit, which is the engine's capacity here."""
    made = engine(drafts=3, rows=1)
    for _ in range(2):
        request = Request(prompt=[1] * 50, max_new_tokens=12, options=AGREED)
        number = made.submit(request)
        check(request, drained(made)[number])
    made.submit(dataclasses.replace(request, max_new_tokens=14))
    # 9 tokens of a prompt are read at once; the step in which it is complete draws the first and has a run.
    assert runs(made) == [0] * 5 + [1 + 4, 4, 4, 1]
    assert made._running.cache.lengths_B.tolist() == [63]


def test_runs_end_with_blocks_that_are_kept():
    made = engine(drafts=3, rows=1, prefix_bytes=10**9)
    made.submit(Request(prompt=[1] * 6, max_new_tokens=20, options=AGREED))
    # Behind 6 tokens, those that end with the 8th, 16th and 24th in the cache; then the limit.
    assert runs(made) == [1 + 2, 4, 4, 4, 4, 1]


@pytest.mark.parametrize("stop", [("e",), ("ab", "ba", "d"), ("c", "é"), ("zzz",)])
def test_a_stop_string_within_a_run_cuts_it(stop):
    made, requests = engine(drafts=4, max_queue=99), {}
    for seed in range(8):
        options = Options(seed=seed, logit_bias=dict.fromkeys(LETTERS, 12.0), temperature=4.0)
        request = Request(prompt=[seed] * (seed + 1), max_new_tokens=40, options=options, stop=stop)
        requests[made.submit(request)] = request
    found = drained(made)
    for number, request in requests.items():
        tokens, text = alone(request)
        assert "".join(e.text for e in found[number]) == text
        assert [e.token for e in found[number]] == tokens[: len(found[number])]
        ended = any(s in "".join(tokenizer.stream(WORDS, tokens)) for s in stop)
        assert found[number][-1].finish_reason == ("stop" if ended else "length")
    counts = made.counts()
    kept = len(requests) + counts.drafted_tokens // 4 + counts.accepted_tokens
    # The tokens behind the stop strings, which the device had drawn in the same step.
    assert (counts.drawn_tokens < kept) == (stop != ("zzz",))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs_write_the_same_texts(compiled):
    tree, generator, requests = pytree.tree_map(torch.Tensor.cuda, TREE), random.Random(1), {}
    made = Engine(tree, CONFIG, rows=3, capacity=64, tokenizer=WORDS, drafts=3, prefix_bytes=10**9, block_size=8,
                  compile=compiled)  # fmt: skip
    for _ in range(12):
        request = random_request(generator)
        requests[made.submit(request)] = request
    found = drained(made)
    for number, request in requests.items():
        check(request, found[number])
    assert made.counts().accepted_tokens > 0


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"drafts must be 0 \(none\) or more, got -1"):
        engine(drafts=-1)
    config = small(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"the model has no prediction module \(mtp\) to draft with"):
        Engine(perturbed(config), config, rows=1, capacity=9, drafts=1)
