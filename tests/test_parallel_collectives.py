"""What ranks exchange in a step, pinned; and that whole parameters do not outlive the layer that uses them."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from expecttest import assert_expected_inline
from torch.testing._internal.distributed.fake_pg import FakeStore

from q3n_functional import model, step
from q3n_functional.layers import context, on_ranks
from q3n_functional.parallel import mesh, overlap, placement, rules
from tests import runs
from tests.configs import perturbed, small, trainable
from tests.runs import torchrun

GATHER = "all_gather_into_tensor"
VIEWS = ("wait_tensor", "cat", "split", "getitem", "view", "t", "permute", "transpose")


def test_collectives_of_a_step():
    """Columns: forward, backward, update. Two layers and the prediction module, no documents."""
    done = torchrun(2, "tests.count_ranks")
    assert done.returncode == 0, done.stderr
    # All layers' parameters are gathered twice; the head's and the prediction module's are used last and first.
    assert_expected_inline(
        done.stdout,
        """\
dp=2
  all_gather_into_tensor fsdp         47   44    0
  reduce_scatter_tensor  fsdp          0   47    0
  all_reduce             fsdp          0   17    0
  all_reduce             tokens        2    1    0
  all_reduce             world         2    0    1
  kept of what was gathered 2
replicate=2
  all_reduce             replicate     0   64    0
  all_reduce             tokens        2    1    0
  all_reduce             world         2    0    1
tp=2
  all_gather_into_tensor tp            8    7    0
  reduce_scatter_tensor  tp            7    8    0
  all_reduce             tp            4   24    0
  all_reduce             world         2    0    1
tp=2 without sequence
  all_reduce             tp           11   31    0
  all_reduce             world         2    0    1
cp=2
  all_gather_into_tensor cp            6    0    0
  all_gather_into_tensor fsdp         47   44    0
  reduce_scatter_tensor  cp            0    6    0
  reduce_scatter_tensor  fsdp          0   47    0
  all_reduce             fsdp          0   17    0
  all_reduce             tokens        2    1    0
  all_reduce             world         2    0    1
  kept of what was gathered 2
ep=2
  all_reduce             ep_copies     0   55    0
  all_reduce             tokens        2    1    0
  all_reduce             world         2    0    1
  all_to_all_single      ep           15    9    0
