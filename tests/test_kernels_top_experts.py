"""The Triton choice of experts against the reference: in Triton's interpreter here, on the device there."""

import pytest
import torch
from torch import library

from q3n_functional.ops import top_experts
from q3n_functional.ops.top_experts import _backward as reference_backward
from q3n_functional.ops.top_experts import _forward as reference_forward
from tests.device import DEVICE, INTERPRETED, ON_DEVICE

pytestmark = ON_DEVICE

CASES = {
    "several programs": {"tokens": 11},
    "one token": {"tokens": 1},
    "a program and one row more": {"tokens": 5},
    "no tokens": {"tokens": 0},
    "none chosen": {"num": 0},
    "all chosen": {"experts": 12, "num": 12},
    "one expert": {"experts": 1, "num": 1},
    "no power of two": {"experts": 100},
    "one more than a power of two": {"experts": 513, "num": 3, "tokens": 3},
    "a program to each row": {"experts": 512, "tokens": 3},
    "ties": {"values": 3},
    "all equal": {"values": 1},
    "ties of zeros of either sign": {"zeros": True},
    "negative, infinite, NaN": {"special": True},
    "rows apart": {"layout": "rows apart"},
    "transposed": {"layout": "transposed"},
    "expanded": {"layout": "expanded"},
}


def kernels():
    from q3n_functional.ops.kernels import top_experts

    return top_experts


def build(tokens=9, experts=128, num=10, values=None, zeros=False, special=False, layout=""):
    """(dweights, probabilities, num); `values` is how many different ones there are."""
    generator = torch.Generator().manual_seed(0)
    p, dweights = (torch.randn(tokens, n, generator=generator) for n in (experts, num))
    if values:
        p = p.view(torch.int32).remainder(values).float()
    if zeros:
        p = torch.where(p > 0, 0.0, -0.0)
    if special:
        p[0], p[1, 3:], p[2, ::3] = torch.nan, -torch.inf, torch.inf
        p[3, 5], p[4, ::40], p[5, 1:] = -torch.nan, torch.nan, torch.nan
    if layout == "rows apart":
        p, dweights = (torch.cat([torch.full_like(t, 9), t], 1)[:, t.shape[1] :] for t in (p, dweights))
    if layout == "transposed":
        p, dweights = (t.mT.contiguous().mT for t in (p, dweights))
    p, dweights = p.to(DEVICE), dweights.to(DEVICE)
    if layout == "expanded":
        p, dweights = p[:1].expand(tokens, experts), dweights[:1, :1].expand(tokens, num)
    return dweights, p, num


def poisoned(function, *args):
    """`function` with NaN in all memory that it allocates."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        return function(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def assert_matches(dweights, probabilities, num):
    """Bit by bit, but for a zero's or NaN's sign."""
    found = poisoned(kernels().forward, probabilities, num)
    # On CUDA torch sorts a negative NaN behind all numbers.
    wanted = tuple(x.to(DEVICE) for x in reference_forward(probabilities.cpu(), num))
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert actual.is_contiguous()
    gradient = poisoned(kernels().backward, dweights, found[1], probabilities)
    torch.testing.assert_close(gradient, reference_backward(dweights, wanted[1], probabilities), rtol=0, atol=0)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_the_reference(options):
    assert_matches(*build(**options))


def test_the_op():
    dweights, probabilities, num = build()
    library.opcheck(torch.ops.q3n.top_experts.default, (probabilities.clone().requires_grad_(), num, "triton"))
    experts = top_experts(probabilities, num, "triton")[1]
    library.opcheck(torch.ops.q3n.top_experts_backward.default, (dweights, experts, probabilities, "triton"))


def test_errors():
    _, probabilities, num = build()
    with pytest.raises(ValueError, match=r"probabilities are torch\.float64: the Triton kernels take fp32"):
        kernels().forward(probabilities.double(), num)
    with pytest.raises(ValueError, match="2049 experts: the Triton kernels take at most 2048"):
        kernels().forward(torch.empty(1, 2049, device=DEVICE), num)


@pytest.mark.skipif(INTERPRETED, reason="takes minutes")
@pytest.mark.parametrize("values", [None, 20])
@pytest.mark.parametrize("experts", [128, 512, 2048])
def test_many_tokens(experts, values):
    assert_matches(*build(8192, experts, values=values))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
@pytest.mark.parametrize("tokens", [1, 32, 8192])
def test_in_a_cuda_graph(tokens):
    dweights, probabilities, num = build(tokens, experts=512)
    assert_matches(dweights, probabilities, num)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels().forward(probabilities, num)
        gradient = kernels().backward(dweights, found[1], probabilities)
    probabilities.copy_(probabilities.flip(1))
    graph.replay()
    wanted = reference_forward(probabilities, num)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(gradient, reference_backward(dweights, wanted[1], probabilities))


@pytest.mark.skipif(INTERPRETED, reason="8 GiB")
def test_offsets_beyond_32_bits():
    """Across rows of probabilities that begin beyond them, and in a gradient that ends there."""
    rows = 2**31 // 512 + 3
    probabilities = torch.zeros(rows, 512, device=DEVICE)
    _, probabilities[-3:], num = build(3, experts=512)
    weights, experts = kernels().forward(probabilities, num)
    assert all(map(torch.equal, (weights[-3:], experts[-3:]), reference_forward(probabilities[-3:], num)))
    gradient = kernels().backward(weights, experts, probabilities)
    assert torch.equal(gradient[-3:], reference_backward(weights[-3:], experts[-3:], probabilities[-3:]))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_no_new_compilation_for_other_lengths():
    functions = [kernels()._forward_kernel, kernels()._backward_kernel]
    counts = []
    for tokens in (20, 33, 64, 17, 1):
        assert_matches(*build(tokens))
        counts.append([len(f.device_caches[torch.cuda.current_device()][0]) for f in functions])
    assert counts[0] == counts[-1]
