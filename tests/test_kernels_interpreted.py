"""Runs the kernels' tests in Triton's interpreter, which has to be chosen before anything imports Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = (
    "test_kernels_causal_conv.py",
    "test_kernels_embedding.py",
    "test_kernels_expert_order.py",
    "test_kernels_grouped_swiglu.py",
    "test_kernels_linear_cross_entropy.py",
    "test_kernels_linear_log_partition.py",
    "test_kernels_piece_attention.py",
    "test_kernels_rms_norm.py",
    "test_kernels_rms_norm_gated.py",
    "test_kernels_top_experts.py",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device runs these tests itself")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
