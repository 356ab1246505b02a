"""The router's scores on tensor cores: bf16 operands, whose products fp32 holds exactly, summed in fp32.

Backward's dlogits are fp32. They are taken apart into a bf16 number and the bf16 number nearest to what is left, which
together hold 16 bits of them, and a product with either is exact again.
"""

import torch
from torch import Tensor

from q3n_functional.ops.registration import UnsupportedError


def forward(x: Tensor, router: Tensor) -> Tensor:
    """Return x router^T in fp32."""
    _check(x, router)
    return _product(x, router.mT)


def backward(dlogits: Tensor, x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and router."""
    _check(x, router)
    parts = _parts(dlogits)
    drouter = _product(parts.mT, x).unflatten(0, (2, -1)).sum(0)
    return parts @ torch.cat([router, router]), drouter.to(router.dtype)


def _check(x: Tensor, router: Tensor) -> None:
    if x.dtype != torch.bfloat16 or router.dtype != torch.bfloat16:
        raise UnsupportedError(f"x is {x.dtype}, router {router.dtype}: products are exact in fp32 if both are bf16")


def _parts(dlogits_TE: Tensor) -> Tensor:
    """[T, 2E]: dlogits in bf16, and in bf16 what that leaves."""
    rounded = dlogits_TE.to(torch.bfloat16)
    return torch.cat([rounded, (dlogits_TE - rounded).to(torch.bfloat16)], 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)
