"""The training loop: the same numbers again, whatever happens in between."""

import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from q3n_functional import checkpoint, data, metrics, model, prepare, train_state
from q3n_functional.train import Stopped
from tests import runs
from tests.runs import assert_same_weights, interrupt_at, run

GOLDEN = Path(__file__).parent / "golden" / "training_losses.txt"


def test_ten_losses_are_the_same_in_every_run_and_those_of_the_golden_file(finished, tmp_path):
    run(tmp_path)
    losses = runs.rows(tmp_path)
    assert losses == runs.rows(finished)  # bit by bit: JSON keeps a float's value
    golden = [float.fromhex(line) for line in GOLDEN.read_text().split()]
    # Another processor sums in another order. A relative 1e-4 is far above that and far below any real change.
    assert losses == pytest.approx(golden, rel=1e-4)


def test_resuming_at_step_five_gives_the_same_ten(finished, tmp_path):
    first = runs.config(tmp_path, "--output.save-every=5")
    with pytest.raises(ZeroDivisionError):
        interrupt_at(first, 7, lambda: 1 / 0)
    assert len(runs.rows(tmp_path)) == 7
    run(tmp_path, "--resume")
    assert runs.rows(tmp_path) == runs.rows(finished)
    assert runs.rows(tmp_path, "step") == list(range(1, 11))
    assert_same_weights(tmp_path / "run/step-10", finished / "run/step-10")


@pytest.mark.parametrize("name", ["muon"])
def test_muon_resumes_too(tmp_path, name):
    more = (f"--optimizer.name={name}", "--steps=4", "--output.save-every=2")
    with pytest.raises(ZeroDivisionError):
        interrupt_at(runs.config(tmp_path, *more), 3, lambda: 1 / 0)
    run(tmp_path, *more, "--resume")
    run(tmp_path, *more, f"--run={tmp_path / 'again'}")
    assert_same_weights(tmp_path / "run/step-4", tmp_path / "again/step-4")


def test_validation_is_in_bits_of_the_texts_bytes(finished):
    config = runs.config(finished)
    text = prepare.text(config, finished / "run", finished / "run/step-10")
    saved = checkpoint.load(finished / "run/step-10/model")
    bits = targets = 0.0
    begin = text.validation.corpus.ids
    windows = [begin[i : i + 32] for i in range(0, len(begin) - 31, 31)]
    windows = torch.tensor([w.tolist() for w in windows[: len(windows) // 2 * 2]])
    with torch.no_grad():
        logits = model.forward(saved.params, windows, config=saved.config)
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])
    bits, targets = -chosen.sum().item() / math.log(2), chosen.numel()
    spelt = text.tokenizer.decode(begin[1 : targets + 1].tolist()).encode()
    measured = [row for row in metrics.read(finished / "run/metrics.jsonl") if "validation_loss" in row]
    assert [row["step"] for row in measured] == [4, 8, 10]
    assert measured[-1]["validation_bits_per_byte"] == pytest.approx(bits / len(spelt), rel=1e-5)


def test_a_run_leaves_metrics_curves_and_a_hugging_face_folder(finished):
    names = {path.name for path in (finished / "run").iterdir()}
    assert names == {"metrics.jsonl", "tensorboard", "loss.png", "tokens.npy", "tokens.json", "step-5", "step-10"}
    assert (finished / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "run/tensorboard").glob("events*"))
    assert {p.name for p in (finished / "run/step-10/model").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert checkpoint.load(finished / "run/step-10/model").config.eos_token_id == 0
    first, last = runs.rows(finished)[0], runs.rows(finished)[-1]
    assert last < first - 0.3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_stops(finished, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"stopped by SIG.*step-4; --resume goes on") as stopped:
        interrupt_at(runs.config(tmp_path), 3, lambda: os.kill(os.getpid(), number))
    assert stopped.value.number == number
    assert signal.getsignal(number) is before
    run(tmp_path, "--resume")
    assert runs.rows(tmp_path) == runs.rows(finished)


def test_the_second_signal_stops_at_once(tmp_path):
    def twice():
        for _ in range(2):  # to this thread, so that the second does not come while the first still waits
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have their background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_at(runs.config(tmp_path), 3, twice)
    finally:
        signal.signal(signal.SIGINT, before)
    assert train_state.complete(tmp_path / "run") == []


def test_a_loss_that_is_not_finite_stops_and_names_everything(tmp_path, monkeypatch):
    write = train_state._write
    # A disk slower than the steps: the checkpoint to name is still being written when the loss is found to be bad.
    monkeypatch.setattr(train_state, "_write", lambda *given: (time.sleep(1), write(*given)))
    more = ("--optimizer.lr=1e30", "--optimizer.clip-norm=inf", "--output.save-every=1", "--accumulate=2")
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, *more, "--optimizer.warmup-steps=0")
    message = str(error.value)
    failed = len(runs.rows(tmp_path))
    last = train_state.complete(tmp_path / "run")[0]
    assert last == tmp_path / f"run/step-{failed}"
    assert f"at step {failed}; nothing of this step is saved; last good checkpoint: {last}\n" in message
    assert "loss is nan" in message or "grad_norm is" in message
    text = prepare.text(runs.config(tmp_path), tmp_path / "run", None)
    for index in (2 * failed, 2 * failed + 1):
        assert data.describe(text.training, index, 0) in message
    assert all(math.isfinite(value) for value in runs.rows(tmp_path))


def test_a_mesh_needs_its_ranks(tmp_path):
    with pytest.raises(
        ValueError, match=r"the mesh \(dp 2\) needs torchrun with hosts x --nproc-per-node = 2, but 1 was launched"
    ):
        run(tmp_path, "--mesh.dp=2")
    assert not (tmp_path / "run").exists()
