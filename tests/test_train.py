"""The training loop: the same numbers again, whatever happens in between."""

import functools
import json
import logging
import math
import os
import signal
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch

from q3n_functional import (
    checkpoint,
    data,
    metrics,
    model,
    params,
    prepare,
    step,
    train,
    train_config,
    train_state,
)
from q3n_functional.train import Stopped
from tests import runs
from tests.configs import small, trainable

GOLDEN = Path(__file__).parent / "golden" / "training_losses.txt"


def run(folder, *more, **shape):
    return train.train(runs.config(folder, *more, **shape))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of ten steps; tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, "--output.save-every=5", "--output.validate-every=4")
    return folder


def weights(folder):
    return params.named_leaves(checkpoint.load(folder / "model").params)


def assert_same_weights(a, b):
    theirs = weights(b)
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, theirs[name]), name


# the same numbers again


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


def interrupt_at(config, step_number, action):
    """Trains, and calls `action` when the batch of that step is asked for."""
    batch = data.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "batch", lambda r, i, s: (action() if i == step_number else None, batch(r, i, s))[1])
        train.train(config)


# exact gradients

UNEVEN = (0, 3)
"""Batches of `documents_of` with different numbers of targets."""


def documents_file(tmp_path):
    """JSON lines of many lengths."""
    source = tmp_path / "plays.jsonl"
    play = runs.SHAKESPEARE.read_text()
    cuts = list(accumulate([0, 9, 1, 50, 3, 120, 2, 30] * 20))
    source.write_text("".join(json.dumps({"text": play[a:b]}) + "\n" for a, b in pairwise(cuts)))
    return source


def documents_of(tmp_path, *more, **shape):
    """A run's text, parameters and loss over such lines."""
    source = documents_file(tmp_path)
    config = runs.config(tmp_path, f"--data.source={source}", "--data.validation-fraction=0", *more, **shape)
    text = prepare.text(config, tmp_path, None)
    tree = trainable(prepare.start(config, None, text.tokenizer, torch.device("cpu")).model.params)
    return config, text, tree


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    # The load-balancing loss is of each micro-batch by itself, as everywhere; without it the sum is exact.
    config, text, tree = documents_of(tmp_path, "--batch-size=2", "--z-loss-coef=0.01", router_aux_loss_coef=0.0)
    loss = step.make_loss(config, config.model)
    small_batches = [data.batch(text.training, i, 0) for i in UNEVEN]
    rows = torch.cat([b.tokens_BT for b in small_batches])
    bounds = [b.cu_seqlens + 64 * i for i, b in enumerate(small_batches)]
    large = data.Batch(rows, torch.cat([bounds[0], bounds[1][1:]]))
    assert step.count(small_batches[0])[0] != step.count(small_batches[1])[0]
    ours, total, parts = step.gradients(loss, tree, small_batches)
    theirs, expected, expected_parts = step.gradients(loss, tree, [large])
    torch.testing.assert_close(total, expected)
    for name in ("cross_entropy", "mtp_cross_entropy", "z_loss", "num_targets"):
        torch.testing.assert_close(getattr(parts, name), getattr(expected_parts, name))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0, name


def test_a_packed_batch_is_its_documents_one_by_one(tmp_path):
    config, text, tree = documents_of(tmp_path, router_aux_loss_coef=0.0)
    batch = data.batch(text.training, 1, 0)
    ours, total, _ = step.gradients(step.make_loss(config, config.model), tree, [batch])
    counts, flat = step.count(batch), batch.tokens_BT.flatten()
    bounds = sorted(set(batch.cu_seqlens.tolist()))
    assert len(bounds) > 4
    losses = [
        model.loss(tree, flat[None, a:b], num_targets=counts, config=config.model)[0] for a, b in pairwise(bounds)
    ]
    torch.testing.assert_close(total, sum(losses).detach())
    theirs = torch.autograd.grad(sum(losses), list(params.named_leaves(tree).values()))
    for (name, gradient), expected in zip(ours.items(), theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_computes_in_bf16_over_fp32_masters(tmp_path):
    config, text, tree = documents_of(tmp_path, "--dtype=bfloat16")
    batches = [data.batch(text.training, 0, 0)]
    gradients, total, _ = step.gradients(step.make_loss(config, config.model), tree, batches)
    full = documents_of(tmp_path)[0]
    _, expected, _ = step.gradients(step.make_loss(full, full.model), tree, batches)
    assert total.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients.values())
    assert 0 < abs(total - expected) < 0.05


