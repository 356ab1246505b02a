"""The short convolution and the norms: our kernels, the PyTorch reference, and a copy of the same bytes.

    python examples/benchmarks/short_ops.py            # table, and examples/benchmarks/results/short_ops.json
    python examples/benchmarks/short_ops.py --sweep    # launch configurations of the kernels, table only

Times are medians by CUDA events, of forward and of forward and backward together; errors are the largest one relative
to the largest entry of the float64 reference, on the first 1024 tokens. A case that fails leaves its error's text. The
norm in front of a block has a kernel for backward alone; its forward is compiled, and its reference is its formula,
differentiated and compiled by torch.
"""

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from q3n_functional.ops.causal_conv import _backward as conv_backward_reference
from q3n_functional.ops.causal_conv import _forward as conv_forward_reference
from q3n_functional.ops.kernels import causal_conv, rms_norm, rms_norm_gated
from q3n_functional.ops.rms_norm import _backward as pre_norm_backward_reference
from q3n_functional.ops.rms_norm import rms_norm as norm_in_front
from q3n_functional.ops.rms_norm_gated import _backward as norm_backward_reference
from q3n_functional.ops.rms_norm_gated import _forward as norm_forward_reference

RESULTS = Path(__file__).parent / "results" / "short_ops.json"
DTYPE = torch.bfloat16
EPS = 1e-6
Row = dict[str, Any]


class Case(NamedTuple):
    """One op on one shape: forward and backward of our kernels and of the reference, and the bytes that they move."""

    name: str
    kernel: tuple[Callable[[], Any], Callable[[], Any]]
    reference: tuple[Callable[[], Any], Callable[[], Any]]
    tensor_bytes: int  # of one activation
    moves: tuple[int, int]  # activations that forward, and backward, read or write
    check: Callable[[], dict[str, float]]


