"""The experts' sort of slots at the sizes of training: in Triton's interpreter here, on the device there."""

import pytest
import torch

from q3n_functional.ops.grouped_swiglu import sort as reference_sort
from tests.device import DEVICE, INTERPRETED, ON_DEVICE

pytestmark = ON_DEVICE

SIZES = [(4100, 3, 8), (2500, 70, 14)]  # more blocks than are scanned at a time, and a few slots in the last
if not INTERPRETED:
    SIZES += [(8192, 128, 10), (32768, 512, 10), (32, 128, 10), (1, 512, 10)]
each_size = pytest.mark.parametrize(("tokens", "experts", "per_token"), SIZES)


def kernels():
    from q3n_functional.ops.kernels import grouped_swiglu

    return grouped_swiglu


def build(tokens, experts, per_token, dtype=torch.int64):
    """What `_sort` is given: most slots go to a few experts."""
    scores = torch.rand(tokens, per_token, generator=torch.Generator().manual_seed(0))
    x, weights, gate = (torch.empty(shape, device=DEVICE) for shape in ((tokens, 8), scores.shape, (experts, 8, 8)))
    return kernels()._problem(x, weights, gate, None, None), (scores.square() * experts).to(DEVICE, dtype)


def assert_sorted(places, chosen, num_experts):
    order, ends = reference_sort(chosen, num_experts)
    assert torch.equal(places.order, order)
    assert torch.equal(places.ends, ends)


@each_size
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_as_a_stable_sort(tokens, experts, per_token, dtype):
    problem, chosen = build(tokens, experts, per_token, dtype)
    places = kernels()._sort(problem, chosen)
    assert_sorted(places, chosen, experts)
    assert torch.equal(kernels()._tile_table(problem, None, places.ends), places.tiles)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
@each_size
def test_in_a_cuda_graph(tokens, experts, per_token):
    problem, chosen = build(tokens, experts, per_token)
    kernels()._sort(problem, chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        places = kernels()._sort(problem, chosen)
    chosen.copy_(experts - 1 - chosen.flip(0))
    graph.replay()
    assert_sorted(places, chosen, experts)
