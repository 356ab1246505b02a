"""Grouped products in float8: every group of rows by a matrix of its own.

Letters: M rows in the order of their groups, K what a product sums over, N its outputs, E groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q3n_functional.ops.registration import Impl, define, gradient

CAPABILITIES = (9, 10)
"""Major ones of the cards that torch has such products for."""


def float8_grouped_mm(
    a_MK: Tensor, b_ENK: Tensor, scale_M: Tensor, scale_EN: Tensor, ends_E: Tensor, impl: Impl = "auto"
) -> Tensor:
    """`(a[m] * scale[m]) (b[e, n] * scale[e, n])^T` [M, N] in bf16, with e the group of row m.

    a: e4m3 [M, K]; b: e4m3 [E, N, K], both contiguous, N and K multiples of 16. scale: fp32 [M] and [E, N], one a row.
    ends: int32 [E], the row behind each group's last. Sums are fp32. On cards of capability 9 and 10 it is
    torch._scaled_grouped_mm, of fewer than 1024 groups; elsewhere what tensor cores would compute. It has no gradient.
    """
    y_MN: Tensor = _float8_grouped_mm(a_MK, b_ENK, scale_M, scale_EN, ends_E, impl)
    return y_MN


def _reference(a_MK: Tensor, b_ENK: Tensor, scale_M: Tensor, scale_EN: Tensor, ends_E: Tensor) -> Tensor:
    y_MN, ends = _fake(a_MK, b_ENK), ends_E.tolist()
    for e, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        sums = a_MK[begin:end].float() @ b_ENK[e].float().mT
        y_MN[begin:end] = sums * scale_M[begin:end, None] * scale_EN[e]
    return y_MN


def _fake(a_MK: Tensor, b_ENK: Tensor, *rest: Any) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_ENK.shape[1], dtype=torch.bfloat16)


_float8_grouped_mm = gradient(
    define(
        "float8_grouped_mm",
        "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor ends, str impl) -> Tensor",
        reference=_reference,
        fake=_fake,
        kernel="float8_grouped_mm:forward",
    )
)
