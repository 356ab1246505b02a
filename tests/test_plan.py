"""Plans of steps on cards that are not here, held against the steps that are."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

from q3n_functional import cli, flops, params, plan_search
from q3n_functional.config import PRESETS
from q3n_functional.ops import gated_delta_rule, grouped_swiglu
from q3n_functional.parallel import placement
from q3n_functional.parallel.mesh import Mesh, parse
from q3n_functional.parallel.rules import named_layouts
from q3n_functional.plan import BACKEND, plan, run, waited
from q3n_functional.plan_cards import (
    CARDS,
    COPY,
    EXCHANGE,
    LAUNCH,
    LINK,
    NETWORK_ROUND,
    NVLINK_ROUND,
    POINTWISE,
    PRODUCT,
)
from q3n_functional.plan_cost import Link, link, time
from q3n_functional.plan_trace import FUSED, Kernel, Tracker, kernels, memory
from tests import plan_ranks
from tests.plan_ranks import LENGTH, ROWS, settings

H100 = CARDS["h100"]
RESULTS = Path(__file__).parent.parent / "examples" / "benchmarks" / "results" / "grouped_swiglu.json"
LARGE = PRESETS["qwen3_next_80b_a3b"]()


def real(config):
    """The tracker of a real step on one device."""
    torch._dynamo.reset()
    tracker = Tracker()
    tokens = torch.randint(config.model.vocab_size, (config.batch_size, config.seq_len))
    run(config, params.init(config.model, 0), tokens, None, tracker, BACKEND)
    return tracker


@pytest.mark.parametrize(("compiled", "recompute"), [("none", "none"), ("none", "full"), ("layers", "none")])
def test_memory_is_that_of_a_real_step(compiled, recompute):
    config = settings("", recompute, dtype="bfloat16", compile=compiled)
    planned, tracker = plan(config, H100), real(config)
    found = kernels(tracker)
    assert [kernel.name for kernel in planned.kernels] == [kernel.name for kernel in found]
    assert sum(kernel.bytes for kernel in planned.kernels) == pytest.approx(sum(k.bytes for k in found), rel=0.01)
    assert planned.peak == pytest.approx(memory(tracker).sum(0).max(), rel=0.01)


def test_the_tracker_counts_what_python_holds():
    tracker = Tracker()
    with tracker:
        a = torch.ones(1000)
        b = a.mm(a.T) if a.ndim > 1 else a[:, None] @ a[None]
        view = b[0]
        del b
        c = view + 1
        del view
        d = c.sort()[0]
    del a
    sizes = memory(tracker).sum(0)
    # The view keeps the product; what is freed later is there while the next operator runs.
    assert sizes.tolist() == [4e3, 4e3 + 4e6, 8e3 + 4e6, 20e3]
    assert [op.name for op in tracker.ops] == ["ones", "mm", "add", "sort"]
    assert d.numel() == 1000


def test_neighbours_are_one_kernel():
    tracker = Tracker()
    x = torch.ones(256, 256)
    with tracker:
        tracker.own(x, "parameters")
        y = (x.sin() * 2).exp()
        z = y @ y
        del y  # as soon as nothing reads it, but read it was
        w = z.sum(1) + 1
    first, product, last = kernels(tracker)
    size = x.nbytes
    assert (first.name, first.bytes, product.name, product.bytes) == (FUSED, 2 * size, "mm", 2 * size)
    assert (product.flops, last.name, last.bytes) == (2 * 256**3, FUSED, size + w.nbytes)
    # Sine and double never came to memory, nor did the sum.
    assert memory(tracker).sum(0).tolist() == [size, size, 2 * size, 3 * size, 2 * size, 2 * size + w.nbytes]


@pytest.mark.parametrize(("tokens", "experts"), [(8192, 512), (32768, 128)])
def test_memory_of_the_experts_is_what_an_h100_took(tokens, experts):
    rows = json.loads(RESULTS.read_text())
    (measured,) = (
        row["value"] for row in rows
        if (row["case"], row["implementation"], row["metric"]) == (f"{tokens} {experts}", "q3n", "peak_mib")
    )  # fmt: skip
    with FakeTensorMode(), Tracker() as tracker:
        x, dy = (torch.empty(tokens, 2048, dtype=torch.bfloat16) for _ in range(2))
        chosen, weights = torch.empty(tokens, 10, dtype=torch.int32), torch.empty(tokens, 10)
        shapes = ((experts, 512, 2048), (experts, 512, 2048), (experts, 2048, 512))
        matrices = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        given = sum(leaf.nbytes for leaf in (x, dy, chosen, weights, *matrices))
        inputs = [leaf.requires_grad_() for leaf in (x, weights, *matrices)]
        y = grouped_swiglu(x, chosen, weights, *matrices)
        gradients = torch.autograd.grad(y, inputs, dy)
    kernels(tracker)
    assert len(gradients) == 5
    assert (memory(tracker).sum(0).max() - given) / 2**20 == pytest.approx(measured, rel=0.03)


def test_a_card_keeps_the_inverse_of_the_delta_rule_in_16_bits():
    with FakeTensorMode(), Tracker() as tracker:
        q, v = torch.empty(1, 256, 2, 16, dtype=torch.bfloat16), torch.empty(1, 256, 4, 32, dtype=torch.bfloat16)
        gated_delta_rule(q, q, v, *(torch.empty(1, 256, 4) for _ in range(2)))
    o, state, gates, inverse = (block.bytes for block, _ in tracker.ops[-1].writes)
    assert (o, state, gates, inverse) == (v.nbytes, 4 * 16 * 32 * 4, 4 * 4 * 7 * 64 * 4, 4 * 4 * 64 * 64 * 2)


AHEAD = {"overlap": True}
KEPT = {**AHEAD, "reshard_after_forward": False}
CASES = [
    ("dp=2", "selective", {}), ("tp=2", "none", {}), ("cp=2", "none", {}), ("ep=2", "selective", {}),
    ("dp=2", "none", AHEAD), ("dp=2", "none", KEPT), ("ep=2", "none", AHEAD),
]  # fmt: skip


def test_collectives_and_memory_are_those_of_real_ranks():
    for case, (counts, peak) in zip(CASES, plan_ranks.launch(CASES), strict=True):
        planned = plan(settings(*case[:2], **case[2]), H100)
        names = (kernel.name for kernel in planned.kernels if kernel.group)
        # CommDebugMode does not count those in place.
        assert counts == Counter(name for name in names if name != "all_reduce_coalesced_"), case
        # Real routers send some ranks a little more than others.
        assert planned.peak == pytest.approx(peak, rel=0.03 if "ep" in case[0] else 0.001), case


def test_operations_are_those_of_model_flops():
    config = settings("", dtype="bfloat16")
    expected = flops.flops_per_token(config.model, LENGTH) * ROWS * LENGTH
    once = sum(kernel.flops for kernel in plan(config, H100).kernels)
    # Router statistics of padded tokens are a product too.
    assert once == pytest.approx(expected, rel=0.01)
    again = sum(kernel.flops for kernel in plan(replace(config, recompute="full"), H100).kernels)
    assert 1.2 * once < again < 4 / 3 * once
    shared = plan(settings("tp=2", dtype="bfloat16"), H100)
    # Router, shared gate and the prediction module's projection are done by every rank.
    assert once / 2 < sum(kernel.flops for kernel in shared.kernels) < 0.6 * once


def bytes_of(config):
    """Of a rank's fp32 masters, and of the copies that a step computes with."""
    places = named_layouts(config.model, config.mesh).values()
    masters = sum(where.num_bytes(torch.float32) for where in places)
    return masters, sum(where.num_bytes(torch.bfloat16) for where in places if where.spec.dtype is None)


