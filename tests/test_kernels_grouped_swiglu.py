"""The Triton experts against the reference in float64: in Triton's interpreter here, on the device there."""

import pytest
import torch
from torch import library

from q3n_functional.ops import grouped_swiglu
from q3n_functional.ops.grouped_swiglu import _backward as reference_backward
from q3n_functional.ops.grouped_swiglu import _forward as reference_forward
from tests.device import DEVICE, INTERPRETED, ON_DEVICE

pytestmark = ON_DEVICE

CASES = {
    "several tiles": {},
    "no TMA": {"tma": False},
    "ragged widths": {"width": 40, "inner": 24},
    "odd widths": {"width": 21, "inner": 11},
    "narrower than a tile": {"width": 8, "inner": 8},
    "one token": {"tokens": 1, "experts": 24},
    "fewer slots than experts": {"tokens": 7, "experts": 24},
    "one expert": {"experts": 1, "per_token": 1},
    "one expert takes all": {"only": 3},
    "the same expert twice": {"only": 3, "per_token": 2},
    "one a token": {"per_token": 1},
    "a whole tile and one more": {"tokens": 17, "per_token": 1, "only": 0},
    "no tokens": {"tokens": 0},
    "no experts chosen": {"per_token": 0},
    "columns in slices": {"width": 64, "scratch": 1},
    "slices that do not divide the width": {"width": 40, "scratch": 2 * 16 * 20 * 3 * 4},
    "fp16": {"dtype": torch.float16},
    "fp16, no TMA, ragged": {"dtype": torch.float16, "tma": False, "width": 40, "inner": 24},
    "routing weights in the inputs' dtype": {"dtype": torch.float16, "weights_dtype": torch.float16},
    "int32 experts": {"index": torch.int32},
    "strided": {"strided": True},
    "strided, ragged": {"strided": True, "width": 21, "inner": 11},
    "expanded gradient": {"expanded": True},
    "rows of tokens": {"shared": 9, "per_token": 1},
    "rows of tokens, two a row": {"shared": 6, "per_token": 2, "strided": True},
    "rows of tokens, columns in slices": {"shared": 7, "per_token": 1, "width": 64, "scratch": 1},
    "rows of no token": {"shared": 5, "tokens": 0},
}
if not INTERPRETED:  # whose dots cannot take bf16
    CASES |= {f"{name}, bf16": {"dtype": torch.bfloat16, **options} for name, options in CASES.items()}
BOUNDS = {torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 8e-3}
NAMES = ("y", "hidden", "dx", "dweights", "dgate", "dup", "ddown")
FAST = torch.float16 if INTERPRETED else torch.bfloat16


def kernels():
    from q3n_functional.ops.kernels import grouped_swiglu

    return grouped_swiglu


def small(tma=True, scratch=2**29, **_):
    """A configuration of tiles so small that several of each come up."""
    tile = kernels().Tile(16, 16, 16, 1, 2)
    return kernels().Config(tile, tile, tile, tile, tile, tma=tma, scratch=scratch)


def build(
    tokens=20, experts=5, per_token=3, width=32, inner=32, dtype=torch.float32, weights_dtype=torch.float32,
    index=torch.int64, only=None, strided=False, expanded=False, shared=None, **_,
):  # fmt: skip
    """(dy, x, experts, weights, gate, up, down, rows); with three experts or more the second has no tokens.

    Of `shared` tokens the second and the last have no rows, the third has half of them.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    scores = torch.rand(tokens, experts, generator=generator)
    if experts > max(per_token, 2):
        scores[:, 1] = -1
    chosen = scores.topk(per_token).indices if only is None else torch.full((tokens, per_token), only)
    tensors = [
        random(tokens, width),
        random(tokens, width),
        chosen.to(DEVICE, index),
        torch.rand(tokens, per_token, generator=generator).to(DEVICE, weights_dtype),
        *(random(experts, inner, width, scale=width**-0.5) for _ in range(2)),
        random(experts, width, inner, scale=inner**-0.5),
    ]
    if strided:
        tensors = [torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in tensors]
        tensors[1] = torch.cat([random(tokens, 3), tensors[1], random(tokens, 2)], 1)[:, 3:-2]
        tensors[6] = tensors[6].mT.contiguous().mT
    if expanded:
        tensors[0] = random(1, 1).expand(tokens, width)
    if shared is None:
        return [*tensors, None]
    rows = torch.arange(tokens) % (shared - 1)
    rows[rows == 1], rows[::2] = 0, 2
    return [random(shared, width), random(shared, width), *tensors[2:], rows.sort().values.to(DEVICE, torch.int32)]


def poisoned(function, *args):
    """`function` with NaN in all memory that it allocates."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        return function(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def outputs(inputs, config=None):
    dy, x, _, weights, *rest = inputs
    y, *saved = poisoned(kernels().forward, *inputs[1:], config)
    gradients = poisoned(kernels().backward, dy, x, weights, *saved, *rest, config)
    return dict(zip(NAMES, (y, saved[0], *gradients), strict=True)), saved[1:]


