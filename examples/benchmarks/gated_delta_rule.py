"""Time, memory and error of the gated delta rule's kernels on one card.

    python examples/benchmarks/gated_delta_rule.py [--commit HASH] [--out FOLDER]

Prints a table, writes results/gated_delta_rule.json and, where matplotlib is there, a picture beside it. bf16, head
dims 128, keys and queries normalised and gates made inside the kernels; forward alone, and forward plus backward. The
error is that of every output against a float64 recurrence over 2x256 tokens.
"""

import argparse
import json
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from q3n_functional.ops.kernels import gated_delta_rule as kernels
from q3n_functional.ops.kernels.recurrent_gated_delta_rule import recurrent_forward

K = V = 128
CASES = {  # batch, length, key heads, value heads, documents
    "1x8192 16/32": (1, 8192, 16, 32, 0),
    "1x32768 16/32": (1, 32768, 16, 32, 0),
    "8x4096 16/32": (8, 4096, 16, 32, 0),
    "packed 32 in 32768 16/32": (1, 32768, 16, 32, 32),
    "1x32768 8/16": (1, 32768, 8, 16, 0),
    "1x32768 4/8": (1, 32768, 4, 8, 0),
}
SCALARS = (K**-0.5, True, 1.0)
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias")


def inputs(batch: int, length: int, key_heads: int, heads: int, documents: int) -> tuple[Tensor | None, ...]:
    """q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens: gates from weak to strong over the heads."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    q = random(batch, length, key_heads, K)
    k = random(batch, length, key_heads, K) + 0.5 * random(1, 1, key_heads, K)
    v = random(batch, length, heads, V)
    g, beta = random(batch, length, heads), random(batch, length, heads)
    A_log, dt_bias = torch.linspace(-3, 1, heads, device="cuda"), random(heads)
    cu = None
    if documents:
        ends = torch.randperm(length - 1)[: documents - 1].sort().values + 1
        cu = torch.tensor([0, *ends.tolist(), length], dtype=torch.int32, device="cuda")
    return (*(x.bfloat16() for x in (q, k, v, g, beta)), A_log, dt_bias, None, cu)


def forward_and_backward(do: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    o, final, *saved = kernels.forward(*tensors, *SCALARS, 64)
    return o, final, *kernels.backward(do, None, *tensors, *saved, *SCALARS, 64)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor
) -> list[Tensor]:
    """o and the final state, token by token."""
    g, beta = -A_log.exp() * torch.nn.functional.softplus(g + dt_bias), beta.sigmoid()
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    S = q.new_zeros(*v.shape[:1], v.shape[2], K, V)
    out = []
    for t in range(q.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + k[:, t, :, :, None] * u[:, :, None]
        out.append(K**-0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return [torch.stack(out, 1), S]


def errors() -> dict[str, float]:
    tensors = inputs(2, 256, 16, 32, 0)
    do = torch.randn(2, 256, 32, V, device="cuda").bfloat16()
    leaves = [x.double().requires_grad_() for x in tensors[:7] if x is not None]
    o, S = recurrence(*leaves)
    wanted = [o, S, *torch.autograd.grad((o * do.double()).sum(), leaves)]
    found = forward_and_backward(do, tensors)
    return {
        name: float((x.double() - y).norm() / y.norm()) for name, x, y in zip(NAMES, found, wanted, strict=False)
    }  # fmt: skip


def measure(case: str) -> dict[str, tuple[float, str]]:
    batch, length, key_heads, heads, documents = CASES[case]
    tensors = inputs(batch, length, key_heads, heads, documents)
    do = torch.randn(batch, length, heads, V, device="cuda").bfloat16()
    _, _, *saved = kernels.forward(*tensors, *SCALARS, 64)
    saved_bytes = sum(x.nbytes for x in (*saved, *tensors[:5]) if x is not None)
    del saved
    forward_and_backward(do, tensors)
    torch.cuda.reset_peak_memory_stats()
    forward_and_backward(do, tensors)
    peak = torch.cuda.max_memory_allocated()
    fwd = do_bench(lambda: kernels.forward(*tensors, *SCALARS, 64), warmup=20, rep=80, return_mode="median")
    both = do_bench(lambda: forward_and_backward(do, tensors), warmup=20, rep=100, return_mode="median")
    return {
        "fwd_ms": (fwd, "ms"), "fwd_bwd_ms": (both, "ms"), "peak_mib": (peak / 2**20, "MiB"),
        "saved_mib": (saved_bytes / 2**20, "MiB"),
    }  # fmt: skip


def measure_decoding(batch: int) -> dict[str, tuple[float, str]]:
    """A token a sequence, in a CUDA graph, over enough states that none is in the cache."""
    tensors = inputs(batch, 1, 16, 32, 0)[:7]
    states = [torch.randn(batch, 32, K, V, device="cuda") for _ in range(max(1, 256 // batch))]
    run = lambda: [recurrent_forward(*tensors, state, None, *SCALARS) for state in states]  # noqa: E731
    ms = do_bench_cudagraph(run, rep=50, return_mode="median") / len(states)
    return {"ms": (ms, "ms"), "gb_per_s": (2 * states[0].nbytes / ms / 1e6, "GB/s")}


def draw(rows: list[dict[str, object]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for offset, metric in ((-0.2, "fwd_ms"), (0.2, "fwd_bwd_ms")):
        values = [row["value"] for row in rows if row["metric"] == metric]
        axes.bar([x + offset for x in range(len(values))], values, 0.4, label=metric)
    axes.set_xticks(range(len(CASES)), CASES, rotation=20)
    axes.set_ylabel("ms")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    rows = []

    def add(case: str, found: dict[str, tuple[float, str]]) -> None:
        print(f"{case:26s}" + "".join(f"  {name} {value:.4g} {unit}" for name, (value, unit) in found.items()))
        for metric, (value, unit) in found.items():
            rows.append({
                "benchmark": "gated_delta_rule", "case": case, "implementation": "q3n", "metric": metric,
                "value": float(f"{value:.5g}"), "unit": unit, "card": torch.cuda.get_device_name(),
                "commit": options.commit, "versions": versions,
            })  # fmt: skip

    add("2x256 16/32", {f"error_{name}": (error, "") for name, error in errors().items()})
    for case in CASES:
        add(case, measure(case))
    for batch in (1, 32, 128):
        add(f"decode {batch}", measure_decoding(batch))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gated_delta_rule.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, options.out / "gated_delta_rule.png")


if __name__ == "__main__":
    main()
