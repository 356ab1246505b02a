"""Which experts a token goes to: as torch.topk where it is certain, and in order where it is not."""

import pytest
import torch

from q3n_functional.ops import top_experts


def draw(tokens=20, experts=16, dtype=torch.float32):
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num", [0, 1, 5, 16])
def test_as_torch(num, dtype):
    probabilities = draw(dtype=torch.float32).requires_grad_()
    found, wanted = (choose(probabilities.to(dtype), num) for choose in (top_experts, torch.topk))
    assert torch.equal(found[0], wanted[0])
    if dtype != torch.bfloat16:  # which has ties
        assert torch.equal(found[1], wanted[1])
        gradients = [torch.autograd.grad(weights.square().sum(), probabilities)[0] for weights, _ in (found, wanted)]
        assert torch.equal(*gradients)
    assert found[1].dtype == torch.int64
    assert not found[1].requires_grad


def test_ties_are_in_order_of_the_experts():
    probabilities = torch.tensor([[0.25, 0.5, 0.25, 0.5, 0.25], [0.2] * 5])
    weights, experts = top_experts(probabilities, 4)
    assert weights.tolist() == [[0.5, 0.5, 0.25, 0.25], [pytest.approx(0.2)] * 4]
    assert experts.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


def test_vmap_over_rows():
    probabilities = draw(24).view(3, 8, 16)
    mapped = torch.vmap(lambda p: top_experts(p, 4))(probabilities)
    for found, wanted in zip(mapped, top_experts(probabilities.flatten(0, 1), 4), strict=True):
        assert torch.equal(found.flatten(0, 1), wanted)


@pytest.mark.parametrize(("shape", "num"), [((3,), 1), ((2, 3), 4), ((2, 3), -1)])
def test_errors(shape, num):
    with pytest.raises(ValueError, match=r"probabilities must be \[T, E\] and num at most E, got \("):
        top_experts(torch.ones(shape), num)
