"""Attention against its definition in float64, query by query; its memory; flash attention on a device."""

import math
from itertools import pairwise

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional.ops import attention
from q3n_functional.ops.attention import (
    BLOCK,
    _cached,
    _flash_backward,
    _flash_forward,
    _plain_backward,
    _plain_forward,
)

# Rows, their length, heads, and offsets.
PACKED = {
    "one stream": (1, 43, (0, 5, 5, 6, 23, 43)),
    "tail of padding": (1, 43, (0, 0, 2, 19, 40, 40, 40)),
    "several rows": (3, 20, (0, 3, 20, 37, 38, 40, 60)),
    "rows of padding": (3, 20, (0, 20, 26)),
    "nothing but padding": (2, 9, (0, 0, 0)),
    "tokens": (4, 1, (0, 1, 2, 2, 3)),
    "longer than a block": (1, 300, (0, 140, 141, 290)),
}
each_pack = pytest.mark.parametrize("case", PACKED)


def draw(batch, length, rows=None, capacity=None, heads=(4, 2), dim=8, dtype=torch.float64, device="cpu"):
    """q, k, v."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, heads[0], dim), *[(rows or batch, capacity or length, heads[1], dim)] * 2]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def offsets(case, device="cpu"):
    return torch.tensor(PACKED[case][2], dtype=torch.int32, device=device)


def packed(case, **options):
    batch, length, _ = PACKED[case]
    return [*draw(batch, length, **options), offsets(case, options.get("device", "cpu")), None]


def seen(q, k, cu_seqlens, lengths):
    """bool [B T, N S]: which keys each query sees, written down."""
    batch, length = q.shape[:2]
    rows, capacity = k.shape[:2]
    mask = torch.zeros(batch * length, rows * capacity, dtype=torch.bool)
    bounds = range(0, batch * length + 1, max(length, 1)) if cu_seqlens is None else cu_seqlens.tolist()
    for n, (start, end) in enumerate(pairwise(bounds)):
        first = start if lengths is None else n * capacity
        before = 0 if lengths is None else int(lengths[n])
        for t in range(end - start):
            mask[start + t, first : first + before + t + 1] = True
    return mask.to(q.device)


def naive(q, k, v, cu_seqlens=None, lengths=None, scale=None):
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    mask, share = seen(q, k, cu_seqlens, lengths), q.shape[2] // k.shape[2]
    flat_k, flat_v = (x.flatten(0, 1).repeat_interleave(share, 1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q.flatten(0, 1), flat_k) * scale
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * mask
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("hts,shk->thk", weights, flat_v).view(q.shape)


def derivatives(function, q, k, v, *where, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves, *where, **options)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o.device, o.dtype)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.shape == e.shape, name
        # The floor is the size of the summands: with one key dq is nought, and here what its sums round to.
        assert (a.double() - e.double()).norm() <= tolerance * max(e.double().norm(), 1), name


@each_pack
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)], ids=str)
def test_packed(case, heads):
    inputs = packed(case, heads=heads)
    assert_close(derivatives(attention, *inputs), derivatives(naive, *inputs), 1e-13)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 200)], ids=str)
def test_rows(shape, scale):
    inputs = draw(*shape)
    assert_close(derivatives(attention, *inputs, scale=scale), derivatives(naive, *inputs, scale=scale), 1e-13)


@pytest.mark.parametrize("length", [1, 5, BLOCK, 2 * BLOCK + 3])
def test_cache(length):
    """Rows that begin at different places, one of them empty before and one full after."""
    inputs, lengths = draw(3, length, capacity=length + 40), torch.tensor([0, 40, 17], dtype=torch.int32)
    inputs[1][0, length:], inputs[2][0, length:] = torch.nan, torch.nan  # not to be read
    numbers = [x.nan_to_num() for x in inputs]
    assert_close(derivatives(attention, *inputs, None, lengths), derivatives(naive, *numbers, None, lengths), 1e-13)


@pytest.mark.parametrize("case", ["one stream", "several rows", "longer than a block", "tokens"])
def test_documents_that_continue_a_cache(case):
    batch, length, bounds = PACKED[case]
    num = len(bounds) - 1
    lengths = torch.tensor([7, 0, 30, 2, 11, 3][:num], dtype=torch.int32)
    where = (offsets(case), lengths)
    inputs = draw(batch, length, num, length + 40)
    assert_close(derivatives(attention, *inputs, *where), derivatives(naive, *inputs, *where), 1e-13)


@each_pack
def test_documents_are_strangers(case):
    """NaN in one document, or behind the last, reaches no other, forward or backward."""
    inputs = packed(case)
    before = derivatives(attention, *inputs)
    bounds = [*PACKED[case][2], PACKED[case][0] * PACKED[case][1]]
    for start, end in pairwise(bounds):
        others = torch.ones(bounds[-1], dtype=torch.bool)
        others[start:end] = False
        poisoned = [x.flatten(0, 1).masked_fill(~others[:, None, None], torch.nan).view(x.shape) for x in inputs[:3]]
        after = derivatives(attention, *poisoned, *inputs[3:])
        for a, b in zip(after, before, strict=True):
            assert torch.equal(a.flatten(0, 1)[others], b.flatten(0, 1)[others])


def between(device="cpu", **options):
    """Columns 8 to 16 of two rows of 24 tokens: offsets of their queries and, with gaps between, of their keys."""
    q, k, v = draw(2, 24, device=device, **options)
    whole = torch.tensor([0, 10, 11, 24, 30, 40, 48], dtype=torch.int32, device=device)
    queries = [0, 2, 2, 3, 3, 8, 8, 8, 8, 16]
    keys = [0, 10, 10, 11, 11, 16, 24, 24, 30, 40]
    return q, k, v, whole, *(torch.tensor(x, dtype=torch.int32, device=device) for x in (queries, keys))


def piece_of(q, k, v, queries, keys, **options):
    """The attention of the whole rows, of which only those columns are computed."""
    return torch.nn.functional.pad(attention(q[:, 8:16], k, v, queries, keys=keys, **options), (0, 0, 0, 0, 8, 8))


def test_queries_and_keys_with_offsets_of_their_own():
    q, k, v, whole, queries, keys = between()
    middle = torch.zeros(24, 1, 1, dtype=q.dtype)
    middle[8:16] = 1
    expected = derivatives(lambda q, k, v: naive(q, k, v, whole) * middle, q, k, v)
    assert_close(derivatives(piece_of, q, k, v, queries, keys), expected, 1e-13)
    with pytest.raises(ValueError, match="beside cu_seqlens of the same shape"):
        attention(q, k, v, queries, keys=keys[1:])


@pytest.mark.parametrize("shape", [(5, 5), (3, 9), (1, 4)], ids=str)
def test_written_out_is_the_same(shape):
    """What runs where torch has no flash attention for CPUs."""
    q, k, v = draw(2, shape[0], capacity=shape[1])
    ours, theirs = (forward(q, k, v, 0.3) for forward in (_plain_forward, _flash_forward))
    do = torch.randn_like(q)
    torch.testing.assert_close(ours, theirs)
    gradients = [f(do, q, k, v, *theirs, 0.3) for f in (_plain_backward, _flash_backward)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("length", [1, 4])
def test_all_rows_at_once_behind_their_caches(length):
    """What runs behind a cache where torch has no flash attention, and nobody may be asked how long it is."""
    inputs, lengths = draw(3, length, capacity=length + 40), torch.tensor([0, 40, 17], dtype=torch.int32)
    expected = naive(*inputs, None, lengths)
    inputs[1][0, length:], inputs[2][0, length:] = torch.nan, torch.nan  # not to be read
    o, lse = _cached(*inputs, lengths, inputs[0].shape[-1] ** -0.5)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-13)
    assert lse.shape == o.shape[:3]
    assert lse.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_precision(dtype, tolerance):
    inputs = packed("longer than a block", dim=32, dtype=dtype)
    actual = derivatives(attention, *inputs)
    assert [x.dtype for x in actual] == [dtype] * 4
    assert_close(actual, derivatives(naive, *[x.double() for x in inputs[:3]], *inputs[3:]), tolerance)


def largest_allocation(run):
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_memory_grows_with_the_length_alone():
    """No [T, T]: the largest tensor is one of the inputs' size, or of a block's mask with a cache."""
    q, k, v = draw(1, 8192, heads=(1, 1), dim=1, dtype=torch.float32)
    cu = torch.tensor([0, 4500, 8000, 8000], dtype=torch.int32)
    assert largest_allocation(lambda: derivatives(attention, q, k, v, cu)) <= 2**20
    before = torch.tensor([192], dtype=torch.int32)
    assert largest_allocation(lambda: attention(q[:, :8000], k, v, None, before)) <= 4 * BLOCK * 8192
    assert largest_allocation(lambda: torch.ones(8192, 8192, dtype=torch.bool)) == 2**26  # what a mask would take


def test_no_recompile_for_lengths_and_document_counts():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, bounds in ((12, (0, 5, 12)), (30, (0, 1, 2, 3, 29)), (17, (0, 17, 17, 17, 17, 17, 17))):
            inputs = [*draw(2, length), torch.tensor(bounds, dtype=torch.int32)]
            assert_close(derivatives(compiled, *inputs), derivatives(attention, *inputs), 0)


def test_no_tokens():
    assert attention(*draw(2, 0)).shape == (2, 0, 4, 8)


def test_errors():
    q, k, v = draw(2, 3)
    cu, lengths = torch.tensor([0, 6]), torch.zeros(2, dtype=torch.int32)
    messages = []
    for arguments in [
        (q[0], k, v), (q, k, v[:, :2]), (q[..., :3], k, v), (q[:, :, :3], k, v), (q.float(), k, v), (q[:, :2], k, v),
        (q, k[:1], v[:1]), (q, k, v, cu), (q, k, v, None, lengths.long()), (q, k, v, cu.int(), lengths),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (all texts are pinned below)
            attention(*arguments)
        messages.append(str(raised.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
q must be [B, T, H, K], k and v [N, S, G, K], got (3, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8)
q must be [B, T, H, K], k and v [N, S, G, K], got (2, 3, 4, 8), (2, 3, 2, 8), (2, 2, 2, 8)
q must be [B, T, H, K], k and v [N, S, G, K], got (2, 3, 4, 3), (2, 3, 2, 8), (2, 3, 2, 8)
3 query heads cannot share 2 key/value heads evenly
q, k and v must share a dtype, got torch.float32, torch.float64 and torch.float64
queries in (2, 2) and keys in (2, 3) differ: with a cache, give lengths
queries in (2, 3) and keys in (1, 3) differ: with a cache, give lengths
cu_seqlens must be int32 [S+1], got torch.int64 (2,)
2 sequences of queries need a cache of 2 rows and lengths int32 [2], got 2 rows and torch.int64 (2,)
1 sequences of queries need a cache of 1 rows and lengths int32 [1], got 2 rows and torch.int32 (2,)""",
    )


