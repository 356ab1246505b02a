"""Compiling in pieces: as many graphs as kinds of layers, whatever the depth, the length and the documents."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.utils._pytree as pytree

from q3n_functional import compiled, model, params
from q3n_functional.config import PRESETS
from q3n_functional.layers import context
from q3n_functional.packing import documents
from q3n_functional.params import named_leaves
from tests.configs import perturbed, slower, small, trainable

KINDS = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
TRUNK = 2
"""Kinds of layers in `small`."""


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def batches(lengths):
    """Tokens and documents: another number of them, some empty, for every length; the tail is padding."""
    generator = torch.Generator().manual_seed(0)
    for number, length in enumerate(lengths):
        ends = torch.randint(1, length, (1 + number % 9,), generator=generator).sort().values
        offsets = torch.cat([torch.zeros(1), ends, ends[-1:].expand(10 - len(ends))]).int()
        tokens = torch.randint(64, (1, length), generator=generator)
        yield tokens, documents(offsets, 1, length)


def assert_equals_eager(compiled_loss, loss, tree, cases, relative=1e-5):
    leaves = named_leaves(tree)
    for tokens, packed in cases:
        (actual, ours), (expected, theirs) = (f(tree, tokens, packed) for f in (compiled_loss, loss))
        torch.testing.assert_close([actual, *ours], [expected, *theirs], rtol=relative, atol=1e-7)
        pairs = zip(*(torch.autograd.grad(x, list(leaves.values())) for x in (actual, expected)), strict=True)
        for name, (gradient, wanted) in zip(leaves, pairs, strict=True):
            assert (gradient - wanted).norm() <= 10 * relative * wanted.norm() + 1e-9, name


def case(num_layers=4, **changes):
    config = small(num_hidden_layers=num_layers, layer_types=KINDS * (num_layers // 4), **changes)
    return trainable(slower(perturbed(config))), functools.partial(model.loss, config=config)


def test_twenty_lengths_and_document_counts_in_one_graph_of_each_kind():
    tree, loss = case()
    ours = compiled.compiled(loss, "layers", any_length=True, backend="aot_eager")
    assert_equals_eager(ours, loss, tree, batches(range(17, 77, 3)))
    assert graphs() == TRUNK + 1


def test_deeper_models_compile_no_more():
    tree, loss = case(12)
    loss = functools.partial(loss, recompute="selective")
    ours = compiled.compiled(loss, "layers", backend="aot_eager")
    assert_equals_eager(ours, loss, tree, batches([40] * 3))
    assert graphs() == TRUNK + 1


def test_dense_layers_are_kinds_of_their_own():
    tree, loss = case(mlp_only_layers=(0, 3), intermediate_size=24, num_nextn_predict_layers=0)
    ours = compiled.compiled(loss, "layers", backend="aot_eager")
    assert_equals_eager(ours, loss, tree, batches([40]))
    assert graphs() == 3 + 1  # dense linear, sparse linear, dense full


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_layer_of_16k_tokens_has_the_eager_gradients(kind, recompute):
    """Compilers were seen to spoil long sequences alone (pytorch#193061): every gradient of a layer of real widths."""
    base = PRESETS["qwen3_next_80b_a3b"]()
    config = replace(base, num_hidden_layers=1, layer_types=(kind,), num_experts=32, num_nextn_predict_layers=0)
    tree = params.init(replace(config, vocab_size=64), 0, torch.bfloat16, "cuda").layers[0]
    p, x = pytree.tree_map(lambda leaf: leaf.detach().requires_grad_(), tree), torch.randn(1, 16_384, 2048).cuda()
    x, dy = x.bfloat16().requires_grad_(), torch.randn_like(x).bfloat16()
    cut = torch.tensor([0, 5000, 5001, 16_000, 16_000], dtype=torch.int32, device="cuda")
    shared = context(torch.zeros(1, 16_384, dtype=torch.long, device="cuda"), documents(cut, 1, 16_384), None, config)

    def run(layer):
        y, statistics = layer(p, x, shared, config=config, recompute=recompute)
        target = (y.float() * dy).sum() + statistics.probabilities_E.square().sum() / 16_384
        return [y, *torch.autograd.grad(target, [x, *pytree.tree_leaves(p)])]

    names = ["y", "x", *(params.path_name(path) for path, _ in pytree.tree_flatten_with_path(tree)[0])]
    # Both round to bf16 in places of their own, and a token whose tenth and eleventh expert are nearly equal then goes
    # elsewhere (the router's gradient differs by 3e-2). A gradient that is wrong anywhere differs by far more there.
    for name, ours, theirs in zip(names, run(compiled.stages().layer), run(model.layer), strict=True):
        ours, theirs = ours.float(), theirs.float()
        assert torch.isfinite(ours).all(), name
        bound = 8e-2 if name.startswith(("mlp.router", "mlp.experts", "post_attention")) else 2e-2
        assert (ours - theirs).norm() <= bound * theirs.norm(), name
        if name in ("y", "x"):
            rows = (ours - theirs)[0].norm(dim=-1) / theirs[0].norm(dim=-1).clamp(min=1e-6)
            assert rows.max() < 0.2, (name, int(rows.argmax()))
