"""The whole model against transformers' Qwen3NextForCausalLM: logits, losses, gradients, padding, greedy text, bf16."""

import math

import pytest
import torch
import torch.utils._pytree as pytree

from q3n_functional import cache as caches
from q3n_functional.generate import generate
from q3n_functional.model import forward, forward_cached, loss
from q3n_functional.names import sources
from q3n_functional.packing import IGNORE, documents_from_mask
from q3n_functional.params import named_leaves, spec
from q3n_functional.rotary import RopeParameters
from q3n_functional.sampling import Options
from tests.configs import perturbed, slower, small, trainable

transformers = pytest.importorskip("transformers")

LINEAR, FULL = "linear_attention", "full_attention"


def config_of(**changes):
    """Every kind of layer once, no prediction module (transformers has none), logits of order 1."""
    base = {"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), "num_nextn_predict_layers": 0}
    return small(**{**base, **changes})


def as_state_dict(tree, config):
    """A tree of ours (parameters, or their gradients) under transformers' names and in its shapes."""
    leaves, out = named_leaves(tree), {}
    for name, source in sources(config).items():
        tensor = torch.empty(source.shape, dtype=leaves[source.leaves[0]].dtype)
        for part, leaf in source.pieces(tensor, leaves):
            part.copy_(leaf.detach())
        out[name] = tensor
    for i in filter(config.is_sparse, range(config.num_hidden_layers)):
        experts = f"model.layers.{i}.mlp.experts."
        gate, up, down = (
            torch.stack([out.pop(f"{experts}{e}.{part}_proj.weight") for e in range(config.num_experts)])
            for part in ("gate", "up", "down")
        )
        out |= {f"{experts}gate_up_proj": torch.cat([gate, up], 1), f"{experts}down_proj": down}
    return out


def theirs(tree, config, dtype=torch.float32, **changes):
    settings = {**config.to_json(), "output_router_logits": config.num_experts > 0, **changes}
    model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**settings)).to(dtype).eval()
    state = as_state_dict(tree, config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def random_tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def gradients(value, tree):
    leaves, structure = pytree.tree_flatten(tree)
    return pytree.tree_unflatten(torch.autograd.grad(value, leaves), structure)


def assert_near(actual, expected, relative, name=""):
    """Every element within `relative` of the largest expected one."""
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= relative * size, f"{name}: {error:.2e} of {size:.2e}"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LONGROPE = {
    **{"rope_type": "longrope", "original_max_position_embeddings": 32},
    **{"short_factor": (1.0, 1.1, 1.2, 1.3), "long_factor": (2.0, 3.0, 4.0, 5.0)},
}
DENSE = {"num_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 40}


def rope(partial=0.5, **scaling):
    return {"rope_parameters": RopeParameters(rope_theta=1e4, partial_rotary_factor=partial, **scaling)}


CASES = {
    "as small": {},
    "one value head a key head": {"linear_num_value_heads": 2},
    "three value heads a key head": {"linear_num_value_heads": 6},
    "wider keys than values": {"linear_key_head_dim": 20, "linear_value_head_dim": 8},
    "two taps": {"linear_conv_kernel_dim": 2},
    "multi-query attention": {"num_key_value_heads": 1},
    "multi-head attention": {"num_key_value_heads": 4},
    "some layers dense by index": {"mlp_only_layers": (0,), "intermediate_size": 40},
    "some layers dense by step": {"decoder_sparse_step": 2, "intermediate_size": 40},
    "all dense": DENSE,
    "weights of experts not renormalised": {"norm_topk_prob": False},
    "one expert a token": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8},
    "tied embeddings": {"tie_word_embeddings": True},
    "large epsilon": {"rms_norm_eps": 1e-2},
    "only linear": {"layer_types": (LINEAR, LINEAR)},
    "only full": {"layer_types": (FULL, FULL)},
    "quarter rotated": rope(0.25),
    "linear rope": rope(rope_type="linear", factor=3.0),
    "yarn": rope(**YARN),
    "llama3": rope(**LLAMA3),
    "dynamic": rope(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 20},
    "longrope": rope(**LONGROPE),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_every_gradient(case):
    config = config_of(**CASES[case])
    tree = trainable(slower(perturbed(config)))
    model, tokens = theirs(tree, config), random_tokens(2, 37)
    expected = model(tokens, labels=tokens, use_cache=False)
    assert 0.3 < expected.logits.std() < 10
    assert_near(forward(tree, tokens, config=config), expected.logits, 1e-5)
    total, metrics = loss(tree, tokens, config=config)
    assert total.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    if config.num_experts:
        assert metrics.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    expected.loss.backward()
    actual, named = as_state_dict(gradients(total, tree), config), dict(model.named_parameters())
    assert actual.keys() == named.keys()
    for name, parameter in named.items():
        assert parameter.grad.abs().max() > 0, name
        assert_near(actual[name], parameter.grad, 1e-4, name)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 15, 16, 17, 64, 75])
