"""What each rank of a planning test runs: a real step under the planner's tracker and torch's count of collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from q3n_functional.optim import OptimizerConfig
from q3n_functional.parallel import mesh, placement, rules
from q3n_functional.plan import BACKEND, run
from q3n_functional.plan_trace import Tracker, kernels, memory
from q3n_functional.train_config import DataConfig, TrainConfig
from tests.configs import small

ROWS, LENGTH = 4, 64


def settings(layout: str, recompute: str = "none", **changes: Any) -> TrainConfig:
    """A step of the small model, eager; in float32 as gloo has no sums of bf16."""
    fixed: dict[str, Any] = {
        "run": "", "steps": 1, "batch_size": ROWS, "seq_len": LENGTH, "compile": "none", "recompute": recompute,
        "data": DataConfig(source=""), "optimizer": OptimizerConfig(), "mesh": mesh.parse(layout), "model": small(),
    }  # fmt: skip
    return TrainConfig(**{**fixed, **changes})


def measured(config: TrainConfig) -> tuple[dict[str, int], float]:
    """Collectives of a real step by name, and its peak of memory in bytes."""
    layout = config.mesh
    where = rules.layouts(config.model, layout)
    parallel = placement.connect(layout, where, torch.device("cpu"))
    shards = rules.init(config.model, 0, layout, dist.get_rank())
    tokens = torch.randint(config.model.vocab_size, (ROWS // layout.rows, LENGTH))
    tracker, counted = Tracker(), CommDebugMode()
    with counted:
        run(config, shards, tokens, parallel, tracker, BACKEND)
    kernels(tracker)
    names = Counter({str(op).split(".")[-1]: count for op, count in counted.get_comm_counts().items()})
    return dict(names), float(memory(tracker).sum(0).max())


def launch(cases: Sequence[tuple[str, str, dict[str, Any]]]) -> list[tuple[dict[str, int], float]]:
    """What rank 0 of two measured, case by case."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.plan_ranks", folder, json.dumps(cases)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        try:
            said = [rank.communicate(timeout=500)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert not any(rank.returncode for rank in ranks), "\n".join(said)
        return [tuple(found) for found in json.loads((Path(folder) / "found.json").read_text())]


def _main(folder: str, cases: str, rank: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=300), 2, int(rank))
    found = [measured(settings(*case, **changes)) for *case, changes in json.loads(cases)]
    if rank == "0":
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
