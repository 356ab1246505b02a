"""What a step costs, counted by hand and by torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from q3n_functional import flops, model, params
from q3n_functional.config import PRESETS
from tests import runs
from tests.configs import small


def test_flops_of_a_token():
    dense = small(num_experts=0, intermediate_size=48, num_nextn_predict_layers=0, num_hidden_layers=2,
                  layer_types=runs.LAYERS, tie_word_embeddings=True)  # fmt: skip
    mlp = 2 * 3 * 32 * 48
    linear = 32 * (16 + 16 + 48 + 48 + 4 + 4) + 4 * (16 + 16 + 48) + 32 * 48
    full = 32 * (64 + 64 + 32 + 32) + 64 * 32
    expected = 2 * (mlp + linear + full + 64 * 32) + 2 * 64 * 100 + 6 * 4 * 8 * 12
    assert flops.flops_per_token(dense, 100) == 3 * expected
    with_experts = small(num_hidden_layers=1, layer_types=("full_attention",), num_nextn_predict_layers=0)
    one_more = small(num_hidden_layers=1, layer_types=("full_attention",), num_nextn_predict_layers=0,
                     num_experts_per_tok=3)  # fmt: skip
    extra = flops.flops_per_token(one_more, 8) - flops.flops_per_token(with_experts, 8)
    assert extra == pytest.approx(3 * 2 * 3 * 32 * 16)


def test_products_are_what_torch_counts():
    # A dense model of full attention: all of its products are torch's, but attention's and the loss's own.
    config = small(num_hidden_layers=2, layer_types=("full_attention",) * 2, num_experts=0, intermediate_size=48,
                   num_nextn_predict_layers=0)  # fmt: skip
    tree, tokens = params.init(config, 0), torch.randint(64, (2, 24))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward(tree, tokens, config=config)
    mm = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    counted = flops.costs(config, 48, 24)
    assert 3 * mm == sum(counted[r].flops for r in ("projections", "dense feed-forward", "loss"))


def test_regions_of_the_large_model():
    config = PRESETS["qwen3_next_80b_a3b"]()
    counted = flops.costs(config, 8192, 4096)
    assert set(counted) == {
        *("projections", "conv", "delta rule", "attention", "router", "experts", "shared expert", "norms", "loss"),
        "embedding",
    }
    # 3.9 B active parameters with the prediction module's, less the embedding, six operations each.
    products = sum(cost.flops for name, cost in counted.items() if name not in ("delta rule", "attention"))
    assert products / 8192 / 6 == pytest.approx(3.9e9, rel=0.03)
    assert counted["delta rule"].flops == 8192 * 3 * 36 * 6 * 32 * 128 * 128
    # Every expert's three matrices are read twice and their gradients written, whatever the number of tokens.
    assert counted["experts"].bytes > 2 * 3 * 49 * 512 * 3 * 512 * 2048
    assert flops.costs(config, 1, 4096)["experts"].bytes > 0.9 * counted["experts"].bytes


def test_the_optimizer_moves_its_state():
    config = small()
    assert flops.optimizer_cost(config).bytes == params.count(config) * 32
    assert flops.optimizer_cost(config, 2, 2).bytes == params.count(config) * 20
