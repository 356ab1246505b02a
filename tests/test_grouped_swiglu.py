"""The routed experts against a loop over tokens in float64."""

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional.ops import grouped_swiglu

LOADS = {
    "each its own": [[0], [1], [2], [0]],
    "two each": [[0, 1], [2, 0], [1, 2], [0, 1], [1, 0]],
    "all of them": [[2, 0, 1], [0, 1, 2], [1, 2, 0]],
    "the same twice": [[1, 1], [2, 0], [1, 1]],
    "an expert without tokens": [[0, 2], [2, 0], [0, 2], [2, 0]],
    "one takes all": [[1], [1], [1], [1], [1]],
    "one token": [[2, 1]],
    "no tokens": torch.empty(0, 2, dtype=torch.long),
    "no experts chosen": torch.empty(4, 0, dtype=torch.long),
}


def reference(x, experts, weights, gate, up, down):
    """In float64, token by token with its own experts' matrices."""
    x, weights, gate, up, down = (t.double() for t in (x, weights, gate, up, down))
    rows = [x.sum(0) * 0 + (gate.sum() + up.sum() + down.sum() + weights.sum()) * 0]  # something of every input
    for x_t, chosen, shares in zip(x, experts.tolist(), weights, strict=True):
        y = rows[0]
        for e, share in zip(chosen, shares, strict=True):
            a, b = gate[e] @ x_t, up[e] @ x_t
            y = y + share * (down[e] @ (a / (1 + torch.exp(-a)) * b))
        rows.append(y)
    return torch.stack(rows)[1:]


def draw(experts, width=6, inner=5, dtype=torch.float64, num_experts=3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)

    experts = torch.as_tensor(experts)
    matrices = [normal(num_experts, inner, width), normal(num_experts, inner, width), normal(num_experts, width, inner)]
    return [normal(len(experts), width), experts, normal(*experts.shape), *matrices]


def routed(tokens, per_token, num_experts, **options):
    """Inputs with random experts, all of a token's different."""
    order = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1)).argsort(-1)
    return draw(order[:, :per_token], num_experts=num_experts, **options)


NAMES = ["y", "dx", "dweights", "dgate", "dup", "ddown"]


def run(op, inputs, dy=None):
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = op(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16) if dy is None else dy
    gradients = torch.autograd.grad(y, [x for x in leaves if x.requires_grad], dy.to(y.dtype))
    return dict(zip(NAMES, [y.detach(), *gradients], strict=True))


def errors(actual, wanted):
    """Relative errors in the 2-norm, by name."""
    return {
        name: ((a.double() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30)).item()
        for name, a in actual.items()
    }


@pytest.mark.parametrize("experts", LOADS.values(), ids=LOADS)
def test_loads(experts):
    inputs = draw(experts)
    actual, wanted = run(grouped_swiglu, inputs), run(reference, inputs)
    assert [a.shape for a in actual.values()] == [w.shape for w in wanted.values()]
    assert max(errors(actual, wanted).values()) < 1e-13
    for e in range(3):
        busy = (torch.as_tensor(experts) == e).any()
        assert busy or not any(actual[name][e].any() for name in ("dgate", "dup", "ddown"))


def test_int32_experts():
    inputs = draw(LOADS["two each"])
    assert torch.equal(grouped_swiglu(*inputs), grouped_swiglu(inputs[0], inputs[1].int(), *inputs[2:]))


def test_precision_in_fp32():
    inputs = routed(50, 3, 8, width=64, inner=32, dtype=torch.float32)
    assert max(errors(run(grouped_swiglu, inputs), run(reference, inputs)).values()) < 1e-6


def test_precision_in_bf16():
    """No worse than PyTorch's own operations on the same bf16 values, with weights in fp32."""

    def plain(x, experts, weights, gate, up, down):
        y = torch.zeros_like(x)
        for e in range(len(gate)):
            token, j = torch.where(experts == e)
            hidden = torch.nn.functional.silu(x[token] @ gate[e].mT) * (x[token] @ up[e].mT)
            y = y.index_add(0, token, (hidden @ down[e].mT) * weights[token, j, None].to(x.dtype))
        return y

    inputs = routed(50, 3, 8, width=64, inner=32, dtype=torch.bfloat16)
    inputs[2] = inputs[2].float()
    wanted = run(reference, inputs)
    ours, theirs = errors(run(grouped_swiglu, inputs), wanted), errors(run(plain, inputs), wanted)
    assert all(ours[name] <= 1.1 * theirs[name] for name in ours), (ours, theirs)


