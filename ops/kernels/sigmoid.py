# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The logistic function for kernels that are short of instructions rather than of bytes."""

import triton
import triton.language as tl

NEGATIVE_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32 x as a squared reciprocal root: 5 instructions, where exp and a division take 11.

    The approximations are good to 2^-22, and infinities come out as they should.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * NEGATIVE_LOG2_E))
    return root * root
