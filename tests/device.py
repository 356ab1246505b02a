"""Where tests of kernels run: on a card, or without one in Triton's interpreter, in a process of its own."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_DEVICE = [] if INTERPRETED else [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]  # fmt: skip
"""A file's `pytestmark`."""
