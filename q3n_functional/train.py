"""The training loop: batches in, checkpoints and curves out.

A step is two functions: the loss, whose gradient is taken outside it so that recomputation works when it is compiled,
and the optimizer's update. Everything that a step changes is in a `TrainState`.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from q3n_functional import data, metrics, optim, prepare, step, tokenizer, train_state
from q3n_functional.data import Batch
from q3n_functional.generate import generate
from q3n_functional.params import named_leaves
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


def train(config: TrainConfig) -> Path:
    """Trains as `config` says and returns the last checkpoint's folder.

    Raises ValueError, before any work, for data, settings or a run folder that do not fit; FloatingPointError where the
    loss or the gradient stops being finite, with nothing of that step saved; `Stopped` after SIGINT or SIGTERM.
    """
    device, run = step.pick_device(config.device), Path(config.run)
    newest = prepare.newest(run, config)
    text = prepare.text(config, run, newest)
    state = prepare.start(config, newest, text.tokenizer, device)
    with metrics.Log(run, state.step) as log, _Interrupt() as interrupt, logging_redirect_tqdm():
        state = _loop(config, text, state, log, interrupt)
        folder = run / f"step-{state.step}"
        if folder not in train_state.complete(run):
            train_state.save(run, state, config)
            metrics.plot(run)
    if interrupt.number:
        name = signal.Signals(interrupt.number).name
        raise Stopped(interrupt.number, f"stopped by {name}; saved {folder}; --resume goes on from there")
    _report(config, text, state)
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


def _loop(config: TrainConfig, text: Text, state: TrainState, log: metrics.Log, interrupt: _Interrupt) -> TrainState:
    """Steps until the last one, a signal or a number that is not finite."""
    loss, update = step.functions(config, state.model.config, state.optimizer.step.device)
    pace = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log wants few lines
    with tqdm(total=config.steps, initial=state.step, unit="step", dynamic_ncols=True, mininterval=pace) as bar:
        while state.step < config.steps and not interrupt.number:
            values = _step(config, text, state, loss, update)
            _check_finite(config, text, state, values)
            state = state._replace(step=state.step + 1)
            if _due(config.output.validate_every, state.step) or state.step == config.steps:
                values |= _validation(config, text, state, loss)
            log.write(state.step, values)
            bar.set_postfix({name: f"{values[name]:.4g}" for name in SHOWN if name in values}, refresh=False)
            bar.update()
            if _due(config.output.save_every, state.step):
                train_state.save(Path(config.run), state, config)
                metrics.plot(Path(config.run))
    return state


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _step(config: TrainConfig, text: Text, state: TrainState, loss: step.Loss, update: step.Update) -> dict[str, float]:
    """One update, in place; what is known about it as numbers."""
    device, begin = state.optimizer.step.device, time.perf_counter()
    batches = [_to(data.batch(text.training, i, config.seed), device) for i in _indices(config, state.step)]
    params = step.working(state.model.params, config, state.model.config)
    gradients, total, parts = step.gradients(loss, params, batches)
    del params
    lr = optim.learning_rate(state.step, config.steps, config.optimizer)
    norm = update(named_leaves(state.model.params), gradients, state.optimizer, torch.tensor(lr, device=device))
    # One transfer a step: each would wait for the device.
    numbers = torch.stack([total, norm, *parts]).tolist()
    values = dict(zip(("loss", "grad_norm", *parts._fields), numbers, strict=True))
    if text.bytes_per_token[0]:
        values["bits_per_byte"] = values["cross_entropy"] / math.log(2) / text.bytes_per_token[0]
    tokens = sum(batch.tokens_BT.numel() for batch in batches)
    speed = metrics.speed(tokens, time.perf_counter() - begin, state.model.config, config.seq_len, device)
    return {**values, "lr": lr, **speed}


def _indices(config: TrainConfig, step: int) -> range:
    """The numbers of a step's batches."""
    return range(step * config.accumulate, (step + 1) * config.accumulate)


def _to(batch: Batch, device: torch.device) -> Batch:
    cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device, non_blocking=True)
    return Batch(batch.tokens_BT.to(device, non_blocking=True), cu_seqlens)


def _check_finite(config: TrainConfig, text: Text, state: TrainState, values: dict[str, float]) -> None:
    bad = [f"{name} is {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if not bad:
        return
    rows = "\n".join(data.describe(text.training, i, config.seed) for i in _indices(config, state.step))
    last = next(iter(train_state.complete(Path(config.run))), "none yet")
    raise FloatingPointError(
        f"{' and '.join(bad)} at step {state.step}; nothing of this step is saved; last good checkpoint: {last}\n"
        f"The batch was, in {config.data.source}:\n{rows}"
    )


def _validation(config: TrainConfig, text: Text, state: TrainState, loss: step.Loss) -> dict[str, float]:
    if text.validation is None:
        return {}
    params = step.working(state.model.params, config, state.model.config)
    device = params.embed_tokens.device
    batches = data.validation_batches(text.validation, config.output.validation_batches)
    nats = step.validate(loss, params, (_to(batch, device) for batch in batches))
    values = {"validation_loss": nats}
    if text.bytes_per_token[1]:
        values[BITS] = nats / math.log(2) / text.bytes_per_token[1]
    return values


def _report(config: TrainConfig, text: Text, state: TrainState) -> None:
    """Says where everything is, and lets the model write."""
    run = Path(config.run)
    logger.info("model: %s, curves: %s", run / f"step-{state.step}" / "model", metrics.plot(run))
    measured = [row[BITS] for row in metrics.read(run / "metrics.jsonl") if BITS in row]
    if measured:
        logger.info("validation: %.3f bits per byte", measured[-1])
    s = config.output.sample
    if not s.max_new_tokens or not text.tokenizer:
        return
    prompt = tokenizer.encode(text.tokenizer, [s.prompt])[0]
    ids = generate(
        state.model.params, prompt, config=state.model.config, max_new_tokens=s.max_new_tokens,
        options=Options(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=s.seed),
    )  # fmt: skip
    print(s.prompt, *tokenizer.stream(text.tokenizer, ids), sep="")
