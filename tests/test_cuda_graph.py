"""A step as a CUDA graph: on the card, and what can be seen of it without one."""

from contextlib import nullcontext

import pytest
import torch
import torch.utils._pytree as pytree
from torch.fx.experimental.proxy_tensor import make_fx

from q3n_functional import cuda_graph, data, optim, prepare, step
from q3n_functional.params import named_leaves
from tests import runs
from tests.test_step import documents_file

STEPS = 5


def case(tmp_path, *more, device="cpu", **shape):
    """A run's configuration, initial state, and inputs of some steps: other documents and learning rates each."""
    options = ("--data.validation-fraction=0", "--accumulate=2", *more)
    config = runs.config(tmp_path, f"--data.source={documents_file(tmp_path)}", *options, **shape)
    text = prepare.text(config, tmp_path, None)
    model = prepare.model(config, None, text.tokenizer, torch.device(device))
    state = prepare.start(config, None, model)
    inputs = []
    for number in range(cuda_graph.WARM_UP + STEPS):
        batches = tuple(data.batch(text.training, 2 * number + i, 0) for i in range(2))
        lr = torch.tensor(optim.learning_rate(number, 20, config.optimizer))
        given = step.Inputs(batches, step.count(batches), lr)
        inputs.append(pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), given))
    assert len({float(x.lr) for x in inputs}) > 3
    assert len({tuple(x.batches[0].cu_seqlens.tolist()) for x in inputs}) == len(inputs)
    return config, state, inputs


def steps(config, state, inputs):
    """What steps return, and all tensors of the state behind them."""
    functions = step.functions(config, state.model.config, inputs[0].lr.device)
    move = step.make_step(*functions, state.model.params, state.optimizer, config, state.model.config)
    found = [move(given) for given in inputs]
    return [*found, *pytree.tree_leaves((state.model.params, state.optimizer))]


def pieces(config, state, inputs):
    """The same of steps put together here."""
    loss, update = step.functions(config, state.model.config, inputs[0].lr.device)
    found = []
    for given in inputs:
        copies = step.working(state.model.params, config, state.model.config)
        gradients, total, parts = step.gradients(loss, copies, given.batches, step.count(given.batches))
        lr = torch.tensor(float(given.lr), device=given.lr.device)
        norm = update(named_leaves(state.model.params), gradients, state.optimizer, lr)
        found.append(torch.stack([total, norm, *parts]))
    assert state.optimizer.step == len(inputs)
    return [*found, *pytree.tree_leaves((state.model.params, state.optimizer))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
@pytest.mark.parametrize("more", [("--compile=layers",), ("--compile=layers", "--optimizer.name=muon"), ()])
def test_replayed_steps_are_the_plain_ones(tmp_path, kind, more):
    # Compiled, the prediction module's gradient of the embedding is summed in the order of arrival; so is dq of flash
    # attention in rows longer than these.
    shape = {"layer_types": ("linear_attention", kind), "num_nextn_predict_layers": 0}
    given = tmp_path, "--dtype=bfloat16", "--cuda-graph", *more
    found = [run(*case(*given, device="cuda", **shape)) for run in (steps, pieces)]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def recorded(stream, pool, run, *arguments):
    """Stands for a CUDA graph: the operators of a call, with its tensors and the host's numbers of that time."""
    # Recording must change nothing.
    copies = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
    graph = make_fx(run)(*copies)
    held = graph(*pytree.tree_map_only(torch.Tensor, torch.clone, arguments))
    return lambda: held.copy_(graph(*arguments))


@pytest.fixture
def without_a_card(monkeypatch):
    """Lets `CapturedStep` work on the CPU: graphs of torch.fx in the place of CUDA's."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(cuda_graph, "_beside", lambda stream, run, *arguments: run(*arguments))
    monkeypatch.setattr(cuda_graph, "_captured", recorded)
    monkeypatch.setattr(cuda_graph, "check_device", lambda device: None)


@pytest.mark.usefixtures("without_a_card")
def test_nothing_of_a_step_but_its_inputs_changes(tmp_path):
    given = tmp_path, "--dtype=bfloat16", "--optimizer.name=muon", "--cuda-graph"
    found = [run(*case(*given)) for run in (steps, pieces)]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("without_a_card")
def test_every_shape_has_its_graph(monkeypatch):
    recordings = []
    monkeypatch.setattr(cuda_graph, "_captured", lambda *a: recordings.append(a) or recorded(*a))

    def run(total, inputs):
        total.add_(inputs[0].sum())
        return total + 0

    total = torch.zeros(())
    move = cuda_graph.CapturedStep(run, total)
    seen, expected = [], 0.0
    for size in (2, 3) * 5:
        expected += size * len(seen)
        seen.append(move((torch.full((size,), float(len(seen))), None)))
        assert seen[-1] == expected
    assert len(recordings) == 2
    assert len({x.data_ptr() for x in seen}) == len(seen)


@pytest.mark.usefixtures("without_a_card")
def test_a_run_with_a_graph_is_the_plain_run(tmp_path):
    folders = [tmp_path / name for name in ("graph", "plain")]
    for folder, options in zip(folders, (("--cuda-graph",), ()), strict=True):
        folder.mkdir()
        more = "--dtype=bfloat16", "--accumulate=2", "--steps=6", "--output.save-every=5", "--output.validate-every=4"
        runs.run(folder, *more, *options)
    for name in ("loss", "grad_norm", "lr"):
        assert runs.rows(folders[0], name) == runs.rows(folders[1], name)
    for number in (5, 6):
        runs.assert_same_weights(*(folder / "run" / f"step-{number}" for folder in folders))


def test_where_there_are_no_graphs_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, the run's is cpu: set cuda_graph to false"):
        runs.run(tmp_path, "--device=cpu", "--dtype=bfloat16", "--cuda-graph")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_recorded_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **options: nullcontext())
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph, set cuda_graph to false: it waits"):
        cuda_graph._captured(None, None, _waits)


def _waits():
    raise RuntimeError("it waits")
