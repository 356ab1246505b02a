"""Drawing tokens: distributions, settings of each row by itself, randomness that is a function of seed and position."""

import dataclasses
import math

import pytest
import torch
import torch.utils._pytree as pytree

from q3n_functional import cache as caches
from q3n_functional.sampling import Options, gumbel, history, kept, noted, philox, sample, settings

PROBABILITIES = [0.4, 0.1, 0.3, 0.2]


def frequencies(options, probabilities=PROBABILITIES, num=8000, prompt=(), drawn=(), **changes):
    """How often each token is drawn over positions, [V] of 1."""
    logits = torch.tensor(probabilities).log().expand(num, -1)
    rows, past = settings([Options(**options)], len(probabilities)), history([prompt], len(probabilities))
    for token in drawn:
        past = noted(past, torch.tensor([token]))
    rows, past = caches.repeat(rows, num), caches.repeat(past, num)
    tokens = sample(logits, rows, past, torch.arange(num), **changes).token_B
    return torch.bincount(tokens, minlength=len(probabilities)) / num


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        ({"temperature": 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0, "top_k": 3}, [1, 0, 0, 0]),
        ({"temperature": 1e-40}, [1, 0, 0, 0]),
        ({"temperature": 1e-320, "top_p": 0.9}, [1, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 9}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_p": 0.1}, [1, 0, 0, 0]),
        ({"top_p": 1e-46}, [1, 0, 0, 0]),
        ({"top_p": 1e-320}, [1, 0, 0, 0]),
        ({"top_p": 0.39}, [1, 0, 0, 0]),
        ({"top_p": 0.5}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.85}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_p": 0.5, "top_k": 3}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.45, "top_k": 2}, [1, 0, 0, 0]),
        ({"top_p": 0.5, "temperature": 0.5}, [1, 0, 0, 0]),
        ({"min_p": 0.6}, [4 / 7, 0, 3 / 7, 0]),
        ({"min_p": 0.3}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"logit_bias": {1: math.log(4), 0: -100}}, [0, 4 / 9, 3 / 9, 2 / 9]),
    ],
)
def test_distributions(options, expected):
    actual = frequencies(options)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.02)
    assert torch.equal(actual == 0, torch.tensor(expected) == 0)


def normalised(weights):
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        # Token 0 was in the prompt, token 2 was drawn twice; all logits are negative.
        ({"repetition_penalty": 2.0}, [0.4**2, 0.1, 0.3**2, 0.2]),
        ({"presence_penalty": 1.0}, [0.4, 0.1, 0.3 / math.e, 0.2]),
        ({"presence_penalty": -0.5}, [0.4, 0.1, 0.3 * math.exp(0.5), 0.2]),
        ({"frequency_penalty": 1.0}, [0.4, 0.1, 0.3 / math.e**2, 0.2]),
        ({"frequency_penalty": 0.5, "presence_penalty": 0.5}, [0.4, 0.1, 0.3 / math.exp(1.5), 0.2]),
    ],
)
def test_penalties(options, weights):
    actual = frequencies(options, prompt=[0, 0], drawn=[2, 2])
    torch.testing.assert_close(actual, torch.tensor(normalised(weights)), rtol=0, atol=0.02)


def test_a_repetition_penalty_lowers_positive_logits_too():
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    rows, past = settings([Options(repetition_penalty=2.0, temperature=0)], 3), history([[0]], 3)
    assert sample(logits, rows, past, torch.tensor([0])).token_B.tolist() == [1]