def expected(inputs):
    *tensors, rows = inputs
    dy, x, experts, weights, *matrices = (t.double() if t.is_floating_point() else t for t in tensors)
    y, *saved = reference_forward(x, experts, weights, *matrices, rows)
    gradients = reference_backward(dy, x, weights, *saved, *matrices, rows)
    return dict(zip(NAMES, (y, saved[0], *gradients), strict=True)), saved[1:]


def assert_matches(found, wanted, dtype):
    """By the error's norm relative to the reference's."""
    (actual, places), (exact, true_places) = found, wanted
    for place, true in zip(places, true_places, strict=True):
        assert torch.equal(place, true)
    for name, value in actual.items():
        assert value.shape == exact[name].shape, name
        assert value.is_contiguous(), name
        error = (value.double() - exact[name]).norm().nan_to_num(float("inf"))
        assert error <= BOUNDS[dtype] * exact[name].norm(), name


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_the_reference(options):
    inputs = build(**options)
    found = outputs(inputs, small(**options))
    assert_matches(found, expected(inputs), inputs[1].dtype)
    dtypes = [t.dtype for t in (inputs[1], inputs[1], *inputs[1:2], *inputs[3:7])]
    assert [value.dtype for value in found[0].values()] == dtypes


@pytest.mark.parametrize("dtype", [torch.float32, FAST], ids=str)
def test_default_configurations(dtype):
    """Those for few, some and many rows an expert."""
    for tokens in (4, 20) if INTERPRETED else (4, 60, 400):
        inputs = build(tokens=tokens, experts=3, per_token=2, width=128, inner=128, dtype=dtype)
        assert_matches(outputs(inputs), expected(inputs), dtype)


@pytest.mark.skipif(INTERPRETED, reason="takes minutes")
@pytest.mark.parametrize("config", [0, 1, 2])
def test_every_configuration_at_real_widths(config):
    inputs = build(tokens=300, experts=16, per_token=10, width=2048, inner=512, dtype=FAST)
    assert_matches(outputs(inputs, kernels().CONFIGS[config]), expected(inputs), FAST)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(200, 5, 4), (300, 70, 1), (50, 512, 10), (1, 3, 1)])
def test_sorting(tokens, experts, per_token, few, monkeypatch):
    """Across blocks of slots: as torch's stable sort, and every row in exactly one tile of its expert."""
    monkeypatch.setattr(kernels(), "FEW_SLOTS", 1024 if few else 0)
    _, x, chosen, weights, gate, *_ = build(tokens, experts, per_token, width=8, inner=8)
    p = kernels()._problem(x, weights, gate, None, small())
    order, ends, tiles = poisoned(kernels()._sort, p, chosen)
    values, true_order = chosen.flatten().sort(stable=True)
    assert torch.equal(order.long(), true_order)
    assert torch.equal(ends.long(), torch.bincount(values, minlength=experts).cumsum(0))
    assert torch.equal(kernels()._tile_table(p, None, ends), tiles)
    rows = []
    for e, first in tiles.tolist():
        if e >= 0:
            rows += [(e, row) for row in range(first, min(first + 16, int(ends[e])))]
    assert rows == list(zip(values.tolist(), range(p.num_slots), strict=True))


def test_only_experts_with_tokens_are_read():
    inputs = build(tokens=3, experts=9, per_token=2)
    wanted, busy = expected(inputs), torch.zeros(9, dtype=torch.bool).index_fill(0, inputs[2].flatten().cpu(), True)
    for matrices in inputs[4:7]:
        matrices[~busy] = torch.nan
    found = outputs(inputs, small())
    assert_matches(found, wanted, torch.float32)
    for name in ("dgate", "dup", "ddown"):
        assert not found[0][name][~busy].any()


@pytest.mark.parametrize("tma", [False, True])
def test_a_bad_token_spoils_nothing_but_its_own(tma):
    """NaN in one token reaches neither other tokens nor the gradients of experts that it was not sent to."""
    inputs = build(experts=8, per_token=2)
    before, _ = outputs(inputs, small(tma))
    inputs[0][4], inputs[1][4] = torch.nan, torch.nan
    after, _ = outputs(inputs, small(tma))
    others, strangers = torch.arange(20, device=DEVICE) != 4, torch.ones(8, dtype=torch.bool, device=DEVICE)
    strangers[inputs[2][4]] = False
    for name in ("y", "dx", "dweights"):
        assert torch.equal(after[name][others], before[name][others]), name
        assert after[name][4].isnan().all(), name
    for name in ("dgate", "dup", "ddown"):
        assert torch.equal(after[name][strangers], before[name][strangers]), name


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # on a device it is silent
def test_large_gates_neither_overflow_nor_vanish_into_nan():
    inputs = build()
    inputs[4].mul_(1000)
    assert_matches(outputs(inputs, small()), expected(inputs), torch.float32)


