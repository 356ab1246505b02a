"""`tests.dying_rank` in which fp32 means float64: what q3n stores and computes, to tell rounding from a fault."""

import runpy

import safetensors.torch  # noqa: F401  # tables of dtypes that stay as they are
import torch
from torch.distributed.checkpoint import hf_storage  # noqa: F401

# Before q3n is imported: it names the dtype of masters, moments, decays and angles, and has no option for another.
torch.float32 = torch.float64
torch.set_default_dtype(torch.float64)

if __name__ == "__main__":
    runpy.run_module("tests.dying_rank", run_name="__main__")
