"""The model and its loss as a whole: definitions of every loss term, gradients, options that must not matter."""

import math
from dataclasses import replace

import pytest
import torch
import torch.utils._pytree as pytree
from torch.nn.functional import cross_entropy

from q3n_functional import layers, params
from q3n_functional.feed_forward import RouterStatistics
from q3n_functional.model import forward, head, hidden_states, loss, multi_token_prediction, next_tokens
from q3n_functional.params import named_leaves
from tests.configs import perturbed, slower, small, trainable

LINEAR, FULL = "linear_attention", "full_attention"
FP32_LEAVES = ("A_log", "dt_bias", "mixer.norm")


def config_of(**changes):
    return small(**{"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), **changes})


def tree_of(config, dtype=torch.float64):
    return trainable(slower(perturbed(config, dtype=dtype)))


def random_tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def gradients(value, tree):
    return dict(zip(named_leaves(tree), torch.autograd.grad(value, pytree.tree_leaves(tree)), strict=True))


def assert_same(actual, expected, relative=1e-11):
    for name in expected:
        assert (actual[name] - expected[name]).abs().max() <= relative * expected[name].abs().max(), name


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 0}, {"tie_word_embeddings": True}])
def test_the_loss_is_the_sum_of_its_parts(changes):
    config = config_of(mtp_loss_scaling_factor=0.3, router_aux_loss_coef=0.02, **changes)
    tree, tokens = tree_of(config), random_tokens(3, 20)
    value, metrics = loss(tree, tokens, config=config, z_loss_coef=0.05)
    logits = forward(tree, tokens, config=config)[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(metrics.cross_entropy, expected)
    torch.testing.assert_close(metrics.z_loss, logits.logsumexp(-1).square().mean())
    assert metrics.num_targets == 3 * 19
    total = metrics.cross_entropy + 0.05 * metrics.z_loss + 0.3 * metrics.mtp_cross_entropy + 0.02 * metrics.aux_loss
    torch.testing.assert_close(value, total)
    assert (metrics.mtp_cross_entropy > 0) == (config.num_nextn_predict_layers > 0)
    assert not any(metric.requires_grad for metric in metrics)


def test_multi_token_prediction_by_its_definition():
    """From h_t and the embedding of token t+1, through one layer that sees no padding, to token t+2; shared head."""
    config = config_of()
    tree, tokens = tree_of(config), random_tokens(2, 20)
    h, _, _ = hidden_states(tree, tokens, config=config)
    m, eps = tree.mtp, config.rms_norm_eps
    e = layers.rms_norm(tree.embed_tokens[tokens[:, 1:]], m.pre_fc_norm_embedding, eps)
    x = torch.cat([e, layers.rms_norm(h[:, :-1], m.pre_fc_norm_hidden, eps)], -1) @ m.fc.T
    shared = layers.context(tokens[:, 1:], None, None, config)
    x, _, _ = layers.decoder_layer(m.layer, x, shared, None, config=config)
    x = layers.rms_norm(x, m.norm, eps)
    actual, _ = multi_token_prediction(m, tree.embed_tokens[next_tokens(tokens)], h, tokens, config=config)
    torch.testing.assert_close(actual[:, :-1], x)
    expected = cross_entropy((x[:, :-1] @ head(tree).T).flatten(0, 1), tokens[:, 2:].flatten())
    torch.testing.assert_close(loss(tree, tokens, config=config)[1].mtp_cross_entropy, expected)


def test_load_balancing_is_pooled_over_all_routers_and_the_predictions_own():
    config = config_of(num_nextn_predict_layers=1)
    tree, tokens = tree_of(config), random_tokens(2, 20)
    value = loss(tree, tokens, config=config)[1].aux_loss
    h, trunk, _ = hidden_states(tree, tokens, config=config)
    _, extra = multi_token_prediction(tree.mtp, tree.embed_tokens[next_tokens(tokens)], h, tokens, config=config)
    assert trunk.tokens == 2 * 40
    assert extra.tokens == 38  # the last token of a row has no next one to be shown
    pooled = RouterStatistics(*map(torch.add, trunk, extra))
    f, mean = pooled.assignments_E / 118, pooled.probabilities_E / 118
    assert f.sum() == config.num_experts_per_tok
    torch.testing.assert_close(value, 8 * (f * mean).sum())


def test_perfect_balance_is_the_number_of_experts_a_token():
    config = config_of(num_experts_per_tok=8, num_nextn_predict_layers=0)
    _, metrics = loss(tree_of(config), random_tokens(2, 20), config=config)
    assert metrics.aux_loss.item() == pytest.approx(8)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}])