# On a device.

DEVICE_CASES = {
    "heads of 256": {"heads": (16, 2), "dim": 256},
    "small heads": {"heads": (4, 2), "dim": 32},
    "odd width": {"heads": (4, 4), "dim": 40},
}


def on_cuda(function):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(function))


@on_cuda
@pytest.mark.parametrize("options", DEVICE_CASES.values(), ids=DEVICE_CASES)
@each_pack
def test_flash_attention(case, options):
    inputs = packed(case, dtype=torch.bfloat16, device="cuda", **options)
    actual = derivatives(attention, *inputs, impl="triton")
    expected = derivatives(naive, *[x.double() for x in inputs[:3]], *inputs[3:])
    assert_close(actual, expected, 1e-2)
    end = int(inputs[3][-1])
    assert not any(x.flatten(0, 1)[end:].any() for x in actual)


@on_cuda
def test_flash_attention_between_offsets():
    q, k, v, whole, queries, keys = between("cuda", heads=(16, 2), dim=256, dtype=torch.bfloat16)
    middle = torch.zeros(24, 1, 1, dtype=torch.float64, device="cuda")
    middle[8:16] = 1
    expected = derivatives(lambda q, k, v: naive(q, k, v, whole) * middle, *(x.double() for x in (q, k, v)))
    assert_close(derivatives(piece_of, q, k, v, queries, keys, impl="triton"), expected, 1e-2)


