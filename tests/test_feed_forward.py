"""The feed-forward layers against a plain transcription of their definition, in float64, and at their inputs' edges."""

import pytest
import torch

from q3n_functional import params
from q3n_functional.feed_forward import mixture_of_experts, swiglu
from tests.configs import perturbed, small


def config_of(**changes):
    return small(num_hidden_layers=1, layer_types=("linear_attention",), **changes)


def tree_of(config, dtype=torch.float64):
    return perturbed(config, dtype=dtype)


def random_input(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def naive_mixture(p, x, config):
    outputs, assignments, probabilities = [], torch.zeros(config.num_experts), 0
    for x_t in x.flatten(0, 1):
        odds = (p.router @ x_t).softmax(-1)
        chosen = odds.argsort(descending=True)[: config.num_experts_per_tok].tolist()
        total = sum(odds[e] for e in chosen) if config.norm_topk_prob else 1
        experts = [params.SwiGLU(*(leaf[e] for leaf in p.experts)) for e in chosen]
        routed = sum(odds[e] / total * swiglu(expert, x_t) for e, expert in zip(chosen, experts, strict=True))
        outputs.append(routed + torch.sigmoid(p.shared_expert_gate @ x_t) * swiglu(p.shared_expert, x_t))
        assignments[chosen] += 1
        probabilities = probabilities + odds
    return torch.stack(outputs).view(x.shape), assignments, probabilities


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("per_token", [1, 3, 8])
def test_mixture_of_experts(per_token, renormalise):
    config = config_of(num_experts_per_tok=per_token, norm_topk_prob=renormalise)
    p, x = tree_of(config).layers[0].mlp, random_input(2, 11, 32)
    y, statistics = mixture_of_experts(p, x, None, config=config)
    expected, assignments, probabilities = naive_mixture(p, x, config)
    torch.testing.assert_close(y, expected)
    assert statistics.assignments_E.tolist() == assignments.tolist()
    torch.testing.assert_close(statistics.probabilities_E, probabilities)
    assert statistics.tokens == 22


def test_swiglu_is_not_symmetric_in_gate_and_up():
    p, x = tree_of(config_of()).layers[0].mlp.shared_expert, random_input(3, 32)
    gate, up = x @ p.gate.T, x @ p.up.T
    torch.testing.assert_close(swiglu(p, x), (gate * torch.sigmoid(gate) * up) @ p.down.T)
    assert not torch.allclose(swiglu(p, x), swiglu(p._replace(gate=p.up, up=p.gate), x))


def test_the_router_counts_valid_tokens_only():
    config = config_of()
    p, x = tree_of(config).layers[0].mlp, random_input(2, 11, 32)
    valid = torch.arange(22).view(2, 11) % 3 > 0
    _, statistics = mixture_of_experts(p, x, valid, config=config)
    _, assignments, probabilities = naive_mixture(p, x[valid][None], config)
    assert statistics.assignments_E.tolist() == assignments.tolist()
    torch.testing.assert_close(statistics.probabilities_E, probabilities)
    assert statistics.tokens == valid.sum()


def test_experts_without_tokens_have_gradients_of_zero():
    config = config_of()
    p, x = tree_of(config).layers[0].mlp, random_input(1, 30, 32).abs()
    router = p.router.abs()
    router[[2, 5]] *= -1
    experts = params.SwiGLU(*(leaf.clone().requires_grad_() for leaf in p.experts))
    y, statistics = mixture_of_experts(p._replace(router=router, experts=experts), x, None, config=config)
    idle = statistics.assignments_E == 0
    assert idle[[2, 5]].all()
    assert not idle.all()
    for gradient in torch.autograd.grad(y.square().sum(), experts):
        assert torch.equal(gradient.flatten(1).any(1), ~idle)


def test_the_router_works_in_fp32():
    """Of two experts a hundredth of a bf16 unit apart, the better one is taken."""
    config = config_of(num_experts=2, num_experts_per_tok=1)
    p = tree_of(config, torch.bfloat16).layers[0].mlp
    x = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    x[..., 0], x[..., 1] = 1.0, 2**-12
    router = torch.zeros_like(p.router)
    router[:, 0], router[1, 1] = 4.0, 1.0
    _, statistics = mixture_of_experts(p._replace(router=router), x, None, config=config)
    assert statistics.assignments_E.tolist() == [0, 1]
    assert statistics.probabilities_E.dtype == torch.float32
