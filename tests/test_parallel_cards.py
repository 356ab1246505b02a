"""Meshes of two cards over NCCL, in bf16, eager, compiled and as CUDA graphs."""

import subprocess
import sys

import pytest
import torch

from tests.card_ranks import LAYOUTS


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")
@pytest.mark.parametrize("mode", LAYOUTS)
def test_two_cards_are_as_near_fp32_as_one(mode):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run([*command, "-m", "tests.card_ranks", mode], capture_output=True, text=True, timeout=500)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.count("of one card's distance") == len(LAYOUTS[mode])