def test_parameters_are_what_inspect_says():
    config = settings("dp=2,ep=2", dtype="bfloat16")
    budget = plan(config, H100).budget
    masters, copies = bytes_of(config)
    assert budget["parameters"] == masters + copies
    assert budget["optimizer"] == 2 * masters + 4
    halved = replace(config, optimizer=replace(config.optimizer, state_dtype="bfloat16"))
    assert plan(halved, H100).budget["optimizer"] == masters + 4


def kernel(**changes):
    return Kernel(
        **{"name": "mm", "phase": "", "ours": False, "op": 0, "flops": 0.0, "wide": False, "bytes": 0, **changes}
    )


def test_what_a_step_waits_for():
    product, exchange = kernel(), kernel(name="all_reduce", group="tp")
    found = [k._replace(op=n) for n, k in enumerate([exchange, product, exchange, product, product, exchange])]
    lasting = np.array([5.0, 2.0, 4.0, 3.0, 1.0, 6.0])
    at_once = [(1, 0), (3, 2), (6, 5)]
    assert waited(found, lasting, at_once).tolist() == lasting.tolist()
    # The first is under way for 2 before it is waited for, the second begins behind it, and nobody waits for the last.
    assert waited(found, lasting, [(2, 0), (4, 2)]).tolist() == [3, 2, 1, 3, 1, 0]
    assert waited(found, lasting, [(6, 0), (6, 2), (6, 5)]).tolist() == [0, 2, 3, 3, 1, 6]
    other = [found[0], found[1], found[2]._replace(group="ep"), *found[3:]]
    assert waited(other, lasting, [(4, 0), (4, 2)]).tolist() == [0, 2, 1, 3, 1, 0]


