"""Rotary embedding against transformers' rope utilities, and what no reference has: lengths per document."""

import math
from dataclasses import replace

import pytest
import torch

from q3n_functional.rotary import (
    RopeParameters,
    attention_factor,
    cos_sin,
    inverse_frequencies,
    needs_lengths,
    rotary_dim,
    rotate,
    scaling_fields,
)

pytest.importorskip("transformers")

from transformers import Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding, apply_rotary_pos_emb

HEAD_DIM, LIMIT, ORIGINAL = 32, 256, 64


def rope_parameters(rope_type, partial=0.5, **scaling):
    return RopeParameters(rope_theta=1e4, rope_type=rope_type, partial_rotary_factor=partial, **scaling)


def longrope(partial=0.5, **scaling):
    half = int(HEAD_DIM * partial) // 2
    factors = {
        "short_factor": tuple(1 + 0.1 * i for i in range(half)),
        "long_factor": tuple(2 + 0.5 * i for i in range(half)),
    }
    return rope_parameters("longrope", partial, original_max_position_embeddings=ORIGINAL, **factors, **scaling)


YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "default": rope_parameters("default"),
    "default, whole head": rope_parameters("default", partial=1.0),
    "linear": rope_parameters("linear", factor=3.0),
    "dynamic": rope_parameters("dynamic", factor=2.5),
    "dynamic, whole head": rope_parameters("dynamic", partial=1.0, factor=4.0),
    "yarn": rope_parameters("yarn", **YARN),
    "yarn, quarter": rope_parameters("yarn", partial=0.25, **YARN),
    "yarn, not truncated": rope_parameters("yarn", truncate=False, beta_fast=8.0, beta_slow=0.5, **YARN),
    "yarn, mscale": rope_parameters("yarn", mscale=0.7, mscale_all_dim=1.3, **YARN),
    "yarn, mscale_all_dim 0": rope_parameters("yarn", mscale=0.7, mscale_all_dim=0.0, **YARN),
    "yarn, attention_factor": rope_parameters("yarn", attention_factor=1.5, **YARN),
    "yarn, factor 1": rope_parameters("yarn", factor=1.0, original_max_position_embeddings=LIMIT),
    "yarn, one pair wide": rope_parameters("yarn", beta_fast=1.0, beta_slow=1.0, truncate=False, **YARN),
    "llama3": rope_parameters("llama3", partial=1.0, **LLAMA3),
    "llama3, quarter": rope_parameters("llama3", partial=0.25, **LLAMA3),
    "longrope": longrope(),
    "longrope, factor": longrope(factor=8.0),
    "longrope, attention_factor": longrope(attention_factor=1.25),
    "longrope, whole head": longrope(partial=1.0, factor=1.0),
}


def reference_config(rope):
    scaling = {name: list(v) if isinstance(v, tuple) else v for name, v in scaling_fields(rope).items()}
    base = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    return Qwen3NextConfig(
        head_dim=HEAD_DIM,
        max_position_embeddings=LIMIT,
        partial_rotary_factor=rope.partial_rotary_factor,
        rope_parameters={**base, **scaling},
    )


def reference_frequencies(rope, length):
    """Frequencies and attention factor of transformers for one text of `length` tokens."""
    config = reference_config(rope)
    if rope.rope_type == "default":
        return Qwen3NextRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope.rope_type](config, seq_len=length)


@pytest.mark.parametrize("length", [1, ORIGINAL, ORIGINAL + 1, LIMIT, LIMIT + 1, 1000])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_factor(case, length):
    rope = CASES[case]
    expected, expected_factor = reference_frequencies(rope, length)
    actual = inverse_frequencies(torch.tensor([[length]]), HEAD_DIM, LIMIT, rope)
    assert actual.shape == ((1, 1) if needs_lengths(rope) else ()) + (rotary_dim(HEAD_DIM, rope) // 2,)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.view(-1), expected, rtol=5e-7, atol=0)
    assert attention_factor(LIMIT, rope) == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("length", [1, 70, 300])
@pytest.mark.parametrize("case", CASES)
def test_cosines_and_sines_of_one_document(case, length):
    rope = CASES[case]
    positions = torch.arange(length)[None]
    lengths = torch.full_like(positions, length) if needs_lengths(rope) else None
    cos, sin = cos_sin(positions, lengths, HEAD_DIM, LIMIT, rope)
    assert cos.dtype == sin.dtype == torch.float32
    expected_cos, expected_sin = Qwen3NextRotaryEmbedding(reference_config(rope))(torch.zeros(1), positions)
    # Both halves of the reference are the same; a last-bit difference of a frequency grows with the position.
    tolerance = {"rtol": 0, "atol": 2e-7 * max(1, length)}
    torch.testing.assert_close(torch.cat([cos, cos], -1), expected_cos, **tolerance)
    torch.testing.assert_close(torch.cat([sin, sin], -1), expected_sin, **tolerance)


def test_default_is_bit_equal_to_transformers():
    rope = RopeParameters(rope_theta=1e7)
    positions = torch.tensor([[0, 1, 1000, 262_143]])
    cos, sin = cos_sin(positions, None, 256, 262_144, rope)
    config = Qwen3NextConfig(rope_theta=1e7, partial_rotary_factor=0.25)
    expected_cos, expected_sin = Qwen3NextRotaryEmbedding(config)(torch.zeros(1), positions)
    assert torch.equal(torch.cat([cos, cos], -1), expected_cos)
    assert torch.equal(torch.cat([sin, sin], -1), expected_sin)


@pytest.mark.parametrize("case", ["dynamic", "longrope"])
def test_packed_documents_do_not_see_each_other(case):
    sizes = [3, 0, 300, 70, 1]
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    lengths = torch.cat([torch.full((n,), n) for n in sizes])[None]
    packed = torch.stack(cos_sin(positions, lengths, HEAD_DIM, LIMIT, CASES[case]))
    alone = [
        torch.stack(cos_sin(torch.arange(n)[None], torch.full((1, n), n), HEAD_DIM, LIMIT, CASES[case])) for n in sizes
    ]
    assert torch.equal(packed, torch.cat(alone, dim=2))


def test_a_short_document_has_the_unscaled_frequencies():
    plain = inverse_frequencies(None, HEAD_DIM, LIMIT, CASES["default"])
    dynamic = inverse_frequencies(torch.tensor([[1, LIMIT]]), HEAD_DIM, LIMIT, CASES["dynamic"])
    assert torch.equal(dynamic, plain.expand(1, 2, -1))


@pytest.mark.parametrize("case", ["default", "linear", "dynamic", "yarn", "llama3", "longrope"])
def test_compiles_once_for_all_lengths(case):
    rope, compilations = CASES[case], []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def embed(positions, lengths):
        return cos_sin(positions, lengths, HEAD_DIM, LIMIT, rope)

    torch._dynamo.reset()
    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend=counting)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 100, 400):
            positions = torch.arange(length)[None].expand(2, -1).contiguous()
            lengths = torch.full_like(positions, length)
            assert all(map(torch.equal, compiled(positions, lengths), embed(positions, lengths)))
    assert len(compilations) == 1


