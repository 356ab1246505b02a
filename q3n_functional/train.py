"""The training loop: batches in, checkpoints and curves out.

A step is two functions: the loss, whose gradient is taken outside it so that recomputation works when it is compiled,
and the optimizer's update. Everything that a step changes is in a `TrainState`. On a mesh every rank runs the loop on
its shards and rows, and rank 0 alone writes logs; all agree on when to stop.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from q3n_functional import data, metrics, optim, prepare, step, tokenizer, train_state
from q3n_functional.data import Batch
from q3n_functional.generate import generate
from q3n_functional.model import Metrics
from q3n_functional.parallel import distributed_checkpoint, launch, placement, rules
from q3n_functional.parallel.collectives import maximum
from q3n_functional.parallel.distributed_checkpoint import Storage
from q3n_functional.parallel.launch import World
from q3n_functional.parallel.mesh import check_size
from q3n_functional.parallel.placement import Parallel
from q3n_functional.prepare import Text
from q3n_functional.sampling import Options
from q3n_functional.train_config import TrainConfig
from q3n_functional.train_state import TrainState

logger = logging.getLogger(__name__)

SHOWN = ("loss", "bits_per_byte", "tokens_per_s", "mfu")
"""What the progress bar says."""

BITS = "validation_bits_per_byte"


class Stopped(Exception):  # noqa: N818  # not an error
    """A signal ended the run after a checkpoint was saved. `number` is the signal's."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Job(NamedTuple):
    """What stays the same from step to step. On a mesh `parallel` is this rank's place in it."""

    config: TrainConfig
    text: Text
    device: torch.device
    parallel: Parallel | None
    where: World


def train(config: TrainConfig) -> Path:
    """Trains as `config` says and returns the last checkpoint's folder; on a mesh, every rank calls it.

    Raises ValueError, before any work, for data, settings, a mesh or a run folder that do not fit; FloatingPointError
    where the loss or the gradient stops being finite, with nothing of that step saved; `launch.LostRankError` where
    another rank is gone or silent for `config.timeout`; `Stopped` after SIGINT or SIGTERM.
    """
    where = launch.world()
    check_size(config.mesh, where.size)
    if launch.restarted():
        config = dataclasses.replace(config, resume=True)
    device = launch.own_device(step.pick_device(config.device), where)
    step.check_device(config, device)
    with launch.joined(where, device):
        job, state, storage = _prepared(config, device, where)
        with launch.watched(where, lambda: _remedy(Path(config.run))):
            return _train(job, state, storage)


def _remedy(run: Path) -> str:
    last = next(iter(train_state.complete(run)), None)
    return f"last complete checkpoint: {last}; --resume goes on from there" if last else "no checkpoint is complete yet"


def _prepared(config: TrainConfig, device: torch.device, where: World) -> tuple[Job, TrainState, Storage | None]:
    """All that may fail before the first step."""
    run = Path(config.run)
    newest = launch.same(launch.together(lambda: prepare.newest(run, config)), "the newest checkpoint")
    text = prepare.text(config, run, newest)
    model = launch.together(lambda: prepare.model(config, newest, text.tokenizer, device, where.rank))
    parallel = storage = None
    if where.size > 1:
        places, timeout = rules.layouts(model.config, config.mesh), timedelta(seconds=config.timeout)
        parallel = placement.connect(config.mesh, places, device, timeout)
        storage = distributed_checkpoint.storage(rules.named_layouts(model.config, config.mesh), config.mesh, timeout)
    state = launch.together(lambda: prepare.start(config, newest, model, storage))
    return Job(config, text, device, parallel, where), state, storage


def _train(job: Job, state: TrainState, storage: Storage | None) -> Path:
    run = Path(job.config.run)
    config, shape = job.config, state.model.config
    loss, update = step.functions(config, shape, job.device, job.parallel)
    move = step.make_step(loss, update, state.model.params, state.optimizer, config, shape)
    log = metrics.Log(run, state.step) if job.where.lead else nullcontext()
    with log as opened, train_state.Saver(run, config, job.text.signature, storage) as saver, _Interrupt() as interrupt:
        with logging_redirect_tqdm():
            state, number = _loop(job, state, move, loss, opened, saver, interrupt)
        saver.wait()
        folder = run / f"step-{state.step}"
        if folder not in train_state.complete(run):
            saver.save(state)
            saver.wait()
    if job.where.lead:
        metrics.plot(run)
    if number:
        name = signal.Signals(number).name
        raise Stopped(number, f"stopped by {name}; saved {folder}; --resume goes on from there")
    if job.where.lead:
        _report(job, state)
    return folder