""",
    )


@pytest.fixture
def two_ranks():
    """One of two ranks, of which the other is not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def graphs(policy):
    """The compiled graphs of a layer's forward and backward on one of two fsdp ranks."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    config = small(num_hidden_layers=1, layer_types=("full_attention",), num_nextn_predict_layers=0)
    layout = mesh.parse("dp=2")
    places = rules.layouts(config, layout)
    parallel = placement.connect(layout, places, torch.device("cpu"))
    tree = trainable(rules.shard(perturbed(config), places, layout.coordinates(0)))
    tokens = torch.randint(64, (1, 32))
    shared = on_ranks(context(tokens, None, None, config), tokens, parallel, config=config)
    found = []

    def keep(graph, _):
        found.append(graph.graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    layer = torch.compile(model.layer, fullgraph=True, backend=backend)
    x = torch.randn(1, 32, config.hidden_size, requires_grad=True)
    y, _ = layer(tree.layers[0], x, shared, places.layers[0], config=config, recompute=policy)
    y.sum().backward()
    torch._dynamo.reset()
    return found


def gathers(graph):
    return [node for node in graph.nodes if GATHER in str(node.target)]


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, and tells itself
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_compiled_layers_gather_their_parameters_again(policy):
    forward, backward = graphs(policy)
    assert len(gathers(forward)) == 13
    assert len(gathers(backward)) == 13
    (outputs,) = (node.args[0] for node in forward.nodes if node.op == "output")
    whole = set(gathers(forward))
    for node in forward.nodes:
        name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        if name in VIEWS and whole & {n for n in pytree.tree_leaves(node.args) if isinstance(n, torch.fx.Node)}:
            whole.add(node)
    assert len(whole) > 2 * 13
    assert not whole & set(outputs)


class Ordered(Exception):  # noqa: N818  # not an error
    """The order is known, and code for it is not needed."""


SIGNS = {"all_gather_into": "G", "reduce_scatter": "S", "q3n.attention": "C", ".mm": "C", "all_reduce": ""}


def letter(node):
    """Of a scheduled operation: G gathers, S sums and scatters, g and s wait for that, C computes; "" for others."""
    told = f"{getattr(node, 'op_overload', '')} {getattr(node, 'python_kernel_name', '')}"
    waits = "wait_tensor" in told
    found = next((sign for name, sign in SIGNS.items() if name in (str(node.inputs) if waits else told)), "")
    return found.lower() if waits else found


def orders():
    """Of the forward and the backward graph of a model of two layers on one of two fsdp ranks: as it was, and is."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor import config as inductor
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    config = small(
        num_hidden_layers=2, layer_types=("full_attention",) * 2, num_experts=0, intermediate_size=24,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    layout = mesh.parse("dp=2")
    places = rules.layouts(config, layout)
    parallel = placement.connect(layout, places, torch.device("cpu"))
    tree = trainable(rules.shard(perturbed(config), places, layout.coordinates(0)))
    found = []

    def note(nodes):
        found.append("".join(letter(node.node) for node in nodes))
        return nodes

    def end(nodes):
        raise Ordered

    # Estimates are for cards; here what computes takes as long as what is sent.
    options = {**overlap.OPTIONS, "estimate_op_runtime": lambda node: float(bool(letter(node.node)))}
    options["reorder_for_compute_comm_overlap_passes"] = [
        note,
        *options["reorder_for_compute_comm_overlap_passes"],
        note,
        end,
    ]

    def schedule(graph, inputs):
        with inductor.patch(options), pytest.raises(Exception, match="Ordered"):
            compile_fx_inner(graph, inputs)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=schedule, bw_compiler=schedule, decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    loss = torch.compile(partial(model.loss, parallel=parallel, config=config), fullgraph=True, backend=backend)
    loss(tree, torch.randint(64, (1, 32)))[0].backward()
    torch._dynamo.reset()
    return found


def indices(order, sign):
    return [place for place, found in enumerate(order) if found == sign]


def behind(order, sign):
    """How many of the collectives have something computed before they are waited for."""
    pairs = zip(indices(order, sign), indices(order, sign.lower()), strict=True)
    return sum("C" in order[sent:waited] for sent, waited in pairs)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_shards_come_and_gradients_go_while_blocks_compute():
    written, forward, also_written, backward = orders()
    assert behind(written, "G") == behind(also_written, "G") == behind(also_written, "S") == 0
    # A block has 8 matrices and, with attention, 8 products; before the first comes the embedding, behind all the head.
    for order in (written, forward):
        assert len(indices(order, "G")) == 1 + 8 + 8 + 1
        assert len(indices(order, "C")) == 8 + 8
    first, last = indices(forward, "G")[1 + 8], indices(forward, "C")[7]
    assert first < last
    assert behind(forward, "G") >= 8 + 8
    # One at a time: the model is not gathered at the start.
    assert all(forward[:end].count("G") - forward[:end].count("g") <= 1 for end in range(len(forward)))
    assert behind(backward, "G") >= 8
    assert behind(backward, "S") >= 8, backward


ORDERED = pytest.mark.skipif(not overlap.SOUND, reason="this torch orders it wrongly")


@pytest.mark.parametrize(
    ("mode", "asked", "options"),
    [
        pytest.param("model", ["--overlap"], (False, True, {"options": overlap.OPTIONS}), marks=ORDERED),
        ("model", ["--no-overlap"], (False, True, {})),
        ("layers", ["--overlap"], (True, True, {})),
        ("layers", ["--overlap", "--no-reshard-after-forward"], (True, False, {})),
        ("layers", ["--no-overlap"], (False, True, {})),
    ],
)
def test_training_is_compiled_in_that_order_where_asked(tmp_path, monkeypatch, mode, asked, options):
    monkeypatch.setattr(step, "missing_compiler", lambda device: None)
    monkeypatch.setattr(step.compiled, "compiled", lambda loss, mode, *found, **options: (*found, options))
    settings = runs.config(tmp_path, f"--compile={mode}", "--mesh.dp=2", *asked)
    assert step.functions(settings, settings.model, torch.device("cpu"))[0] == options
