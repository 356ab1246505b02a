"""The pieces of a step: exact sums, precision, and what is compiled."""

import functools
import json
import logging
import sys
from itertools import accumulate, pairwise

import pytest
import torch

from q3n_functional import (
    data,
    metrics,
    model,
    params,
    prepare,
    step,
)
from tests import runs
from tests.configs import trainable
from tests.runs import run

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
    tree = trainable(prepare.model(config, None, text.tokenizer, torch.device("cpu")).params)
    return config, text, tree


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    # The load-balancing loss is of each micro-batch by itself, as everywhere; without it the sum is exact.
    config, text, tree = documents_of(tmp_path, "--batch-size=2", "--z-loss-coef=0.01", router_aux_loss_coef=0.0)
    loss = step.make_loss(config, config.model)
    small_batches = [data.batch(text.training, i, 0) for i in UNEVEN]
    rows = torch.cat([b.tokens_BT for b in small_batches])
    bounds = [b.cu_seqlens + 64 * i for i, b in enumerate(small_batches)]
    large = data.Batch(rows, torch.cat([bounds[0], bounds[1][1:]]))
    assert step.count(small_batches[:1])[0] != step.count(small_batches[1:])[0]
    ours, total, parts = step.gradients(loss, tree, small_batches, step.count(small_batches))
    theirs, expected, expected_parts = step.gradients(loss, tree, [large], step.count([large]))
    torch.testing.assert_close(total, expected)
    for name in ("cross_entropy", "mtp_cross_entropy", "z_loss", "num_targets"):
        torch.testing.assert_close(getattr(parts, name), getattr(expected_parts, name))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0, name


def test_a_packed_batch_is_its_documents_one_by_one(tmp_path):
    config, text, tree = documents_of(tmp_path, router_aux_loss_coef=0.0)
    batch = data.batch(text.training, 1, 0)
    ours, total, _ = step.gradients(step.make_loss(config, config.model), tree, [batch], step.count([batch]))
    counts, flat = step.count([batch]), batch.tokens_BT.flatten()
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
    loss, copies = step.make_loss(config, config.model), step.working(tree, config, config.model)
    gradients, total, _ = step.gradients(loss, copies, batches, step.count(batches))
    full = documents_of(tmp_path)[0]
    _, expected, _ = step.gradients(step.make_loss(full, full.model), tree, batches, step.count(batches))
    assert total.dtype == torch.float32
    assert 0 < abs(total - expected) < 0.05
    wide = {name for name, leaf in params.named_specs(config.model).items() if leaf.dtype}
    for name, gradient in gradients.items():
        assert gradient.dtype == (torch.float32 if name in wide else torch.bfloat16), name
    assert wide


def test_bf16_gradients_of_micro_batches_are_summed_in_fp32(tmp_path):
    config, text, tree = documents_of(tmp_path, "--dtype=bfloat16")
    loss, copies = step.make_loss(config, config.model), step.working(tree, config, config.model)
    batches = [data.batch(text.training, i, 0) for i in UNEVEN]
    sums, _, _ = step.gradients(loss, copies, batches, step.count(batches))
    counts = step.count(batches)
    leaves = list(params.named_leaves(copies).values())
    each = [torch.autograd.grad(loss(copies, *batch, counts)[0], leaves) for batch in batches]
    for (name, total), a, b in zip(sums.items(), *each, strict=True):
        assert total.dtype == torch.float32, name
        assert torch.equal(total, a.float() + b.float()), name


def test_fp32_parameters_are_computed_with_as_they_are(tmp_path):
    config, _, tree = documents_of(tmp_path)
    copies = params.named_leaves(step.working(tree, config, config.model))
    for name, leaf in params.named_leaves(tree).items():
        assert copies[name].data_ptr() == leaf.data_ptr(), name


def test_recomputed_layers_give_the_same_gradients(tmp_path):
    config, text, tree = documents_of(tmp_path)
    recomputed = documents_of(tmp_path, "--recompute=full")[0]
    batches = [data.batch(text.training, 0, 0)]
    counts = step.count(batches)
    ours, theirs = (step.gradients(step.make_loss(c, c.model), tree, batches, counts)[0] for c in (recomputed, config))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("mode", ["layers", "model"])
def test_compiled_steps_and_validations_compile_nothing_twice_and_give_the_eager_numbers(tmp_path, monkeypatch, mode):
    source = documents_file(tmp_path)
    more = (
        f"--data.source={source}",
        "--accumulate=2",
        "--recompute=selective",
        "--output.validate-every=4",
        "--steps=5",
    )
    run(tmp_path, *more, f"--run={tmp_path / 'eager'}")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(step, "missing_compiler", lambda device: None)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(tmp_path, *more, f"--compile={mode}")
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
    config = runs.config(tmp_path, "--compile=layers")
    loss, _ = step.functions(config, config.model, torch.device("cpu"))
    assert not hasattr(loss, "_torchdynamo_orig_callable")
    assert "running eagerly: no compiler (g++ is not there; install one or set $CXX)" in caplog.text
    assert "gcc or clang" in step.missing_compiler(torch.device("cuda"))
    monkeypatch.setenv("CXX", sys.executable)
    assert step.missing_compiler(torch.device("cpu")) is None


def test_devices_that_are_not_here_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no CUDA card here"):
        step.pick_device("cuda")
    for name in ("gpu", "meta", "cuda:x"):
        with pytest.raises(ValueError, match=f"device is '{name}', it must be auto, cpu, cuda or cuda:N"):
            step.pick_device(name)