def conv_inputs(batch: int, length: int, documents: int) -> list[Any]:
    """dy, dfinal_state, x, weight, initial_state, cu_seqlens at 8192 channels and 4 taps."""
    x, dy = (torch.randn(batch, length, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    weight = torch.randn(8192, 4, device="cuda", dtype=DTYPE)
    cu = None
    if documents:
        cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(0))[: documents - 1] + 1
        ends = [0, *cuts.sort().values.tolist(), length]
        cu = torch.tensor(ends, dtype=torch.int32, device="cuda")
    return [dy, None, x, weight, None, cu]


def conv_case(batch: int, length: int, documents: int = 0) -> Case:
    inputs = conv_inputs(batch, length, documents)
    _, _, x, weight, _, cu = inputs

    def check() -> dict[str, float]:
        small = [t[:1, :1024] if t is not None and t.ndim == 3 else t for t in inputs]
        if cu is not None:
            small[5] = cu.clamp(max=1024)
        actual = (*causal_conv.forward(*small[2:]), *causal_conv.backward(*small))
        wide = [t.double() if t is not None and t.is_floating_point() else t for t in small]
        expected = (*conv_forward_reference(*wide[2:]), *conv_backward_reference(*wide))
        return errors(("y", "final_state", "dx", "dweight"), actual, expected)

    return Case(
        f"conv {f'packed {documents} in {length}' if documents else f'{batch}x{length}'}",
        (lambda: causal_conv.forward(x, weight, None, cu), lambda: causal_conv.backward(*inputs)),
        (lambda: conv_forward_reference(x, weight, None, cu), lambda: conv_backward_reference(*inputs)),
        x.nbytes,
        (2, 3),
        check,
    )


def norm_case(tokens: int) -> Case:
    dy, x, gate = (torch.randn(1, tokens, 32, 128, device="cuda", dtype=DTYPE) for _ in range(3))
    weight = torch.randn(128, device="cuda")

    def check() -> dict[str, float]:
        small = [t[:, :1024] for t in (dy, x, gate)]
        actual = (rms_norm_gated.forward(*small[1:], weight, EPS), *rms_norm_gated.backward(*small, weight, EPS))
        wide = [t.double() for t in (*small, weight)]
        expected = (norm_forward_reference(*wide[1:], EPS), *norm_backward_reference(*wide, EPS))
        return errors(("y", "dx", "dgate", "dweight"), actual, expected)

    return Case(
        f"norm {tokens}",
        (
            lambda: rms_norm_gated.forward(x, gate, weight, EPS),
            lambda: rms_norm_gated.backward(dy, x, gate, weight, EPS),
        ),
        (
            lambda: norm_forward_reference(x, gate, weight, EPS),
            lambda: norm_backward_reference(dy, x, gate, weight, EPS),
        ),
        x.nbytes,
        (3, 5),
        check,
    )


def pre_norm_case(tokens: int) -> Case:
    dy, dresidual, x = (torch.randn(tokens, 2048, device="cuda", dtype=DTYPE) for _ in range(3))
    weight = torch.randn(2048, device="cuda", dtype=DTYPE)
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    forward = torch.compile(lambda x, weight: (x + 0, norm_in_front(x, weight, EPS)))
    outputs = forward(*leaves)

    def check() -> dict[str, float]:
        small = [t[:1024] for t in (dy, dresidual, x)]
        actual = rms_norm.backward(*small, weight, EPS)
        expected = pre_norm_backward_reference(*(t.double() for t in (*small, weight)), EPS)
        return errors(("dx", "dweight"), actual, expected)

    return Case(
        f"norm in front of a block {tokens}",
        (lambda: forward(x, weight), lambda: rms_norm.backward(dy, dresidual, x, weight, EPS)),
        (
            lambda: forward(x, weight),
            lambda: torch.autograd.grad(outputs, leaves, (dresidual, dy), retain_graph=True),
        ),
        x.nbytes,
        (3, 4),
        check,
    )


def errors(names: tuple[str, ...], actual: Any, expected: Any) -> dict[str, float]:
    pairs = zip(names, actual[: len(names)], expected[: len(names)], strict=True)
    return {n: ((a.double() - e).abs().max() / e.abs().max()).item() for n, a, e in pairs}


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of `run` on the device."""
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_milliseconds(num_bytes: int) -> float:
    """A copy that reads and writes `num_bytes` in all."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), 30)


def both(functions: tuple[Callable[[], Any], Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for function in functions:
            function()

    return run


def measure(make: Callable[[], Case], label: str) -> list[Row]:
    """All rows of one case; what fails leaves a row with its error."""
    rows: list[Row] = []
    try:
        case = make()
    except Exception:
        return [{"case": label, "implementation": "q3n", "metric": "failure", "value": traceback.format_exc()}]

    def row(implementation: str, metric: str, unit: str, value: Callable[[], float]) -> None:
        try:
            torch.cuda.synchronize()
            rows.append(
                {"case": case.name, "implementation": implementation, "metric": metric, "value": value(), "unit": unit}
            )
        except Exception:
            rows.append(
                {"case": case.name, "implementation": implementation, "metric": f"{metric} failure",
                 "value": traceback.format_exc(limit=-3)}
            )  # fmt: skip

    try:
        rows += [
            {"case": case.name, "implementation": "q3n", "metric": f"error_{k}", "value": v, "unit": "1"}
            for k, v in case.check().items()
        ]
    except Exception:
        rows.append({"case": case.name, "implementation": "q3n", "metric": "error failure",
                     "value": traceback.format_exc(limit=-3)})  # fmt: skip
    forward, backward = case.moves
    row("q3n", "fwd_ms", "ms", lambda: milliseconds(case.kernel[0], 30))
    row("q3n", "bwd_ms", "ms", lambda: milliseconds(case.kernel[1], 30))
    row("q3n", "fwd_bwd_ms", "ms", lambda: milliseconds(both(case.kernel), 30))
    row("limit", "fwd_ms", "ms", lambda: copy_milliseconds(case.tensor_bytes * forward))
    row("limit", "bwd_ms", "ms", lambda: copy_milliseconds(case.tensor_bytes * backward))
    row("limit", "fwd_bwd_ms", "ms", lambda: copy_milliseconds(case.tensor_bytes * (forward + backward)))
    row("reference", "fwd_ms", "ms", lambda: milliseconds(case.reference[0], 5))
    row("reference", "fwd_bwd_ms", "ms", lambda: milliseconds(both(case.reference), 5))
    return rows


CASES: dict[str, Callable[[], Case]] = {
    "conv 1x32768": lambda: conv_case(1, 32768),
    "conv 8x4096": lambda: conv_case(8, 4096),
    "conv packed 32 in 32768": lambda: conv_case(1, 32768, 32),
    "conv packed 1024 in 32768": lambda: conv_case(1, 32768, 1024),
    "norm 32768": lambda: norm_case(32768),
    "norm in front of a block 8192": lambda: pre_norm_case(8192),
}


def stamp(rows: list[Row]) -> list[Row]:
    """The rows with what they hold for."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    where = {"card": torch.cuda.get_device_name(), "commit": run.stdout.strip() or "unknown", "versions": versions}
    return [{"benchmark": "short_ops", **row, **where} for row in rows]


def table(rows: list[Row]) -> str:
    lines = [f"{'case':28}{'implementation':16}{'metric':22}value"]
    limits = {(r["case"], r["metric"]): r["value"] for r in rows if r["implementation"] == "limit"}
    for r in rows:
        value = r["value"]
        limit = limits.get((r["case"], r["metric"]))
        share = ""
        if isinstance(value, float):
            share = f"   {limit / value:.0%} of a copy" if isinstance(limit, float) else ""
            value = f"{value:.4g}"
        lines.append(f"{r['case']:28}{r['implementation']:16}{r['metric']:22}{value}{share}")
    return "\n".join(lines)


CONV_FORWARDS = [(512, 8, 4), (256, 8, 2), (1024, 8, 8), (512, 4, 4), (512, 16, 4), (512, 8, 2), (512, 4, 2)]
CONV_BACKWARDS = [(512, 8, 4), (256, 8, 2), (1024, 8, 8), (512, 4, 4), (256, 8, 4), (512, 8, 8), (512, 4, 2)]
NORM_FORWARDS = [(1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (1024, 1), (2048, 2)]
PRE_NORM_BACKWARDS = [256, 512, 1024, 2048]
NORM_BACKWARDS = [(1024, 4), (2048, 4), (4096, 8), (1024, 2), (512, 1), (4096, 4)]


def sweep() -> None:
    """Times of other launch configurations, to choose the ones that the kernels name."""
    sms = causal_conv.NUM_SMS
    inputs = conv_inputs(1, 32768, 32)
    for shape, programs in itertools.product(CONV_FORWARDS, (16, 32, 64)):
        conv = causal_conv.Config(*shape, sms * programs)
        attempt("conv forward", conv, functools.partial(causal_conv.forward, *inputs[2:], conv))
    for shape, programs in itertools.product(CONV_BACKWARDS, (4, 8, 12, 24)):
        conv = causal_conv.Config(*shape, sms * programs)
        attempt("conv backward", conv, functools.partial(causal_conv.backward, *inputs, conv))
    dy, x, gate = (torch.randn(1, 32768, 32, 128, device="cuda", dtype=DTYPE) for _ in range(3))
    weight = torch.randn(128, device="cuda")
    for entries_warps in NORM_FORWARDS:
        norm = rms_norm_gated.Config(*entries_warps, 0)
        attempt("norm forward", norm, functools.partial(rms_norm_gated.forward, x, gate, weight, EPS, norm))
    for entries_warps, programs in itertools.product(NORM_BACKWARDS, (4, 5, 8, 16)):
        norm = rms_norm_gated.Config(*entries_warps, sms * programs)
        attempt("norm backward", norm, functools.partial(rms_norm_gated.backward, dy, x, gate, weight, EPS, norm))
    dy, dresidual, x = (torch.randn(8192, 2048, device="cuda", dtype=DTYPE) for _ in range(3))
    weight = torch.randn(2048, device="cuda", dtype=DTYPE)
    for entries, programs in itertools.product(PRE_NORM_BACKWARDS, (4, 6, 8, 12, 16, 62)):
        front = rms_norm.Config(entries, sms * programs)
        attempt("pre-norm", front, functools.partial(rms_norm.backward, dy, dresidual, x, weight, EPS, front))


def attempt(name: str, config: Any, run: Callable[[], Any]) -> None:
    try:
        print(f"{name:14} {milliseconds(run, 15):.4f} ms  {config}", flush=True)
    except Exception as error:
        print(f"{name:14} {type(error).__name__}: {str(error)[:200]}  {config}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep()
        return
    rows: list[Row] = []
    for label, make in CASES.items():
        rows += measure(make, label)
        torch.cuda.empty_cache()
    rows = stamp(rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
