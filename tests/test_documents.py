"""Packed and padded batches through the whole model: every document as if it were alone, in float64."""

import pytest
import torch
import torch.utils._pytree as pytree

from q3n_functional.feed_forward import RouterStatistics
from q3n_functional.model import (
    count_targets,
    forward,
    hidden_states,
    load_balancing_loss,
    loss,
    multi_token_prediction,
    next_tokens,
    targets,
)
from q3n_functional.packing import IGNORE, documents, documents_from_mask, lengths
from q3n_functional.params import named_leaves
from q3n_functional.rotary import RopeParameters
from tests.configs import perturbed, slower, small, trainable

LINEAR, FULL = "linear_attention", "full_attention"
DENSE = {"num_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 40}

# Rows, their length, and offsets: documents of one token, shorter than the convolution, empty, and of several chunks.
PACKED = {
    "one stream": (1, 43, (0, 5, 5, 6, 23, 43)),
    "tail of padding": (1, 43, (0, 0, 2, 19, 40, 40, 40)),
    "several rows": (3, 20, (0, 3, 20, 37, 38, 40, 60)),
    "rows with padding at the end": (2, 25, (0, 25, 26, 44)),
    "one document": (1, 33, (0, 33)),
    "nothing but padding": (1, 9, (0, 0)),
}
VARIANTS = {
    "as small": {},
    "dense": DENSE,
    "only linear": {"layer_types": (LINEAR,) * 2},
    "only full": {"layer_types": (FULL,) * 2},
    "token by token": {"linear_attention_use_recurrent": True},
    "clipped": {"linear_attention_clip_val": 0.4},
    "multi-query": {"num_key_value_heads": 1},
    "two taps": {"linear_conv_kernel_dim": 2},
    "dynamic rope": {"max_position_embeddings": 8, "rope_parameters": ("dynamic", {"factor": 2.0})},
    "longrope": {
        "rope_parameters": (
            "longrope",
            {"original_max_position_embeddings": 8, "short_factor": (1.0, 1.2), "long_factor": (3.0, 5.0)},
        )
    },
}


def config_of(**changes):
    """Two layers with slow decays, so that a leak shows; the prediction module is on."""
    if isinstance(changes.get("rope_parameters"), tuple):
        kind, fields = changes["rope_parameters"]
        changes["rope_parameters"] = RopeParameters(rope_theta=100.0, rope_type=kind, **fields)
    return small(**{"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), **changes})


def tree_of(config, dtype=torch.float64):
    return trainable(slower(perturbed(config, dtype=dtype)))


def random_tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def packed(case):
    batch, length, offsets = PACKED[case]
    return random_tokens(batch, length), documents(torch.tensor(offsets, dtype=torch.int32), batch, length)


def pieces(tokens, docs):
    """The non-empty documents, each as a batch of one row, and where they lie in the flattened batch."""
    bounds = zip(docs.cu_seqlens[:-1].tolist(), docs.cu_seqlens[1:].tolist(), strict=True)
    where = [slice(start, end) for start, end in bounds if end > start]
    return [tokens.flatten()[rows][None] for rows in where], where


def gradients(value, tree):
    return dict(zip(named_leaves(tree), torch.autograd.grad(value, pytree.tree_leaves(tree)), strict=True))


def added(trees):
    return {name: sum(tree[name] for tree in trees) for name in trees[0]}


def assert_same(actual, expected, relative=1e-11):
    for name in expected:
        error, size = (actual[name] - expected[name]).abs().max(), expected[name].abs().max()
        assert error <= relative * size, f"{name}: {error:.1e} of {size:.1e}"


def statistics_of(tree, tokens, docs, config):
    """Of every router, the prediction module's with them."""
    h, statistics, _ = hidden_states(tree, tokens, docs, config=config)
    e = tree.embed_tokens[next_tokens(tokens, docs)]
    _, new = multi_token_prediction(tree.mtp, e, h, tokens, docs, config=config)
    return statistics if new is None else RouterStatistics(*map(torch.add, statistics, new))


@pytest.mark.parametrize(
    ("case", "variant"), [(case, "as small") for case in PACKED] + [("one stream", variant) for variant in VARIANTS]
)
def test_packed_documents_are_as_if_alone(case, variant):
    config = config_of(**VARIANTS[variant], router_aux_loss_coef=0.0)
    tree, (tokens, docs) = tree_of(config), packed(case)
    alone, where = pieces(tokens, docs)
    logits = forward(tree, tokens, docs, config=config).flatten(0, 1)
    for piece, rows in zip(alone, where, strict=True):
        assert_same({"logits": logits[rows]}, {"logits": forward(tree, piece, config=config)[0]})
    totals, options = count_targets(tokens, docs), {"config": config, "z_loss_coef": 0.1}
    assert torch.equal(totals, sum((count_targets(piece) for piece in alone), torch.zeros(2)))
    value, metrics = loss(tree, tokens, docs, **options)
    if not alone:
        assert not any((value, *metrics))
        assert not any(grad.any() for grad in gradients(value, tree).values())
        return
    parts = [loss(tree, piece, None, None, totals, **options) for piece in alone]
    assert_same({"loss": value}, {"loss": sum(part for part, _ in parts)})
    for name in ("cross_entropy", "mtp_cross_entropy", "z_loss", "num_targets"):
        assert_same({name: getattr(metrics, name)}, {name: sum(getattr(part, name) for _, part in parts)})
    together, each = gradients(value, tree), [gradients(part, tree) for part, _ in parts]
    assert_same(together, added(each))
    counted = [statistics_of(tree, piece, None, config) for piece in alone]
    pooled = RouterStatistics(*(sum(field) for field in zip(*counted, strict=True)))
    assert_same({"aux": metrics.aux_loss}, {"aux": load_balancing_loss(pooled)})


@pytest.mark.parametrize("variant", ["as small", "token by token", "only linear", "only full"])
@pytest.mark.parametrize("case", ["one stream", "tail of padding", "several rows"])
def test_no_gradient_crosses_a_document(case, variant):
    """Exactly zero. Every token has an embedding of its own, so the embedding's gradient has a row for each token."""
    config = config_of(**VARIANTS[variant], router_aux_loss_coef=0.0)
    tree, (tokens, docs) = tree_of(config), packed(case)
    tokens = torch.arange(1, 1 + tokens.numel()).view(tokens.shape)
    for rows in pieces(tokens, docs)[1]:
        labels = torch.full_like(tokens, IGNORE).flatten()
        labels[rows] = tokens.flatten()[rows]
        value, _ = loss(tree, tokens, docs, labels.view(tokens.shape), config=config, z_loss_coef=0.1)
        reached = gradients(value, tree)["embed_tokens"].abs().sum(1)
        own = torch.zeros(64, dtype=torch.bool)
        own[1 + rows.start : rows.stop] = True  # the last token of a document is only a target
        assert torch.equal(reached > 0, own)


@pytest.mark.parametrize("variant", ["dense", "only linear", "only full", "dynamic rope", "longrope"])
@pytest.mark.parametrize("case", ["one stream", "tail of padding", "rows with padding at the end"])
def test_no_token_changes_another_documents_logits(case, variant):
    """Bit for bit. Dense layers, because a mixture's matrix products have other shapes if other tokens take experts."""
    config = config_of(**{**VARIANTS[variant], **DENSE})
    tree, (tokens, docs) = tree_of(config, torch.float32), packed(case)
    before = forward(tree, tokens, docs, config=config).flatten(0, 1)
    for changed in [*pieces(tokens, docs)[1], slice(int(docs.cu_seqlens[-1]), None)]:
        other = tokens.flatten().clone()
        other[changed] = (other[changed] + 7) % 64
        after = forward(tree, other.view(tokens.shape), docs, config=config).flatten(0, 1)
        same = torch.ones(tokens.numel(), dtype=torch.bool)
        same[changed] = False
        assert torch.equal(after[same], before[same])
        assert same.all() or not torch.equal(after[~same], before[~same])


def test_a_repeated_last_offset_changes_no_bit():
    config = config_of()
    tree, tokens = tree_of(config, torch.float32), random_tokens(1, 40)
    results = []
    for tail in (0, 1, 6):
        offsets = torch.tensor([0, 4, 21, 38] + [38] * tail, dtype=torch.int32)
        value, metrics = loss(tree, tokens, documents(offsets, 1, 40), config=config)
        results.append([value, *metrics, *gradients(value, tree).values()])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("extra", [1, 3, 40])
def test_padding_behind_the_last_document_changes_no_loss_term(extra, seed):
    config = config_of()
    tree, tokens = tree_of(config), random_tokens(1, 30)
    offsets = torch.tensor([0, 11, 30], dtype=torch.int32)
    padded = torch.cat([tokens, random_tokens(1, extra, seed=seed)], 1)
    value, metrics = loss(tree, tokens, documents(offsets, 1, 30), config=config, z_loss_coef=0.1)
    other, others = loss(tree, padded, documents(offsets, 1, 30 + extra), config=config, z_loss_coef=0.1)
    assert min(metrics) > 0
    assert_same({"total": other, **others._asdict()}, {"total": value, **metrics._asdict()})
    assert_same(gradients(other, tree), gradients(value, tree))


def mask_of(length, *bounds):
    time = torch.arange(length)
    return torch.stack([(time >= start) & (time < end) for start, end in bounds])


MASKS = {
    "left": mask_of(24, (5, 24), (0, 24), (23, 24)),
    "right": mask_of(24, (0, 24), (0, 2), (0, 19)),
    "both": mask_of(24, (3, 22), (1, 18), (8, 11)),
    "one row, left": mask_of(24, (9, 24)),
    "one row, right": mask_of(24, (0, 12)),
    "an empty row": mask_of(24, (2, 24), (0, 0), (0, 20)),
    "no padding": mask_of(24, (0, 24), (0, 24)),
}


@pytest.mark.parametrize(
    ("case", "variant"), [(case, "as small") for case in MASKS] + [("right", "dynamic rope"), ("both", "longrope")]
)
def test_padded_rows_are_as_if_unpadded(case, variant):
    mask, config = MASKS[case], config_of(**VARIANTS[variant])
    tree, docs = tree_of(config), documents_from_mask(mask)
    tokens = random_tokens(*mask.shape)
    rows = [tokens[b][mask[b]][None] for b in range(len(mask)) if mask[b].any()]
    lone = documents(torch.tensor([0] + [row.numel() for row in rows]).cumsum(0).int(), 1, int(mask.sum()))
    stream = torch.cat(rows, 1)
    logits, expected = forward(tree, tokens, docs, config=config)[mask], forward(tree, stream, lone, config=config)[0]
    assert_same({"logits": logits}, {"logits": expected})
    value, metrics = loss(tree, tokens, docs, config=config, z_loss_coef=0.1)
    other, others = loss(tree, stream, lone, config=config, z_loss_coef=0.1)
    assert_same({"total": value, **metrics._asdict()}, {"total": other, **others._asdict()})
    assert_same(gradients(value, tree), gradients(other, tree))
    if mask.all():
        plain, _ = loss(tree, tokens, config=config, z_loss_coef=0.1)
        assert_same({"loss": value}, {"loss": plain})


@pytest.mark.parametrize("length", [1, 2])
def test_rows_too_short_for_a_target(length):
    config = config_of(router_aux_loss_coef=0.0)
    tree, tokens = tree_of(config), random_tokens(2, length)
    value, metrics = loss(tree, tokens, config=config, z_loss_coef=0.1)
    assert metrics.num_targets == 2 * (length - 1)
    assert metrics.mtp_cross_entropy == 0
    assert (value > 0) == (length == 2)
    assert all(gradient.isfinite().all() for gradient in gradients(value, tree).values())


@pytest.mark.parametrize("label", [-1, 64])
def test_a_label_that_is_no_token_is_an_error(label):
    config, tokens = config_of(), random_tokens(1, 9)
    labels = tokens.clone()
    labels[0, 4] = label
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
        loss(tree_of(config), tokens, None, labels, config=config)


def test_a_masked_token_inside_a_document_is_read_but_not_learnt():
    config = config_of(router_aux_loss_coef=0.0, num_nextn_predict_layers=0)
    tree, tokens = tree_of(config), random_tokens(1, 12)
    mask = mask_of(12, (2, 11))
    mask[0, 5] = False
    docs = documents_from_mask(mask)
    whole = documents(torch.tensor([0, 2, 11, 12], dtype=torch.int32), 1, 12)
    assert torch.equal(forward(tree, tokens, docs, config=config), forward(tree, tokens, whole, config=config))
    expected = tokens.roll(-1, 1)
    expected[0, [0, 1, 4, 5, 10, 11]] = IGNORE
    assert torch.equal(targets(tokens, docs), expected)


def test_labels_that_are_ignored():
    config = config_of()
    tree, (tokens, docs) = tree_of(config), packed("one stream")
    labels = tokens.clone()
    labels[0, 8:19] = IGNORE
    _, metrics = loss(tree, tokens, docs, labels, config=config)
    logits = forward(tree, tokens, docs, config=config)
    position, last = docs.positions_BT, lengths(docs) - 1
    kept = (position < last) & (labels.roll(-1, 1) != IGNORE)
    each = torch.nn.functional.cross_entropy(logits[kept], tokens.roll(-1, 1)[kept])
    assert metrics.num_targets == kept.sum() == 43 - 4 - 11
    assert_same({"": metrics.cross_entropy}, {"": each})
    h, _, _ = hidden_states(tree, tokens, docs, config=config)
    e = tree.embed_tokens[next_tokens(tokens, docs)]
    h2, _ = multi_token_prediction(tree.mtp, e, h, tokens, docs, config=config)
    kept = (position < last - 1) & (labels.roll(-2, 1) != IGNORE)
    each = torch.nn.functional.cross_entropy((h2 @ tree.lm_head.T)[kept], tokens.roll(-2, 1)[kept])
    assert count_targets(tokens, docs, labels)[1] == kept.sum()
    assert_same({"": metrics.mtp_cross_entropy}, {"": each})


@pytest.mark.parametrize("aux", [0.0, 0.1])
def test_accumulated_micro_batches_add_up_to_the_large_batch(aux):
    """The load-balancing loss is each micro-batch's own: it adds up where the micro-batches route alike."""
    config = config_of(router_aux_loss_coef=aux)
    tree, tokens = tree_of(config), random_tokens(4, 20)
    mask = mask_of(20, (0, 20), (0, 7), (4, 20), (1, 2))
    if aux:
        tokens, mask = tokens[:2].repeat(2, 1), mask[:2].repeat(2, 1)
    total = count_targets(tokens, documents_from_mask(mask))
    value, metrics = loss(tree, tokens, documents_from_mask(mask), config=config, z_loss_coef=0.1)
    halves = [
        loss(tree, tokens[rows], documents_from_mask(mask[rows]), None, total, config=config, z_loss_coef=0.1)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert_same({"": value}, {"": sum(half for half, _ in halves)})
    assert_same({"": metrics.mtp_cross_entropy}, {"": sum(half.mtp_cross_entropy for _, half in halves)})
    assert_same(gradients(value, tree), added([gradients(half, tree) for half, _ in halves]))


def test_documents_of_another_batch_are_refused():
    config = config_of()
    docs = documents(torch.tensor([0, 9], dtype=torch.int32), 1, 9)
    for shape in ((2, 9), (1, 8)):
        with pytest.raises(ValueError, match=rf"a batch of shape \(1, 9\), but tokens have \({shape[0]}, {shape[1]}\)"):
            loss(tree_of(config), random_tokens(*shape), docs, config=config)
