"""Grouped products in float8 on CUDA by torch's own, which are for Hopper and Blackwell."""

import torch
from torch import Tensor

from q3n_functional.ops.float8_grouped_mm import CAPABILITIES
from q3n_functional.ops.registration import UnsupportedError


def forward(a_MK: Tensor, b_ENK: Tensor, scale_M: Tensor, scale_EN: Tensor, ends_E: Tensor) -> Tensor:
    """Return the products [M, N], as `q3n_functional.ops.float8_grouped_mm` says; tensor cores read along rows."""
    if a_MK.is_cuda and torch.cuda.get_device_capability(a_MK.device)[0] not in CAPABILITIES:
        raise UnsupportedError("grouped products in float8 need a card of compute capability 9 or 10")
    # Not the fast accumulation, which keeps fewer bits of a sum than fp32 has.
    return torch._scaled_grouped_mm(
        a_MK, b_ENK.mT, scale_M, scale_EN, offs=ends_E, out_dtype=torch.bfloat16, use_fast_accum=False
    )
