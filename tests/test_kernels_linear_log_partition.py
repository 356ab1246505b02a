"""The kernels of log-partitions against float64: in Triton's interpreter here, on the device there."""

import os

import pytest
import torch

from tests.test_kernels_linear_cross_entropy import DEVICE, DTYPES, VOCABULARIES
from tests.test_kernels_linear_cross_entropy import pytestmark as pytestmark
from tests.test_linear_cross_entropy import MODULE
from tests.test_linear_log_partition import assert_close, definition, results, some

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, head, targets):
        from q3n_functional.ops.kernels import linear_log_partition

        partition, picked, logits = linear_log_partition.forward(h, head, targets)
        ctx.save_for_backward(partition, logits, h, head, targets)
        return partition, picked

    @staticmethod
    def backward(ctx, *gradients):
        from q3n_functional.ops.kernels import linear_log_partition

        return *linear_log_partition.backward(*gradients, *ctx.saved_tensors), None


def kernel_results(*inputs):
    torch.use_deterministic_algorithms(True)  # NaN in all memory that is allocated
    try:
        return results(Kernel.apply, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_matches_the_definition(dtype, tolerance, vocabulary):
    h, head, targets = some(13, vocabulary=vocabulary, width=24, dtype=dtype, device=DEVICE)
    actual = kernel_results(h, head, targets)
    assert [x.dtype for x in actual] == [torch.float32] * 2 + [dtype] * 2
    assert_close(actual, results(definition, h.double(), head.double(), targets), tolerance)


def test_several_chunks_and_repeats(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 128 * 64 * 4)
    h, head, targets = some(300, vocabulary=64, width=16, dtype=torch.float32, device=DEVICE)
    actual = kernel_results(h, head, targets)
    assert_close(actual, results(definition, h.double(), head.double(), targets), 1e-5)
    assert all(map(torch.equal, actual, kernel_results(h, head, targets)))


def test_large_logits_and_no_tokens():
    h, head, targets = some(9, scale=1e4, dtype=torch.float32, device=DEVICE)
    assert_close(kernel_results(h, head, targets), results(definition, h.double(), head.double(), targets), 1e-4)
    assert not any(x.any() for x in kernel_results(h[:0], head, targets[:0]))
