"""Small training runs for tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from q3n_functional import checkpoint, data, params, train, train_config
from q3n_functional.train_config import TrainConfig
from tests.configs import small

SHAKESPEARE = Path(__file__).parent.parent / "examples" / "shakespeare.txt"


def arguments(folder: Path, *more: str, **model: object) -> list[str]:
    """Options of a run of ten eager steps on 20,000 bytes, whose model is `small` with changes."""
    source = folder / "play.txt"
    if not source.exists():
        source.write_bytes(SHAKESPEARE.read_bytes()[:20_000])
    shape = folder / "config.json"
    if model or not shape.exists():
        small(**{"vocab_size": 300, "num_hidden_layers": 2, "layer_types": LAYERS, **model}).to_json(shape)
    fixed = {"run": folder / "run", "preset": shape, "steps": 10, "batch_size": 2, "seq_len": 32, "data.source": source}
    options = [f"--{key}={value}" for key, value in fixed.items()]
    return [*options, "--compile=none", "--optimizer.lr=0.01", "--optimizer.warmup-steps=2", *more]


LAYERS = ("linear_attention", "full_attention")


def config(folder: Path, *more: str, **model: object) -> TrainConfig:
    """The same, parsed."""
    return train_config.parse(arguments(folder, *more, **model))


def rows(folder: Path, name: str = "loss") -> list[float]:
    """What metrics.jsonl of the run says of `name`, step by step."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def run(folder: Path, *more: str, **model: object) -> Path:
    """Trains, and returns the last checkpoint's folder."""
    return train.train(config(folder, *more, **model))


def torchrun(
    ranks: int, module: str, *arguments: object, die: str = "", restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` on that many ranks; `die` as `tests.dying_rank` reads it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # What follows -- is not torchrun's, which would take --run for one of its own.
    command = [*launcher, f"--max-restarts={restarts}", "-m", "--", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIE": die}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)


def interrupt_at(settings: TrainConfig, step: int, action: Callable[[], object]) -> None:
    """Trains, and calls `action` when the batch of that step is asked for."""
    batch = data.batch

    def interrupted(reader: data.Reader, index: int, seed: int) -> data.Batch:
        if index == step:
            action()
        return batch(reader, index, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "batch", interrupted)
        train.train(settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of checkpoint step-N by name."""
    return params.named_leaves(checkpoint.load(folder / "model").params)


def assert_same_weights(a: Path, b: Path) -> None:
    """Two checkpoints hold the same parameters, bit by bit."""
    theirs = weights(b)
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, theirs[name]), name