def test_recomputed_layers_give_the_same_gradients(tmp_path):
    config, text, tree = documents_of(tmp_path)
    recomputed = documents_of(tmp_path, "--checkpoint-layers")[0]
    batches = [data.batch(text.training, 0, 0)]
    ours, theirs = (step.gradients(step.make_loss(c, c.model), tree, batches)[0] for c in (recomputed, config))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_compiled_steps_and_validations_are_two_graphs_and_the_eager_numbers(tmp_path, monkeypatch):
    source = documents_file(tmp_path)
    more = (
        f"--data.source={source}",
        "--accumulate=2",
        "--checkpoint-layers",
        "--output.validate-every=4",
        "--steps=5",
    )
    run(tmp_path, *more, f"--run={tmp_path / 'eager'}")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(step, "missing_compiler", lambda device: None)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(tmp_path, *more, "--compile")
    compiled, eager = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("run", "eager"))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "grad_norm", "validation_loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    caplog.set_level(logging.INFO)
    config = runs.config(tmp_path, "--compile")
    loss, _ = step.functions(config, config.model, torch.device("cpu"))
    assert not hasattr(loss, "_torchdynamo_orig_callable")
    assert "running eagerly: no compiler (g++ is not there; install one or set $CXX)" in caplog.text
    assert "gcc or clang" in step.missing_compiler(torch.device("cuda"))
    monkeypatch.setenv("CXX", sys.executable)
    assert step.missing_compiler(torch.device("cpu")) is None


# what is written down


