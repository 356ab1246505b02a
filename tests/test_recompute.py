"""What layers keep for backward: the same gradients for less memory, and compiled code that obeys."""

import functools
from collections import Counter

import pytest
import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from q3n_functional.model import loss
from q3n_functional.packing import documents
from q3n_functional.params import named_leaves
from tests.configs import perturbed, slower, small, trainable

SHALLOW = {"num_hidden_layers": 2, "layer_types": ("linear_attention", "full_attention")}
COSTLY = ("gated_delta_rule", "attention", "grouped_swiglu", "router_logits", "top_experts")
CHEAP = "causal_conv"
POLICIES = ("none", "selective", "full")


def case(**changes):
    config = small(**{**SHALLOW, **changes})
    tokens = torch.randint(64, (1, 96), generator=torch.Generator().manual_seed(0))
    packed = documents(torch.tensor([0, 40, 41, 90], dtype=torch.int32), 1, 96)
    return trainable(slower(perturbed(config))), functools.partial(loss, config=config), tokens, packed


def gradients(value, tree):
    leaves = named_leaves(tree)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"linear_attention_use_recurrent": True}])
def test_every_policy_gives_the_same_bits(changes):
    tree, function, tokens, packed = case(**changes)
    results = []
    for policy in POLICIES:
        value, parts = function(tree, tokens, packed, recompute=policy)
        results.append([value, *parts, *gradients(value, tree).values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_what_runs_again_eagerly():
    tree, function, tokens, packed = case()
    again = {}
    for policy in POLICIES:
        value, _ = function(tree, tokens, packed, recompute=policy)
        with Calls() as calls:
            gradients(value, tree)
        again[policy] = calls.counts
    # The trunk and the prediction module: one linear layer, two of full attention, three of experts.
    assert [again[policy][CHEAP] for policy in POLICIES] == [0, 1, 1]
    assert [again["full"][name] for name in COSTLY] == [1, 2, 3, 3, 3]
    assert not any(again[policy][name] for policy in ("none", "selective") for name in COSTLY)
    assert again["selective"]["mm"] == again["none"]["mm"] < again["full"]["mm"]


def saved_bytes(run, tree):
    own, saved = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(tree)}, {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(size for pointer, size in saved.items() if pointer not in own)


def test_layers_that_are_recomputed_save_less():
    tree, function, tokens, packed = case(num_hidden_layers=4, layer_types=("linear_attention",) * 4)
    # Selective recomputation keeps its results in the checkpoint's own cache, which these hooks do not see.
    none, full = (
        saved_bytes(lambda p=policy: function(tree, tokens, packed, recompute=p), tree) for policy in ("none", "full")
    )
    assert full < none / 4


def partitioned(function, *inputs):
    """The operators of the compiled gradient, and the bytes that the compiled forward hands over to it."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    found = {}

    def forward(graph, _):
        (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        computed = [n for n in outputs if isinstance(n, torch.fx.Node) and n.op != "placeholder"]
        found["bytes"] = sum(n.meta["val"].nbytes for n in computed if isinstance(n.meta.get("val"), torch.Tensor))
        return make_boxed_func(graph.forward)

    def backward(graph, _):
        names = [n.target._schema.name for n in graph.graph.nodes if hasattr(n.target, "_schema")]
        found["calls"] = Counter(name.partition("::")[2] for name in names)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    value, _ = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    return value, found


def test_compiled_graphs_obey():
    tree, function, tokens, packed = case()
    expected, found = gradients(function(tree, tokens, packed)[0], tree), {}
    for policy in POLICIES:
        value, found[policy] = partitioned(functools.partial(function, recompute=policy), tree, tokens, packed)
        for name, gradient in gradients(value, tree).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    torch._dynamo.reset()
    calls, size = ({policy: each[kind] for policy, each in found.items()} for kind in ("calls", "bytes"))
    assert [calls["full"][name] for name in COSTLY] == [1, 2, 3, 3, 3]
    assert not any(calls[policy][name] for policy in ("none", "selective") for name in COSTLY)
    assert [calls[policy][CHEAP] for policy in POLICIES] == [0, 1, 1]
    assert size["full"] < size["selective"] < size["none"]
