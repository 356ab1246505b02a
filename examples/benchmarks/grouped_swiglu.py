"""Time, memory and error of the routed experts on one card: our kernels beside torch's grouped products.

    python examples/benchmarks/grouped_swiglu.py [--commit HASH] [--out FOLDER]

Prints a table and writes results/grouped_swiglu.json. bf16, model width 2048, expert width 512, ten experts a token
chosen by random routers, routing weights in fp32; times are medians of forward alone, of forward plus backward to all
inputs, and in CUDA graphs of decoding, where calls take turns among eight batches so that the chosen experts are not
left in the cache. Implementations: q3n; grouped_mm, torch's grouped products over tokens sorted by expert (as
transformers does it); loop, products expert by expert with a wait for the device; limit, dense products of as many
FLOPs, or for decoding the bytes of the chosen experts at the rate of a copy. Peak is what forward plus backward
allocate, gradients included; the error is against float64, over 64 tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import report
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu
from triton.testing import do_bench, do_bench_cudagraph

from q3n_functional.ops import grouped_swiglu

WIDTH, INNER, PER_TOKEN = 2048, 512, 10
CASES = {"8192 512": (8192, 512), "32768 128": (32768, 128)}  # tokens, experts
DECODE = {"decode 1": (1, 512), "decode 32": (32, 512)}
NAMES = ("y", "dx", "dweights", "dgate", "dup", "ddown")
Inputs = tuple[Tensor, ...]
Function = Callable[..., Tensor]


def routing(tokens: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """experts [T, J] and weights [T, J]: the best of random scores, experts liked to different degrees."""
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.randn(tokens, experts, device="cuda", generator=generator)
    scores += 0.3 * torch.randn(experts, device="cuda", generator=generator)
    weights, chosen = scores.softmax(-1).topk(PER_TOKEN)
    return chosen, weights / weights.sum(-1, keepdim=True)


def inputs(tokens: int, experts: int) -> Inputs:
    torch.manual_seed(0)
    shapes = ((experts, INNER, WIDTH), (experts, INNER, WIDTH), (experts, WIDTH, INNER))
    matrices = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02) for shape in shapes]
    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    chosen, weights = routing(tokens, experts)
    return tuple(t.requires_grad_(t.is_floating_point()) for t in (x, chosen, weights, *matrices))


def with_grouped_mm(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    per_token = experts.shape[1]
    chosen, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(len(gate), device=x.device), right=True, out_int32=True)
    rows = x[order // per_token]
    hidden = silu(grouped_mm(rows, gate.mT, offs=ends)) * grouped_mm(rows, up.mT, offs=ends)
    y = grouped_mm(hidden, down.mT, offs=ends) * weights.flatten()[order, None].to(x.dtype)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return y[back].view(*experts.shape, -1).sum(1)


def in_a_loop(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, matrices in enumerate(zip(gate, up, down, strict=True)):
        token, j = torch.where(experts == e)
        rows = x[token]
        hidden = silu(rows @ matrices[0].mT) * (rows @ matrices[1].mT)
        y = y.index_add(0, token, (hidden @ matrices[2].mT) * weights[token, j, None].to(x.dtype))
    return y


IMPLEMENTATIONS: dict[str, Function] = {
    "q3n": functools.partial(grouped_swiglu, impl="triton"),
    "grouped_mm": with_grouped_mm,
    "loop": in_a_loop,
}


def gradients(function: Function, tensors: Inputs, dy: Tensor) -> tuple[Tensor, ...]:
    y = function(*tensors)
    return y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)


def errors(function: Function) -> dict[str, float]:
    tensors = inputs(64, 16)
    dy = torch.randn_like(tensors[0])
    exact = [t.detach().double().requires_grad_() if t.requires_grad else t for t in tensors]
    wanted = gradients(in_a_loop, tuple(exact), dy.double())
    found = gradients(function, tensors, dy)
    return {
        f"error_{name}": float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(NAMES, found, wanted, strict=True)
    }


def measure(function: Function, tensors: Inputs) -> dict[str, float]:
    dy = torch.randn_like(tensors[0])
    before = torch.cuda.memory_allocated()
    gradients(function, tensors, dy)
    torch.cuda.reset_peak_memory_stats()
    gradients(function, tensors, dy)
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = do_bench(lambda: function(*tensors), warmup=20, rep=100, return_mode="median")
    both = do_bench(lambda: gradients(function, tensors, dy), warmup=20, rep=150, return_mode="median")
    return {"fwd_ms": forward, "fwd_bwd_ms": both, "peak_mib": peak / 2**20}


def measure_dense(tokens: int) -> dict[str, float]:
    """Products of as many FLOPs whose rows are not apart; backward is two of each."""
    rows = tokens * PER_TOKEN
    a, b = (torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for n, k in ((rows, WIDTH), (3 * INNER, WIDTH)))
    forward = do_bench(lambda: a @ b.mT, warmup=20, rep=100, return_mode="median")
    return {"fwd_ms": forward, "fwd_bwd_ms": 3 * forward, "tflops": 2 * rows * 3 * INNER * WIDTH / forward / 1e9}


def measure_decoding(function: Function, tensors: Inputs, turns: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    x, _, _, *matrices = (t.detach() for t in tensors)
    run = lambda: [function(x, chosen, weights, *matrices) for chosen, weights in turns]  # noqa: E731
    return {"fwd_ms": do_bench_cudagraph(run, rep=50, return_mode="median") / len(turns)}


def measure_bytes(turns: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median")
    experts = sum(len(chosen.unique()) for chosen, _ in turns) / len(turns)
    return {"fwd_ms": experts * 3 * WIDTH * INNER * 2 / copied}


def case_rows(case: str) -> list[dict[str, Any]]:
    tokens, experts = (CASES | DECODE)[case]
    tensors, rows = inputs(tokens, experts), []
    turns = [routing(tokens, experts, seed) for seed in range(8)]
    for name, function in IMPLEMENTATIONS.items():
        if case in CASES:
            rows += report.measured(case, name, lambda f=function: measure(f, tensors))
        elif name != "loop":  # which waits for the device, so that no graph can hold it
            rows += report.measured(case, name, lambda f=function: measure_decoding(f, tensors, turns))
    rows += report.measured(case, "limit", lambda: measure_dense(tokens) if case in CASES else measure_bytes(turns))
    return rows


def main() -> None:
    parser = report.parser(__doc__)
    options = parser.parse_args()
    rows = []
    for name, function in IMPLEMENTATIONS.items():
        rows += report.measured("64 16", name, lambda f=function: errors(f))
    for case in CASES | DECODE:
        rows += case_rows(case)
        torch.cuda.empty_cache()
    report.write(rows, "grouped_swiglu", options.commit, options.out)


if __name__ == "__main__":
    main()
