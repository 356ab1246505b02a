"""The experts against a loop over tokens in float64."""

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional.ops import grouped_swiglu

SIZES = [[2, 3, 1], [0, 4, 0], [0, 0, 5], [5, 0, 0], [0, 0, 0], [1, 0, 1]]


def ends_of(sizes):
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def reference(x, ends, gate, up, down):
    """In float64, token by token with its own expert's matrices."""
    x, gate, up, down = (t.double() for t in (x, gate, up, down))
    outputs = []
    for m in range(len(x)):
        e = sum(m >= end for end in ends.tolist())
        a, b = gate[e] @ x[m], up[e] @ x[m]
        outputs.append(down[e] @ (a / (1 + torch.exp(-a)) * b))
    return torch.stack(outputs) if outputs else x * (gate.sum() + up.sum() + down.sum())


def draw(sizes, width=6, inner=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)

    experts = len(sizes)
    weights = [normal(experts, inner, width), normal(experts, inner, width), normal(experts, width, inner)]
    return [normal(sum(sizes), width), ends_of(sizes), *weights]


def run(op, inputs, dy=None):
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = op(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16) if dy is None else dy
    gradients = torch.autograd.grad(y, [x for x in leaves if x.requires_grad], dy.to(y.dtype))
    return dict(zip(["y", "dx", "dgate", "dup", "ddown"], [y.detach(), *gradients], strict=True))


def errors(actual, wanted):
    """Relative errors in the 2-norm, by name."""
    return {
        name: ((a.double() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30)).item()
        for name, a in actual.items()
    }


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_loads(sizes):
    """Any load, experts without tokens and a batch without tokens included."""
    inputs = draw(sizes)
    actual, wanted = run(grouped_swiglu, inputs), run(reference, inputs)
    assert [a.shape for a in actual.values()] == [w.shape for w in wanted.values()]
    assert max(errors(actual, wanted).values()) < 1e-13
    for e, size in enumerate(sizes):
        assert size or not any(actual[name][e].any() for name in ("dgate", "dup", "ddown"))


def test_precision_in_fp32():
    inputs = draw([40, 0, 60], 64, 32, dtype=torch.float32)
    assert max(errors(run(grouped_swiglu, inputs), run(reference, inputs)).values()) < 1e-6


def test_precision_in_bf16():
    """No worse than PyTorch's own operations on the same bf16 values."""

    def plain(x, ends, gate, up, down):
        parts = []
        for e, rows in enumerate(x.tensor_split(ends[:-1].tolist())):
            hidden = torch.nn.functional.silu(rows @ gate[e].mT) * (rows @ up[e].mT)
            parts.append(hidden @ down[e].mT)
        return torch.cat(parts)

    inputs = draw([40, 0, 60], 64, 32, dtype=torch.bfloat16)
    wanted = run(reference, inputs)
    ours, theirs = errors(run(grouped_swiglu, inputs), wanted), errors(run(plain, inputs), wanted)
    assert all(ours[name] <= 1.1 * theirs[name] for name in ours), (ours, theirs)


def test_far_out():
    inputs = draw([4, 2], dtype=torch.float32)
    inputs[0] *= 100
    assert max(errors(run(grouped_swiglu, inputs), run(reference, inputs)).values()) < 1e-6


def test_tokens_are_strangers():
    inputs = draw([2, 3, 1])
    before, dy = run(grouped_swiglu, inputs, torch.ones(6, 6)), torch.ones(6, 6)
    inputs[0][1:], dy[1:] = torch.nan, torch.nan
    after = run(grouped_swiglu, inputs, dy)
    assert torch.equal(after["y"][0], before["y"][0])
    assert torch.equal(after["dx"][0], before["dx"][0])


def test_one_expert_is_a_dense_layer():
    x, ends, gate, up, down = draw([7])
    hidden = torch.nn.functional.silu(x @ gate[0].T) * (x @ up[0].T)
    torch.testing.assert_close(grouped_swiglu(x, ends, gate, up, down), hidden @ down[0].T)


def test_errors():
    x, ends, gate, up, down = draw([2, 3, 1])
    wrong = [
        (x[:, :5], ends, gate, up, down),
        (x, ends, gate[:2], up, down),
        (x, ends, gate, up, down.mT),
        (x, ends[:2], gate, up, down),
        (x, ends.long(), gate, up, down),
        (x, ends, gate, up.float(), down),
    ]
    messages = []
    for arguments in wrong:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (all texts are pinned below)
            grouped_swiglu(*arguments)
        messages.append(str(raised.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
x must be [M, D], gate and up [E, F, D], down [E, D, F], got (6, 5), (3, 5, 6), (3, 5, 6), (3, 6, 5)
x must be [M, D], gate and up [E, F, D], down [E, D, F], got (6, 6), (2, 5, 6), (3, 5, 6), (3, 6, 5)
x must be [M, D], gate and up [E, F, D], down [E, D, F], got (6, 6), (3, 5, 6), (3, 5, 6), (3, 5, 6)
ends must be int32 [3], got torch.int32 (2,)
ends must be int32 [3], got torch.int64 (3,)
x, gate, up and down must share a dtype, got torch.float64, torch.float64, torch.float32, torch.float64""",
    )