def test_far_out():
    inputs = draw(LOADS["two each"], dtype=torch.float32)
    inputs[0] *= 100
    assert max(errors(run(grouped_swiglu, inputs), run(reference, inputs)).values()) < 1e-6


def test_tokens_are_strangers():
    inputs = draw(LOADS["two each"])
    before, dy = run(grouped_swiglu, inputs, torch.ones(5, 6)), torch.ones(5, 6)
    for tensor in (inputs[0], inputs[2], dy):
        tensor[1:] = torch.nan
    after = run(grouped_swiglu, inputs, dy)
    for name in ("y", "dx", "dweights"):
        assert torch.equal(after[name][0], before[name][0])


def test_one_expert_is_a_dense_layer():
    x, experts, weights, gate, up, down = draw([[0]] * 7, num_experts=1)
    hidden = torch.nn.functional.silu(x @ gate[0].T) * (x @ up[0].T)
    expected = weights * (hidden @ down[0].T)
    torch.testing.assert_close(grouped_swiglu(x, experts, weights, gate, up, down), expected)


def test_gradient_of_routing_weights_is_an_experts_output():
    """With dy = y's own expert output direction, and whatever the weights' dtype."""
    x, experts, weights, gate, up, down = draw(LOADS["two each"])
    weights = weights.float().requires_grad_()
    y = grouped_swiglu(x, experts, weights, gate, up, down)
    (dweights,) = torch.autograd.grad(y.sum(), weights)
    alone = grouped_swiglu(
        x.repeat_interleave(2, 0), experts.view(-1, 1), torch.ones(10, 1), gate, up, down
    )  # each slot by itself
    assert dweights.dtype == torch.float32
    torch.testing.assert_close(dweights, alone.sum(1).view(5, 2).float())


@pytest.mark.parametrize("rows", [[0, 0, 1, 3, 3], [2, 2, 2, 2, 2], [0, 1, 2, 3, 4]])
def test_several_rows_of_a_token(rows):
    """As if each row had a copy of its token."""
    _, experts, weights, *matrices = draw(LOADS["two each"])
    x = draw([[0]] * 6)[0]
    rows = torch.tensor(rows, dtype=torch.int32)

    def copied(x, *rest):
        return x.new_zeros(x.shape).index_add(0, rows, reference(x[rows], *rest))

    inputs = [x, experts, weights, *matrices]
    actual = run(lambda *leaves: grouped_swiglu(*leaves, rows), inputs)
    assert max(errors(actual, run(copied, inputs)).values()) < 1e-13
    assert not actual["y"][5].any()


def test_errors():
    x, experts, weights, gate, up, down = draw(LOADS["two each"])
    wrong = [
        (x[:, :5], experts, weights, gate, up, down),
        (x, experts, weights, gate[:2], up, down),
        (x, experts, weights, gate, up, down.mT),
        (x, experts[:4], weights[:4], gate, up, down),
        (x, experts, weights[:, :1], gate, up, down),
        (x, experts.flatten(), weights, gate, up, down),
        (x, experts.short(), weights, gate, up, down),
        (x, experts, weights.long(), gate, up, down),
        (x, experts, weights, gate, up.float(), down),
    ]
    messages = []
    for arguments in wrong:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (all texts are pinned below)
            grouped_swiglu(*arguments)
        messages.append(str(raised.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
x must be [T, D], gate and up [E, F, D], down [E, D, F], got (5, 5), (3, 5, 6), (3, 5, 6), (3, 6, 5)
x must be [T, D], gate and up [E, F, D], down [E, D, F], got (5, 6), (2, 5, 6), (3, 5, 6), (3, 6, 5)
x must be [T, D], gate and up [E, F, D], down [E, D, F], got (5, 6), (3, 5, 6), (3, 5, 6), (3, 5, 6)
experts and weights must be [T, J] with the 5 tokens of x, got (4, 2) and (4, 2)
experts and weights must be [T, J] with the 5 tokens of x, got (5, 2) and (5, 1)
experts and weights must be [T, J] with the 5 tokens of x, got (10,) and (5, 2)
experts must be int32 or int64, weights floating, got torch.int16 and torch.float64
experts must be int32 or int64, weights floating, got torch.int64 and torch.int64
x, gate, up and down must share a dtype, got torch.float64, torch.float64, torch.float32, torch.float64""",
    )
