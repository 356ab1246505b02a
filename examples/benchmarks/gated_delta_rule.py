"""The gated delta rule on one card: our op, FlashQLA and flash-linear-attention in turn, on the same inputs.

    python examples/benchmarks/gated_delta_rule.py [--peers flash_qla,fla] [--cases 0,1] [--commit HASH] [--out FOLDER]

Prints a table, writes results/gated_delta_rule.json and, where matplotlib is there, a picture beside it. bf16, head
dims 128. Our op is given projections and normalises keys and queries, makes the gates, and differentiates both; the
peers are given what that comes to (keys and queries of length one, log-decays and betas in fp32), and their time for
it is left out. Times are medians of forward alone, and of forward plus backward to all inputs, through autograd; those
of graph_ are of CUDA graphs, so without the host. Peak is what forward plus backward allocate beyond the inputs,
gradients included; saved is what is left between them. The error is that of every output against a float64 recurrence
over 2x256 tokens, each on the inputs that it is given.

A peer that is not installed is left out. flash-linear-attention alone refuses backward on Hopper with Triton 3.4 to
3.7.0: install TileLang beside it, and keep it from handing over to FlashQLA (FLA_FLASH_QLA=0, set here).
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")

import report
import torch
from torch import Tensor
from torch.nn.functional import softplus
from triton.testing import do_bench, do_bench_cudagraph

from q3n_functional.ops import gated_delta_rule, recurrent_gated_delta_rule

K = V = 128
CASES = {  # batch, length, key heads, value heads, documents
    "1x8192 16/32": (1, 8192, 16, 32, 0),
    "1x32768 16/32": (1, 32768, 16, 32, 0),
    "8x4096 16/32": (8, 4096, 16, 32, 0),
    "packed 32 in 32768 16/32": (1, 32768, 16, 32, 32),
    "1x32768 8/16": (1, 32768, 8, 16, 0),
    "1x32768 4/8": (1, 32768, 4, 8, 0),
    "1x4096 16/32": (1, 4096, 16, 32, 0),
    "1x131072 16/32": (1, 131072, 16, 32, 0),
    "1x1048576 4/8": (1, 1048576, 4, 8, 0),
}
NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")
Rule = Callable[..., Tensor]  # of q, k, v, g, beta and cu_seqlens


def raw_inputs(batch: int, length: int, key_heads: int, heads: int, documents: int) -> tuple[list[Tensor], Any, Any]:
    """q, k, v, a, b in bf16; A_log and dt_bias from weak to strong over the heads; cu_seqlens or None."""
    torch.manual_seed(0)
    sizes = ((key_heads, K), (key_heads, K), (heads, V), (heads,), (heads,))
    tensors = [torch.randn(batch, length, *size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    tensors[1] += 0.5 * torch.randn(1, 1, key_heads, K, device="cuda", dtype=torch.bfloat16)
    gates = torch.linspace(-3, 1, heads, device="cuda"), torch.randn(heads, device="cuda")
    if not documents:
        return tensors, gates, None
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(0))[: documents - 1] + 1
    return tensors, gates, torch.tensor([0, *cuts.sort().values.tolist(), length], dtype=torch.int32, device="cuda")


def activated(tensors: list[Tensor], gates: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What the rule itself takes: unit keys and queries, log-decays and betas."""
    q, k, v, a, b = tensors
    precise = torch.promote_types(a.dtype, torch.float32)
    A_log, dt_bias = (x.to(precise) for x in gates)
    q, k = ((x.to(precise) * (x.to(precise).square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) for x in (q, k))
    return [q, k, v, -A_log.exp() * softplus(a.to(precise) + dt_bias), b.to(precise).sigmoid()]


def ours(gates: tuple[Tensor, Tensor]) -> Rule:
    options: dict[str, Any] = {"qk_l2norm": True, "A_log": gates[0], "dt_bias": gates[1], "beta_scale": 1.0}
    return lambda *tensors, cu: gated_delta_rule(*tensors, None, cu, **options, impl="triton")[0]


def load_peer(name: str) -> Rule | None:
    try:
        if name == "fla":
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule
        else:
            from flash_qla import chunk_gated_delta_rule as rule
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return None
    return lambda q, k, v, g, beta, cu: rule(q=q, k=k, v=v, g=g, beta=beta, cu_seqlens=cu)[0]


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu: None = None) -> Tensor:
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    S = q.new_zeros(v.shape[0], v.shape[2], K, V)
    out = []
    for t in range(q.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + k[:, t, :, :, None] * u[:, :, None]
        out.append(K**-0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(out, 1)


def gradients(rule: Rule, tensors: list[Tensor], do: Tensor, cu: Tensor | None) -> list[Tensor]:
    o = rule(*tensors, cu=cu)
    return [o, *torch.autograd.grad(o, tensors, do)]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def errors(rule: Rule, tensors: list[Tensor], exact: Rule) -> dict[str, float]:
    do = torch.randn_like(tensors[2])
    wanted = gradients(exact, leaves([x.double() for x in tensors]), do.double(), None)
    found = gradients(rule, leaves(tensors), do, None)
    return {
        f"error_{name}": float((x.detach().double() - y.detach()).norm() / y.detach().norm())
        for name, x, y in zip(NAMES, found, wanted, strict=True)
    }


def measure(rule: Rule, tensors: list[Tensor], cu: Tensor | None) -> dict[str, float]:
    tensors = leaves(tensors)
    do = torch.randn_like(tensors[2])
    gradients(rule, tensors, do, cu)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = rule(*tensors, cu=cu)
    saved = torch.cuda.memory_allocated() - before
    torch.autograd.grad(o, tensors, do)
    peak = torch.cuda.max_memory_allocated() - before
    del o
    with torch.no_grad():
        forward = do_bench(lambda: rule(*tensors, cu=cu), warmup=20, rep=80, return_mode="median")
    both = do_bench(lambda: gradients(rule, tensors, do, cu), warmup=20, rep=120, return_mode="median")
    return {"fwd_ms": forward, "fwd_bwd_ms": both, "peak_mib": peak / 2**20, "saved_mib": saved / 2**20}


def measure_graphs(rule: Rule, tensors: list[Tensor], cu: Tensor | None) -> dict[str, float]:
    """As a compiled step captures them."""
    tensors = leaves(tensors)
    do = torch.randn_like(tensors[2])
    with torch.no_grad():
        forward = do_bench_cudagraph(lambda: rule(*tensors, cu=cu), rep=40, return_mode="median")
    both = do_bench_cudagraph(lambda: gradients(rule, tensors, do, cu), rep=60, return_mode="median")
    return {"graph_fwd_ms": forward, "graph_fwd_bwd_ms": both}


def measure_decoding(batch: int) -> dict[str, float]:
    """A token a sequence, in a CUDA graph, over so many states that none is in the cache."""
    tensors, gates, _ = raw_inputs(batch, 1, 16, 32, 0)
    options: dict[str, Any] = {"qk_l2norm": True, "A_log": gates[0], "dt_bias": gates[1], "beta_scale": 1.0}
    states = [torch.randn(batch, 32, K, V, device="cuda") for _ in range(max(1, 256 // batch))]
    run = lambda: [recurrent_gated_delta_rule(*tensors, state, **options, impl="triton") for state in states]  # noqa: E731
    with torch.no_grad():
        ms = do_bench_cudagraph(run, rep=50, return_mode="median") / len(states)
    return {"ms": ms, "gb_per_s": 2 * states[0].nbytes / ms / 1e6}


def measure_first_call() -> dict[str, float]:
    """Forward and backward in a process of its own that finds no compiled kernel; its imports are left out."""
    code = (
        "import time, torch, gated_delta_rule as b; raw, gates, cu = b.raw_inputs(1, 4096, 16, 32, 0); "
        "begin = time.perf_counter(); b.gradients(b.ours(gates), b.leaves(raw), torch.randn_like(raw[2]), cu); "
        "torch.cuda.synchronize(); print(time.perf_counter() - begin)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", code]
        process = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    process.check_returncode()
    return {"s": float(process.stdout.split()[-1])}


def case_rows(case: str, peers: dict[str, Rule]) -> report.Rows:
    raw, gates, cu = raw_inputs(*CASES[case])
    tensors, offsets = activated(raw, gates), None if cu is None else cu.long()
    rows: report.Rows = []
    for name, rule in {"q3n": ours(gates), **peers}.items():
        given = (raw, cu) if name == "q3n" else (tensors, offsets)
        for run in (measure, measure_graphs):
            rows += report.measured(case, name, lambda rule=rule, given=given, run=run: run(rule, *given))
    return rows


def error_rows(peers: dict[str, Rule]) -> report.Rows:
    raw, gates, _ = raw_inputs(2, 256, 16, 32, 0)
    exact: Rule = lambda *tensors, cu: recurrence(*activated(list(tensors), gates))  # noqa: E731
    rows = report.measured("2x256 16/32", "q3n", lambda: errors(ours(gates), raw, exact))
    tensors = activated(raw, gates)
    for name, rule in peers.items():
        rows += report.measured("2x256 16/32", name, lambda rule=rule: errors(rule, tensors, recurrence))
    return rows


def draw(rows: report.Rows, path: Path) -> None:
    found = report.by_implementation(rows, "graph_fwd_bwd_ms")
    tokens = {case: batch * length for case, (batch, length, *_) in CASES.items()}
    by_token = {name: {case: 1e6 * ms / tokens[case] for case, ms in each.items()} for name, each in found.items()}
    if by_token:
        report.bars(by_token, "forward and backward in a CUDA graph, ns a token", path)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--peers", default="flash_qla,fla", help="of flash_qla, fla; empty for none")
    parser.add_argument("--cases", default="", help="numbers of the cases, all where empty")
    options = parser.parse_args()
    peers = {name: rule for name in filter(None, options.peers.split(",")) if (rule := load_peer(name))}
    cases = [list(CASES)[int(n)] for n in options.cases.split(",")] if options.cases else list(CASES)
    rows = report.measured("first call", "q3n", measure_first_call) + error_rows(peers)
    for batch in (1, 32, 128):
        rows += report.measured(f"decode {batch}", "q3n", lambda batch=batch: measure_decoding(batch))
    for case in cases:
        rows += case_rows(case, peers)
        report.write(rows, "gated_delta_rule", options.commit, options.out)  # a peer may take minutes for a shape
    draw(rows, options.out / "gated_delta_rule.png")


if __name__ == "__main__":
    main()
