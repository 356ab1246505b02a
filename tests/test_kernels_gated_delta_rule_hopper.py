"""The Hopper kernels of the gated delta rule against the float64 recurrence and the plain kernels, on the device."""

import pytest
import torch

from tests.test_kernels_gated_delta_rule import (
    BOUNDS,
    GATES,
    assert_matches,
    build,
    expected,
    kernel_outputs,
    kernels,
    nan_memory,  # noqa: F401  # used by every test here too
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the kernels are for Hopper"
    ),
]

DOCUMENTS = {"documents": [0, 0, 64, 129, 129, 130, 200, 392], "length": 400}
CASES = {
    "one token": {"length": 1, **GATES},
    "less than a chunk": {"length": 63, "batch": 2, **GATES},
    "whole chunks": {"length": 256, **GATES},
    "a chunk and one": {"length": 65, "batch": 3, **GATES},
    "nothing fused": {"batch": 2, "length": 200},
    "no states": {"length": 200, "state": False, "d_state": False, **GATES},
    "only the final state is used": {"length": 70, "d_out": False, **GATES},  # longer, and fp16 runs out of exponents
    "documents": {**DOCUMENTS, **GATES},
    "documents over rows": {**DOCUMENTS, "batch": 2, "length": 200, "beta_scale": 2.0, "l2norm": True},
    "documents, no states": {**DOCUMENTS, "state": False, "d_state": False},
    "nothing but a tail": {"documents": [0, 0, 0], "length": 20, **GATES},
    "equal heads": {"heads": 2, "key_heads": 2, "length": 130, **GATES},
    "three value heads a key head": {"heads": 3, "length": 130, **GATES},
    "overwhelming decay": {"decay": 80.0, "length": 130, "l2norm": True},
    "alike keys, beta to 2": {"alike": 3.0, "length": 130, **GATES, "beta_scale": 2.0},
    "strided": {"strided": True, "batch": 2, "length": 130, **GATES},
    "expanded gradient": {"expanded": True, "length": 130, **GATES},
    "many chunks": {"length": 64 * 20 + 7, **GATES},
}
HALF = [torch.bfloat16, torch.float16]


def hopper():
    from q3n_functional.ops.kernels import gated_delta_rule_hopper

    return gated_delta_rule_hopper


def case(dtype=torch.bfloat16, **options):
    return build(**{"key_dim": 128, "value_dim": 128, "chunk_size": 64, "dtype": dtype} | options)


def poisoned(x, *args, **kwargs):
    """An output that a kernel writes wholly or, for the rows that belong to no document, not at all."""
    return torch.full_like(x, float("nan"), *args, **kwargs)