class _Interrupt:
    """Notes the first SIGINT or SIGTERM; the next one acts as if nobody listened."""

    number = 0

    def __enter__(self) -> _Interrupt:
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        logger.info("%s: saving after this step (again to stop at once)", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()


def _loop(
    job: Job,
    state: TrainState,
    move: step.Step,
    loss: step.Loss,
    log: metrics.Log | None,
    saver: train_state.Saver,
    interrupt: _Interrupt,
) -> tuple[TrainState, int]:
    """Steps until the last one, a signal or a number that is not finite; the number of the signal, 0 for none."""
    config, number = job.config, 0
    pace = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log wants few lines
    with tqdm(
        total=config.steps, initial=state.step, unit="step", dynamic_ncols=True, mininterval=pace, disable=log is None
    ) as bar:
        while state.step < config.steps and not number:
            values, number = _step(job, state, move, interrupt)
            _check_finite(job, state, values, saver)
            state = state._replace(step=state.step + 1)
            if _due(config.output.validate_every, state.step) or state.step == config.steps:
                values |= _validation(job, state, loss)
            if log:
                log.write(state.step, values)
            bar.set_postfix({name: f"{values[name]:.4g}" for name in SHOWN if name in values}, refresh=False)
            bar.update()
            saver.check()
            if _due(config.output.save_every, state.step):
                saver.save(state)
                if log:
                    metrics.plot(Path(config.run))
    return state, number


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _step(job: Job, state: TrainState, move: step.Step, interrupt: _Interrupt) -> tuple[dict[str, float], int]:
    """One update, in place; what is known about it as numbers, and that of a signal which any rank has got."""
    config, device, begin = job.config, job.device, time.perf_counter()
    whole = [data.batch(job.text.training, i, config.seed) for i in _indices(config, state.step)]
    lr = optim.learning_rate(state.step, config.steps, config.optimizer)
    batches = tuple(_own(batch, job) for batch in whole)
    found = move(step.Inputs(batches, step.count(whole).to(device), torch.tensor(lr, device=device)))
    # Ranks that stopped after different steps would wait for each other for ever.
    stop = torch.tensor(float(interrupt.number), device=device)
    stop = stop if job.parallel is None else maximum(stop, job.parallel.world)
    # One transfer a step: each would wait for the device.
    *numbers, number = torch.cat([found, stop[None]]).tolist()
    values = dict(zip(("loss", "grad_norm", *Metrics._fields), numbers, strict=True))
    if job.text.bytes_per_token[0]:
        values["bits_per_byte"] = values["cross_entropy"] / math.log(2) / job.text.bytes_per_token[0]
    tokens, seconds = sum(batch.tokens_BT.numel() for batch in whole), time.perf_counter() - begin
    speed = metrics.speed(tokens, seconds, state.model.config, config.seq_len, device, job.where.size)
    return {**values, "lr": lr, **speed}, int(number)


def _indices(config: TrainConfig, step: int) -> range:
    """The numbers of a step's batches."""
    return range(step * config.accumulate, (step + 1) * config.accumulate)


def _own(batch: Batch, job: Job) -> Batch:
    """The rank's rows of a batch, on its device."""
    mesh = job.config.mesh
    own = data.rows(batch, mesh.rows, mesh.coordinates(job.where.rank)["rows"])
    cu_seqlens = None if own.cu_seqlens is None else own.cu_seqlens.to(job.device, non_blocking=True)
    return Batch(own.tokens_BT.to(job.device, non_blocking=True), cu_seqlens)


def _check_finite(job: Job, state: TrainState, values: dict[str, float], saver: train_state.Saver) -> None:
    bad = [f"{name} is {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if not bad:
        return
    config = job.config
    rows = "\n".join(data.describe(job.text.training, i, config.seed) for i in _indices(config, state.step))
    # What is being written is the checkpoint to name.
    saver.wait()
    last = next(iter(train_state.complete(Path(config.run))), "none yet")
    raise FloatingPointError(
        f"{' and '.join(bad)} at step {state.step}; nothing of this step is saved; last good checkpoint: {last}\n"
        f"The batch was, in {config.data.source}:\n{rows}"
    )


def _validation(job: Job, state: TrainState, loss: step.Loss) -> dict[str, float]:
    text = job.text
    if text.validation is None:
        return {}
    params = step.working(state.model.params, job.config, state.model.config)
    batches = data.validation_batches(text.validation, job.config.output.validation_batches)
    nats = step.validate(loss, params, ((_own(batch, job), step.count([batch]).to(job.device)) for batch in batches))
    values = {"validation_loss": nats}
    if text.bytes_per_token[1]:
        values[BITS] = nats / math.log(2) / text.bytes_per_token[1]
    return values


def _report(job: Job, state: TrainState) -> None:
    """Says where everything is, and lets the model write."""
    run, s, words = Path(job.config.run), job.config.output.sample, job.text.tokenizer
    logger.info("model: %s, curves: %s", run / f"step-{state.step}" / "model", run / "loss.png")
    measured = [row[BITS] for row in metrics.read(run / "metrics.jsonl") if BITS in row]
    if measured:
        logger.info("validation: %.3f bits per byte", measured[-1])
    if not s.max_new_tokens or not words:
        return
    if job.parallel is not None:
        # No rank has the model, and one alone might not hold it.
        logger.info("no sample, as the ranks have parts of the model: q3n generate %s %r writes one", run, s.prompt)
        return
    prompt = tokenizer.encode(words, [s.prompt])[0]
    ids = generate(
        state.model.params, prompt, config=state.model.config, max_new_tokens=s.max_new_tokens,
        options=Options(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=s.seed),
    )  # fmt: skip
    print(s.prompt, *tokenizer.stream(words, ids), sep="")
