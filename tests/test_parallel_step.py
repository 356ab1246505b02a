"""Every layout trains like one device: losses, norms, gradients and parameters of three steps, in float64."""

import pytest

from tests.parallel_ranks import MUTATIONS, Case, launch

TWO = [
    Case("dp=2"),
    Case("dp=2", packed=False, recompute="selective"),
    Case("replicate=2"),
    Case("tp=2"),
    Case("tp=2", packed=False, sequence=False),
    Case("tp=2", {"num_experts": 0, "intermediate_size": 24, "tie_word_embeddings": True}),
    Case("cp=2"),
    Case("cp=2", {"linear_attention_clip_val": 0.7}, packed=False),
    Case("ep=2"),
    Case("ep=2", packed=False, recompute="full"),
]
SHALLOW = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
FOUR = [
    Case("dp=2,tp=2", SHALLOW),
    Case("replicate=2,dp=2", SHALLOW),
    Case("cp=4", SHALLOW),
    Case("cp=4", SHALLOW, packed=False),
    Case("cp=2,tp=2", SHALLOW),
    Case("cp=2,tp=2", SHALLOW, sequence=False),
    Case("dp=2,cp=2", SHALLOW),
    Case("dp=2,ep=2", SHALLOW),
    Case("ep=2,tp=2", SHALLOW),
    Case("cp=2,ep=2", SHALLOW),
    # Three value heads to a key head, half as many key/value heads as ranks.
    Case("tp=4", {**SHALLOW, "linear_num_key_heads": 4, "linear_num_value_heads": 12}),
]
COMPILED = [Case(layout, SHALLOW, backend="aot_eager") for layout in ("dp=2", "tp=2", "cp=2", "ep=2")]


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO), (4, FOUR), (2, COMPILED)], ids=["two", "four", "compiled"])
def test_layouts_equal_one_device(ranks, cases):
    errors = launch(ranks, cases)
    wrong = {str(case): value for case, value in zip(cases, errors, strict=True) if not value < 1e-10}
    assert not wrong


def test_each_reduction_is_needed():
    cases = [
        *(Case(layout, mutation="parameters are not summed") for layout in ("replicate=2", "tp=2", "ep=2")),
        *(Case(layout, mutation="gathers are not reduced") for layout in ("tp=2", "cp=2")),
        Case("tp=2", sequence=False, mutation="a sum's gradient is not summed"),
        *(Case(layout, mutation="statistics are local") for layout in ("dp=2", "cp=2")),
        Case("dp=2", mutation="the norm is local"),
    ]
    assert {case.mutation for case in cases} == set(MUTATIONS)
    errors = launch(2, cases)
    unnoticed = [str(case) for case, value in zip(cases, errors, strict=True) if value < 1e-6]
    assert not unnoticed
