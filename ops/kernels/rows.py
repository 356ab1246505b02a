"""Tensors as the rows that kernels walk over."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """[rows, D] with contiguous entries of x [..., D]: a view where strides allow one."""
    x = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
