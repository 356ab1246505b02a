"""Kernels compiled while torch.compile traces: which are asked for, with what, and that no launch compiles again."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from q3n_functional.ops import precompile, registration, rms_norm_gated

pytest.importorskip("triton")

CPU = torch.device("cpu")


@pytest.fixture
def walked(monkeypatch):
    """The walks through launchers: where, and with which tensors."""
    walks = []

    def load(kernel):
        def launcher(*arguments):
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            assert all(isinstance(x, FakeTensor) and x.data_ptr() == 0 for x in tensors)
            assert isinstance(torch.empty(2), FakeTensor)  # what a launcher allocates holds nothing either
            walks.append((kernel, [(tuple(x.shape), x.stride(), x.dtype) for x in tensors]))

        return launcher

    monkeypatch.setattr(registration, "_load", load)
    torch._dynamo.reset()
    yield walks
    torch._dynamo.reset()


def gradients(compile_=None, width=4, dynamic=False):
    def function(x, gate, weight):
        return rms_norm_gated(x, gate, weight).sum()

    if compile_ is not None:
        function = torch.compile(function, fullgraph=True, backend=compile_, dynamic=dynamic)
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(3, 2 * width, generator=generator)[:, ::2].requires_grad_() for _ in range(2))
    leaves = [x, gate, torch.ones(width, requires_grad=True)]
    return torch.autograd.grad(function(*leaves), leaves)


def traced(graph, inputs):
    from torch._dynamo.backends.debugging import aot_eager

    with precompile.kernels(CPU):
        return aot_eager(graph, inputs)


def test_forward_and_backward_are_walked_once_with_what_they_are_called_with(walked):
    compiled = gradients(traced)
    rows, weight = ((3, 4), (8, 2), torch.float32), ((4,), (1,), torch.float32)
    assert ("rms_norm_gated:forward", [rows, rows, weight]) in walked
    names = [kernel for kernel, _ in walked]
    assert sorted(names) == ["rms_norm_gated:backward", "rms_norm_gated:forward"]
    for actual, expected in zip(compiled, gradients(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_nothing_is_walked_outside_or_for_sizes_that_may_be_any(walked):
    gradients("aot_eager")
    gradients(traced, width=6, dynamic=True)
    with precompile.kernels(torch.device("meta")):  # the ops are of another device
        gradients("aot_eager", width=8)
    assert walked == []


def test_a_launcher_that_cannot_walk_is_told_of_and_no_more(monkeypatch, caplog):
    def load(kernel):
        raise RuntimeError(f"no {kernel} without tensors")

    monkeypatch.setattr(registration, "_load", load)
    torch._dynamo.reset()
    with caplog.at_level("INFO", logger="q3n_functional.ops"):
        gradients(traced, width=5)
    assert "q3n::rms_norm_gated is compiled when it first runs" in caplog.text
    assert "no rms_norm_gated:forward without tensors" in caplog.text


class Kernel:
    def __init__(self):
        self.calls = []

    def warmup(self, *arguments, grid, **options):
        self.calls.append(("compile", grid, arguments, options))

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append(("launch", grid, arguments, options))


def test_a_launch_on_a_walk_compiles_and_does_not_run():
    from q3n_functional.ops.kernels.launch import Launcher, launch

    kernel, x, seen = Kernel(), torch.ones(2), []

    def launcher(x):
        seen.append(x)
        launch(kernel, 3)(x, 7, num_warps=2)
        Launcher(kernel)(4, (), (x,), (5,), num_warps=1)

    with precompile.kernels(CPU):
        precompile.walk(launcher, (x,))
        launcher(x)  # a tensor that holds something is no walk
    fake = seen[0]
    launched = [("launch", (3,), (x, 7), {"num_warps": 2}), ("launch", (4,), (x, 5), {"num_warps": 1})]
    walked = [("compile", (3,), (fake, 7), {"num_warps": 2}), ("compile", (4,), (fake, 5), {"num_warps": 1})]
    assert kernel.calls == walked + launched


STEP = """
import threading
from dataclasses import replace

import torch
import triton

from q3n_functional import compiled, params
from q3n_functional.config import PRESETS
from q3n_functional.layers import context

compiled_beside, late = [], []

def listen(src, cache_hit, **rest):
    if not cache_hit and src.name.startswith("_"):  # not Inductor's own
        beside = threading.current_thread().name.startswith("ThreadPoolExecutor")
        (compiled_beside if beside else late).append(src.name)

triton.knobs.compilation.listener = listen
base = PRESETS["qwen3_next_80b_a3b"]()
config = replace(base, num_hidden_layers=1, layer_types=("linear_attention",), num_experts=32, vocab_size=64)
layer = params.init(replace(config, num_nextn_predict_layers=0), 0, torch.bfloat16, "cuda").layers[0]
p = torch.utils._pytree.tree_map(lambda leaf: leaf.detach().requires_grad_(), layer)
x = torch.randn(2, 1024, 2048).cuda().bfloat16().requires_grad_()
shared = context(torch.zeros(2, 1024, dtype=torch.long, device="cuda"), None, None, config)
y, _ = compiled.stages().layer(p, x, shared, config=config, recompute="none")
torch.autograd.grad(y.float().sum(), [x, *torch.utils._pytree.tree_leaves(p)], allow_unused=True)
torch.cuda.synchronize()
print(len(compiled_beside), late)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layer_compiles_its_kernels_beside_the_graph_and_never_again(tmp_path):
    """In a process of its own with nothing compiled yet; then in another, which finds all in one place."""
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
    environment = {**keep, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "HOME": str(tmp_path)}
    run = [sys.executable, "-c", STEP]
    first, second = (
        subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
        for _ in range(2)
    )
    assert int(first.split()[0]) > 15
    assert first.endswith(" []")
    assert second == "0 []"