def test_rotate_is_the_rotation_of_transformers():
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, HEAD_DIM), torch.randn(2, 7, 1, HEAD_DIM)
    positions = torch.randint(0, 100, (2, 7))
    cos, sin = cos_sin(positions, None, HEAD_DIM, LIMIT, CASES["yarn"])
    expected = apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), unsqueeze_dim=2)
    torch.testing.assert_close(rotate(q, cos, sin), expected[0])
    torch.testing.assert_close(rotate(k, cos, sin), expected[1])
    assert torch.equal(rotate(q, cos, sin)[..., 16:], q[..., 16:])


def test_rotation_of_bf16_is_rounded_once():
    torch.manual_seed(0)
    x = torch.randn(1, 50, 4, HEAD_DIM, dtype=torch.bfloat16)
    cos, sin = cos_sin(torch.arange(50)[None], None, HEAD_DIM, LIMIT, CASES["default"])
    actual = rotate(x, cos, sin)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, rotate(x.float(), cos, sin).bfloat16())


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, HEAD_DIM).expand(1, 40, 1, -1), torch.randn(1, 1, 1, HEAD_DIM).expand(1, 40, 1, -1)
    cos, sin = cos_sin(torch.arange(40)[None], None, HEAD_DIM, LIMIT, CASES["default"])
    scores = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["dynamic", "longrope"])
def test_lengths_are_asked_for(case):
    assert needs_lengths(CASES[case])
    with pytest.raises(ValueError, match=r"lengths_BT is None, but rope_type '(dynamic|longrope)' depends on"):
        cos_sin(torch.arange(3)[None], None, HEAD_DIM, LIMIT, CASES[case])


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        (r"rope_type is 'axial'; supported are default, linear, dynamic, yarn", {"rope_type": "axial"}),
        (r"rope_type 'linear' needs factor; missing: factor", {"rope_type": "linear"}),
        (r"rope_type 'dynamic' needs factor; missing: factor", {"rope_type": "dynamic"}),
        (r"missing: original_max_position_embeddings", {"rope_type": "yarn", "factor": 2.0}),
        (r"missing: .*, low_freq_factor, high_freq_factor", {"rope_type": "llama3", "factor": 2.0}),
        (r"missing: short_factor, long_factor, original", {"rope_type": "longrope"}),
        (r"rope_type 'default' takes no scaling fields; remove factor", {"factor": 2.0}),
        (
            r"rope_type 'linear' takes only factor; remove truncate",
            {"rope_type": "linear", "factor": 2.0, "truncate": False},
        ),
        (r"rope_theta is 1.0; it must be a finite number greater than 1", {"rope_theta": 1.0}),
        (r"rope_theta is inf", {"rope_theta": math.inf}),
        (r"rope_theta is '1e4'", {"rope_theta": "1e4"}),
        (r"partial_rotary_factor is 0", {"partial_rotary_factor": 0}),
        (r"factor is 0.5; it must be a finite number at least 1", {"rope_type": "linear", "factor": 0.5}),
        (r"beta_slow 2 exceeds beta_fast 1", {"rope_type": "yarn", "beta_fast": 1.0, "beta_slow": 2.0, **YARN}),
        (r"beta_fast is 0", {"rope_type": "yarn", "beta_fast": 0, **YARN}),
        (r"mscale is -1", {"rope_type": "yarn", "mscale": -1, **YARN}),
        (r"truncate is 0; it must be true or false", {"rope_type": "yarn", "truncate": 0, **YARN}),
        (
            r"original_max_position_embeddings is 1.5",
            {"rope_type": "yarn", **YARN, "original_max_position_embeddings": 1.5},
        ),
        (r"high_freq_factor is 1.0; it must exceed", {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}),
    ],
)
def test_parameters_that_are_refused(match, fields):
    with pytest.raises(ValueError, match=match):
        RopeParameters(**{"rope_theta": 1e4} | fields)


def test_factor_rows_that_are_refused():
    with pytest.raises(ValueError, match=r"long_factor is \[1.0\]; it must be a tuple"):
        replace(longrope(), long_factor=[1.0])
    with pytest.raises(ValueError, match=r"short_factor\[1\] is -1; it must be a finite number greater than 0"):
        replace(longrope(), short_factor=(1.0, -1))
