"""Benchmarks that can run at a small size do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from q3n_functional import checkpoint, tokenizer
from tests.servers import CONFIG, TREE, WORDS

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


def test_training_step_measures_transformers_and_itself(tmp_path):
    # Compiling would take longer than this file may: the others' names are checked by the parser alone.
    command = [sys.executable, BENCHMARKS / "training_step.py", "--tiny", "--cases", "0", "--out", tmp_path]
    command += ["--commit", "abc", "--only", "transformers", "q3n eager"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "training_step.json").read_text())
    keys = {"benchmark", "case", "implementation", "metric", "value", "unit", "card", "commit", "versions"}
    assert all(set(row) == keys for row in rows)
    assert {row["case"] for row in rows} == {"4 layers 128 experts 2x4096"}
    found = {(row["implementation"], row["metric"]): row["value"] for row in rows}
    metrics = {"loss", "first_step_s", "step_ms", "with_optimizer_ms"}
    assert set(found) == {(name, metric) for name in ("transformers", "q3n eager") for metric in metrics}
    # On the same weights; drawn separately they differ by 5e-3.
    assert abs(found["transformers", "loss"] - found["q3n eager", "loss"]) < 1e-3


def test_decode_measures_transformers_and_itself(tmp_path):
    command = [sys.executable, BENCHMARKS / "decode.py", "--tiny", "--cases", "0", "5", "--out", tmp_path]
    command += ["--commit", "abc", "--only", "transformers", "q3n eager"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "decode.json").read_text())
    found = {(row["case"], row["implementation"]) for row in rows}
    assert found == {("batch 1", "transformers"), ("batch 1", "q3n eager"), ("drafts 2", "q3n eager")}
    assert not [row for row in rows if row["metric"] == "failure"]
    assert all(row["value"] > 0 for row in rows)


def test_scaling_measures_one_and_two_ranks(tmp_path):
    command = [sys.executable, BENCHMARKS / "scaling.py", "--tiny", "--cases", "1", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "scaling.json").read_text())
    found = {(row["implementation"], row["metric"]): row["value"] for row in rows}
    metrics, one, two = {"first_step_s", "step_ms", "tokens_per_s"}, "q3n one card", "q3n all cards"
    assert set(found) == {(name, metric) for name in (one, two) for metric in metrics} | {(two, "efficiency")}
    assert found[one, "tokens_per_s"] == pytest.approx(2 * 64 / found[one, "step_ms"] * 1e3, rel=1e-3)
    ratio = found[two, "tokens_per_s"] / found[one, "tokens_per_s"] / 2
    assert found[two, "efficiency"] == pytest.approx(ratio, rel=1e-3)


def test_float8_draws_both_curves(tmp_path):
    # The steps are training_step.py's, whose compiling would take longer than this file may.
    command = [sys.executable, BENCHMARKS / "float8.py", "--tiny", "--cases", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "float8.json").read_text())
    found = {(row["case"], row["implementation"], row["metric"]): row["value"] for row in rows}
    names = ("q3n", "q3n float8", "q3n float8 experts")
    assert len(found) == 3 * (10 + 1)
    for end in range(1, 11):
        theirs, *ours = (found[f"tiny step {end}", name, "cross_entropy"] for name in names)
        assert all(abs(loss - theirs) < 0.02 for loss in ours)
    assert len({found["tiny step 10", name, "validation_loss"] for name in names}) == 3
    assert (tmp_path / "float8.png").stat().st_size > 10_000


def test_serve_load_measures_and_finds_nothing_wrong(tmp_path):
    checkpoint.save(tmp_path / "model", TREE, CONFIG, None, checkpoint.Extras({}, tokenizer.files(WORDS)))
    command = [sys.executable, BENCHMARKS / "serve_load.py", tmp_path / "model", "--out", tmp_path, "--tokens", "9"]
    command += ["--streams", "8", "--requests", "24", "--capacity", "4"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = {row["metric"]: row["value"] for row in json.loads((tmp_path / "serve_load.json").read_text())}
    assert (found["wrong_texts"], found["wrong_refusals"], found["left_behind"]) == (0, 0, 0)
    assert found["finished"] + found["left"] == 24
    assert found["finished"] > 12
    assert min(found[name] for name in ("tokens_per_s", "first_token_p50_s", "first_token_p95_s", "between_p50_s")) > 0
