"""Parameters that are sent for ahead: one device's steps, an order that hides exchanges, two parts in memory."""

import gc
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore

from q3n_functional import compiled, model
from q3n_functional.parallel import ahead, mesh, placement, rules
from q3n_functional.params import named_leaves
from tests.configs import perturbed, small, trainable
from tests.parallel_ranks import SHALLOW, Case, launch

LINEAR = {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}
MOVES = ("aten.cat.", "aten.permute.", "aten.t.", "aten.view.", "aten.transpose.")
DENSE = {"num_experts": 0, "intermediate_size": 24}
TWO = [
    ("", Case("dp=2")),
    ("", Case("replicate=2", {**SHALLOW, **DENSE, "tie_word_embeddings": True}, recompute="selective")),
    ("", Case("ep=2", SHALLOW)),
    ("aot_eager", Case("dp=2", LINEAR, recompute="selective")),
    ("inductor", Case("dp=2", {**LINEAR, **DENSE, "num_nextn_predict_layers": 0}, packed=False)),
    ("kept ", Case("dp=2", SHALLOW)),
    ("", Case("dp=2", {**SHALLOW, "vocab_size": 1024, "tie_word_embeddings": True})),
    ("kept ", Case("ep=2", {**SHALLOW, "vocab_size": 1024})),
    ("kept aot_eager", Case("dp=2", LINEAR, recompute="selective")),
]
FOUR = [("", Case("dp=2,tp=2", SHALLOW)), ("", Case("replicate=2,dp=2", SHALLOW, packed=False))]


def cases_of(pairs):
    return [(kind, *case) for kind, case in pairs]


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_steps_equal_one_device(ranks, cases):
    errors = launch(ranks, cases_of(cases), module="tests.ahead_ranks")
    wrong = {str(case): value for case, value in zip(cases, errors, strict=True) if not value < 1e-10}
    assert not wrong


def test_used_in_bf16_they_have_the_gradients_of_those_not_sent_ahead():
    cases = [("narrow", Case("dp=2", SHALLOW)), ("narrow", Case("replicate=2", SHALLOW))]
    assert launch(2, cases_of(cases), module="tests.ahead_ranks") == [0, 0]


@pytest.fixture
def two_ranks():
    """One of two ranks, of which the other is not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class Log:
    """What happens in a step, in order, and which parts' whole parameters are in memory while something is computed."""

    def __init__(self):
        self.events, self.alive, self.gathered, self.flights, self.copies = [], [], [], [], []

    def backend(self):
        """Of torch.compile; what it compiles is noted each time it runs."""

        def compiler(letter, graph, _):
            self.copies += copies(graph.graph)

            def run(*arguments):
                self.events.append(letter)
                self.alive.append(self.whole())
                return graph(*arguments)

            return make_boxed_func(run)

        return aot_autograd(
            fw_compiler=partial(compiler, "F"), bw_compiler=partial(compiler, "B"),
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip

    def told(self):
        return " ".join(self.events)

    def forget(self):
        self.events, self.alive = [], []

    def whole(self):
        """The parts of which whole parameters are in memory."""
        return sorted({number for number, memory in self.gathered if not memory.expired()})


def copies(graph):
    """What a graph gives back that is some of its arguments put together anew."""
    arguments, joined = set(), set()
    for node in graph.nodes:
        inputs, name = set(node.all_input_nodes), str(node.target)
        if node.op == "placeholder":
            arguments.add(node)
        elif node.op == "call_function" and inputs <= arguments | joined and any(op in name for op in MOVES):
            (joined if "cat" in name or inputs & joined else arguments).add(node)
    (outputs,) = (node.args[0] for node in graph.nodes if node.op == "output")
    return [str(node) for node in outputs if node in joined]


@pytest.fixture
def log(monkeypatch):
    """Notes gathers that are sent (G) and waited for (g), and scattered sums of gradients (S)."""
    found, flight = Log(), ahead._Flight
    send_for, arrived, send = flight.send_for, flight.arrived, ahead._send

    def noted_send_for(self, number):
        before = number in self.coming
        send_for(self, number)
        if number in self.coming and not before:
            found.events.append(f"G{number}")
            gathered = [
                x for x, where in zip(self.coming[number], self.parts[number].places, strict=True) if where.dim == 0
            ]
            found.gathered += [(number, StorageWeakRef(x.untyped_storage())) for x in gathered]
            found.flights = [weakref.ref(self)]

    def noted_arrived(self, number):
        found.events.append(f"g{number}")
        return arrived(self, number)

    def noted_send(*arguments):
        found.events.append("S")
        return send(*arguments)

    monkeypatch.setattr(flight, "send_for", noted_send_for)
    monkeypatch.setattr(flight, "arrived", noted_arrived)
    monkeypatch.setattr(ahead, "_send", noted_send)
    return found


def step_of(log, recompute, reshard=True):
    """The loss of one of two fsdp ranks, and its gradients."""
    config = small(num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))
    layout = mesh.parse("dp=2")
    places = rules.layouts(config, layout)
    parallel = placement.connect(layout, places, torch.device("cpu"))
    tree = trainable(rules.shard(perturbed(config), places, layout.coordinates(0)))
    loss = compiled.compiled(model.loss, "layers", True, reshard, backend=log.backend())
    loss = partial(loss, tree, torch.randint(64, (2, 32)), parallel=parallel, config=config, recompute=recompute)
    return lambda: loss()[0], lambda value: torch.autograd.grad(value, list(named_leaves(tree).values()))


@contextmanager
def uncollected(log, recompute, reshard=True):
    """That step, compiled, while nothing but the counts of references frees memory."""
    torch._dynamo.reset()
    loss, gradients = step_of(log, recompute, reshard)
    gradients(loss())  # compiles, which leaves cycles behind
    assert not log.copies
    gc.collect()
    log.forget()
    gc.disable()
    try:
        yield loss, gradients
    finally:
        gc.enable()
        torch._dynamo.reset()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, and tells itself
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_parts_are_sent_for_before_the_one_that_runs_and_are_gone_behind_it(log, recompute):
    with uncollected(log, recompute) as (loss, gradients):
        value = loss()
        # The embedding, two layers, and what is behind them.
        assert log.told() == "G0 G1 g0 G2 g1 F G3 g2 F g3 F"
        assert log.alive == [[1, 2], [2, 3], [3]]
        assert log.whole() == [3]
        log.forget()
        gradients(value)
        assert log.told() == "G2 B S G1 g2 B S g1 B S S"
        assert log.alive == [[2, 3], [1, 2], [1]]
        assert log.whole() == []
        del value
        assert log.flights[0]() is None


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_parts_may_keep_what_was_gathered_for_their_backward(log):
    with uncollected(log, "none", reshard=False) as (loss, gradients):
        value = loss()
        assert log.told() == "G0 G1 g0 G2 g1 F G3 g2 F g3 F"
        assert log.whole() == [1, 2, 3]  # the embedding's gradient needs no table
        log.forget()
        gradients(value)
        assert log.told() == "B S B S B S S"
        assert log.whole() == []
        del value
        assert log.flights[0]() is None
