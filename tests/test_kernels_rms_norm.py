"""The Triton gradient of the norm against the reference in float64: interpreted here, on the device there."""

import pytest
import torch

from q3n_functional.ops.rms_norm import _backward as reference
from tests.device import DEVICE, INTERPRETED, ON_DEVICE
from tests.test_kernels_rms_norm_gated import EPS, assert_near, poisoned

pytestmark = ON_DEVICE

CASES = {
    "three dims": {},
    "one row": {"shape": (1, 128)},
    "no rows": {"shape": (2, 0, 8)},
    "ragged width": {"shape": (3, 5, 100)},
    "width 3": {"shape": (6, 3)},
    "width 2048": {"shape": (2, 3, 2048)},
    "width 5000": {"shape": (3, 5000)},
    "no residual": {"residual": False},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, fp32 weight": {"dtype": torch.bfloat16, "weight_dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "rows apart": {"layout": "rows apart"},
    "transposed": {"layout": "transposed"},
    "expanded dy": {"layout": "expanded"},
}


def kernels():
    from q3n_functional.ops.kernels import rms_norm

    return rms_norm


def build(shape=(2, 15, 16), dtype=torch.float32, weight_dtype=None, layout="", residual=True):
    """(dy, dresidual, x, weight)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    dy, dresidual, x = (random(*shape) for _ in range(3))
    if layout == "rows apart":
        dy, dresidual, x = (torch.cat([random(*shape[:-1], 2), t], -1)[..., 2:] for t in (dy, dresidual, x))
    if layout == "transposed":
        dy, dresidual, x = (t.mT.contiguous().mT for t in (dy, dresidual, x))
    if layout == "expanded":
        dy = random(1).expand(shape)
    return dy, dresidual if residual else None, x, random(shape[-1]).to(weight_dtype or dtype)


def run(inputs, config=()):
    return poisoned(kernels().backward)(*inputs, EPS, *config)


def assert_matches(actual, inputs):
    """Against the reference in float64, by the largest error relative to the largest entry."""
    expected = reference(*(None if t is None else t.double() for t in inputs), EPS)
    for name, value, wanted, like in zip(("dx", "dweight"), actual, expected, inputs[2:], strict=True):
        assert_near(value, wanted, like.dtype, name)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_the_reference(options):
    inputs = build(**options)
    assert_matches(run(inputs), inputs)


def test_several_rows_a_program():
    """And not as many for each program."""
    inputs = build()
    assert_matches(run(inputs, [kernels().Config(entries=4, programs=7)]), inputs)


def test_rows_of_zeros():
    inputs = build()
    inputs[2][:, 1] = 0
    assert_matches(run(inputs), inputs)


def test_repeats_bit_by_bit():
    inputs = build(shape=(4, 50, 16))
    for first, second in zip(run(inputs), run(inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("width", "dtype", "text"), [(8193, torch.float32, "8193.*8192"), (4, torch.float64, "64")])
def test_errors(width, dtype, text):
    with pytest.raises(ValueError, match=text):
        kernels().backward(*build(shape=(2, width), dtype=dtype), EPS)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_no_new_compilation_for_other_lengths():
    counts = []
    for length in (2, 5, 16, 33, 64):
        run(build(shape=(1, length, 24)))
        counts.append(len(kernels()._backward_kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts[0] == counts[-1]


@pytest.mark.skipif(INTERPRETED, reason="30 GiB")
def test_offsets_beyond_32_bits():
    x = torch.zeros(1_100_000, 2048, dtype=torch.bfloat16, device=DEVICE)
    x[-64:] = torch.randn(64, 2048, device=DEVICE)
    weight, last = torch.randn(2048, device=DEVICE), x[-64:]
    (dx, _), (expected, _) = (kernels().backward(t, t, t, weight, EPS) for t in (x, last))
    assert torch.equal(dx[-64:], expected)