@pytest.fixture
def through_hopper(monkeypatch):
    """The names of the launches that go through the kernels under test."""
    calls = []

    def counted(module, name):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (calls.append(name), launch(*args)))

    for name in ("launch_scan", "launch_reverse_scan"):
        counted(hopper(), name)
    counted(kernels(), "launch_gradients")
    return calls


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_the_recurrence(through_hopper, options, dtype):
    example = case(**options, dtype=dtype)
    loose = 2 if options.get("alike", 0) > 1 else 1  # as in the plain kernels' test
    assert_matches(kernel_outputs(*example), expected(*example), BOUNDS[dtype] * loose)
    assert sorted(through_hopper) == ["launch_gradients", "launch_reverse_scan", "launch_scan", "launch_scan"]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_the_plain_kernels(monkeypatch, options):
    """Tensor for tensor, and NaN where nothing is to be written: no row of another document is touched."""
    (do, d_final), tensors, scalars = case(**options)
    do = torch.zeros_like(tensors[2]) if do is None else do
    module, found = kernels(), {}
    p = module._problem(*tensors[:5], tensors[8], scalars[3])
    initial, config = tensors[7], module._scan_config(p)
    _, _, gates, Y = module.forward(*tensors, *scalars)
    P = torch.empty_like(Y)
    module._launch_chunks(p, tensors[5], tensors[6], gates, Y, P, None, *scalars[:3], False)
    for name in ("hopper", "plain"):
        o, U, Z = (poisoned(tensors[2], memory_format=torch.contiguous_format) for _ in range(3))
        final = torch.full((p.num_sequences, *do.shape[2:3], 128, 128), float("nan"), device=do.device)
        d_initial = final.new_empty(0) if initial is None else poisoned(final)
        h, dh = (torch.empty(p.num_chunks, *do.shape[2:3], 128, 128, dtype=do.dtype, device=do.device) for _ in "ab")
        module._launch_scan(p, config, gates, Y, P, scalars[0], initial, final, o, None)
        module._launch_scan(p, config, gates, Y, None, scalars[0], initial, None, U, h)
        grad = module._flat(do)
        module._launch_reverse_scan(p, config, grad, gates, Y, P, scalars[0], d_final, d_initial, Z, dh, False)
        found[name] = {"o": o, "final": final, "U": U, "h": h, "Z": Z, "dh": dh, "d_initial": d_initial}
        monkeypatch.setattr(hopper(), "serves", lambda *args: False)
    for name, x in found["hopper"].items():
        wanted = found["plain"][name]
        assert torch.equal(x.isnan(), wanted.isnan()), name
        error = (x.nan_to_num().double() - wanted.nan_to_num().double()).norm()
        assert error <= BOUNDS[torch.bfloat16] * wanted.nan_to_num().double().norm(), name


