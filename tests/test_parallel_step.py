"""Every layout trains like one device: losses, norms, gradients and parameters of three steps, in float64."""

import pytest

from tests import parallel_ranks
from tests.parallel_ranks import SHALLOW, Case, launch
from tests.simulated import simulate

# More words than tokens: those travel, and not the table.
MANY = {**SHALLOW, "vocab_size": 1024}
TWO = [
    Case("dp=2"),
    Case("dp=2", MANY),
    Case("cp=2", {**MANY, "tie_word_embeddings": True}),
    Case("ep=2", MANY),
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
FOUR = [
    Case("dp=2,tp=2", SHALLOW),
    Case("replicate=2,dp=2", SHALLOW),
    Case("dp=2,ep=2", MANY),
    Case("cp=4", SHALLOW),
    Case("cp=4", SHALLOW, packed=False),
    Case("ep=2,tp=2", SHALLOW),
    # Three value heads to a key head, half as many key/value heads as ranks.
    Case("tp=4", {**SHALLOW, "linear_num_key_heads": 4, "linear_num_value_heads": 12}),
]
# One key/value head for two tensor parallel ranks; two and three value heads to a key head.
ONE_KEY_HEAD = {**SHALLOW, "num_key_value_heads": 1}
EIGHT = [
    Case("dp=2,cp=2,tp=2", ONE_KEY_HEAD),
    Case("dp=2,ep=2,tp=2", {**ONE_KEY_HEAD, "linear_num_value_heads": 6}),
    Case("cp=2,ep=2,tp=2", {**SHALLOW, "linear_num_value_heads": 6}, sequence=False, recompute="selective"),
    Case("replicate=2,dp=2,cp=2", SHALLOW, recompute="full"),
    Case("replicate=2,cp=2,ep=2", MANY),
]
# Inductor compiles tp=2 in test_parallel_train.
COMPILED = [
    Case(layout, MANY if layout == "dp=2" else SHALLOW, backend="aot_eager") for layout in ("dp=2", "cp=2", "ep=2")
]


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO), (4, FOUR), (2, COMPILED)], ids=["two", "four", "compiled"])
def test_layouts_equal_one_device(ranks, cases):
    errors = launch(ranks, cases)
    wrong = {str(case): value for case, value in zip(cases, errors, strict=True) if not value < 1e-10}
    assert not wrong


@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.mesh)
def test_eight_simulated_ranks_equal_one_device(case):
    parallel_ranks.expected(case)  # once, not by every thread
    assert max(simulate(8, lambda: parallel_ranks.error(case))) < 1e-10
