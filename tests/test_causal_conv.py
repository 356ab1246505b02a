"""The short convolution against a loop over tokens and taps in float64."""

import itertools

import pytest
import torch
from expecttest import assert_expected_inline
from torch import library

from q3n_functional.ops import causal_conv, causal_conv_qkv

BOUNDS = [0, 5, 5, 6, 8, 20, 20]  # one empty, two shorter than the taps, the last repeated, then padding
LENGTH = 23


def offsets(bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def reference(x, weight, state=None, cu_seqlens=None):
    """In float64, one sequence, token and tap after the other; zeros behind the last."""
    (batch, length, channels), width, dtype = x.shape, weight.shape[1], torch.float64
    flat, weight = x.to(dtype).flatten(0, 1), weight.to(dtype)
    bounds = cu_seqlens.tolist() if cu_seqlens is not None else [length * b for b in range(batch + 1)]
    outputs, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        before = torch.zeros(width - 1, channels, dtype=dtype) if state is None else state[n].to(dtype).T
        inputs = torch.cat([before, flat[start:end]])
        for t in range(end - start):
            total = sum(weight[:, tap] * inputs[t + tap] for tap in range(width))
            outputs.append(total / (1 + torch.exp(-total)))
        states.append(inputs[end - start :].T)
    outputs += [flat.new_zeros(channels)] * (batch * length - bounds[-1])
    y = torch.stack(outputs) if outputs else flat
    return y.view(batch, length, channels) + 0 * weight.sum(), torch.stack(states)


def draw(rows, length, channels=5, width=4, sequences=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(torch.bfloat16).to(dtype)

    return [normal(rows, length, channels), normal(channels, width), normal(sequences or rows, channels, width - 1)]


def draw_like(outputs):
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype) for y in outputs]


