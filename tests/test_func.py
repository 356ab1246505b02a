"""torch.func over the whole model: per-document gradients, values with gradients, eager and compiled."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import grad, grad_and_value, vjp, vmap

from q3n_functional.model import forward, loss
from q3n_functional.packing import documents, documents_from_mask
from q3n_functional.params import named_leaves
from tests.configs import perturbed, slower, small, trainable

LINEAR, FULL = "linear_attention", "full_attention"


def config_of(**changes):
    return small(**{"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), **changes})


def random_tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def by_autograd(value, tree):
    return torch.autograd.grad(value, pytree.tree_leaves(tree))


def assert_same(actual, expected, relative=1e-11):
    names = named_leaves(expected)
    for name, a, b in zip(names, pytree.tree_leaves(actual), names.values(), strict=True):
        assert b.any(), name
        assert (a - b).abs().max() <= relative * b.abs().max(), name


def like(tree, leaves):
    return pytree.tree_unflatten(leaves, pytree.tree_structure(tree))


def row(tree, i):
    return pytree.tree_map(lambda leaf: leaf[i], tree)


VARIANTS = {
    "as small": {},
    "recurrent": {"linear_attention_use_recurrent": True},
    "clipped": {"linear_attention_clip_val": 0.4},
    "dense and tied": {
        **{"num_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 24, "tie_word_embeddings": True},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
def test_grad_and_value_is_autograd(variant, packed):
    config = config_of(**VARIANTS[variant])
    tree, tokens = trainable(slower(perturbed(config, dtype=torch.float64))), random_tokens(1, 30)
    docs = documents(torch.tensor([0, 9, 9, 26], dtype=torch.int32), 1, 30) if packed else None
    value, parts = loss(tree, tokens, docs, config=config, z_loss_coef=0.1)
    gradients, (same_value, same_parts) = grad_and_value(loss, has_aux=True)(
        tree, tokens, docs, config=config, z_loss_coef=0.1
    )
    torch.testing.assert_close((same_value, same_parts), (value, parts), rtol=1e-12, atol=0)
    assert_same(gradients, like(tree, by_autograd(value, tree)))


def one_document(params, tokens_T, config):
    return loss(params, tokens_T[None], config=config)[0]


def one_padded(params, tokens_T, mask_T, config):
    return loss(params, tokens_T[None], documents_from_mask(mask_T[None]), config=config)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_by_document_are_the_loop(variant):
    config = config_of(**VARIANTS[variant])
    tree, tokens = trainable(slower(perturbed(config, dtype=torch.float64))), random_tokens(3, 20)
    batched, values = vmap(grad_and_value(one_document), in_dims=(None, 0, None))(tree, tokens, config)
    for i in range(3):
        value = one_document(tree, tokens[i], config)
        torch.testing.assert_close(values[i], value, rtol=1e-12, atol=0)
        assert_same(row(batched, i), like(tree, by_autograd(value, tree)))


def test_gradients_by_document_of_several_lengths():
    config = config_of()
    tree, tokens = trainable(slower(perturbed(config, dtype=torch.float64))), random_tokens(3, 20)
    sizes = torch.tensor([20, 7, 16])
    mask = torch.arange(20) < sizes[:, None]
    batched = vmap(grad(one_padded), in_dims=(None, 0, 0, None))(tree, tokens, mask, config)
    for i, size in enumerate(sizes.tolist()):
        value = one_document(tree, tokens[i, :size], config)
        assert_same(row(batched, i), like(tree, by_autograd(value, tree)))


def test_compiled():
    config = config_of(num_hidden_layers=1, layer_types=(LINEAR,))
    tree, tokens = slower(perturbed(config, dtype=torch.float64)), random_tokens(2, 20)

    def gradients(params, tokens):
        return vmap(grad_and_value(one_document), in_dims=(None, 0, None))(params, tokens, config)

    torch._dynamo.reset()
    actual, values = torch.compile(gradients, fullgraph=True, backend="aot_eager")(tree, tokens)
    expected, expected_values = gradients(tree, tokens)
    torch.testing.assert_close(values, expected_values, rtol=1e-12, atol=0)
    assert_same(actual, expected)


def test_several_models_at_once():
    """vmap over the parameters: an ensemble."""
    config = config_of()
    trees, tokens = [perturbed(config, seed, torch.float64) for seed in range(3)], random_tokens(2, 20)
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    logits = vmap(lambda tree: forward(tree, tokens, config=config))(stacked)
    for tree, theirs in zip(trees, logits, strict=True):
        torch.testing.assert_close(theirs, forward(tree, tokens, config=config), rtol=1e-10, atol=1e-12)


def test_vjp_of_the_logits():
    config = config_of()
    tree, tokens = trainable(perturbed(config, dtype=torch.float64)), random_tokens(2, 20)
    logits, pull = vjp(lambda tree: forward(tree, tokens, config=config), tree._replace(mtp=()))
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradients,) = pull(weights)
    part = tree._replace(mtp=())
    expected = by_autograd((forward(part, tokens, config=config) * weights).sum(), part)
    assert_same(gradients, like(part, expected))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_second_derivatives_and_forward_mode_are_refused():
    """Left alone, forward mode through a custom op would silently be zero."""
    config = config_of()
    tree, tokens = perturbed(config, dtype=torch.float64), random_tokens(1, 20)

    def value(scale):
        return one_document(pytree.tree_map(lambda leaf: leaf * scale, tree), tokens[0], config)

    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        grad(grad(value))(one)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(value, (one,), (one,))
