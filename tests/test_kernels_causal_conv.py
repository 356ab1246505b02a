"""The Triton convolution against the reference in float64: in Triton's interpreter here, on the device there."""

import pytest
import torch

from q3n_functional.ops.causal_conv import _backward as reference_backward
from q3n_functional.ops.causal_conv import _forward as reference_forward
from tests.device import DEVICE, INTERPRETED, ON_DEVICE

pytestmark = ON_DEVICE

DOCUMENTS = [0, 0, 7, 8, 10, 10, 24, 27, 27, 27]
CASES = {
    "rows": {},
    "rows, no states": {"state": False},
    "one row of one token": {"batch": 1, "length": 1},
    "rows shorter than the taps": {"batch": 5, "length": 2},
    "no tokens": {"length": 0},
    "no rows": {"batch": 0, "state": False, "dfinal": False},
    "documents": {"documents": DOCUMENTS},
    "documents, no states": {"documents": DOCUMENTS, "state": False},
    "documents over rows": {"batch": 3, "length": 9, "documents": DOCUMENTS},
    "documents and a tail": {"batch": 2, "length": 15, "documents": DOCUMENTS},
    "nothing but a tail": {"documents": [0, 0, 0]},
    "no document": {"documents": [0], "state": False, "dfinal": False},
    "one long document": {"batch": 1, "length": 45, "documents": [0, 45]},
    "one tap": {"width": 1, "documents": DOCUMENTS},
    "two taps": {"width": 2, "documents": DOCUMENTS},
    "three taps": {"width": 3, "documents": DOCUMENTS},
    "one tap, rows": {"width": 1},
    "one channel": {"channels": 1},
    "several tiles of channels": {"channels": 18, "documents": DOCUMENTS},
    "no gradient of y": {"documents": DOCUMENTS, "dy": False},
    "no gradient of y, no states": {"dy": False, "state": False},
    "no gradient of the final state": {"documents": DOCUMENTS, "dfinal": False},
    "bf16": {"documents": DOCUMENTS, "dtype": torch.bfloat16},
    "bf16, fp32 weight": {"dtype": torch.bfloat16, "weight_dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "strided": {"batch": 2, "length": 14, "documents": DOCUMENTS, "strided": True},
    "transposed": {"transposed": True},
    "expanded dy": {"expanded": True},
}
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("y", "final_state", "dx", "dweight", "dinitial_state")


def kernels():
    from q3n_functional.ops.kernels import causal_conv

    return causal_conv


def build(
    batch=2, length=14, channels=5, width=4, documents=None, state=True, dtype=torch.float32, weight_dtype=None,
    dy=True, dfinal=True, strided=False, transposed=False, expanded=False,
):  # fmt: skip
    """(dy, dfinal_state, x, weight, initial_state, cu_seqlens); the tail behind the documents is NaN."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    num = batch if documents is None else len(documents) - 1
    x, grad = random(batch, length, channels), random(batch, length, channels)
    if documents is not None:
        for tensor in (x, grad):
            tensor.view(-1, channels)[documents[-1] :] = float("nan")
    if strided:
        x = torch.cat([random(batch, length, 3), x, random(batch, length, 2)], -1)[..., 3 : 3 + channels]
    if transposed:
        x, grad = (t.mT.contiguous().mT for t in (x, grad))
    if expanded:
        grad = random(1).expand(batch, length, channels)
    return [
        grad if dy else None,
        random(num, channels, width - 1) if dfinal else None,
        x,
        random(channels, width).to(weight_dtype or dtype),
        random(num, channels, width - 1) if state else None,
        None if documents is None else torch.tensor(documents, dtype=torch.int32, device=DEVICE),
    ]


def poisoned(function):
    """`function` with NaN in all memory that it allocates."""

    def call(*args):
        assert torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        try:
            return function(*args)
        finally:
            torch.use_deterministic_algorithms(False)

    return call


def outputs(inputs, forward, backward, *config):
    dy, dfinal, *rest = inputs
    y_and_state = forward(*rest, *config)
    gradients = () if dy is None and dfinal is None else backward(dy, dfinal, *rest, *config)
    return dict(zip(NAMES, (*y_and_state, *gradients), strict=False))


def kernel_outputs(inputs, *config):
    return outputs(inputs, poisoned(kernels().forward), poisoned(kernels().backward), *config)


def assert_matches(actual, inputs, slack=1):
    """Against the reference in float64, by the largest error relative to the largest entry."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    expected = outputs(wide, reference_forward, reference_backward)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        wanted = expected[name]
        assert value.shape == wanted.shape, name
        assert value.dtype == (inputs[3] if name == "dweight" else inputs[2]).dtype, name
        assert value.is_contiguous(), name
        error = (value.double() - wanted).abs().nan_to_num(float("inf"))
        if value.numel():
            assert error.max() <= slack * BOUNDS[value.dtype] * max(1, wanted.abs().max()), name


@pytest.mark.parametrize("channels", [(32, 16, 48), (4, 4, 8), (0, 16, 5), (0, 0, 20)], ids=str)
def test_gradients_of_three_parts(channels):
    """Bit for bit what one tensor of them gives, wherever they lie."""
    config = kernels().Config(channels=64, rows=8, warps=2, programs=5)
    dy, dfinal, *rest = build(channels=sum(channels), length=7, documents=[0, 3, 9], dtype=torch.bfloat16)
    dq, dk, dv = (torch.cat([x, x], -1)[..., : x.shape[2]] for x in dy.split(channels, -1))
    actual = poisoned(kernels().backward_of_parts)(dq, dk, dv.mT.contiguous().mT, dfinal, *rest, config)
    expected = kernels().backward(dy, dfinal, *rest, config)
    for name, value, wanted in zip(NAMES[2:], actual, expected, strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_the_reference(options):
    """With a configuration small enough that several spans and tiles and fast steps come up."""
    config = kernels().Config(channels=16, rows=2, warps=1, programs=3)
    inputs = build(**options)
    assert_matches(kernel_outputs(inputs, config), inputs)


@pytest.mark.parametrize("name", ["documents", "bf16"])
def test_default_configuration(name):
    inputs = build(**CASES[name])
    assert_matches(kernel_outputs(inputs), inputs)


def test_documents_of_every_length():
    """Document boundaries at every offset from the steps' and the spans'."""
    ends = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 1, 1]).cumsum(0).tolist()
    inputs = build(batch=1, length=ends[-1] + 2, channels=2, documents=ends)
    config = kernels().Config(channels=16, rows=2, warps=1, programs=4)
    assert_matches(kernel_outputs(inputs, config), inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # on a device it is silent
def test_large_gates_neither_overflow_nor_vanish_into_nan():
    inputs = build(documents=DOCUMENTS)
    inputs[2].mul_(100)
    inputs[3].mul_(10)
    assert_matches(kernel_outputs(inputs), inputs, slack=100)  # sums of thousands lose digits of the gate's argument


def test_repeats_bit_by_bit():
    inputs = build(length=16, documents=[0, 10, 30])
    first, second = (kernel_outputs(inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_token_has_the_same_bits_whichever_way_it_is_reached():
    """In a step of several tokens or alone, at the end of a span or inside: so batch and packing do not matter."""
    inputs = build(batch=1, length=27, documents=[0, 9, 27])
    each, together = (kernels().Config(channels=16, rows=rows, warps=1, programs=p) for rows, p in ((32, 8), (4, 1)))
    first, second = (kernel_outputs(inputs, config) for config in (each, together))
    for name in ("y", "final_state", "dx", "dinitial_state"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("width", "dtype", "text"), [(5, torch.float32, "5 taps.*1 to 4"), (4, torch.float64, "64")])
def test_errors(width, dtype, text):
    dy, dfinal, *rest = build(width=width, dtype=dtype)
    with pytest.raises(ValueError, match=text):
        kernels().forward(*rest)
    with pytest.raises(ValueError, match=text):
        kernels().backward(dy, dfinal, *rest)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
def test_in_a_cuda_graph_with_other_documents():
    inputs = build(batch=1, length=40, channels=64, documents=[0, 7, 7, 30])
    run = lambda: kernel_outputs(inputs)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    inputs[5].copy_(torch.tensor([0, 0, 19, 30]))
    graph.replay()
    assert_matches(captured, inputs)


@pytest.mark.skipif(INTERPRETED, reason="16 GiB and more")
def test_offsets_beyond_32_bits():
    length, channels = 270_000, 8192
    x = torch.zeros(1, length, channels, dtype=torch.bfloat16, device=DEVICE)
    x[:, -64:] = torch.randn(1, 64, channels, device=DEVICE)
    weight = torch.randn(channels, 4, device=DEVICE)
    y, final = kernels().forward(x, weight, None, None)
    dx, dweight, _ = kernels().backward(x, None, x, weight, None, None)
    short = x[:, -80:].contiguous()
    wanted, wanted_final = kernels().forward(short, weight, None, None)
    wanted_dx, wanted_dweight, _ = kernels().backward(short, None, short, weight, None, None)
    pairs = (y[:, -80:], wanted), (final, wanted_final), (dx[:, -80:], wanted_dx), (dweight, wanted_dweight)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_no_new_compilation_for_other_lengths_and_document_counts():
    functions = kernels()._forward_kernel, kernels()._backward_kernel
    counts = []
    for length, documents in ((20, [0, 20]), (33, [0, 1, 33]), (48, [0, 1, 2, 48]), (1, [0, 1]), (64, [0, 16, 32, 64])):
        kernel_outputs(build(batch=1, length=length, channels=7, documents=documents))
        counts.append([len(f.device_caches[torch.cuda.current_device()][0]) for f in functions])
    assert counts[0] == counts[-1]
