"""What a run starts from, and run folders and data that do not fit."""

import json
import logging

import pytest

from q3n_functional import checkpoint, metrics, prepare
from tests import runs
from tests.runs import assert_same_weights, run


def test_a_finished_run_is_not_overwritten(finished):
    with pytest.raises(ValueError, match=r"step-10 exists: add --resume.*another --run"):
        run(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--optimizer.lr=0.02", r"optimizer\.lr was 0\.01 and is now 0\.02"),
        ("--seed=1", "seed was 0 and is now 1"),
        ("--model.no-norm-topk-prob", r"model\.norm_topk_prob was True and is now False"),
        ("--steps=11", r"steps was 10 and is now 11"),
    ],
)
def test_another_configuration_does_not_resume(finished, change, message):
    with pytest.raises(ValueError, match=rf"step-10 cannot be resumed: {message}; change it back.*--init-from"):
        run(finished, "--resume", change)


def test_another_text_does_not_resume(tmp_path):
    state = run(tmp_path, "--steps=1") / "train_state.json"
    (tmp_path / "play.txt").write_text("another text " * 999)
    with pytest.raises(ValueError, match=r"step-1 cannot be resumed: .*play\.txt is not what it was.*--init-from"):
        run(tmp_path, "--steps=1", "--resume")
    older = {name: value for name, value in json.loads(state.read_text()).items() if name != "source"}
    state.write_text(json.dumps(older))
    run(tmp_path, "--steps=1", "--resume")


def test_resuming_a_finished_run_trains_no_further(finished):
    before = (finished / "run/metrics.jsonl").read_bytes()
    run(finished, "--resume", "--output.validate-every=7")
    assert (finished / "run/metrics.jsonl").read_bytes() == before


def test_resuming_nothing_starts(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, "--resume", "--steps=1")
    assert "no complete checkpoint: starting at step 0" in caplog.text


def test_init_from_takes_a_run(finished, tmp_path):
    words = f"--data.tokenizer={finished / 'run/step-10/model/tokenizer.json'}"
    run(tmp_path, f"--init-from={finished / 'run'}", words, "--steps=1", "--optimizer.lr=0")
    assert_same_weights(tmp_path / "run/step-1", finished / "run/step-10")


def test_init_from_continues_the_weights_with_changed_options(finished, tmp_path):
    folder = finished / "run/step-10/model"
    more = (f"--init-from={folder}", f"--data.tokenizer={folder / 'tokenizer.json'}", "--steps=1")
    run(tmp_path, *more, "--model.router-aux-loss-coef=0.5", "--optimizer.lr=0")
    assert_same_weights(tmp_path / "run/step-1", finished / "run/step-10")
    assert checkpoint.load(tmp_path / "run/step-1/model").config.router_aux_loss_coef == 0.5
    with pytest.raises(ValueError, match=r"init_from .* has another .* than model\.hidden_size"):
        run(tmp_path, *more, "--model.hidden-size=48", f"--run={tmp_path / 'other'}")
    with pytest.raises(ValueError, match=r"data\.tokenizer is 'bpe' with init_from.*tokenizer\.json"):
        run(tmp_path, f"--init-from={folder}", f"--run={tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.source=nowhere.txt", r"data\.source nowhere\.txt does not exist"),
        ("--data.source={folder}/config.json", r"must end in \.txt, \.jsonl or \.npy"),
        ("--data.tokenizer=none", r"data\.tokenizer is 'none' with .*play\.txt"),
        ("--data.tokenizer=byte --model.vocab-size=256", r"data\.tokenizer has 257 tokens, model\.vocab_size is 256"),
        ("--seq-len=4000", r"validation part has \d+ tokens, one batch of 2 rows x 4000 needs 8000"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path, change, message):
    changes = [word.format(folder=tmp_path) for word in change.split()]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *changes)
    assert not list(tmp_path.glob("run/step-*"))


def test_a_run_in_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    for name in ("run", "run/x"):
        with pytest.raises(ValueError, match=rf"run .*/{name} cannot be made .*: choose another --run"):
            run(tmp_path, f"--run={tmp_path / name}")


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "play.txt").write_text("")
    with pytest.raises(ValueError, match="holds no tokens: is its source empty"):
        run(tmp_path, "--data.tokenizer=byte")


def test_token_ids_train_without_a_tokenizer(tmp_path):
    config = runs.config(tmp_path)
    prepare.text(config, tmp_path, None)
    more = (f"--data.source={tmp_path / 'tokens.npy'}", "--steps=2")
    with pytest.raises(ValueError, match=r"data\.tokenizer is 'bpe' with .*tokens\.npy"):
        run(tmp_path, *more)
    run(tmp_path, *more, "--data.tokenizer=none")
    assert "bits_per_byte" not in metrics.read(tmp_path / "run/metrics.jsonl")[-1]
    assert metrics.read(tmp_path / "run/metrics.jsonl")[-1]["validation_loss"] > 0
