"""Small models learn what they should: text, what the state must carry, and every parameter of them moves."""

import os
import subprocess
import sys

import pytest
import torch

from q3n_functional import checkpoint, metrics, model, optim, params, prepare, train
from tests import runs
from tests.configs import slower, small, trainable


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learnt")
    more = ("--steps=120", "--batch-size=4", "--seq-len=64", f"--data.source={runs.SHAKESPEARE}")
    config = runs.config(folder, *more, "--output.validation-batches=20", "--output.validate-every=0")
    train.train(config)
    return folder, config


def test_text_is_learnt_beyond_its_letter_counts(learnt):
    folder, config = learnt
    reader = prepare.text(config, folder / "run", folder / "run/step-120").training
    counts = torch.bincount(torch.from_numpy(reader.corpus.ids.astype("int64"))).double()
    shares = counts[counts > 0] / counts.sum()
    unigram = -(shares * shares.log()).sum().item()
    last = metrics.read(folder / "run/metrics.jsonl")[-1]
    assert last["validation_loss"] < unigram - 0.7
    assert last["mtp_cross_entropy"] < unigram - 0.5


def test_every_parameter_moves(learnt):
    folder, config = learnt
    final = params.named_leaves(checkpoint.load(folder / "run/step-120/model").params)
    for name, before in params.named_leaves(params.init(config.model, config.seed)).items():
        assert (final[name] - before).abs().max() > 1e-4, name
        assert final[name].isfinite().all(), name


@pytest.mark.parametrize("mixer", ["linear_attention", "full_attention"])
def test_a_sequence_is_repeated_from_memory(mixer):
    """Eight tokens in random order, twice: what follows a token the second time is what followed it the first time."""
    shape = small(num_hidden_layers=1, layer_types=(mixer,), num_experts=0, intermediate_size=32, vocab_size=16,
                  linear_key_head_dim=16, linear_attention_chunk_size=8, num_nextn_predict_layers=0)  # fmt: skip
    # The decays that transformers starts from forget within a token, and how to remember is then not found.
    tree = trainable(slower(params.init(shape, 0), by=7.0))
    assert loss_after_training(tree, shape, steps=200) < 0.3  # guessing costs log(16) = 2.8


def loss_after_training(tree, shape, steps):
    optimizer = optim.OptimizerConfig(lr=1e-2, warmup_steps=20)
    masters = {name: p.detach() for name, p in params.named_leaves(tree).items()}
    groups, generator = optim.groups(shape, optimizer), torch.Generator().manual_seed(0)
    state = optim.init(masters, groups)
    for step in range(steps):
        once = torch.rand(32, shape.vocab_size, generator=generator).argsort(1)[:, :8]
        labels = torch.cat([torch.full_like(once, -100), once], 1)
        labels[:, 8] = -100  # nothing says which comes first
        loss, _ = model.loss(tree, once.repeat(1, 2), labels_BT=labels, config=shape)
        gradients = torch.autograd.grad(loss, list(params.named_leaves(tree).values()))
        lr = torch.tensor(optim.learning_rate(step, steps, optimizer))
        optim.update_(
            masters, dict(zip(masters, gradients, strict=True)), state, lr, groups=groups, optimizer=optimizer
        )
    return loss.item()


def test_the_example_loop_runs(tmp_path):
    example = runs.SHAKESPEARE.with_name("train_compiled.py")
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, str(example), "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 0: 6.2")
