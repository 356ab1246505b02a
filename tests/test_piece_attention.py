"""Attention of context parallel ranks' pieces is that of whole rows, cut up: values and gradients."""

import pytest
import torch

from q3n_functional.ops import attention, piece_attention


def draw(batch, length, heads=(4, 2), dim=8, dtype=torch.float64, device="cpu"):
    """q, k, v of whole rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, count, dim) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def cut(x, ranks, rank):
    """The rank's two pieces of rows."""
    pieces = x.chunk(2 * ranks, 1)
    return torch.cat([pieces[rank], pieces[-1 - rank]], 1)


def together(parts):
    """Rows made of what ranks have for their pieces."""
    halves = [x.chunk(2, 1) for x in parts]
    return torch.cat([a for a, _ in halves] + [b for _, b in reversed(halves)], 1)


def derivatives(function, q, k, v):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    weights = torch.linspace(-1, 1, o.numel(), device=o.device, dtype=torch.float64).view(o.shape).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, leaves, weights)]


def by_pieces(ranks, attend=piece_attention):
    def run(q, k, v):
        each = [torch.tensor([rank], device=q.device) for rank in range(ranks)]
        return together([attend(cut(q, ranks, int(rank)), k, v, rank) for rank in each])

    return run


@pytest.mark.parametrize(("batch", "length", "ranks"), [(1, 16, 1), (2, 24, 2), (1, 300, 2), (2, 48, 3), (1, 8, 4)])
def test_matches_whole_rows(batch, length, ranks):
    inputs = draw(batch, length)
    expected = derivatives(attention, *inputs)
    for actual, wanted in zip(derivatives(by_pieces(ranks), *inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [((1, 6), (1, 16)), ((1, 3), (1, 6)), ((2, 4), (1, 8))])
def test_shapes_that_do_not_fit(queries, keys):
    q, k = (torch.zeros(*shape, 2, 8) for shape in (queries, keys))
    with pytest.raises(ValueError, match=r"must be two pieces of each of 1 rows of \d+ keys"):
        piece_attention(q, k, k, torch.zeros(1, dtype=torch.int64))
