"""Attention of pieces in blocks: put together in Triton's interpreter here, with cuDNN's blocks on the device."""

import pytest
import torch

from q3n_functional.ops import attention, piece_attention
from tests.device import DEVICE, INTERPRETED, ON_DEVICE
from tests.test_piece_attention import by_pieces, derivatives, draw

on_hopper = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="the blocks are cuDNN's on Hopper",
)
pytestmark = ON_DEVICE


def scores(q, k, scale, causal):
    """[B, H, T, S], minus infinity where a query does not see a key."""
    found = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * scale
    return found.masked_fill(torch.ones_like(found, dtype=torch.bool).triu(1), -torch.inf) if causal else found


def block_forward(q, k, v, scale, causal=True):
    q_, k_, v_ = (x.double() for x in (q, k, v))
    found = scores(q_, k_, scale, causal)
    o = torch.einsum("bhts,bshk->bthk", found.softmax(-1), v_.repeat_interleave(q.shape[2] // k.shape[2], 2))
    return o.to(q.dtype).contiguous(), found.logsumexp(-1).mT.float().contiguous()


def block_backward(do, q, k, v, o, lse, scale, causal=True):
    """With the probabilities and the inner products of the whole, as flash attention's backward takes them."""
    do, q, k, v, o, lse = (x.double() for x in (do, q, k, v, o, lse))
    group = q.shape[2] // k.shape[2]
    p = (scores(q, k, scale, causal) - lse.mT[..., None]).exp()
    k_, v_ = (x.repeat_interleave(group, 2) for x in (k, v))
    ds = p * (torch.einsum("bthk,bshk->bhts", do, v_) - (do * o).sum(-1).mT[..., None]) * scale
    dk, dv = (torch.einsum("bhts,bthk->bshk", x, y).unflatten(2, (-1, group)).sum(3) for x, y in ((ds, q), (p, do)))
    return torch.einsum("bhts,bshk->bthk", ds, k_), dk, dv


@pytest.fixture
def plain_blocks(monkeypatch):
    """Blocks written out where cuDNN's would be; whether each that forward took was causal."""
    from q3n_functional.ops.kernels import piece_attention as kernels

    kinds = []

    def noted(*given, causal=True):
        kinds.append(causal)
        return block_forward(*given, causal=causal)

    monkeypatch.setattr(kernels, "cudnn_serves", lambda *given: True)
    monkeypatch.setattr(kernels, "cudnn_forward", noted)
    monkeypatch.setattr(kernels, "cudnn_backward", block_backward)
    return kinds


@pytest.mark.parametrize(("batch", "length", "ranks"), [(1, 16, 1), (2, 24, 2), (1, 200, 2), (2, 48, 3), (1, 64, 4)])
def test_blocks_make_up_whole_rows(plain_blocks, batch, length, ranks):
    from q3n_functional.ops.kernels import piece_attention as kernels

    inputs = draw(batch, length, heads=(6, 2), dim=24, dtype=torch.float32, device=DEVICE)
    whole = [x.double() for x in inputs]
    expected = derivatives(attention, *whole)

    class InBlocks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, rank):
            o, lse = kernels.forward(q, k, v, rank, 24**-0.5)
            ctx.save_for_backward(q, k, v, o, lse, rank)
            return o

        @staticmethod
        def backward(ctx, do):
            return *kernels.backward(do, *ctx.saved_tensors, 24**-0.5), None

    for actual, wanted in zip(derivatives(by_pieces(ranks, InBlocks.apply), *inputs), expected, strict=True):
        assert (actual.double() - wanted).norm() <= 1e-6 * wanted.norm()
    assert plain_blocks == [True, True, *[False] * ranks] * ranks


@on_hopper
@pytest.mark.parametrize(("batch", "length", "ranks"), [(1, 512, 1), (2, 1024, 2), (1, 3072, 3), (1, 4096, 8)])
def test_on_hopper(batch, length, ranks):
    inputs = draw(batch, length, heads=(16, 2), dim=256, dtype=torch.bfloat16, device="cuda")
    expected = derivatives(attention, *(x.double() for x in inputs))
    run = by_pieces(ranks, lambda *x: piece_attention(*x, impl="triton"))
    found = derivatives(run, *inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual.double() - wanted).norm() <= 1e-2 * wanted.norm()
    assert torch.equal(found[0], run(*inputs))


@on_hopper
def test_waits_for_nothing():
    q, k, v = draw(1, 1024, heads=(16, 2), dim=256, dtype=torch.bfloat16, device="cuda")
    rank, leaf = torch.tensor([1], device="cuda"), q[:, :512].clone().requires_grad_()
    torch.autograd.grad(piece_attention(leaf, k, v, rank).sum(), leaf)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(piece_attention(leaf, k, v, rank).sum(), leaf)
    finally:
        torch.cuda.set_sync_debug_mode("default")