def run(op, inputs, cu_seqlens=None, dy=None):
    """y, the final state, and the gradients of x, the weight and the initial state."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = op(*leaves, cu_seqlens)
    dy = draw_like(outputs) if dy is None else dy
    given = [x for x in leaves if x is not None]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, given, dy, materialize_grads=True)]


def assert_close(actual, wanted, tolerance):
    for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert a.shape == w.shape, i
        assert a.isfinite().all(), i
        assert (a.double() - w.double()).norm() <= tolerance * w.double().norm(), i


def assert_equal(actual, wanted):
    for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert torch.equal(a, w), i


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 9])
def test_lengths_and_taps(length, width, state):
    x, weight, initial = draw(2, length, width=width)
    inputs = [x, weight, initial if state else None]
    assert_close(run(causal_conv, inputs), run(reference, inputs), 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)], ids=str)
def test_precision(dtype, tolerance):
    inputs = draw(2, 200, dtype=dtype)
    actual = run(causal_conv, inputs)
    assert all(x.dtype == dtype for x in actual)
    assert_close(actual, run(reference, [x.double() for x in inputs]), tolerance)


def test_fp32_taps_of_bf16_inputs():
    x, weight, state = draw(2, 50, dtype=torch.bfloat16)
    weight = weight.float() * 1.001  # not a bf16 value
    actual = run(causal_conv, [x, weight, state])
    assert actual[3].dtype == torch.float32
    wanted = run(reference, [x.double(), weight.double(), state.double()])
    assert_close(actual, wanted, 3e-3)
    assert_close([actual[3]], [wanted[3]], 1e-6)


def test_far_out():
    """SiLU and its gradient stay finite and right where the sums are large."""
    inputs = draw(2, 50, dtype=torch.float32)
    inputs[0] *= 100
    assert_close(run(causal_conv, inputs), run(reference, [x.double() for x in inputs]), 1e-6)


# Documents.


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize(
    ("rows", "bounds"),
    [(1, BOUNDS), (1, [0, 0, LENGTH]), (1, [0, 0]), (2, [0, 9, 23, 23, 30, 46])],
    ids=["ragged", "empty first", "all padding", "two rows"],
)
def test_documents(rows, bounds, state):
    x, weight, initial = draw(rows, LENGTH, sequences=len(bounds) - 1)
    inputs = [x, weight, initial if state else None]
    assert_close(run(causal_conv, inputs, offsets(bounds)), run(reference, inputs, offsets(bounds)), 1e-13)


def test_no_documents():
    x, weight, _ = draw(1, LENGTH)
    y, state = causal_conv(x, weight, None, offsets([0]))
    assert not y.any()
    assert state.shape == (0, 5, 3)


def test_documents_equal_separate_calls():
    x, weight, state = draw(1, LENGTH, sequences=len(BOUNDS) - 1)
    dy, dstate = draw_like(causal_conv(x, weight, state, offsets(BOUNDS)))
    y, final, dx, _, dinitial = run(causal_conv, [x, weight, state], offsets(BOUNDS), [dy, dstate])
    for n, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        alone = run(causal_conv, [x[:, start:end], weight, state[n, None]], None, [dy[:, start:end], dstate[n, None]])
        del alone[3]  # the weight's gradient is a sum over documents
        assert_close([y[:, start:end], final[n, None], dx[:, start:end], dinitial[n, None]], alone, 1e-15)


def test_documents_are_strangers():
    """Values and gradients of other documents, and of what lies behind the last, do not change one by a bit."""
    x, weight, state = draw(1, LENGTH, sequences=len(BOUNDS) - 1)
    dy, dstate = draw_like(causal_conv(x, weight, state, offsets(BOUNDS)))
    before = run(causal_conv, [x, weight, state], offsets(BOUNDS), [dy, dstate])
    for n, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        tokens, sequences = torch.ones(LENGTH, dtype=torch.bool), torch.ones(len(state), dtype=torch.bool)
        tokens[start:end], sequences[n] = False, False
        others = [value.clone() for value in (x, dy, state, dstate)]
        for value, where in zip(others, [(slice(None), tokens)] * 2 + [sequences] * 2, strict=True):
            value[where] = torch.nan
        other_x, other_dy, other_state, other_dstate = others
        after = run(causal_conv, [other_x, weight, other_state], offsets(BOUNDS), [other_dy, other_dstate])
        for i in (0, 2):
            assert_equal([after[i][:, start:end]], [before[i][:, start:end]])
        for i in (1, 4):
            assert_equal([after[i][n]], [before[i][n]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_behind_the_last_document(dtype):
    """Whatever lies there changes no result, and its own results are zero."""
    inputs = draw(1, LENGTH, sequences=len(BOUNDS) - 1, dtype=dtype)
    dy = draw_like(causal_conv(*inputs, offsets(BOUNDS)))
    clean = run(causal_conv, inputs, offsets(BOUNDS), dy)
    inputs[0][:, BOUNDS[-1] :] = torch.nan
    dy[0][:, BOUNDS[-1] :] = torch.nan
    dirty = run(causal_conv, inputs, offsets(BOUNDS), dy)
    assert_equal(dirty, clean)
    assert not dirty[0][:, BOUNDS[-1] :].any()
    assert not dirty[2][:, BOUNDS[-1] :].any()


# States.


@pytest.mark.parametrize("split", [0, 1, 2, 3, 7])
def test_halves_make_a_whole(split):
    def halves(x, weight, state, cu_seqlens):
        left, state = causal_conv(x[:, :split], weight, state)
        right, state = causal_conv(x[:, split:], weight, state)
        return torch.cat([left, right], 1), state

    assert_close(run(halves, draw(2, 9)), run(causal_conv, draw(2, 9)), 1e-14)


def test_token_by_token():
    x, weight, state = draw(2, 9)
    whole, final = causal_conv(x, weight, state)
    tokens = []
    for t in range(9):
        y, state = causal_conv(x[:, t : t + 1], weight, state)
        tokens.append(y)
    assert_close([torch.cat(tokens, 1), state], [whole, final], 1e-15)


CHANNELS = (2, 1, 2)


def split(x, weight, state, cu_seqlens):
    y, final = causal_conv(x, weight, state, cu_seqlens)
    return *y.split(CHANNELS, -1), final


def parts(x, weight, state, cu_seqlens):
    return causal_conv_qkv(x, weight, CHANNELS, state, cu_seqlens)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_queries_keys_and_values(state):
    """What a split of the convolution gives, compiled too, and also where some results are not used."""
    x, weight, before = draw(1, LENGTH, sequences=len(BOUNDS) - 1)
    inputs, where = [x, weight, before if state else None], offsets(BOUNDS)
    expected = run(split, inputs, where)
    assert_equal(run(parts, inputs, where), expected)
    torch._dynamo.reset()
    assert_equal(run(torch.compile(parts, fullgraph=True, backend="aot_eager"), inputs, where), expected)
    for used in ((0, 3), (1, 2)):
        some, same = (lambda *x, f=f, used=used: [f(*x)[i] for i in used] for f in (parts, split))
        assert_equal(run(some, inputs, where), run(same, inputs, where))
    mapped = torch.vmap(parts, (0, None, None, None))(x[None], weight, None, where)
    assert_equal([y[0] for y in mapped], split(x, weight, None, where))


def test_the_gradient_of_queries_keys_and_values_is_an_op():
    x, weight, state = draw(2, 9, dtype=torch.bfloat16)
    arguments = *(2 * x).split(CHANNELS, -1), state, x, weight, state, None, "auto"
    library.opcheck(torch.ops.q3n.causal_conv_qkv_backward.default, arguments)


def test_errors():
    x, weight, state = draw(2, 9)
    wrong = [
        (x[0], weight),
        (x, weight[:4]),
        (x, weight[:, :0]),
        (x, weight, state[:1]),
        (x, weight, state.float()),
        (x, weight, state, offsets([0, 18])),
        (x, weight, None, torch.tensor([0, 18])),
        (x, weight, None, offsets([[0, 18]])),
    ]
    messages = []
    for arguments in wrong:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (all texts are pinned below)
            causal_conv(*arguments)
        messages.append(str(raised.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
x must be [B, T, C] and weight [C, W], got (9, 5) and (5, 4)
x must be [B, T, C] and weight [C, W], got (2, 9, 5) and (4, 4)
weight must have at least one tap, got (5, 0)
initial_state must be (2, 5, 3) torch.float64, got (1, 5, 3) torch.float64
initial_state must be (2, 5, 3) torch.float64, got (2, 5, 3) torch.float32
initial_state must be (1, 5, 3) torch.float64, got (2, 5, 3) torch.float64
cu_seqlens must be int32 [S+1], got torch.int64 (2,)
cu_seqlens must be int32 [S+1], got torch.int32 (1, 2)""",
    )
    with pytest.raises(ValueError, match="add up") as raised:
        causal_conv_qkv(x, weight, (2, 2, 2))
    assert_expected_inline(str(raised.value), """channels must be three numbers that add up to 5, got (2, 2, 2)""")
