"""The gated norm against its definition in float64."""

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional.ops import rms_norm_gated


def reference(x, gate, weight, eps=1e-6):
    x, gate, weight = x.double(), gate.double(), weight.double()
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gate / (1 + torch.exp(-gate))


def draw(*shape, dtype=torch.float64, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1:], generator=generator).to(torch.bfloat16)
    return [x, gate, weight.to(weight_dtype or dtype)]


def run(op, inputs, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*leaves, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_close(actual, wanted, *tolerances):
    for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert a.shape == w.shape, i
        assert a.isfinite().all(), i
        assert (a.double() - w.double()).norm() <= tolerances[i % len(tolerances)] * w.double().norm(), i


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 16), (0, 7), (3, 2)], ids=str)
def test_shapes(shape, eps):
    inputs = draw(*shape)
    assert_close(run(rms_norm_gated, inputs, eps=eps), run(reference, inputs, eps=eps), 1e-13)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)], ids=str)
def test_precision(dtype, tolerance, weight_dtype):
    """What is not rounded to bf16 in the end is not rounded on the way either."""
    inputs = draw(8, 30, 64, dtype=dtype, weight_dtype=weight_dtype)
    actual = run(rms_norm_gated, inputs)
    assert [x.dtype for x in actual] == [dtype, dtype, dtype, weight_dtype]
    weight_tolerance = 1e-6 if weight_dtype == torch.float32 else 3e-3
    assert_close(actual, run(reference, inputs), tolerance, tolerance, tolerance, weight_tolerance)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 1e15])
def test_far_from_one(scale):
    """Rows of zeros, squares that underflow, and squares that are large."""
    inputs = draw(8, 64, dtype=torch.float32)
    inputs[0] *= scale
    assert_close(run(rms_norm_gated, inputs), run(reference, inputs), 2e-6)


def test_gates_far_out():
    inputs = draw(8, 64, dtype=torch.float32)
    inputs[1] *= 50
    assert_close(run(rms_norm_gated, inputs), run(reference, inputs), 2e-6)


def test_rows_are_strangers():
    x, gate, weight = draw(5, 7)
    before = run(rms_norm_gated, [x, gate, weight])
    x[1:], gate[1:] = torch.nan, torch.nan
    after = run(rms_norm_gated, [x, gate, weight])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(after[:3], before[:3], strict=True))


def test_the_norm_comes_before_the_gate():
    """A gate scales a row's output by the same factor whatever it does to the others of that row."""
    x, gate, weight = draw(1, 7)
    halved = gate.clone()
    halved[0, 0] *= 0.5
    assert torch.equal(rms_norm_gated(x, halved, weight)[0, 1:], rms_norm_gated(x, gate, weight)[0, 1:])


def test_errors():
    x, gate, weight = draw(2, 3, 4)
    messages = []
    for arguments in [(x, gate[:1], weight), (x, gate.float(), weight), (x, gate, weight[:3]), (x, gate, weight[None])]:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (all texts are pinned below)
            rms_norm_gated(*arguments)
        messages.append(str(raised.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
x and gate must agree, got (2, 3, 4) torch.float64 and (1, 3, 4) torch.float64
x and gate must agree, got (2, 3, 4) torch.float64 and (2, 3, 4) torch.float32
weight must have shape (4,), the last dim of x, got (3,)
weight must have shape (4,), the last dim of x, got (1, 4)""",
    )
