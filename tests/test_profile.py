"""Where the time of a step goes: all of it accounted for, and to the right regions."""

import json
from types import SimpleNamespace

import pytest
import torch

from q3n_functional import profile
from q3n_functional.config import PRESETS
from tests import runs


def test_a_profile_of_a_small_model(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = profile.profile(runs.config(tmp_path))
    assert {path.name for path in folder.iterdir()} == {"trace.json", "table.txt", "profile.json", "profile.png"}
    assert "no memory snapshot" in caplog.text
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    found = {row["region"]: row for row in json.loads((folder / "profile.json").read_text())["regions"]}
    assert set(found) >= {
        *("projections", "conv", "delta rule", "attention", "router", "experts", "shared expert", "norms", "loss"),
        *("embedding", "optimizer", "elementwise", "not in kernels"),
    }
    assert all(row["ms"] > 0 for name, row in found.items() if name != "not in kernels")
    assert all(found[name]["bytes"] > 0 for name in ("conv", "norms", "optimizer", "embedding"))
    assert all(found[name]["flops"] > 0 for name in ("projections", "delta rule", "attention", "experts", "loss"))
    lines = (folder / "table.txt").read_text().splitlines()
    assert lines[0].split()[:2] == ["region", "ms"]
    assert len(lines) == len(found) + 2


def test_a_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match="profile with --no-cuda-graph"):
        profile.profile(runs.config(tmp_path, "--dtype=bfloat16", "--cuda-graph"))


def event(name, parent=None, micros=1000.0, shapes=(), kernels=()):
    return SimpleNamespace(
        name=name, cpu_parent=parent, self_cpu_time_total=micros, input_shapes=list(shapes),
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
    )  # fmt: skip


def ms(*events, tokens=64):
    found = profile.milliseconds(list(events), PRESETS["qwen3_next_80b_a3b"](), tokens)
    return {region: pytest.approx(value * profile.STEPS) for region, value in found.items()}


def test_events_on_the_host_are_known_by_themselves_or_by_what_called_them():
    rule = event("q3n::gated_delta_rule_backward")
    update = event(profile.OPTIMIZER)
    assert ms(rule, event("aten::mm", rule), update, event("aten::rsqrt", update)) == {
        "delta rule": 2.0, "optimizer": 2.0,
    }  # fmt: skip
    assert ms(event("graph_3_cpp_fused_mul_rsqrt_0")) == {"norms": 1.0}
    assert ms(event("aten::mul")) == {"elementwise": 1.0}
    assert ms(event("aten::_scaled_grouped_mm"), event("aten::_grouped_mm")) == {"experts": 2.0}


def test_products_are_known_by_their_matrix():
    # 8192 x 2048 are q, k and v of linear attention together; forward, and the two products of its gradient.
    for shapes in (([64, 2048], [2048, 8192]), ([64, 8192], [8192, 2048]), ([8192, 64], [64, 2048])):
        assert ms(event("aten::mm", shapes=shapes)) == {"projections": 1.0}
    # 512 x 2048 are keys and values of 13 attention layers, and a matrix of 49 shared experts, whose others are one.
    found = ms(event("aten::mm", shapes=([48, 2048], [2048, 512])))
    assert found == {"projections": 26 / 75, "shared expert": 49 / 75}
    assert ms(event("aten::mm", shapes=([48, 2048], [2048, 1024]))) == {"shared expert": 1.0}


def test_as_many_tokens_as_a_matrix_has_rows():
    joined = event("aten::mm", shapes=([8192, 2048], [2048, 1024]))
    assert ms(joined, tokens=8192) == {"shared expert": 1.0}
    assert ms(event("aten::mm", shapes=([8192, 2048], [2048, 8192])), tokens=8192) == {"projections": 1.0}


def test_kernels_count_where_there_are_any():
    launched = event("aten::mm", shapes=([64, 4096], [4096, 2048]), kernels=[("nvjet", 3000.0)])
    fused = event("CompiledFunction", kernels=[("triton_red_fused_add_mean_rsqrt_1", 2000.0), ("triton_poi_mul", 0.0)])
    assert ms(launched, fused, event("aten::mul")) == {"projections": 3.0, "norms": 2.0}


def test_ceilings_are_rates():
    limits = profile.ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < limits.flops < 1e14
    assert 1e8 < limits.bytes < 1e13
