"""Checkpoints that are complete or absent."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from q3n_functional import train_state
from tests import runs
from tests.runs import run

DIE = """
import os, sys
from q3n_functional import train, train_config, train_state
name, nth, calls = sys.argv[1], int(sys.argv[2]), []
original = getattr(train_state, name)
def dying(*arguments):
    calls.append(arguments)
    if len(calls) == nth:
        os.kill(os.getpid(), 9)
    return original(*arguments)
setattr(train_state, name, dying)
train.train(train_config.parse(sys.argv[3:]))
"""


@pytest.mark.parametrize(("name", "nth"), [("_write_model", 2), ("_keep_newest", 2)])
def test_being_killed_while_saving_leaves_a_checkpoint_to_resume_from(finished, tmp_path, name, nth):
    more = ["--output.save-every=3", "--output.keep=1"]
    killed = subprocess.run([sys.executable, "-c", DIE, name, str(nth), *runs.arguments(tmp_path, *more)], check=False)
    assert killed.returncode == -signal.SIGKILL
    newest = train_state.complete(tmp_path / "run")[0]
    assert newest.name == ("step-6" if name == "_keep_newest" else "step-3")
    run(tmp_path, "--resume", *more)
    assert runs.rows(tmp_path) == runs.rows(finished)
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-10"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble"])
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, damage):
    run(tmp_path, "--output.save-every=5")
    newest = tmp_path / "run/step-10"
    if damage == "truncate":
        os.truncate(newest / "model/model.safetensors", 100)
    elif damage == "remove":
        next((newest / "optimizer").iterdir()).unlink()
    else:
        (newest / "train_state.json").write_text("{")
    assert [p.name for p in train_state.complete(tmp_path / "run")] == ["step-5"]
    run(tmp_path, "--resume", "--output.save-every=5")
    assert runs.rows(tmp_path) == runs.rows(finished)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = runs.config(tmp_path, "--output.save-every=3")
    with pytest.raises(OSError, match=r"step-3 cannot be written \(.*No space left.*\): make room for it, then"):
        runs.interrupt_at(settings, 2, lambda: monkeypatch.setattr(os, "fsync", full))
    assert not list((tmp_path / "run").glob("step-*"))


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, "--output.save-every=2", "--output.keep=3")
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == ["step-10", "step-6", "step-8"]
