"""The norm in front of a block against its definition in float64, and where both of its gradients meet."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import library

from q3n_functional.ops import pre_norm
from tests.test_rms_norm_gated import assert_close


def reference(x, weight, eps=1e-6):
    x, weight = x.double(), weight.double()
    return x * 1, x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1 + weight)


def draw(*shape, dtype=torch.float64, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).to(torch.bfloat16) for size in (shape, shape[-1:]))
    return [x.to(dtype), weight.to(weight_dtype or dtype)]


def run(function, inputs, used=(True, True), **options):
    """Outputs and gradients, from gradients of the `used` outputs alone."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    generator = torch.Generator().manual_seed(9)
    given = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype) for y in outputs]
    chosen = [[y for y, use in zip(ys, used, strict=True) if use] for ys in (outputs, given)]
    return [y.detach() for y in outputs] + list(
        torch.autograd.grad(chosen[0], leaves, chosen[1], materialize_grads=True)
    )


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 16), (0, 7), (3, 2)], ids=str)
def test_shapes(shape, eps):
    inputs = draw(*shape)
    assert_close(run(pre_norm, inputs, eps=eps), run(reference, inputs, eps=eps), 1e-13)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["residual", "norm"])
def test_one_of_both_results_is_used(used):
    inputs = draw(5, 7)
    assert_close(run(pre_norm, inputs, used), run(reference, inputs, used), 1e-13)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)], ids=str)
def test_precision(dtype, tolerance, weight_dtype):
    """What is not rounded to bf16 in the end is not rounded on the way either."""
    inputs = draw(8, 30, 64, dtype=dtype, weight_dtype=weight_dtype)
    actual = run(pre_norm, inputs)
    assert [x.dtype for x in actual] == [dtype, dtype, dtype, weight_dtype]
    weight_tolerance = 1e-6 if weight_dtype == torch.float32 else 3e-3
    assert_close(actual, run(reference, inputs), tolerance, tolerance, tolerance, weight_tolerance)


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(pre_norm, fullgraph=True, dynamic=True)
        for length in (6, 9, 14):
            inputs = draw(4, length, 16)
            assert_close(run(compiled, inputs), run(pre_norm, inputs), 1e-13)


@pytest.mark.parametrize("residual", [True, False])
def test_its_gradient_is_an_op(residual):
    x, weight = draw(5, 7, dtype=torch.bfloat16)
    op, dresidual = torch.ops.q3n.pre_norm_backward.default, x * 3 if residual else None
    library.opcheck(op, (x * 2, dresidual, x, weight, 1e-6, "auto"))
    mapped = torch.vmap(op, (0, 0 if residual else None, 0, None, None, None))
    stacks = [None if t is None else torch.stack([t, t * 0.5]) for t in (x * 2, dresidual, x)]
    each = [op(*(None if t is None else t[n] for t in stacks), weight, 1e-6, "auto") for n in range(2)]
    torch.testing.assert_close(mapped(*stacks, weight, 1e-6, "auto"), tuple(map(torch.stack, zip(*each, strict=True))))


def test_under_transforms():
    inputs = draw(5, 7)
    outputs, pullback = torch.func.vjp(pre_norm, *inputs)
    generator = torch.Generator().manual_seed(9)
    given = tuple(torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype) for y in outputs)
    assert_close([*outputs, *pullback(given)], run(reference, inputs), 1e-13)
    each = [run(pre_norm, [x[None], inputs[1]])[1][0] for x in inputs[0]]
    assert_close(torch.vmap(pre_norm, (0, None))(*inputs)[1:], [torch.stack(each)], 1e-13)


def test_nothing_is_saved_or_registered_without_gradients():
    x, weight = draw(5, 7)
    residual, y = pre_norm(x, weight)
    assert residual is x
    assert y.grad_fn is None
    with torch.no_grad():
        assert pre_norm(x.requires_grad_(), weight)[1].grad_fn is None


def test_second_derivatives_are_refused():
    x, weight = (t.requires_grad_() for t in draw(5, 7))
    (dx,) = torch.autograd.grad(pre_norm(x, weight)[1].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


def test_errors():
    x, weight = draw(2, 3, 4)
    with pytest.raises(ValueError, match="must have shape") as raised:
        pre_norm(x, weight[:3])
    assert_expected_inline(str(raised.value), """weight must have shape (4,), the last dim of x, got (3,)""")
