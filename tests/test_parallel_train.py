"""`q3n train` under torchrun: one device's losses on any mesh, whatever rank dies when, in float64."""

import re
import subprocess
import sys

import pytest
import torch

from q3n_functional import step, train_state
from tests import runs
from tests.runs import torchrun
from tests.test_step import documents_file

MORE = ("--batch-size=4", "--steps=6", "--output.save-every=2", "--output.validate-every=3", "--optimizer.lr=0.003")
DP_TP = ("--mesh.dp=2", "--mesh.tp=2")
Q3N = "tests.double_rank"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one device, on documents of many lengths."""
    folder = tmp_path_factory.mktemp("alone")
    documents_file(folder)
    # Uninterrupted, in a process of its own, as what makes fp32 float64 lasts.
    subprocess.run([sys.executable, "-m", Q3N, "train", *runs.arguments(folder, *options(folder))], check=True)
    return folder


def options(folder):
    return (*MORE, f"--data.source={folder / 'plays.jsonl'}")


def assert_same_losses(folder, alone):
    assert runs.rows(folder, "step") == list(range(1, 7))
    for name in ("loss", "grad_norm", "mtp_cross_entropy", "aux_loss", "num_targets"):
        assert runs.rows(folder, name) == pytest.approx(runs.rows(alone, name), rel=1e-10), name


def test_a_rank_killed_in_a_step_ends_the_job_and_another_mesh_goes_on(alone, tmp_path):
    given = runs.arguments(tmp_path, *options(alone))
    killed = torchrun(4, Q3N, "train", *given, *DP_TP, die="2:step.gradients:5")
    assert killed.returncode == 1
    lost = r"q3n: rank \d: another rank is gone or silent \(.*; last complete checkpoint: .*step-[24]; --resume goes on"
    assert re.search(lost, killed.stderr), killed.stderr
    assert re.search(r" rank +: 2 .*\n +exitcode +: -9", killed.stderr), killed.stderr
    # The second checkpoint may have been complete by then; the first was before the second began.
    assert train_state.complete(tmp_path / "run")[-1].name == "step-2"
    more = ("--mesh.cp=2", "--resume", "--output.sample.max-new-tokens=5")
    done = torchrun(2, Q3N, "train", *given, *more)
    assert done.returncode == 0, done.stderr
    assert "no sample, as the ranks have parts of the model: q3n generate" in done.stderr
    assert done.stderr.count("resuming from") == 1
    assert_same_losses(tmp_path, alone)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (alone / "run").iterdir()}


def test_a_rank_killed_in_a_checkpoint_leaves_the_one_before_and_restarting_resumes(alone, tmp_path):
    more, die = (*runs.arguments(tmp_path, *options(alone)), "--mesh.tp=2"), "1:train_state._write_model:2"
    done = torchrun(2, Q3N, "train", *more, die=die, restarts=1)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {tmp_path}/run/step-2\n" in done.stderr
    assert_same_losses(tmp_path, alone)


def test_any_layout_reads_what_any_other_wrote_bit_by_bit(tmp_path):
    done = torchrun(4, "tests.checkpoint_ranks", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(step.missing_compiler(torch.device("cpu")) is not None, reason="no compiler")
def test_ranks_agree_and_what_one_launch_compiled_serves_every_rank_of_the_next(tmp_path, monkeypatch):
    """torch 2.13 does not tell the ranks' code apart in its cache, so that the rank must be data."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for times in (r"\d+", r"[1-9]\d*"):
        done = torchrun(2, "tests.launch_ranks", tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(re.findall(rf"rank \d: {times} from the cache", done.stdout)) == 2, done.stdout
