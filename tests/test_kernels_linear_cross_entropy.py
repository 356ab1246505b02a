"""The fused loss's kernel against its definition in float64: in Triton's interpreter here, on the device there."""

import os

import pytest
import torch

from q3n_functional.ops.linear_cross_entropy import IGNORE
from tests.device import DEVICE, INTERPRETED, ON_DEVICE
from tests.test_linear_cross_entropy import COEF, MODULE, assert_close, definition, derivatives, draw, wide

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses where memory is to be poisoned
pytestmark = ON_DEVICE
DTYPES = (
    [(torch.float32, 5e-6)] if INTERPRETED else [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)]
)
# On a device programs share a row of more than 8,192 logits; the interpreter runs one after the other.
VOCABULARIES = [1, 3, 1000, 4096, 9001] + ([] if INTERPRETED else [8193, 50_001])


def kernel(h, head, targets, coef=COEF, gradients=True):
    from q3n_functional.ops.kernels import linear_cross_entropy

    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # NaN in all memory that is allocated
    try:
        return linear_cross_entropy.forward(h, head, targets, coef, gradients)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_matches_the_definition(dtype, tolerance, vocabulary):
    inputs = draw(13, vocabulary=vocabulary, width=24, dtype=dtype, device=DEVICE)
    leaves = [x.requires_grad_() for x in wide(*inputs)[:2]]
    sums = definition(*leaves, inputs[2], COEF)
    expected = [*(x.detach() for x in sums), *torch.autograd.grad(sums[0], leaves)]
    actual = kernel(*inputs)
    assert [x.dtype for x in actual] == [torch.float32] * 3 + [dtype] * 2
    assert_close(actual, expected, tolerance)
    # The kernel without gradients is compiled apart, and may round otherwise.
    sums = kernel(*inputs, gradients=False)[:3]
    torch.testing.assert_close(torch.stack(sums), torch.stack(actual[:3]), rtol=1e-6, atol=0)


def test_several_chunks_and_repeats(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 128 * 64 * 8)
    inputs = draw(300, vocabulary=64, width=16, dtype=torch.float32, device=DEVICE)
    leaves = [x.requires_grad_() for x in wide(*inputs)[:2]]
    sums = definition(*leaves, inputs[2], COEF)
    actual = kernel(*inputs)
    assert_close(actual, [*(x.detach() for x in sums), *torch.autograd.grad(sums[0], leaves)], 1e-5)
    assert all(map(torch.equal, actual, kernel(*inputs)))


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES], ids=str)
def test_gradients_times_a_factor_are_those_of_the_reference(dtype):
    from q3n_functional.ops.kernels import linear_cross_entropy

    h, head, _ = draw(13, vocabulary=1000, width=24, dtype=dtype, device=DEVICE)
    factor = torch.tensor(0.3, device=DEVICE)
    found = linear_cross_entropy.backward(factor, h, head, h, head)
    assert all(map(torch.equal, found, MODULE._times(factor, h, head, h, head)))
    assert not linear_cross_entropy.backward(factor, h[:0], head, h[:0], head)[0].numel()


def test_no_targets():
    h, head, targets = draw(5, dtype=torch.float32, device=DEVICE)
    for inputs in ((h, head, torch.full_like(targets, IGNORE)), (h[:0], head, targets[:0])):
        assert not any(x.any() for x in kernel(*inputs))


def test_large_logits():
    inputs = draw(9, scale=1e4, dtype=torch.float32, device=DEVICE)
    expected = definition(*wide(*inputs), COEF)
    assert_close(kernel(*inputs)[:3] + tuple(expected[:2]), [*expected, *expected[:2]], 1e-4)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter waits for nothing")
def test_waits_for_nothing_and_sums_in_fp32():
    """Twice, chunks of bf16 add up to the same bits, and to more than bf16 can hold."""
    from q3n_functional.ops import linear_cross_entropy

    inputs = draw(4, 1100, vocabulary=151_936, width=64, dtype=torch.bfloat16, device="cuda", scale=0.1)
    derivatives(linear_cross_entropy, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (derivatives(linear_cross_entropy, *inputs, impl="triton") for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, second))
    h, head, targets = inputs
    expected = derivatives(definition, h.float(), head.float(), targets)
    assert_close(first, expected, 4e-3)
    assert_close(first[:3] + expected[3:], expected, 1e-5)
