"""What a run writes down, and what a token costs."""

import pytest

from q3n_functional import metrics
from tests import runs
from tests.configs import small


def test_what_an_earlier_attempt_wrote_beyond_the_checkpoint_is_dropped(tmp_path):
    with metrics.Log(tmp_path, 0) as log:
        for number in (1, 2, 3):
            log.write(number, {"loss": float(number)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with metrics.Log(tmp_path, 2) as log:
        log.write(3, {"loss": 30.0})
    assert [row["loss"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 30.0]


def test_flops_of_a_token():
    dense = small(num_experts=0, intermediate_size=48, num_nextn_predict_layers=0, num_hidden_layers=2,
                  layer_types=runs.LAYERS, tie_word_embeddings=True)  # fmt: skip
    mlp = 2 * 3 * 32 * 48
    linear = 32 * (16 + 16 + 48 + 48 + 4 + 4) + 4 * (16 + 16 + 48) + 32 * 48
    full = 32 * (64 + 64 + 32 + 32) + 64 * 32
    expected = 2 * (mlp + linear + full + 64 * 32) + 2 * 64 * 100 + 6 * 4 * 8 * 12
    assert metrics.flops_per_token(dense, 100) == 3 * expected
    with_experts = small(num_hidden_layers=1, layer_types=("full_attention",), num_nextn_predict_layers=0)
    one_more = small(num_hidden_layers=1, layer_types=("full_attention",), num_nextn_predict_layers=0,
                     num_experts_per_tok=3)  # fmt: skip
    extra = metrics.flops_per_token(one_more, 8) - metrics.flops_per_token(with_experts, 8)
    assert extra == pytest.approx(3 * 2 * 3 * 32 * 16)
