"""A run's checkpoints: folders step-N that are complete or absent, whatever interrupts the writing.

step-N/model is a Hugging Face folder of fp32 parameters with its tokenizer.json; step-N/optimizer.safetensors and
step-N/train_state.json lie beside it, so that a server that loads every safetensors file of a model finds only the
model's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from q3n_functional import checkpoint, optim
from q3n_functional.checkpoint import Checkpoint
from q3n_functional.params import named_leaves
from q3n_functional.train_config import TrainConfig, flatten

STATE = "train_state.json"
OPTIMIZER = "optimizer.safetensors"


class TrainState(NamedTuple):
    """The step that comes next, the model with its fp32 master parameters and its tokenizer, and the optimizer."""

    step: int
    model: Checkpoint
    optimizer: optim.State


def save(run: Path, state: TrainState, config: TrainConfig) -> Path:
    """Writes run/step-N and deletes all but the newest `config.output.keep` checkpoints; returns the folder.

    The folder is written under another name, flushed to the disk and then renamed.
    """
    folder = run / f"step-{state.step}"
    partial = folder.with_suffix(".tmp")
    _clear(run)
    partial.mkdir()
    model = state.model
    checkpoint.save(partial / "model", model.params, model.config, extras=model.extras)
    save_file(optim.to_tensors(state.optimizer), partial / OPTIMIZER)
    sizes = {str(f.relative_to(partial)): f.stat().st_size for f in _files(partial)}
    record = {"step": state.step, "files": sizes, "config": flatten(config), "torch": str(torch.__version__)}
    (partial / STATE).write_text(json.dumps(record, indent=1))
    _flush(partial)
    _rename(partial, folder)
    _keep_newest(run, config.output.keep)
    return folder


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _rename(old: Path, new: Path) -> None:
    if new.exists():  # only an incomplete one: a complete one would have been resumed from
        shutil.rmtree(new)
    old.rename(new)
    descriptor = os.open(new.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _clear(run: Path) -> None:
    for path in run.glob("step-*.tmp"):
        shutil.rmtree(path)


def _keep_newest(run: Path, keep: int) -> None:
    for folder in complete(run)[keep:]:
        # Renamed first: a deletion cut short then leaves no folder that looks like a checkpoint.
        doomed = folder.rename(folder.with_suffix(".tmp"))
        shutil.rmtree(doomed)


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first: those whose every file is there at its recorded size."""
    numbered = [(int(p.name[5:]), p) for p in run.glob("step-*") if p.name[5:].isdecimal()]
    return [path for _, path in sorted(numbered, reverse=True) if _is_complete(path)]


def _is_complete(folder: Path) -> bool:
    try:
        sizes = record(folder)["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def record(folder: Path) -> dict[str, Any]:
    """What train_state.json of a checkpoint says: step, files with sizes, configuration, torch's version."""
    return dict(json.loads((folder / STATE).read_text()))


def load(folder: Path, optimizer: optim.OptimizerConfig, device: torch.device) -> TrainState:
    """The state that `save` wrote; ValueError, naming the tensor, where the optimizer's is not this model's."""
    model = checkpoint.load(folder / "model", dtype=torch.float32, device=device)
    state = optim.init(named_leaves(model.params), optim.groups(model.config, optimizer))
    tensors = load_file(folder / OPTIMIZER, device=str(device))
    return TrainState(int(record(folder)["step"]), model, optim.from_tensors(tensors, state))


def model_folder(path: Path) -> Path:
    """The Hugging Face folder meant by `path`: itself, a checkpoint's, or that of a run's newest checkpoint."""
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if checkpoints := complete(path):
        return checkpoints[0] / "model"
    raise ValueError(f"{path} holds no model: neither config.json nor a complete step-N folder")
