"""torch.compile of the whole model: one graph for all lengths and all documents, and the values of eager execution."""

import shutil

import pytest
import torch

from q3n_functional import cache as caches
from q3n_functional.model import forward_cached, loss
from q3n_functional.packing import documents, documents_from_mask
from q3n_functional.params import named_leaves
from q3n_functional.rotary import RopeParameters
from tests.configs import perturbed, slower, small, trainable

LENGTHS = (40, 70, 33)


def config_of(**changes):
    """Linear attention, and full attention in the prediction module; both with a mixture of experts."""
    return small(**{"num_hidden_layers": 1, "layer_types": ("linear_attention",), **changes})


def trunk(**changes):
    """A layer of each kind, without the prediction module."""
    kinds = ("linear_attention", "full_attention")
    return config_of(num_hidden_layers=2, layer_types=kinds, num_nextn_predict_layers=0, **changes)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def random_tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def rows(params, tokens, _, **options):
    return loss(params, tokens, **options)


def packed(params, tokens, offsets, **options):
    return loss(params, tokens, documents(offsets, *tokens.shape), **options)


def padded(params, tokens, mask, **options):
    return loss(params, tokens, documents_from_mask(mask), **options)


def offsets_of(length):
    """Other documents, and another number of them, for every length; the tail is repeated."""
    sizes = {40: (7, 0, 13, 17), 70: (70,), 33: (3, 5, 8, 2, 1)}[length]
    ends = torch.tensor((0, *sizes)).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(8 - len(ends))]).int()


def mask_of(length):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length // 3], mask[1, -(length // 4) :] = False, False
    return mask


BATCHES = {
    "rows": (rows, lambda length: (random_tokens(2, length), None)),
    "packed": (packed, lambda length: (random_tokens(1, length), offsets_of(length))),
    "padded": (padded, lambda length: (random_tokens(2, length), mask_of(length))),
}


def assert_compiled_equals_eager(backend, kind, relative=1e-5, lengths=LENGTHS, **options):
    """Over all lengths, with one compilation and one graph; error_on_recompile is on."""
    compute, batch = BATCHES[kind]
    options = {"config": config_of(), "z_loss_coef": 1e-2, **options}
    tree = trainable(slower(perturbed(options["config"])))
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(compute, fullgraph=True, backend=backend)
    for length in lengths:
        tokens, where = batch(length)
        torch._dynamo.mark_dynamic(tokens, 1)
        if kind == "padded":
            torch._dynamo.mark_dynamic(where, 1)
        (actual, actual_parts), (expected, parts) = (f(tree, tokens, where, **options) for f in (compiled, compute))
        torch.testing.assert_close([actual, *actual_parts], [expected, *parts], rtol=relative, atol=0)
        leaves = named_leaves(tree)
        pairs = zip(*(torch.autograd.grad(x, list(leaves.values())) for x in (actual, expected)), strict=True)
        for name, (grad, wanted) in zip(leaves, pairs, strict=True):
            assert wanted.any(), name
            assert (grad - wanted).norm() <= 10 * relative * wanted.norm(), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_padded_rows():
    assert_compiled_equals_eager("aot_eager", "padded")


OPTIONS = {
    "recomputed layers": ("rows", {"recompute": "full", "config": trunk()}),
    "recurrent": (
        "packed",
        {
            "config": trunk(
                **{"linear_attention_use_recurrent": True, "linear_attention_clip_val": 0.4, "num_key_value_heads": 1},
                **{"tie_word_embeddings": True, "norm_topk_prob": False},
            )
        },
    ),
    "dense": (
        "packed",
        {
            "config": trunk(
                **{"num_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 24, "max_position_embeddings": 16},
                rope_parameters=RopeParameters(
                    rope_theta=1e4, rope_type="dynamic", factor=2.0, partial_rotary_factor=0.5
                ),
            )
        },
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case):
    kind, options = OPTIONS[case]
    assert_compiled_equals_eager("aot_eager", kind, **options)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_packed_documents_with_inductor():
    assert_compiled_equals_eager("inductor", "packed")


def test_decoding_compiles_once():
    config = trunk()
    tree, tokens = perturbed(config), random_tokens(2, 12)
    expected, _ = forward_cached(tree, tokens, caches.empty(config, 2, 12, torch.float32), config=config)
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def decode(token, cache):
        return forward_cached(tree, token, cache, config=config)

    cache, logits = caches.empty(config, 2, 12, torch.float32), []
    with torch.no_grad():
        for t in range(12):
            step, cache = decode(tokens[:, t : t + 1], cache)
            logits.append(step)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