@on_cuda
@pytest.mark.parametrize("length", [1, 2, 130, 700])
def test_flash_attention_with_a_cache(length):
    q, k, v = draw(3, length, capacity=length + 500, heads=(16, 2), dim=256, dtype=torch.bfloat16, device="cuda")
    lengths = torch.tensor([0, 500, 77], dtype=torch.int32, device="cuda")
    k[0, length:], v[0, length:] = torch.nan, torch.nan
    actual = attention(q, k, v, None, lengths, impl="triton")
    expected = naive(*(x.double().nan_to_num() for x in (q, k, v)), None, lengths)
    assert (actual.double() - expected).norm() <= 1e-2 * expected.norm()


@on_cuda
def test_flash_attention_with_documents_that_continue_a_cache():
    inputs = draw(1, 43, 5, 90, heads=(16, 2), dim=256, dtype=torch.bfloat16, device="cuda")
    where = (offsets("one stream", "cuda"), torch.tensor([7, 0, 30, 2, 11], dtype=torch.int32, device="cuda"))
    actual, expected = attention(*inputs, *where, impl="triton"), naive(*(x.double() for x in inputs), *where)
    assert (actual.double() - expected).norm() <= 1e-2 * expected.norm()


@on_cuda
def test_flash_attention_waits_for_nothing_and_repeats():
    inputs = packed("longer than a block", heads=(16, 2), dim=256, dtype=torch.bfloat16, device="cuda")
    expected = derivatives(attention, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [x.requires_grad_() for x in inputs[:3]]
        runs = [torch.autograd.grad(attention(*leaves, *inputs[3:]), leaves, inputs[0]) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    assert expected[0].isfinite().all()


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_on_a_device(dtype):
    inputs = packed("several rows", dtype=dtype, device="cuda")
    expected = derivatives(naive, *[x.double() for x in inputs[:3]], *inputs[3:])
    assert_close(derivatives(attention, *inputs), expected, 1e-5)
