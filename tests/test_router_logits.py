"""The router's scores: in fp32 from whatever dtypes, and what the CUDA implementation's arithmetic leaves of them."""

import pytest
import torch

from q3n_functional.ops import router_logits
from q3n_functional.ops.kernels import router_logits as kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def draw(dtype=torch.bfloat16, router_dtype=None, tokens=40, width=96, experts=16):
    generator = torch.Generator().manual_seed(0)
    x, router, dlogits = (
        torch.randn(*shape, generator=generator) for shape in ((tokens, width), (experts, width), (tokens, experts))
    )
    return dlogits.to(DEVICE), x.to(DEVICE, dtype), router.to(DEVICE, router_dtype or dtype)


def gradients(dlogits, x, router, impl="auto"):
    x, router = (t.clone().requires_grad_() for t in (x, router))
    logits = router_logits(x, router, impl)
    return logits.detach(), *torch.autograd.grad(logits, [x, router], dlogits.to(logits.dtype))


def errors(found, inputs):
    """Relative to the largest entry, against float64."""
    dlogits, x, router = (t.double() for t in inputs)
    wanted = (x @ router.mT, dlogits @ router, dlogits.mT @ x)
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]


@pytest.fixture
def products(monkeypatch):
    """The product with fp32 sums that only CUDA has."""
    if not CUDA:
        monkeypatch.setattr(kernels, "_product", lambda a, b: a.float() @ b.float())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.bfloat16, torch.float32), (torch.float16,)], ids=str)
def test_scores_are_fp32(dtypes):
    inputs = draw(*dtypes)
    found = gradients(*inputs)
    assert [t.dtype for t in found] == [torch.float32, inputs[1].dtype, inputs[2].dtype]
    scores, *rest = errors(found, inputs)
    assert scores < 1e-6
    assert max(rest) < 2**-8


def test_tensor_cores_lose_nothing(products):
    inputs = draw()
    scores, dx, drouter = errors(gradients(*inputs, impl="triton"), inputs)
    assert scores < 1e-6
    assert max(dx, drouter) < 2**-8  # half a unit of bf16 at the largest entry: rounding the result
    assert max(errors(gradients(*inputs, impl="reference"), inputs)[1:]) > 0.5 * max(dx, drouter)


def test_two_parts_hold_sixteen_bits():
    dlogits = draw()[0] * torch.logspace(-12, 3, 40, device=DEVICE)[:, None]
    rounded, rest = kernels._parts(dlogits).double().chunk(2, 1)
    error = (rounded + rest - dlogits.double()).abs() / dlogits.double().abs()
    assert error.max() <= 2**-17
    assert ((rounded - dlogits.double()).abs() / dlogits.double().abs()).max() > 2**-10


@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.bfloat16, torch.float32)], ids=str)
def test_other_dtypes_are_refused_by_tensor_cores(dtypes):
    with pytest.raises(ValueError, match="if both are bf16"):
        gradients(*draw(*dtypes), impl="triton")


def test_errors():
    with pytest.raises(ValueError, match=r"x must be \[T, D\] and router \[E, D\], got \(3, 4\) and \(5, 6\)"):
        router_logits(torch.ones(3, 4), torch.ones(5, 6))
