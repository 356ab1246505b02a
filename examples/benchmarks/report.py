"""What the benchmarks print and keep: rows in long form, a file each, one run's rows replacing the last run's."""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

UNITS = {"gb_per_s": "GB/s", "ms": "ms", "mib": "MiB", "s": "s", "tflops": "TFLOP/s",
         "tokens_per_s": "tokens/s"}  # fmt: skip
"""By a metric's name, or the part of it behind the last underscore."""
Rows = list[dict[str, Any]]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of the options that all have."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--commit", default="")
    found.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return found


def measured(case: str, implementation: str, run: Callable[[], dict[str, float]]) -> Rows:
    """Rows of what `run` measures, printed too; a failure is a row with its text."""
    torch.cuda.empty_cache()
    head = {"case": case, "implementation": implementation}
    try:
        values = run()
    except Exception as error:
        print(f"{case:26}{implementation:22}{error!r}"[:300], flush=True)
        return [{**head, "metric": "failure", "value": repr(error)}]
    print(f"{case:26}{implementation:22}" + "  ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)
    return [
        {**head, "metric": metric, "value": float(f"{value:.5g}"),
         "unit": UNITS.get(metric, UNITS.get(metric.split("_")[-1], "1"))}
        for metric, value in values.items()
    ]  # fmt: skip


def step_ms(run: Callable[[], object], times: int) -> float:
    """The median time from one call's end to the next one's: as in a training loop, the host does not wait between."""
    run()
    if not torch.cuda.is_available():
        return statistics.median(_clocked(run) for _ in range(times))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 2)]
    for mark in marks:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def _clocked(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def write(rows: Rows, benchmark: str, commit: str, out: Path, **versions: str) -> None:
    """Write `out`/BENCHMARK.json; `versions` are those of other packages than torch and Triton."""
    where = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "commit": commit,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, **versions},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([{"benchmark": benchmark, **row, **where} for row in rows], indent=1)
    (out / f"{benchmark}.json").write_text(text + "\n")


def bars(values: dict[str, dict[str, float]], label: str, path: Path, log: bool = False) -> None:
    """Draws a bar for each implementation's value of each case, where matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    cases = list(dict.fromkeys(case for each in values.values() for case in each))
    width = 0.8 / len(values)
    for n, (name, each) in enumerate(values.items()):
        at = [cases.index(case) + n * width for case in each]
        drawn = axes.bar(at, list(each.values()), width, align="edge", label=name)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7)
    axes.set_xticks([x + 0.4 for x in range(len(cases))], cases, rotation=20)
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
    axes.legend()
    figure.savefig(path)


def by_implementation(rows: Rows, metric: str) -> dict[str, dict[str, float]]:
    """The values of a metric, by implementation and case."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == metric:
            found.setdefault(row["implementation"], {})[row["case"]] = row["value"]
    return found