def test_overlap_hides_exchanges():
    plain, ahead = (plan(settings("dp=2", dtype="bfloat16", **more), H100) for more in ({}, AHEAD))
    np.testing.assert_allclose(plain.seconds, plain.lasting)
    exchanged = [bool(k.group) for k in ahead.kernels]
    assert ahead.seconds[exchanged].sum() < ahead.lasting[exchanged].sum()
    assert (ahead.seconds <= ahead.lasting * (1 + 1e-6)).all()


def test_time_of_a_kernel():
    assert time(kernel(flops=1e15), H100, None) == (1e15 / (989e12 * PRODUCT), "arithmetic")
    assert time(kernel(flops=1e12, bytes=10**12), H100, None) == (1e12 / (3.35e12 * COPY), "memory")
    assert time(kernel(bytes=10**12), H100, None) == (1e12 / (3.35e12 * POINTWISE), "memory")
    assert time(kernel(bytes=10**12, ours=True), H100, None) == (1e12 / (3.35e12 * COPY), "memory")
    assert time(kernel(bytes=1), H100, None) == (LAUNCH, "launch")
    wide, narrow = (time(kernel(flops=1e12, wide=wide), H100, None)[0] for wide in (True, False))
    assert wide > 10 * narrow


def test_time_of_a_collective():
    mesh = Mesh(dp=8, ep=2, tp=4)
    axes = {"tp": ("tp",), "ep": ("ep",), "fsdp": ("dp", "cp"), "world": ("replicate", "dp", "cp", "ep", "tp")}
    links = {name: link(mesh, spanned, H100) for name, spanned in axes.items()}
    assert links == {
        "tp": Link(4, 4, "NVLink"),
        "ep": Link(2, 2, "NVLink"),
        "fsdp": Link(8, 1, "network"),
        "world": Link(64, 8, "network"),
    }

    def took(name, axis):
        return time(kernel(name=name, size=10**9), H100, links[axis])[0] - EXCHANGE

    assert took("all_gather_into_tensor", "tp") == pytest.approx(2 * NVLINK_ROUND + 0.75e9 / (450e9 * LINK))
    assert took("all_gather_into_tensor", "fsdp") == pytest.approx(3 * NETWORK_ROUND + 0.875e9 / (50e9 * LINK))
    # Eight adapters a host work for one group, as far as NVLink goes along.
    assert took("all_reduce", "world") == pytest.approx(6 * NETWORK_ROUND + 2 * 63 / 64 * 1e9 / (400e9 * LINK))
    assert took("all_to_all_single", "world") == pytest.approx(6 * NETWORK_ROUND + 56 / 64 * 1e9 / (50e9 * LINK))