def test_thresholds_are_those_of_a_sort():
    """Over many sizes, with ties and infinities, against sorting."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        logits = torch.randn(3, 50, generator=generator) * 4
        if trial % 2:
            logits = logits.round()
        logits[:, trial % 50] = -torch.inf
        options = [Options(top_k=k, top_p=p) for k, p in ((trial, 0.9), (trial % 7, 0.5), (0, 0.99))]
        actual = kept(logits, settings(options, 50))
        for row, each in enumerate(options):
            values = logits[row].clone()
            if each.top_k:
                values[values < values.sort(descending=True).values[each.top_k - 1]] = -torch.inf
            p, index = values.softmax(-1).sort(descending=True)
            last = int((p.cumsum(0) < each.top_p).sum())
            assert torch.equal(actual[row], values >= values[index[last]]), (trial, row)


ROWS = (
    Options(temperature=0),
    Options(seed=1),
    Options(seed=1, temperature=0.7, top_k=5),
    Options(seed=2, top_p=0.8, presence_penalty=1.0),
    Options(seed=-3, min_p=0.1, repetition_penalty=1.3, logit_bias={3: 2.5}),
)


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    prompts, positions = [[1], [2, 3], [4], [], [5, 3]], torch.arange(5) * 1000
    together = sample(logits, settings(ROWS, 40), history(prompts, 40), positions)
    for row, options in enumerate(ROWS):
        one = slice(row, row + 1)
        alone = sample(logits[one], settings([options], 40), history(prompts[one], 40), positions[one])
        assert pytree.tree_map(lambda x, one=one: x[one].tolist(), together) == pytree.tree_map(
            torch.Tensor.tolist, alone
        )


def test_log_probabilities_are_the_models():
    """Whatever the settings: those of the logits as they came."""
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, settings(ROWS, 40), history([[3]] * 5, 40), torch.arange(5))
    expected = logits.log_softmax(-1).gather(1, drawn.token_B[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprob_B, expected)


def test_without_filters_nothing_is_left_out():
    assert torch.equal(frequencies({}, filtered=False), frequencies({}))
    assert (frequencies({"top_k": 1}, filtered=False) > 0).all()


@pytest.mark.parametrize(
    ("seed", "position", "expected"),
    [  # the vectors of Random123's own tests with a zero upper counter
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ],
)
def test_philox_is_the_published_one(seed, position, expected):
    assert philox(torch.tensor([seed]), torch.tensor([position]), 4)[0].tolist() == expected


def test_noise_is_independent_over_seeds_positions_and_tokens():
    seeds, positions = torch.tensor([0, 0, 1, 1 << 40, -1]), torch.tensor([0, 1, 0, 0, 0])
    bits = philox(seeds, positions, 4099)
    assert bits.shape == (5, 4099)
    assert bits.min() >= 0
    assert bits.max() < 2**32
    assert torch.equal(philox(seeds[2:3], positions[2:3], 100), bits[2:3, :100])
    # A product beyond 64 bits was seen to come out otherwise from Inductor's C++.
    assert torch.equal(torch.compile(philox)(seeds, positions, 4099), bits)
    correlations = torch.corrcoef(bits.double())
    assert (correlations - torch.eye(5)).abs().max() < 0.05
    noise = gumbel(seeds, positions, 4099)
    assert abs(float(noise.mean()) - 0.5772) < 0.05
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.1


def test_it_compiles_and_draws_the_same():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    arguments = (logits, settings(ROWS, 40), history([[3]] * 5, 40), torch.arange(5))
    expected, actual = sample(*arguments), torch.compile(sample, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(actual.token_B, expected.token_B)
    torch.testing.assert_close(actual.logprob_B, expected.logprob_B)


def test_only_what_is_kept_is_noted():
    past = noted(history([[1], [2]], 5), torch.tensor([3, 3]), torch.tensor([True, False]))
    past = noted(past, torch.tensor([3, 4]))
    assert past.drawn_BV.tolist() == [[0, 0, 0, 2, 0], [0, 0, 0, 0, 1]]


def test_what_filters():
    assert [o.filtered for o in ROWS] == [False, False, True, True, True]
    assert not dataclasses.replace(ROWS[2], temperature=0).filtered


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature must be 0 \(the likeliest token\) or more, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be .*, got nan"),
        ({"top_k": -1}, r"top_k must be 0 \(all tokens\) or more, got -1"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1 \(all tokens\), got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], 0 for all tokens, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, 1 for none, got 0"),
        ({"presence_penalty": 3}, r"presence_penalty must be in \[-2, 2\], 0 for none, got 3"),
        ({"frequency_penalty": -3}, r"frequency_penalty must be in \[-2, 2\], 0 for none, got -3"),
        ({"seed": 2**63}, "seed must be a signed 64-bit integer"),
        ({"logit_bias": {4: 101}}, r"logit_bias of token 4 must be in \[-100, 100\], got 101"),
        ({"logit_bias": {9: 1}}, r"a token of logit_bias must be in \[0, 9\), got 9"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        settings([Options(**options)], 9)
