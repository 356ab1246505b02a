"""Log-partitions of some rows of a head: values, gradients, and the loss of all rows that they add up to."""

import pytest
import torch

from q3n_functional.ops import linear_cross_entropy, linear_log_partition
from q3n_functional.ops.linear_cross_entropy import IGNORE
from q3n_functional.ops.linear_log_partition import OTHER
from tests.test_linear_cross_entropy import COEF, draw


def some(*shape, **options):
    """h, head, targets of all three kinds."""
    h, head, targets = draw(*shape, **options)
    targets.view(-1)[1::4] = OTHER
    return h, head, targets


def definition(h, head, targets):
    logits = h @ head.mT
    picked = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logits.logsumexp(-1).where(targets != IGNORE, 0), picked.where(targets >= 0, 0)


def results(function, h, head, targets, **options):
    """Both results and the gradients of a sum in which every one has a factor of its own."""
    leaves = [x.detach().requires_grad_() for x in (h, head)]
    found = function(*leaves, targets, **options)
    factors = torch.linspace(0.1, 1.3, targets.numel(), dtype=found[0].dtype, device=h.device).view(targets.shape)
    total = (factors * found[0]).sum() - (factors.square() * found[1]).sum()
    return [x.detach() for x in found] + list(torch.autograd.grad(total, leaves))


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("partition", "picked", "dh", "dhead"), actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert (a.double() - e.double()).norm() <= tolerance * max(e.double().norm(), 1e-3), name


@pytest.mark.parametrize("shape", [(7,), (2, 9), (3, 1, 2), (1, 1), (2, 300), (0, 3)], ids=str)
def test_definition(shape):
    inputs = some(*shape)
    assert_close(results(linear_log_partition, *inputs), results(definition, *inputs), 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_precision(dtype, tolerance):
    """Results in fp32 whatever the inputs, and logits never rounded to bf16."""
    h, head, targets = some(400, vocabulary=300, width=64, dtype=dtype)
    actual, expected = (
        results(linear_log_partition, h, head, targets),
        results(definition, h.double(), head.double(), targets),
    )
    assert [x.dtype for x in actual] == [torch.float32] * 2 + [dtype] * 2
    assert_close(actual, expected, tolerance)
    assert_close(actual[:2] + expected[2:], expected, 1e-6)


def test_parts_of_a_vocabulary_make_the_loss_of_all():
    h, head, targets = draw(2, 9, vocabulary=12)
    leaves = [x.requires_grad_() for x in (h, head)]

    def in_parts(h, head, targets):
        partitions, picked = [], []
        for rank, rows in enumerate(head.split(4)):
            own = targets - 4 * rank
            own = own.where((own >= 0) & (own < 4), OTHER).masked_fill(targets == IGNORE, IGNORE)
            for found, x in zip((partitions, picked), linear_log_partition(h, rows, own), strict=True):
                found.append(x)
        partition = torch.stack(partitions).logsumexp(0).masked_fill(targets == IGNORE, 0)
        return (partition - sum(picked)).sum() + COEF * partition.square().sum()

    ours, whole = in_parts(*leaves, targets), linear_cross_entropy(*leaves, targets, COEF).total
    torch.testing.assert_close(ours, whole)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(whole, leaves))


def test_one_result_alone_has_a_gradient():
    h, head, targets = some(2, 9)
    for n in range(2):
        leaves = [x.detach().requires_grad_() for x in (h, head)]
        found, wanted = (f(*leaves, targets)[n].sum() for f in (linear_log_partition, definition))
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))


def test_an_ignored_token_is_not_read_into_anything():
    h, head, targets = some(2, 9)
    expected = results(linear_log_partition, h, head, targets)
    poisoned = h.masked_fill((targets == IGNORE)[..., None], 1e300)
    assert all(map(torch.equal, results(linear_log_partition, poisoned, head, targets)[:3], expected[:3]))


def test_large_logits():
    h, head, targets = some(40, scale=1e4, dtype=torch.float32)
    wanted = results(definition, h.double(), head.double(), targets)
    assert_close(results(linear_log_partition, h, head, targets), wanted, 1e-5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h, head, t: (h, head[:, 1:], t), r"h must be \[..., D\], head \[V, D\]"),
        (lambda h, head, t: (h, head.float(), t), "share a dtype"),
        (lambda h, head, t: (h, head, t.int()), "targets be int64"),
    ],
)
def test_errors(change, text):
    with pytest.raises(ValueError, match=text):
        linear_log_partition(*change(*some(2, 9)))
