"""The fused loss against its definition in float64: values, gradients, chunks, memory; the kernel on a device."""

import importlib

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional.ops import linear_cross_entropy
from q3n_functional.ops.linear_cross_entropy import CHUNK_BYTES, IGNORE, chunks

COEF = 0.3
MODULE = importlib.import_module("q3n_functional.ops.linear_cross_entropy")  # the package names the function so


def draw(*shape, vocabulary=11, width=5, dtype=torch.float64, device="cpu", scale=1.0):
    """h, head, targets, every fourth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(vocabulary, shape, generator=generator)
    targets.view(-1)[::4] = IGNORE
    return h.to(device, dtype), head.to(device, dtype), targets.to(device)


def definition(h, head, targets, coef=0.0):
    logits, kept = h @ head.mT, targets != IGNORE
    partition = logits.logsumexp(-1)
    picked = logits.gather(-1, targets.where(kept, 0)[..., None])[..., 0]
    cross_entropy, z_loss = (partition - picked)[kept].sum(), partition[kept].square().sum()
    return cross_entropy + coef * z_loss, cross_entropy, z_loss


def derivatives(function, h, head, targets, **options):
    leaves = [x.detach().requires_grad_() for x in (h, head)]
    total, cross_entropy, z_loss = function(*leaves, targets, COEF, **options)
    return [x.detach() for x in (total, cross_entropy, z_loss)] + list(torch.autograd.grad(0.7 * total, leaves))


def wide(h, head, targets):
    return h.double(), head.double(), targets


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("total", "cross_entropy", "z_loss", "dh", "dhead"), actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert (a.double() - e.double()).norm() <= tolerance * max(e.double().norm(), 1e-3), name


@pytest.mark.parametrize("shape", [(7,), (2, 9), (3, 1, 2), (1, 1), (2, 300)], ids=str)
def test_definition(shape):
    inputs = draw(*shape)
    assert_close(derivatives(linear_cross_entropy, *inputs), derivatives(definition, *inputs), 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_precision(dtype, tolerance):
    """Sums in fp32 whatever the inputs, and logits never rounded to bf16."""
    inputs = draw(400, vocabulary=300, width=64, dtype=dtype)
    actual, expected = derivatives(linear_cross_entropy, *inputs), derivatives(definition, *wide(*inputs))
    assert [x.dtype for x in actual] == [torch.float32] * 3 + [dtype] * 2
    assert_close(actual, expected, tolerance)
    assert_close(actual[:3] + expected[3:], expected, 1e-6)


def test_only_the_total_has_a_gradient():
    h, head, targets = draw(2, 9)
    sums = linear_cross_entropy(h.requires_grad_(), head, targets, COEF)
    assert [x.requires_grad for x in sums] == [True, False, False]
    assert torch.equal(sums.total, sums.cross_entropy + COEF * sums.z_loss)


def test_no_targets():
    h, head, targets = draw(2, 9)
    for inputs in ((h, head, torch.full_like(targets, IGNORE)), (h[:, :0], head, targets[:, :0])):
        assert not any(x.any() for x in derivatives(linear_cross_entropy, *inputs))


def test_an_ignored_token_is_not_read_into_anything():
    h, head, targets = draw(2, 9)
    expected = derivatives(linear_cross_entropy, h, head, targets)
    poisoned = h.masked_fill((targets == IGNORE)[..., None], 1e300)
    actual = derivatives(linear_cross_entropy, poisoned, head, targets)
    assert all(torch.equal(a, e) for a, e in zip(actual[:4], expected[:4], strict=True))


def test_large_logits():
    inputs = draw(40, scale=1e4, dtype=torch.float32)
    assert_close(derivatives(linear_cross_entropy, *inputs), derivatives(definition, *wide(*inputs)), 1e-5)


def test_no_gradient_no_work():
    """Validation takes one product instead of three."""
    h, head, targets = draw(2, 9)
    expected = linear_cross_entropy(h.requires_grad_(), head, targets, COEF)
    op = torch.ops.q3n.linear_cross_entropy
    *sums, dh, dhead = op(h.flatten(0, 1), head, targets.flatten(), COEF, False, "auto")
    assert dh.numel() == dhead.numel() == 0
    assert all(map(torch.equal, sums, expected))
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
        linear_cross_entropy(h, head, targets)
    assert sum(event.name == "aten::mm" for event in profile.events()) == 1


@pytest.mark.parametrize("num", [0, 1, 127, 128, 1000, 8192, 32768, 100_000])
@pytest.mark.parametrize("bytes_each", [4, 6])
def test_chunks_cover_all_in_bounded_memory(num, bytes_each):
    parts = list(chunks(num, 151_936, bytes_each))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(num))
    sizes = [part.stop - part.start for part in parts]
    assert all(size * 151_936 * bytes_each <= CHUNK_BYTES for size in sizes)
    assert all(size % 128 == 0 for size in sizes[:-1])


def test_several_chunks(monkeypatch):
    """The sums and gradients of all; and never the logits of all tokens at once."""
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 128 * 500 * 16)
    inputs = draw(1000, vocabulary=500)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        actual = derivatives(linear_cross_entropy, *inputs)
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 128 * 500 * 8
    assert_close(actual, derivatives(definition, *inputs), 1e-13)


def test_per_example_gradients():
    h, head, targets = draw(3, 4)

    def loss(function):
        return torch.vmap(torch.func.grad(lambda h, head, t: function(h, head, t, COEF)[0], (0, 1)), (0, None, 0))

    def plain(h, head, targets, coef):
        logits, kept = h @ head.mT, targets != IGNORE
        partition = logits.logsumexp(-1)
        picked = logits.gather(-1, targets.where(kept, 0)[..., None])[..., 0]
        return ((partition - picked + coef * partition.square()) * kept).sum(), None

    torch.testing.assert_close(loss(linear_cross_entropy)(h, head, targets), loss(plain)(h, head, targets))


def test_no_recompile_for_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (7, 30, 200):
            inputs = draw(2, length)
            assert_close(derivatives(compiled, *inputs), derivatives(linear_cross_entropy, *inputs), 1e-14)


@pytest.mark.parametrize("target", [-1, 11])
def test_a_target_that_is_no_token(target):
    h, head, targets = draw(3)
    targets[1] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        linear_cross_entropy(h, head, targets)


def test_errors():
    h, head, targets = draw(2, 3)
    messages = []
    for arguments in [
        (h, head[:, :2], targets), (h, head, targets[:1]), (h, head[0], targets), (h.float(), head, targets),
        (h, head, targets.int()),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (all texts are pinned below)
            linear_cross_entropy(*arguments)
        messages.append(str(raised.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
h must be [..., D], head [V, D] and targets [...], got (2, 3, 5), (11, 2), (2, 3)
h must be [..., D], head [V, D] and targets [...], got (2, 3, 5), (11, 5), (1, 3)
h must be [..., D], head [V, D] and targets [...], got (2, 3, 5), (5,), (2, 3)
h and head must share a dtype and targets be int64, got torch.float32, torch.float64, torch.int64
h and head must share a dtype and targets be int64, got torch.float64, torch.float64, torch.int32""",
    )