def test_lengths_around_the_convolution_and_the_chunk(length):
    config = config_of()
    tree, tokens = slower(perturbed(config)), random_tokens(2, length, seed=length)
    with torch.no_grad():
        expected = theirs(tree, config)(tokens).logits
        assert_near(forward(tree, tokens, config=config), expected, 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_slow_decay_over_many_chunks(seed):
    config = config_of()
    tree = slower(perturbed(config, seed), by=8.0)
    tokens = random_tokens(1, 200, seed=seed)
    with torch.no_grad():
        assert_near(forward(tree, tokens, config=config), theirs(tree, config)(tokens).logits, 1e-5)


def mask_of(length, *bounds):
    time = torch.arange(length)
    return torch.stack([(time >= start) & (time < end) for start, end in bounds])


PADDINGS = {
    "left": mask_of(21, (6, 21), (0, 21)),
    "right": mask_of(21, (0, 21), (0, 4)),
    "both": mask_of(21, (3, 17), (1, 20)),
    "one row, left": mask_of(21, (9, 21)),
    "one row, right": mask_of(21, (0, 12)),
}


@pytest.mark.parametrize("case", PADDINGS)
def test_padding(case):
    mask = PADDINGS[case]
    config = config_of(router_aux_loss_coef=0.1)
    tree, tokens = trainable(slower(perturbed(config))), random_tokens(*mask.shape)
    model, documents = theirs(tree, config), documents_from_mask(mask)
    # transformers would let the padding in front of a row predict its first token.
    learnt = mask & torch.cat([mask.new_zeros(len(mask), 1), mask[:, :-1]], 1)
    labels = torch.where(learnt, tokens, IGNORE)
    expected = model(tokens, attention_mask=mask.long(), labels=labels)
    assert_near(forward(tree, tokens, documents, config=config)[mask], expected.logits[mask], 1e-5)
    total, metrics = loss(tree, tokens, documents, config=config)
    assert metrics.num_targets == (labels != IGNORE).sum()
    assert metrics.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    assert total.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    expected.loss.backward()
    actual = as_state_dict(gradients(total, tree), config)
    for name, parameter in model.named_parameters():
        assert_near(actual[name], parameter.grad, 1e-4, name)


def test_greedy_text_and_the_cached_states():
    config = config_of(initializer_range=0.2)
    tree = perturbed(config)
    model, prompt = theirs(tree, config, output_router_logits=False), random_tokens(1, 7)
    model.generation_config.eos_token_id = None
    whole = torch.ones_like(prompt)
    expected = model.generate(prompt, attention_mask=whole, max_new_tokens=24, do_sample=False)[0, 7:].tolist()
    greedy = {"max_new_tokens": 24, "options": Options(temperature=0)}
    actual = list(generate(tree, prompt[0].tolist(), config=config, **greedy))
    assert len(set(expected)) > 3
    assert actual == expected
    with torch.no_grad():
        states = model(prompt, use_cache=True).past_key_values.layers
        _, ours = forward_cached(tree, prompt, caches.empty(config, 1, 7, torch.float32), config=config)
    assert_near(ours.layers[0].recurrent, states[0].recurrent_states[0], 1e-5)
    assert_near(ours.layers[0].conv, states[0].conv_states[0][..., 1:], 1e-5)  # they keep a column more
    assert_near(ours.layers[1].k, states[1].keys.transpose(1, 2), 1e-5)


def relative_error(actual, exact):
    pairs = [(actual[name].detach().double(), exact[name].detach()) for name in exact]
    return math.sqrt(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def results(tree, tokens, config):
    """Logits and gradients by transformers' names."""
    return {"logits": forward(tree, tokens, config=config)}, as_state_dict(
        gradients(loss(tree, tokens, config=config)[0], tree), config
    )


def their_results(tree, tokens, config):
    model = theirs(tree, config, torch.bfloat16)
    out = model(tokens, labels=tokens)
    out.loss.backward()
    return {"logits": out.logits}, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", [CASES["all experts"], {**CASES["all dense"], "linear_num_value_heads": 6}])
def test_bf16_error_is_at_most_that_of_transformers(changes):
    """Against float64 with the same weights, all of which are bf16 numbers; over logits, and over all gradients.

    Where only some experts are taken, rounding of the first layers takes others, and one such case outweighs the rest.
    """
    config, squares = config_of(**changes), torch.zeros(2, 2)
    for seed in range(4):
        rounded = pytree.tree_map(lambda leaf: leaf.bfloat16(), slower(perturbed(config, seed)))
        tokens = random_tokens(2, 70, seed=seed)
        exact = results(trainable(pytree.tree_map(lambda leaf: leaf.double(), rounded)), tokens, config)
        stored = pytree.tree_map(lambda leaf, wanted: leaf.to(wanted.dtype or leaf.dtype), rounded, spec(config))
        ours = results(trainable(stored), tokens, config)
        both = (ours, their_results(rounded, tokens, config))
        squares += torch.tensor([[relative_error(*pair) for pair in zip(r, exact, strict=True)] for r in both]).square()
    ours_squared, their_squared = squares
    assert torch.all(ours_squared.sqrt() <= 1.1 * their_squared.sqrt()), squares.sqrt()