def test_repeats_bit_by_bit():
    inputs = build(dtype=FAST)
    (first, _), (second, _) = (outputs(inputs, small()) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_token_has_the_same_bits_in_any_company():
    """So batch and packing do not matter, nor the slices of columns."""
    dy, x, experts, weights, *rest = build(width=48)
    (together, _) = outputs([dy, x, experts, weights, *rest], small())
    (alone, _) = outputs([dy[7:9], x[7:9], experts[7:9], weights[7:9], *rest], small(scratch=1))
    # The interpreter's products are numpy's, in which a row's bits depend on its place, on some CPUs.
    exact = {"rtol": 1e-5, "atol": 1e-6} if INTERPRETED else {"rtol": 0, "atol": 0}
    for name in ("y", "dx", "dweights"):
        torch.testing.assert_close(alone[name], together[name][7:9], **exact, msg=name)


def test_scratch_is_bounded():
    _, x, _, weights, gate, *_ = build(tokens=30, width=256)  # 90 slots
    for limit in (1, 10_000, 30_000, 2**29):
        p = kernels()._problem(x, weights, gate, None, small(scratch=limit))
        slices = kernels()._slices(p, p.config.down, 4)
        assert [b for first, number in slices for b in range(first, first + number)] == list(range(256 // 16))
        assert max(number for _, number in slices) * 16 * 90 * 4 <= max(limit, 16 * 90 * 4)


def test_the_op():
    ops = torch.ops.q3n
    sizes = {"tokens": 5, "experts": 3, "per_token": 2, "width": 16, "inner": 16, "dtype": FAST}
    for shared in (None, 4):
        dy, x, experts, weights, *matrices, rows = build(**sizes, shared=shared)
        leaves = [t.clone().requires_grad_() for t in (x, weights, *matrices)]
        library.opcheck(ops.grouped_swiglu.default, (leaves[0], experts, *leaves[1:], rows, "triton"))
        _, *saved = ops.grouped_swiglu(x, experts, weights, *matrices, rows, "triton")
        library.opcheck(ops.grouped_swiglu_backward.default, (dy, x, weights, *saved, *matrices, rows, "triton"))


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    function = lambda *inputs: grouped_swiglu(*inputs, impl="triton")  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 9, 20):
            dy, *inputs, _ = build(tokens, experts=3, per_token=2, width=16, inner=16, dtype=FAST)
            leaves = [t.requires_grad_(t.is_floating_point()) for t in inputs]
            found, wanted = (
                (y, *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy))
                for y in (compiled(*leaves), function(*leaves))
            )
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_errors():
    _, x, experts, weights, *matrices, _ = build(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x is torch\.float64: the Triton kernels take bf16, fp16 and fp32"):
        kernels().forward(x, experts, weights, *matrices)
    many = [torch.empty(8193, 1, 1, device=DEVICE) for _ in range(3)]
    with pytest.raises(ValueError, match="8193 experts: the Triton kernels take at most 8192"):
        kernels().forward(x[:, :1].float(), experts, weights, *many)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
def test_in_a_cuda_graph_with_other_routing_and_without_a_wait():
    inputs = build(tokens=100, width=64, inner=64, dtype=FAST)
    outputs(inputs)
    dy, x, experts, weights, *rest = inputs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *saved = kernels().forward(*inputs[1:])
        gradients = kernels().backward(dy, x, weights, *saved, *rest)
    experts.copy_((experts + 2) % 5)
    graph.replay()
    found = dict(zip(NAMES, (y, saved[0], *gradients), strict=True)), saved[1:]
    assert_matches(found, expected(inputs), FAST)


@pytest.mark.skipif(INTERPRETED, reason="14 GiB")
def test_offsets_beyond_32_bits():
    tokens = 300_000
    inputs = build(tokens=8, experts=4, per_token=4, width=256, inner=1024, dtype=FAST)
    dy, x = (torch.cat([t.new_zeros(tokens, 256), t]) for t in inputs[:2])
    experts, weights = inputs[2].repeat(tokens // 8 + 1, 1), inputs[3].repeat(tokens // 8 + 1, 1)
    many, _ = outputs([dy, x, experts, weights, *inputs[4:]], kernels().CONFIGS[2])
    few, _ = outputs(inputs, kernels().CONFIGS[2])
    for name in ("y", "dx", "dweights"):
        torch.testing.assert_close(many[name][-8:], few[name])
    for name in ("dgate", "dup", "ddown"):
        torch.testing.assert_close(many[name], few[name], rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_no_new_compilation_for_other_lengths():
    module = kernels()
    functions = [f for name, f in vars(module).items() if name.endswith("_kernel")]
    counts = []
    for tokens in (20, 33, 64, 17, 1):
        outputs(build(tokens=tokens, dtype=FAST), small())
        counts.append([len(f.device_caches[torch.cuda.current_device()][0]) for f in functions])
    assert counts[0] == counts[-1]
