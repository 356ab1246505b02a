"""A run's checkpoints: folders step-N that are complete or absent, whatever interrupts the writing.

step-N/model is a Hugging Face folder of fp32 parameters with its tokenizer.json; step-N/optimizer, in the form of
torch.distributed.checkpoint, and step-N/train_state.json lie beside it, so that a server that loads every safetensors
file of a model finds only the model's. One device and any mesh write the same, and each reads what the other wrote.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch.distributed.checkpoint.api import CheckpointException

from q3n_functional import checkpoint, optim
from q3n_functional.checkpoint import Checkpoint
from q3n_functional.parallel import distributed_checkpoint
from q3n_functional.parallel.distributed_checkpoint import Storage, barrier
from q3n_functional.params import named_leaves
from q3n_functional.train_config import TrainConfig, flatten

STATE = "train_state.json"
OPTIMIZER = "optimizer"


class TrainState(NamedTuple):
    """The step that comes next, the model with its fp32 master parameters and its tokenizer, and the optimizer.

    On a mesh parameters and moments are the rank's shards.
    """

    step: int
    model: Checkpoint
    optimizer: optim.State


class Saver:
    """Writes a run's checkpoints beside the training, one at a time, all ranks of `storage` together.

    `source` is the signature of what is trained on. What cannot be written raises in the next `save`, `check` or
    `wait`: OSError, naming the folder, where the files are to blame.
    """

    def __init__(self, run: Path, config: TrainConfig, source: str, storage: Storage | None = None) -> None:
        self._run, self._config, self._source, self._storage = run, config, source, storage
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def save(self, state: TrainState) -> None:
        """Copies `state` to the host and returns; its folder step-N appears when all of it is on the disk."""
        self.wait()
        copy = _on_host(state)
        self._last = self._thread.submit(_write, self._run, copy, self._config, self._source, self._storage)

    def check(self) -> None:
        """Raises what went wrong with the last checkpoint, if that is known by now."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last checkpoint is complete."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Also after an error: what is being written is the checkpoint to go on from.
        self._thread.shutdown()
        if error is None:
            self.wait()


def _on_host(state: TrainState) -> TrainState:
    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True)

    params = pytree.tree_map(copy, state.model.params)
    optimizer = pytree.tree_map(copy, state.optimizer)
    return TrainState(state.step, state.model._replace(params=params), cast(optim.State, optimizer))


def _write(run: Path, state: TrainState, config: TrainConfig, source: str, storage: Storage | None) -> None:
    """Writes run/step-N and deletes all but the newest `config.output.keep` checkpoints.

    The folder is written under another name, flushed to the disk and then renamed.
    """
    folder = run / f"step-{state.step}"
    partial, lead = folder.with_suffix(".tmp"), storage is None or storage.rank == 0
    with _undone(folder, partial, lead):
        if lead:
            _clear(run)
            partial.mkdir()
        barrier(storage)
        distributed_checkpoint.save(partial / OPTIMIZER, optim.to_tensors(state.optimizer), storage)
        _write_model(partial, state.model, storage)
        barrier(storage)
        if lead:
            _seal(partial, state.step, config, source)
            _rename(partial, folder)
            _keep_newest(run, config.output.keep)
        barrier(storage)


@contextmanager
def _undone(folder: Path, partial: Path, lead: bool) -> Iterator[None]:
    """Removes `partial` where the block fails, as it would keep a full disk full."""
    try:
        yield
    except BaseException as error:  # CheckpointException is no Exception
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, OSError):
            raise OSError(f"{folder} cannot be written ({cause}): make room for it, then --resume") from error
        raise


def _write_model(partial: Path, model: Checkpoint, storage: Storage | None) -> None:
    leaves = named_leaves(model.params)
    dtypes = {name: leaf.dtype for name, leaf in leaves.items()}
    if storage is None:
        checkpoint.save_part(partial / "model", lambda names: leaves, model.config, dtypes, model.extras, (0, 1))
        return
    # The tensors of the folder are not those of the tree. Files turn shards into leaves, a few on each rank at a time.
    shards = partial / "shards"
    distributed_checkpoint.save(shards, leaves, storage)
    whole = functools.partial(distributed_checkpoint.whole, shards, layouts=storage.layouts)
    part = (storage.rank, storage.ranks)
    checkpoint.save_part(partial / "model", whole, model.config, dtypes, model.extras, part)
    barrier(storage)
    if storage.rank == 0:
        shutil.rmtree(shards)


def _seal(partial: Path, step: int, config: TrainConfig, source: str) -> None:
    """Notes what must be there for the checkpoint to be complete, and flushes all of it."""
    sizes = {str(f.relative_to(partial)): f.stat().st_size for f in _files(partial)}
    version = str(torch.__version__)
    record = {"step": step, "files": sizes, "config": flatten(config), "source": source, "torch": version}
    (partial / STATE).write_text(json.dumps(record, indent=1))
    _flush(partial)


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
    """What train_state.json of a checkpoint says: step, files with sizes, configuration, source's signature, torch."""
    return dict(json.loads((folder / STATE).read_text()))


def load(folder: Path, model: Checkpoint, optimizer: optim.State, storage: Storage | None = None) -> TrainState:
    """The state that was saved in `folder`, of which `model` is loaded; `optimizer` is a fresh one, which is filled.

    Raises ValueError, naming the tensor, where the folder's moments are not this model's.
    """
    distributed_checkpoint.load_(folder / OPTIMIZER, optim.to_tensors(optimizer), storage)
    return TrainState(int(record(folder)["step"]), model, optimizer)


def model_folder(path: Path) -> Path:
    """The Hugging Face folder meant by `path`: itself, a checkpoint's, or that of a run's newest checkpoint."""
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if checkpoints := complete(path):
        return checkpoints[0] / "model"
    raise ValueError(f"{path} holds no model: neither config.json nor a complete step-N folder")