def test_search_ranks_what_fits():
    config = settings("", dtype="bfloat16")
    small_card = H100._replace(memory=1.7e6, per_host=2)  # too little for the fastest
    found = plan_search.search(config, 4, small_card)
    assert [each.fits for each in found] == sorted((each.fits for each in found), reverse=True)
    fitting = [each.tokens_per_s for each in found if each.fits]
    assert fitting == sorted(fitting, reverse=True)
    assert 0 < len(fitting) < len(found)
    assert all(each.config.mesh.size == 4 and each.config.mesh.tp <= 2 for each in found)
    assert plan(found[0].config, small_card).tokens_per_s == found[0].tokens_per_s
    # Rows enough for four ranks: none need share one.
    assert all(mesh.cp == 1 for mesh in plan_search.meshes(config, 4, H100))
    assert any(mesh.cp == 2 for mesh in plan_search.meshes(replace(config, batch_size=2), 4, H100))
    with pytest.raises(ValueError, match="GiB of each of 4 ranks at least, one H100 SXM has"):
        plan_search.search(replace(config, model=LARGE), 4, H100)
    with pytest.raises(ValueError, match="no mesh of 7 ranks can share 4 rows of 64 tokens"):
        plan_search.search(config, 7, H100)


def test_a_mesh_of_512_holds_the_large_model():
    mesh = parse("dp=32,ep=8,tp=2")
    config = settings("", "full", dtype="bfloat16", mesh=mesh, batch_size=512, seq_len=4096, model=LARGE)
    planned = plan(config, H100)
    assert planned.fits
    assert planned.budget["parameters"] == sum(bytes_of(config))
    assert not planned.peak < plan_search.kept(config, mesh)


def test_what_a_process_with_ranks_is_told(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"torch.distributed is in use in this process: plan in one of its own"):
        plan(settings(""), H100)
    dist.destroy_process_group()


# Dynamo makes an object of the class itself, which torch warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_command(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    options = ["--seq-len", "128", "--recompute", "none", "--picture", str(picture)]
    cli.main(["plan", "tiny", "--mesh", "dp=2,tp=2", *options])
    said = capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    assert said.startswith("dp=2,tp=2: 4 x H100 SXM, 4 x 128 tokens, recompute none\n")
    for part in ("fits in 68.5 of 74.5", "fsdp of 2: all_gather_into_tensor", "gated delta rule", "tokens/s, MFU"):
        assert part in said


def test_mistakes_on_the_command_line(capsys):
    for wrong in (["--mesh", "dp=2", "--search"], [], ["--mesh", "tp=3"], ["--mesh", "dp=2", "--batch-size", "3"]):
        with pytest.raises(SystemExit):
            cli.main(["plan", "tiny", *wrong])
    assert_expected_inline(
        capsys.readouterr().err,
        """\
q3n: give either --mesh, such as dp=4,tp=2, or --search with --gpus
q3n: give either --mesh, such as dp=4,tp=2, or --search with --gpus
q3n: mesh.tp is 3, but vocab_size is 512, not a multiple of it; this model allows tp 1, 2
q3n: a batch has 3 rows, which replicate x dp x ep = 2 ranks cannot share: use a multiple
""",
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--batch-size=-4", r"batch_size is -4, it must be at least 1"),
        ("--seq-len=0", r"seq_len is 0, it must be at least 2"),
        ("--picture=nowhere/plan.png", r"picture nowhere/plan\.png lies in nowhere, which is no folder"),
        ("--picture=plan.xyz", r"picture plan\.xyz must end in one of .*\.png"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(wrong, message, capsys, monkeypatch):
    monkeypatch.setattr(placement, "connect", None)
    with pytest.raises(SystemExit):
        cli.main(["plan", "tiny", "--mesh=dp=2", wrong])
    assert re.search(message, capsys.readouterr().err)
