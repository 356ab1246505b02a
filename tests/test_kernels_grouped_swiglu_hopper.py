"""The Hopper kernels of the experts against float64 and the plain kernels, on the device."""

import pytest
import torch

from tests.test_kernels_grouped_swiglu import assert_matches, build, expected, kernels, outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the kernels are for Hopper"
    ),
]

WIDE = {"width": 512, "inner": 256}
CASES = {
    "one token": {"tokens": 1, "experts": 24},
    "fewer rows than a step": {"tokens": 20},
    "most experts without tokens": {"tokens": 40, "experts": 64, "per_token": 2},
    "several tiles": {"tokens": 900},
    "several steps and tiles of all widths": {"tokens": 700, "width": 768, "inner": 512, "experts": 7},
    "one expert takes all": {"tokens": 300, "only": 3},
    "whole tiles": {"tokens": 256, "per_token": 1, "only": 0},
    "a whole tile and one more": {"tokens": 129, "per_token": 1, "only": 0},
    "the same expert twice": {"tokens": 70, "only": 3, "per_token": 2},
    "many experts": {"tokens": 1500, "experts": 128, "per_token": 10},
    "rows of tokens": {"tokens": 200, "shared": 90, "per_token": 2},
    "columns in slices": {"tokens": 300, "scratch": 1},
}
LAUNCHES = ["down_rows", "hidden_gradient", "input_gradient_rows", "weight_gradients"]


def config(scratch=2**29, **_):
    return kernels().CONFIGS[2]._replace(scratch=scratch)


@pytest.fixture
def through_hopper(monkeypatch):
    """The names of the launches that go through the kernels under test."""
    calls = []
    for module in (kernels().hopper, kernels().hopper_rows):
        for name in {*LAUNCHES} & {*dir(module)}:
            launch = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *args, name=name, launch=launch: (calls.append(name), launch(*args))
            )
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_matches_float64_and_repeats(through_hopper, options, dtype):
    inputs = build(**{**WIDE, **options}, dtype=dtype)
    found = outputs(inputs, config(**options))
    assert_matches(found, expected(inputs), dtype)
    assert sorted({*through_hopper}) == LAUNCHES
    for _ in range(5):
        again, _ = outputs(inputs, config(**options))
        assert all(torch.equal(x, found[0][name]) for name, x in again.items())


def test_real_widths_beside_the_plain_kernels(through_hopper):
    """Sums are made in the same order: all but what hidden's gradient, rounded here, goes into agrees in its bits."""
    inputs = build(tokens=4096, experts=128, per_token=10, width=2048, inner=512, dtype=torch.bfloat16)
    found, _ = outputs(inputs, config())
    assert sorted(through_hopper) == LAUNCHES
    wanted, _ = outputs(inputs, config()._replace(hopper=False))
    assert all(torch.equal(found[name], wanted[name]) for name in ("y", "ddown"))
    for name, x in found.items():
        assert (x.double() - wanted[name]).norm() <= 6e-3 * wanted[name].double().norm(), name


@pytest.mark.parametrize(
    "options",
    [{"width": 320}, {"inner": 384}, {"dtype": torch.float32}, {"strided": True}],
    ids=["width", "inner", "fp32", "strided"],
)
def test_does_not_serve(through_hopper, options):
    inputs = build(**{"tokens": 30, "dtype": torch.bfloat16, **WIDE, **options})
    outputs(inputs, kernels().FP32 if inputs[1].dtype == torch.float32 else config())
    assert "weight_gradients" not in through_hopper