def elsewhere(x):
    """The same numbers four or two bytes behind where memory begins."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("options", ["documents", "a chunk and one"])
def test_arguments_of_another_kind(options):
    """What Triton made of a call serves the next one only where the arguments are of the same kind."""
    grads, tensors, scalars = case(**CASES[options])
    moved = [x if x is None or n < 3 else elsewhere(x) for n, x in enumerate(tensors)]
    narrow = [x.bfloat16() if n in (3, 4) else x for n, x in enumerate(tensors)]
    rounded = [x.bfloat16().float() if n in (3, 4) else x for n, x in enumerate(tensors)]
    wanted, *found = (kernel_outputs(grads, given, scalars) for given in (tensors, moved, narrow, rounded, tensors))
    for name, x in wanted.items():
        assert torch.equal(found[0][name], x), name
        assert torch.equal(found[3][name], x), name
        assert torch.equal(found[1][name], found[2][name].to(found[1][name].dtype)), name


UNIT = {"beta_scale": 1.0, "l2norm": True}
IN_WALKS = {
    **{name: CASES[name] | UNIT for name in ("no states", "documents", "documents, no states", "many chunks")},
    "documents over rows": CASES["documents over rows"] | {"gate": True},
    "walks from the beginning": {"length": 64 * 9, "decay": 0.01, **UNIT},
    "walks of a few chunks": {"length": 64 * 19 + 7, "decay": 0.3, **UNIT},
    "walks of one chunk": {"length": 64 * 9 + 1, "decay": 8.0, **UNIT, "beta_scale": 2.0},
    "walks in rows": {"length": 64 * 9 + 1, "batch": 2, "decay": 0.3, "heads": 3, **UNIT},
}


@pytest.mark.parametrize("options", IN_WALKS.values(), ids=IN_WALKS)
def test_in_walks_side_by_side(through_hopper, monkeypatch, options):
    monkeypatch.setattr(kernels(), "_in_walks", lambda p, scans, gates: kernels().walks(p, 20, gates))
    example = case(**options)
    found = kernel_outputs(*example)
    assert_matches(found, expected(*example), BOUNDS[torch.bfloat16])
    assert sorted(through_hopper) == ["launch_gradients", "launch_reverse_scan", "launch_scan", "launch_scan"]
    for _ in range(3):
        assert all(torch.equal(x, found[name]) for name, x in kernel_outputs(*example).items())


IN_PARTS = {
    **IN_WALKS,
    "documents of slow decay": {"documents": [0, 10, 600, 601], "length": 640, "decay": 0.01, **UNIT},
    "documents of some decay": {"documents": [0, 10, 1400, 1400, 2000], "length": 2010, "decay": 0.3, **UNIT},
    "one document": {"documents": [0, 500], "length": 500, "decay": 0.3, "state": False, "d_state": False, **UNIT},
    "nothing but a tail": CASES["nothing but a tail"],
    "many documents": {
        "documents": [*range(0, 4800, 160)],
        "length": 4800,
        "heads": 8,
        "key_heads": 4,
        "decay": 0.3,
        **UNIT,
    },
    "three rows": {"length": 200, "batch": 3, **GATES},
    "three rows, no states": {"length": 128, "batch": 3, "state": False, "d_state": False, **GATES},
    "two chunks": {"length": 128, **GATES},
    "a chunk and a tail": {"length": 70, **GATES},
}


@pytest.mark.parametrize("options", IN_PARTS.values(), ids=IN_PARTS)
def test_backward_in_two_parts(through_hopper, monkeypatch, options):
    example = case(**options)
    whole = kernel_outputs(*example)
    through_hopper.clear()
    monkeypatch.setattr(kernels(), "STATES_BYTES", 0)
    found = kernel_outputs(*example)
    assert_matches(found, expected(*example), BOUNDS[torch.bfloat16])
    assert through_hopper.count("launch_gradients") == through_hopper.count("launch_reverse_scan") == 2
    if options.get("batch", 1) > 1 and "documents" not in options:
        same = [name for name in found if name not in ("A_log", "dt_bias")]
        assert all(torch.equal(found[name], whole[name]) for name in same)


@pytest.mark.parametrize("options", [{"norm": 1.2, "decay": 0.1}, UNIT, {"documents": [0, 9], **UNIT}], ids=str)
def test_few_heads_are_cut_unless_keys_may_be_long(monkeypatch, options):
    """Such keys can make a state longer, so that no decay is enough to forget it."""
    cuts = []
    monkeypatch.setattr(kernels(), "walks", lambda p, pieces, *rest: cuts.append(pieces) or p)
    kernel_outputs(*case(**{"length": 64 * 96, **options}))
    assert cuts == ([] if "norm" in options else [3, 3])


@pytest.mark.parametrize("batch", [1, 8])
def test_many_heads_and_bits_that_repeat(through_hopper, batch):
    example = case(batch=batch, length=200, heads=32, key_heads=16, **GATES)
    found = kernel_outputs(*example)
    assert_matches(found, expected(*example), BOUNDS[torch.bfloat16])
    for _ in range(10):
        again = kernel_outputs(*example)
        assert all(torch.equal(x, again[name]) for name, x in found.items())


def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(through_hopper):
    _, tensors, scalars = case(batch=3, length=190, **GATES)
    together, states, *_ = kernels().forward(*tensors, *scalars)
    alone = tuple(x if x is None or x.ndim == 1 else x[1:2] for x in tensors)
    o, state, *_ = kernels().forward(*alone, *scalars)
    assert torch.equal(together[1:2], o)
    assert torch.equal(states[1:2], state)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_in_a_cuda_graph_with_other_documents(through_hopper):
    _, tensors, _ = example = case(documents=[0, 7, 7, 130], length=140, **GATES)
    kernel_outputs(*example)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel_outputs(*example)
    tensors[8].copy_(torch.tensor([0, 0, 65, 130]))
    graph.replay()
    assert_matches(captured, expected(*example), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize(
    "options",
    [{"key_dim": 64}, {"value_dim": 64}, {"chunk_size": 32}, {"dtype": torch.float32}, {"length": 0}],
    ids=str,
)
def test_does_not_serve(options):
    _, tensors, scalars = case(**{"length": 100} | options)
    p = kernels()._problem(*tensors[:5], tensors[8], scalars[3])
    assert not hopper().serves(p, p.v)
