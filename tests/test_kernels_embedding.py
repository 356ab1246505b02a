"""The Triton gradient of an embedding table against plain sums: interpreted here, on the device there."""

import pytest
import torch

from tests.device import DEVICE, INTERPRETED, ON_DEVICE
from tests.test_kernels_rms_norm_gated import poisoned

pytestmark = ON_DEVICE

CASES = {
    "a few of many rows": {"num": 200},
    "many of a few rows": {"num": 5, "tokens": 300},
    "all in one row": {"num": 1},
    "no tokens": {"tokens": 0},
    "rows outside": {"outside": 9},
    "one column": {"width": 1},
    "several tiles of columns": {"width": 1030},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "strided": {"strided": True},
    "int32": {"kind": torch.int32},
}


def kernels():
    from q3n_functional.ops.kernels import embedding

    return embedding


def build(num=40, tokens=50, width=24, dtype=torch.float32, outside=0, strided=False, kind=torch.int64):
    """dx, rows and their number."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-outside, num + outside, (tokens,), generator=generator).to(DEVICE, kind)
    dx = torch.randn(tokens, 2 * width, generator=generator).to(DEVICE, dtype)
    return dx[:, 1::2] if strided else dx[:, width:], rows, num


def sums(dx, rows, num):
    found = torch.zeros(num, dx.shape[1], dtype=torch.float64, device=dx.device)
    for row, grad in zip(rows.tolist(), dx.double(), strict=True):
        if 0 <= row < num:
            found[row] += grad
    return found


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_plain_sums(options):
    dx, rows, num = build(**options)
    actual = poisoned(kernels().backward)(dx, rows, num)
    assert actual.dtype == dx.dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dx.dtype]
    torch.testing.assert_close(actual.double(), sums(dx, rows, num), rtol=tolerance, atol=tolerance)


def test_repeats_bit_by_bit():
    inputs = build(num=5, tokens=300)
    assert torch.equal(kernels().backward(*inputs), kernels().backward(*inputs))


def test_other_dtypes_are_refused():
    dx, rows, num = build(dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        kernels().backward(dx, rows, num)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_no_new_compilation_for_other_sizes():
    counts = []
    for num, tokens in ((40, 50), (7, 16), (151_936, 8192), (1, 1)):
        kernels().backward(*build(num=num, tokens=tokens))
        counts.append(len(kernels()._backward_kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts[0] == counts[-1]


@pytest.mark.skipif(INTERPRETED, reason="5 GiB")
def test_offsets_beyond_32_bits():
    num = 1_100_000
    dx, rows, _ = build(num=num, width=2048, dtype=torch.bfloat16)
    rows[:5] = num - 1
    actual = kernels().backward(dx, rows, num)
    torch.testing.assert_close(actual[-1].float(), dx[rows == num - 1].float().sum(0), rtol=1e-2, atol=1e-2)
