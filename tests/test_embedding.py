"""Rows of an embedding table, and the gradient of the table, against plain sums in float64."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import library

from q3n_functional.ops.embedding import embedding, embedding_gradient


def draw(*shape, num=7, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(num - 1, shape, generator=generator)  # the last row has none
    table = torch.randn(num, width, generator=generator, dtype=torch.float64).to(dtype)
    return tokens, table, torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(dtype)


def derivative(function, tokens, table, dx, kept=None):
    leaf = table.detach().requires_grad_()
    x = function(tokens, leaf, kept)
    return x.detach(), *torch.autograd.grad(x, leaf, dx)


def plain(tokens, table, kept):
    rows = torch.nn.functional.one_hot(tokens if kept is None else tokens.where(kept, 0), len(table)).to(table.dtype)
    return (rows if kept is None else rows * kept[..., None]) @ table


@pytest.mark.parametrize("kept", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("shape", [(9,), (2, 30), (0, 3), (1,)], ids=str)
def test_rows_and_their_gradient(shape, kept):
    tokens, table, dx = draw(*shape)
    which = tokens != 2 if kept else None
    outside = tokens if which is None else tokens.where(which, -3)  # what is not kept may be anything
    for actual, wanted in zip(
        derivative(embedding, outside, table, dx, which), derivative(plain, tokens, table, dx, which), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-13)


def test_sums_of_bf16_are_fp32():
    tokens, table, dx = draw(4000, dtype=torch.bfloat16)
    _, actual = derivative(embedding, tokens, table, dx)
    _, exact = derivative(embedding, tokens, table.double(), dx.double())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, exact.to(torch.bfloat16), rtol=1e-2, atol=0)


def test_rows_outside_have_no_gradient():
    rows, dx = torch.tensor([-1, 0, 3, 2, 0, 7]), torch.arange(12.0, dtype=torch.float64).view(6, 2)
    wanted = torch.tensor([[10.0, 12], [0, 0], [6, 7]], dtype=torch.float64)
    torch.testing.assert_close(embedding_gradient(dx, rows, 3), wanted, rtol=0, atol=0)


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(embedding, fullgraph=True, dynamic=True)
        for length in (6, 9, 14):
            tokens, table, dx = draw(2, length)
            expected = derivative(embedding, tokens, table, dx)
            torch.testing.assert_close(derivative(compiled, tokens, table, dx), expected, rtol=0, atol=0)


def test_its_gradient_is_an_op():
    tokens, _, dx = draw(9, dtype=torch.bfloat16)
    op = torch.ops.q3n.embedding_backward.default
    library.opcheck(op, (dx, tokens, 7, "auto"))
    mapped = torch.vmap(op, (0, None, None, None))(torch.stack([dx, 2 * dx]), tokens, 7, "auto")
    torch.testing.assert_close(mapped, torch.stack([op(x, tokens, 7, "auto") for x in (dx, 2 * dx)]))


def test_under_transforms():
    tokens, table, dx = draw(2, 9)
    x, pullback = torch.func.vjp(lambda table: embedding(tokens, table), table)
    torch.testing.assert_close((x, *pullback(dx)), derivative(embedding, tokens, table, dx), rtol=0, atol=1e-13)
    tables = torch.stack([table, 2 * table])
    torch.testing.assert_close(torch.vmap(embedding, (None, 0))(tokens, tables), torch.stack([x, 2 * x]))


def test_errors():
    tokens, table, _ = draw(2, 9)
    messages = []
    for arguments in [(tokens, table[0]), (tokens, table, tokens[0] > 1)]:
        with pytest.raises(ValueError, match="must be") as raised:
            embedding(*arguments)
        messages.append(str(raised.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
table must be [V, D] and kept like tokens, got tokens, table and kept of (2, 9), (5,)
table must be [V, D] and kept like tokens, got tokens, table and kept of (2, 9), (7, 5), (9,)""",
    )
    with pytest.raises(IndexError):
        embedding(tokens + 1000, table)
