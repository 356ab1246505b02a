"""Each layer against a plain transcription of its definition, in float64, and at the edges of its inputs."""

import math

import pytest
import torch
from torch.nn.functional import softplus

from q3n_functional import params
from q3n_functional.cache import LinearState
from q3n_functional.layers import context, gated_attention, gated_delta_net
from q3n_functional.ops.rms_norm import rms_norm
from tests.configs import perturbed, slower, small

LINEAR, FULL = "linear_attention", "full_attention"


def config_of(**changes):
    return small(**{"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), **changes})


def tree_of(config, dtype=torch.float64):
    return slower(perturbed(config, dtype=dtype))


def random_input(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shared(batch, length, config):
    return context(torch.zeros(batch, length, dtype=torch.long), None, None, config)


def test_norm_is_the_identity_on_normalised_rows_when_fresh():
    weight = params.init(config_of(), seed=0).norm
    x = random_input(5, 32, dtype=torch.float32)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), x, rtol=1e-6, atol=0)


def test_norm_does_not_round_a_small_weight_away():
    """In bf16, 1 + 0.003 is 1: adding before widening would lose it."""
    x, weight = random_input(200, 32, dtype=torch.bfloat16), torch.full((32,), 3e-3, dtype=torch.bfloat16)
    with_weight, without = rms_norm(x, weight, 1e-6), rms_norm(x, torch.zeros_like(weight), 1e-6)
    assert with_weight.dtype == torch.bfloat16
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    assert torch.equal(with_weight, exact.bfloat16())
    assert (with_weight.double() / without.double()).mean().item() == pytest.approx(1.003, abs=2e-4)
    wide = [rms_norm(x.float(), w, 1e-6) for w in (weight.fill_(1e-3), torch.zeros_like(weight))]
    torch.testing.assert_close(wide[0] / wide[1], torch.full_like(wide[0], 1 + weight[0].item()), rtol=3e-7, atol=0)


def naive_delta_net(p, x, config):
    """One row [T, D], token by token."""
    c, silu = config, torch.nn.functional.silu
    N, H, K, V = c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim
    state, outputs, window = torch.zeros(H, K, V, dtype=x.dtype), [], []
    weights, taps = torch.cat([p.q, p.k, p.v]), torch.cat([p.conv_q, p.conv_k, p.conv_v])
    for x_t in x:
        window = [*window, weights @ x_t][-c.linear_conv_kernel_dim :]
        mixed = silu(sum(taps[:, -1 - back] * column for back, column in enumerate(reversed(window))))
        q, k, v = mixed.split([N * K, N * K, H * V])
        q, k = (y.view(N, K) / (y.view(N, K).square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        v, z = v.view(H, V), (p.z @ x_t).view(H, V)
        beta = torch.sigmoid(p.b @ x_t).clamp(max=c.linear_attention_clip_val)
        decay = torch.exp(-p.A_log.exp() * softplus(p.a @ x_t + p.dt_bias))
        heads = []
        for h in range(H):
            k_h, q_h = k[h // (H // N)], q[h // (H // N)] / math.sqrt(K)
            S = decay[h] * state[h]
            S = S + torch.outer(k_h, beta[h] * (v[h] - S.T @ k_h))
            state = torch.cat([state[:h], S[None], state[h + 1 :]])
            o = S.T @ q_h
            heads.append(p.norm * o / (o.square().mean() + c.rms_norm_eps).sqrt() * silu(z[h]))
        outputs.append(p.out @ torch.cat(heads))
    return torch.stack(outputs), state


DELTA_NETS = {
    "as small": {},
    "one value head a key head": {"linear_num_value_heads": 2},
    "three value heads a key head": {"linear_num_value_heads": 6},
    "clipped": {"linear_attention_clip_val": 0.4},
    "clipped, token by token": {"linear_attention_clip_val": 0.4, "linear_attention_use_recurrent": True},
    "two taps, large epsilon": {"linear_conv_kernel_dim": 2, "rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("length", [1, 2, 21])
@pytest.mark.parametrize("case", DELTA_NETS)
def test_gated_delta_net(case, length):
    config = config_of(**DELTA_NETS[case])
    p, x = tree_of(config).layers[0].mixer, random_input(2, length, 32)
    y, state = gated_delta_net(p, x, shared(2, length, config), None, config=config)
    for row in range(2):
        expected, expected_state = naive_delta_net(p, x[row], config)
        torch.testing.assert_close(y[row], expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(state.recurrent[row], expected_state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("clip", [1.0, 5.0])
def test_a_clip_that_no_sigmoid_reaches_changes_no_bit(clip):
    p, x = tree_of(config_of()).layers[0].mixer, random_input(1, 20, 32, dtype=torch.float32)
    p = params.LinearAttention(*(leaf.float() for leaf in p))
    first, second = (
        gated_delta_net(p, x, shared(1, 20, config), None, config=config)[0]
        for config in (config_of(linear_attention_clip_val=clip), config_of(linear_attention_clip_val=1e9))
    )
    assert torch.equal(first, second)


def test_the_gradient_of_a_clipped_beta_is_zero():
    config = config_of(linear_attention_clip_val=0.4)
    p, x = tree_of(config).layers[0].mixer, random_input(1, 20, 32)
    b = torch.zeros_like(p.b).requires_grad_()  # beta is 0.5 everywhere
    y, _ = gated_delta_net(p._replace(b=b), x, shared(1, 20, config), None, config=config)
    assert not torch.autograd.grad(y.square().sum(), b)[0].any()


@pytest.mark.parametrize("bias", [-100.0, -20.0, 20.0, 100.0])
@pytest.mark.parametrize("rate", [-20.0, 4.0])
def test_extreme_decays_and_zero_rows_are_finite(bias, rate):
    config = config_of()
    p = params.LinearAttention(*(leaf.float() for leaf in tree_of(config).layers[0].mixer))
    p = p._replace(dt_bias=torch.full_like(p.dt_bias, bias), A_log=torch.full_like(p.A_log, rate))
    p = params.LinearAttention(*(leaf.requires_grad_() for leaf in p))
    x = random_input(1, 40, 32, dtype=torch.float32)
    x[:, :9], x[:, 20:23] = 0, 0  # as left padding: queries, keys and values of zero, whose norm has no slope
    x.requires_grad_()
    y, state = gated_delta_net(p, x, shared(1, 40, config), None, config=config)
    gradients = torch.autograd.grad(y.sum() + state.recurrent.sum(), (x, *p))
    assert all(t.isfinite().all() for t in (y, state.recurrent, *gradients))


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_bf16_model_forgets_at_the_fp32_rate(recurrent):
    """Tokens of zeros leave the state to its decay, in which an error of the rate grows with the length."""
    config = config_of(linear_attention_use_recurrent=recurrent)
    p, length = slower(params.init(config, 0, torch.bfloat16), by=5.5).layers[0].mixer, 200
    state = random_input(1, 4, 8, 12, dtype=torch.float32)
    conv = torch.zeros(1, p.q.shape[0] + p.k.shape[0] + p.v.shape[0], 3, dtype=torch.bfloat16)
    x = torch.zeros(1, length, 32, dtype=torch.bfloat16)
    _, after = gated_delta_net(p, x, shared(1, length, config), LinearState(conv, state), config=config)
    decay = torch.exp(-length * p.A_log.double().exp() * softplus(p.dt_bias.double()))
    torch.testing.assert_close(after.recurrent.double(), decay[:, None, None] * state.double(), rtol=1e-4, atol=0)
    rounded = torch.exp(-length * p.A_log.bfloat16().double().exp() * softplus(p.dt_bias.double()))
    assert (rounded / decay - 1).abs().max() > 1e-3


def naive_attention(p, x, config):
    """One row [T, D], query by query."""
    c, (T, _) = config, x.shape
    half = int(c.head_dim * c.rope_parameters.partial_rotary_factor) // 2
    angle = torch.arange(T)[:, None] / c.rope_parameters.rope_theta ** (torch.arange(half) / half)

    def normalised_and_rotated(weight, norm):
        y = (x @ weight.T).view(T, -1, c.head_dim)
        y = y / (y.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * (1 + norm)
        a, b, cos, sin = y[..., :half], y[..., half : 2 * half], angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, y[..., 2 * half :]], -1)

    q, k = normalised_and_rotated(p.q, p.q_norm), normalised_and_rotated(p.k, p.k_norm)
    v, gate = ((x @ weight.T).view(T, -1, c.head_dim) for weight in (p.v, p.gate))
    rows = []
    for t in range(T):
        heads = []
        for h in range(c.num_attention_heads):
            g = h // (c.num_attention_heads // c.num_key_value_heads)
            scores = (k[: t + 1, g] @ q[t, h] / math.sqrt(c.head_dim)).softmax(0)
            heads.append(scores @ v[: t + 1, g] * torch.sigmoid(gate[t, h]))
        rows.append(p.out @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gated_attention(kv_heads):
    config = config_of(num_key_value_heads=kv_heads)
    p, x = tree_of(config).layers[1].mixer, random_input(2, 13, 32)
    y, _ = gated_attention(p, x, shared(2, 13, config), None, config=config)
    for row in range(2):
        expected = naive_attention(p, x[row], config)
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-6 * expected.abs().max().item())  # fp32 angles


def test_only_the_first_dims_of_a_head_depend_on_the_position():
    config = config_of()
    p, x = tree_of(config).layers[1].mixer, random_input(1, 1, 32).expand(1, 9, -1)
    _, state = gated_attention(p, x, shared(1, 9, config), None, config=config)
    changes = (state.k[0] - state.k[0, :1]).abs().amax((0, 1))
    assert (changes > 1e-12).tolist() == [True] * 4 + [False] * 12
    torch.testing.assert_close(state.v, state.v[:, :1].expand_as(state.v))
