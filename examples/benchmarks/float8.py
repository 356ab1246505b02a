"""Training in float8 beside bf16: the loss curves of one small run each, and the time of a step at real widths.

    python examples/benchmarks/float8.py [--commit HASH] [--out FOLDER] [--cases 0 2] [--tiny]

Prints two tables, writes results/float8.json and draws results/float8.png. Curves: `q3n train examples/small.toml`
three times, equal but for float8 (seed, batches and initial weights are the same), cross_entropy as the mean of the
steps up to the one that the case names, validation_loss behind the last. Steps: those of training_step.py, a process
each, as its metrics are. --tiny is for a machine without a card: examples/tiny.toml, few steps, eager.
"""

import tempfile
from pathlib import Path
from typing import Any

import report
import torch
import training_step
from matplotlib.figure import Figure

from q3n_functional import metrics, train, train_config

EXAMPLES = Path(__file__).parent.parent
POLICIES = {"q3n": "none", "q3n float8": "linears", "q3n float8 experts": "linears_and_experts"}
"""Implementations, and what each trains with."""
TINY = ("--compile=none", "--steps=10", "--batch-size=4", "--seq-len=64", "--output.validation-batches=4")
POINTS = 10
"""What is kept of a curve."""
Curve = list[dict[str, Any]]


def curve(policy: str, tiny: bool) -> Curve:
    """metrics.jsonl of a run."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(EXAMPLES / ("tiny.toml" if tiny else "small.toml")), f"--float8={policy}", f"--run={folder}"]
        arguments += [f"--data.source={EXAMPLES / 'shakespeare.txt'}", "--dtype=bfloat16"]
        arguments += ["--output.save-every=0", "--output.sample.max-new-tokens=0", *(TINY if tiny else ())]
        train.train(train_config.parse(arguments))
        return metrics.read(Path(folder) / "metrics.jsonl")


def rows_of(curves: dict[str, Curve], model: str) -> report.Rows:
    """Means over parts of the curves, printed too."""
    steps = len(curves["q3n"])
    part = -(-steps // POINTS)
    found: report.Rows = []
    print(f"{'cross-entropy up to step':26}" + "".join(f"{name:>20}" for name in curves))
    for begin in range(0, steps, part):
        end = min(begin + part, steps)
        values = {k: sum(row["cross_entropy"] for row in v[begin:end]) / (end - begin) for k, v in curves.items()}
        print(f"{end:<26}" + "".join(f"{value:20.4f}" for value in values.values()), flush=True)
        found += _rows(f"{model} step {end}", "cross_entropy", values)
    last = {name: rows[-1]["validation_loss"] for name, rows in curves.items()}
    print(f"{'validation':26}" + "".join(f"{value:20.4f}" for value in last.values()), flush=True)
    return found + _rows(f"{model} step {steps}", "validation_loss", last)


def _rows(case: str, metric: str, values: dict[str, float]) -> report.Rows:
    return [
        {"case": case, "implementation": name, "metric": metric, "value": float(f"{value:.5g}"), "unit": "nats"}
        for name, value in values.items()
    ]


def draw(curves: dict[str, Curve], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, rows), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        label = "bf16" if POLICIES[name] == "none" else f"float8 {POLICIES[name].replace('_', ' ')}"
        axes.plot(
            [row["step"] for row in rows], [row["cross_entropy"] for row in rows], style, label=label, linewidth=1
        )
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes, few steps, to see that it runs")
    numbers = range(len(training_step.CASES))
    parser.add_argument("--cases", nargs="*", type=int, default=numbers, help="of training_step.py, from 0")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("there is no CUDA card here: --tiny runs it at a small size")
    curves = {name: curve(policy, options.tiny) for name, policy in POLICIES.items()}
    rows = rows_of(curves, "tiny" if options.tiny else "small")
    for case in [list(training_step.CASES)[number] for number in options.cases]:
        for implementation in POLICIES:
            rows += training_step.in_a_process(case, implementation, options)
    report.write(rows, "float8", options.commit, options.out)
    draw(curves, options.out / "float8.png")


if __name__ == "__main__":
    main()