def test_every_element_that_can_learns(changes):
    """Every leaf, every expert; the prediction module's and, by its loss alone, the trunk's."""
    config = config_of(**changes)
    tree, tokens = tree_of(config), torch.arange(256).mul(77).remainder(64).view(4, 64)  # all tokens occur
    value, _ = loss(tree, tokens, config=config)
    for name, gradient in gradients(value, tree).items():
        assert gradient.isfinite().all(), name
        by_row = gradient.flatten(1).any(1) if gradient.ndim > 1 else gradient != 0
        assert by_row.all(), name
    only_mtp = replace(config, mtp_loss_scaling_factor=1.0, router_aux_loss_coef=0.0)
    without = replace(only_mtp, mtp_loss_scaling_factor=0.0)
    with_it, alone = (gradients(loss(tree, tokens, config=c)[0], tree) for c in (only_mtp, without))
    for name in with_it:
        assert (with_it[name] - alone[name]).any(), name
        assert name.startswith("mtp.") != alone[name].any(), name


def test_nothing_looks_ahead():
    """Exactly zero gradient from the loss of the first targets to later embeddings."""
    config = config_of(router_aux_loss_coef=0.0)
    tree, tokens = tree_of(config), torch.arange(1, 41)[None]
    labels = torch.where(tokens <= 20, tokens, -100)
    value, _ = loss(tree, tokens, None, labels, config=config)
    reached = gradients(value, tree)["embed_tokens"].any(1)
    assert reached.nonzero().flatten().tolist() == list(range(1, 20))


def test_the_same_call_gives_the_same_bits():
    config = config_of()
    tree, tokens = tree_of(config, torch.float32), random_tokens(2, 30)
    results = [loss(tree, tokens, config=config) for _ in range(2)]
    first, second = ([value, *parts, *gradients(value, tree).values()] for value, parts in results)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_chunk_size_does_not_matter(chunk):
    tree, tokens = tree_of(config_of()), random_tokens(2, 45)
    expected, actual = (
        loss(tree, tokens, config=config_of(linear_attention_chunk_size=size))[0] for size in (16, chunk)
    )
    assert_same({"": actual}, {"": expected})
    assert_same(gradients(actual, tree), gradients(expected, tree), 1e-10)


def test_recurrent_equals_chunked():
    tree, tokens = tree_of(config_of()), random_tokens(2, 45)
    expected, actual = (
        loss(tree, tokens, config=config_of(linear_attention_use_recurrent=recurrent))[0] for recurrent in (False, True)
    )
    assert_same({"": actual}, {"": expected})
    assert_same(gradients(actual, tree), gradients(expected, tree), 1e-10)


def test_memory_of_linear_attention_grows_with_the_length_not_its_square():
    config, sizes = config_of(layer_types=(LINEAR, LINEAR), num_nextn_predict_layers=0), []
    tree = tree_of(config, torch.float32)
    for length in (256, 512, 1024):
        saved = {}

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = hidden_states(tree, random_tokens(1, length), config=config)
        sizes.append(sum(saved.values()))
        del kept
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.05)


def test_bf16_keeps_fp32_where_errors_add_up():
    config = config_of()
    tree = trainable(params.init(config, 0, torch.bfloat16))
    for name, leaf in named_leaves(tree).items():
        assert leaf.dtype == (torch.float32 if name.endswith(FP32_LEAVES) else torch.bfloat16), name
    value, metrics = loss(tree, random_tokens(2, 30), config=config, z_loss_coef=0.1)
    assert {value.dtype, *(metric.dtype for metric in metrics)} == {torch.float32}
    assert forward(tree, random_tokens(2, 3), config=config).dtype == torch.bfloat16
    for name, gradient in gradients(value, tree).items():
        assert gradient.dtype == named_leaves(tree)[name].dtype, name
        assert gradient.isfinite().all(), name


def test_a_fresh_model_knows_nothing():
    config = config_of(initializer_range=0.02)
    tree = params.init(config, seed=0)
    _, metrics = loss(tree, random_tokens(2, 60), config=config)
    for value in (metrics.cross_entropy, metrics.mtp_cross_entropy):
        assert value.item() == pytest.approx(math.log(64), rel=0.02)
    assert metrics.aux_loss.item() == pytest.approx(config.num_experts_per_tok, rel=0.02)


def test_long_text_with_long_memory_stays_finite():
    config = config_of(num_nextn_predict_layers=0)
    tree = trainable(slower(perturbed(config), by=20.0))
    value, _ = loss(tree, random_tokens(1, 1500), config=config)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(value, tree).values())
