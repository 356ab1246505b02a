"""The Triton gated norm against the reference in float64: in Triton's interpreter here, on the device there."""

import pytest
import torch

from q3n_functional.ops.rms_norm_gated import _backward as reference_backward
from q3n_functional.ops.rms_norm_gated import _forward as reference_forward
from tests.device import DEVICE, INTERPRETED, ON_DEVICE

pytestmark = ON_DEVICE

CASES = {
    "heads": {},
    "two dims": {"shape": (7, 16)},
    "five dims": {"shape": (2, 1, 3, 2, 8)},
    "one row": {"shape": (1, 128)},
    "no rows": {"shape": (2, 0, 3, 8)},
    "ragged width": {"shape": (3, 5, 100)},
    "width 1": {"shape": (3, 5, 1)},
    "width 3": {"shape": (6, 3)},
    "width 512": {"shape": (2, 3, 512)},
    "width 2000": {"shape": (3, 2000)},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, fp32 weight": {"dtype": torch.bfloat16, "weight_dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "gate from a wider projection": {"layout": "wider"},
    "every one of them strided": {"layout": "rows apart"},
    "transposed": {"layout": "transposed"},
    "expanded dy": {"layout": "expanded"},
}
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("y", "dx", "dgate", "dweight")
EPS = 1e-6


def kernels():
    from q3n_functional.ops.kernels import rms_norm_gated

    return rms_norm_gated


def build(shape=(2, 5, 3, 16), dtype=torch.float32, weight_dtype=None, layout=""):
    """(dy, x, gate, weight)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    width = shape[-1]
    dy, x, gate = (random(*shape) for _ in range(3))
    if layout == "wider":
        batch, length, heads, _ = shape
        wider = random(batch, length, 2 * heads * width + 3)
        gate = wider[..., 3 : 3 + heads * width].unflatten(-1, (heads, width))
    if layout == "rows apart":
        dy, x, gate = (torch.cat([random(*shape[:-1], 2), t], -1)[..., 2:] for t in (dy, x, gate))
        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":
        dy, x, gate = (t.mT.contiguous().mT for t in (dy, x, gate))
    if layout == "expanded":
        dy = random(1).expand(shape)
    return dy, x, gate, random(width).to(weight_dtype or dtype)


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


def outputs(inputs, forward, backward, config=()):
    dy, *rest = inputs
    return dict(zip(NAMES, (forward(*rest, EPS, *config), *backward(dy, *rest, EPS, *config)), strict=True))


def kernel_outputs(inputs, config=()):
    return outputs(inputs, poisoned(kernels().forward), poisoned(kernels().backward), config)


def assert_matches(actual, inputs):
    """Against the reference in float64, by the largest error relative to the largest entry."""
    expected = outputs([t.double() for t in inputs], reference_forward, reference_backward)
    for name, value in actual.items():
        assert_near(value, expected[name], (inputs[3] if name == "dweight" else inputs[1]).dtype, name)


def assert_near(value, wanted, dtype, name):
    assert value.shape == wanted.shape, name
    assert value.dtype == dtype, name
    assert value.is_contiguous(), name
    error = (value.double() - wanted).abs().nan_to_num(float("inf"))
    if value.numel():
        assert error.max() <= BOUNDS[value.dtype] * max(1, wanted.abs().max()), name


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_the_reference(options):
    inputs = build(**options)
    assert_matches(kernel_outputs(inputs), inputs)


def test_several_tiles_a_program():
    """And not as many for each program, and a ragged last one."""
    inputs = build()
    assert_matches(kernel_outputs(inputs, [kernels().Config(entries=64, warps=1, programs=3)]), inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # on a device it is silent
def test_large_gates_neither_overflow_nor_vanish_into_nan():
    inputs = build()
    inputs[2].mul_(200)
    assert_matches(kernel_outputs(inputs), inputs)


def test_rows_of_zeros():
    inputs = build()
    inputs[1][:, 1] = 0
    assert_matches(kernel_outputs(inputs), inputs)


def test_repeats_bit_by_bit():
    inputs = build(shape=(4, 50, 2, 16))
    first, second = (kernel_outputs(inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("width", "dtype", "text"), [(2049, torch.float32, "2049.*2048"), (4, torch.float64, "64")])
def test_errors(width, dtype, text):
    dy, *rest = build(shape=(2, width), dtype=dtype)
    with pytest.raises(ValueError, match=text):
        kernels().forward(*rest, EPS)
    with pytest.raises(ValueError, match=text):
        kernels().backward(dy, *rest, EPS)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
def test_in_a_cuda_graph():
    inputs = build(dtype=torch.bfloat16, layout="wider")
    run = lambda: outputs(inputs, kernels().forward, kernels().backward)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    inputs[1].neg_()
    graph.replay()
    assert_matches(captured, inputs)


@pytest.mark.skipif(INTERPRETED, reason="27 GiB")
def test_offsets_beyond_32_bits():
    shape = (560_000, 32, 128)
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    x[-64:] = torch.randn(64, *shape[1:], device=DEVICE)
    weight = torch.randn(128, device=DEVICE)
    last = x[-64:]
    assert torch.equal(kernels().forward(x, x, weight, EPS)[-64:], kernels().forward(last, last, weight, EPS))
    actual = kernels().backward(x, x, x, weight, EPS)
    for gradient, expected in zip(actual[:2], kernels().backward(last, last, last, weight, EPS)[:2], strict=True):
        assert torch.equal(gradient[-64:], expected)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_no_new_compilation_for_other_lengths():
    functions = kernels()._forward_kernel, kernels()._backward_kernel
    counts = []
    for length in (2, 5, 16, 33, 64):
        kernel_outputs(build(shape=(1, length, 4, 24)))
        counts.append([len(f.device_caches[torch.cuda.current_device()][0]) for f in functions])
    assert counts[0] == counts[-1]