def test_validation_is_in_bits_of_the_texts_bytes(finished):
    config = runs.config(finished)
    text = prepare.text(config, finished / "run", finished / "run/step-10")
    state = train_state.load(finished / "run/step-10", config.optimizer, torch.device("cpu"))
    bits = targets = 0.0
    begin = text.validation.corpus.ids
    windows = [begin[i : i + 32] for i in range(0, len(begin) - 31, 31)]
    windows = torch.tensor([w.tolist() for w in windows[: len(windows) // 2 * 2]])
    with torch.no_grad():
        logits = model.forward(state.model.params, windows, config=state.model.config)
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


def test_what_an_earlier_attempt_wrote_beyond_the_checkpoint_is_dropped(tmp_path):
    with metrics.Log(tmp_path, 0) as log:
        for number in (1, 2, 3):
            log.write(number, {"loss": float(number)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with metrics.Log(tmp_path, 2) as log:
        log.write(3, {"loss": 30.0})
    assert [row["loss"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 30.0]


def test_flops_of_a_token():
    dense = small(num_experts=0, intermediate_size=48, num_nextn_predict_layers=0, num_hidden_layers=2,
                  layer_types=runs.LAYERS, tie_word_embeddings=True)  # fmt: skip
    mlp = 2 * 3 * 32 * 48
    linear = 32 * (16 + 16 + 48 + 48 + 4 + 4) + 4 * (16 + 16 + 48) + 32 * 48
    full = 32 * (64 + 64 + 32 + 32) + 64 * 32
    expected = 2 * (mlp + linear + full + 64 * 32) + 2 * 64 * 100 + 6 * 4 * 8 * 12
    assert metrics.flops_per_token(dense, 100) == 3 * expected
    with_experts = small(num_hidden_layers=1, layer_types=("full_attention",), num_nextn_predict_layers=0)
    one_more = small(num_hidden_layers=1, layer_types=("full_attention",), num_nextn_predict_layers=0,
                     num_experts_per_tok=3)  # fmt: skip
    extra = metrics.flops_per_token(one_more, 8) - metrics.flops_per_token(with_experts, 8)
    assert extra == pytest.approx(3 * 2 * 3 * 32 * 16)


# interruptions


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
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_at(runs.config(tmp_path), 3, twice)
    assert train_state.complete(tmp_path / "run") == []


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


@pytest.mark.parametrize(("name", "nth"), [("save_file", 2), ("_keep_newest", 2)])
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
        (newest / "optimizer.safetensors").unlink()
    else:
        (newest / "train_state.json").write_text("{")
    assert [p.name for p in train_state.complete(tmp_path / "run")] == ["step-5"]
    run(tmp_path, "--resume", "--output.save-every=5")
    assert runs.rows(tmp_path) == runs.rows(finished)


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, "--output.save-every=2", "--output.keep=3")
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == ["step-10", "step-6", "step-8"]


def test_a_loss_that_is_not_finite_stops_and_names_everything(tmp_path):
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


# a run folder and a configuration that do not fit


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


def test_resuming_a_finished_run_trains_no_further(finished):
    before = (finished / "run/metrics.jsonl").read_bytes()
    run(finished, "--resume", "--output.validate-every=7")
    assert (finished / "run/metrics.jsonl").read_bytes() == before


def test_resuming_nothing_starts(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, "--resume", "--steps=1")
    assert "no complete checkpoint: starting at step 0" in caplog.text


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


# the configuration


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("stpes = 3", r"unknown key stpes: did you mean steps\?"),
        ("[optimizer]\nlearning_rate = 3", r"unknown key optimizer\.learning_rate: known are beta1"),
        (
            "[model.rope_parameters]\nrope_thetta = 1.0",
            r"unknown key model\.rope_parameters\.rope_thetta: did you",
        ),
        ("optimizer = 3", r"optimizer is 3, it must be a table"),
        ("[steps]\na = 3", r"steps is .*, it must be a value"),
        ("steps = ", r"run\.toml is not TOML"),
        ("steps = 0", r"steps is 0, it must be at least 1"),
        ("[data]\nvalidation_fraction = 1.0", r"validation_fraction is 1\.0, it must be in \[0, 1\)"),
        ("preset = 'huge'", r"preset is 'huge': neither a file nor one of qwen3_next_80b_a3b, tiny"),
        ("seed = 4294967296", r"seed is 4294967296"),
    ],
)
def test_toml_files_are_strict(tmp_path, toml, message):
    needed = {"run": '"r"', "steps": "1", "batch_size": "1", "seq_len": "8"}
    head = "".join(f"{key} = {value}\n" for key, value in needed.items() if key not in toml)
    path = tmp_path / "run.toml"
    path.write_text(head + (toml if toml.startswith("[data]") else toml + "\n[data]") + '\nsource = "a.txt"\n')
    with pytest.raises(ValueError, match=message):
        train_config.parse([str(path)])


def test_a_value_of_the_wrong_type_ends_with_the_options_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        train_config.parse(["--run=r", "--steps=many", "--batch-size=1", "--seq-len=8", "--data.source=a.txt"])
    assert "--steps" in capsys.readouterr().err


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'run = "r"\nsteps = 5\nbatch_size = 1\nseq_len = 8\ncompile = false\n'
        '[data]\nsource = "a.txt"\n[model]\nhidden_size = 64\nmlp_only_layers = [1, 2]\nnorm_topk_prob = false\n'
        "eos_token_id = 3\nintermediate_size = 8\n"
    )
    config = train_config.parse([str(path), "--steps", "7", "--model.hidden-size=32", "--optimizer.name=muon"])
    assert (config.steps, config.model.hidden_size, config.compile) == (7, 32, False)
    assert config.model.mlp_only_layers == (1, 2)
    assert config.model.norm_topk_prob is False
    assert config.model.eos_token_id == 3
    assert config.optimizer.name == "muon"
    assert config.model.num_experts == train_config.PRESETS["tiny"]().num_experts
