"""A plan as text and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from q3n_functional.flops import flops_per_token
from q3n_functional.parallel.mesh import AXES, Mesh
from q3n_functional.plan import Plan
from q3n_functional.plan_cost import sent
from q3n_functional.plan_trace import KINDS, Kernel

GIB = 2.0**30
COLOURS = dict(zip(KINDS, ("#3182bd", "#9ecae1", "#fdae6b", "#74c476", "#bdbdbd"), strict=True))


class Traffic(NamedTuple):
    """What one kind of collective on one axis takes: how often, bytes that a rank sends, seconds."""

    times: int
    bytes: float
    seconds: float


def name_of(mesh: Mesh) -> str:
    """Such as `dp=2,tp=4`, as `--mesh` takes it."""
    return ",".join(f"{axis}={mesh.degree(axis)}" for axis in AXES if mesh.degree(axis) > 1) or "one rank"


def part(plan: Plan, kernel: Kernel) -> str:
    """What a kernel belongs to in tables and pictures."""
    if kernel.group:
        return f"{kernel.group} over {plan.links[kernel.group].name}"
    if kernel.phase == "update":
        return "optimizer"
    if kernel.ours:
        return kernel.name.removesuffix("_backward").replace("_", " ")
    return "matrix products" if kernel.flops else "pointwise, sums, copies"


def parts(plan: Plan) -> dict[str, float]:
    """Seconds of a step by part, the longest first."""
    found = Counter[str]()
    for kernel, seconds in zip(plan.kernels, plan.seconds.tolist(), strict=True):
        found[part(plan, kernel)] += seconds
    return dict(found.most_common())


def traffic(plan: Plan) -> dict[tuple[str, str], Traffic]:
    """Collectives by axis and kind, as long as they take by themselves."""
    found: dict[tuple[str, str], Traffic] = {}
    for kernel, seconds in zip(plan.kernels, plan.lasting.tolist(), strict=True):
        if kernel.group:
            key = kernel.group, kernel.name
            count, size, took = found.get(key, Traffic(0, 0.0, 0.0))
            found[key] = Traffic(count + 1, size + sent(kernel, plan.links[kernel.group]), took + seconds)
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def bound(plan: Plan) -> tuple[str, float]:
    """What most of the time is spent on, and the share of it."""
    found = Counter[str]()
    for name, seconds in zip(plan.bounds, plan.seconds.tolist(), strict=True):
        found[name] += seconds
    name, seconds = found.most_common(1)[0]
    return name, seconds / sum(found.values())


def lines(plan: Plan) -> Iterator[str]:
    """The table that `q3n plan` prints."""
    c, card = plan.config, plan.card
    batch = f"{c.batch_size} x {c.seq_len} tokens"
    yield f"{name_of(c.mesh)}: {c.mesh.size} x {card.name}, {batch}, recompute {c.recompute}"
    yield f"\n{'memory of a rank, GiB':36}{'at the peak':>12}{'most':>9}"
    for kind, most in zip(KINDS, plan.memory.max(1), strict=True):
        yield f"  {kind:34}{plan.budget[kind] / GIB:12.2f}{most / GIB:9.2f}"
    verdict = "fits" if plan.fits else "does not fit"
    yield f"  {'all':34}{plan.peak / GIB:12.2f}   {verdict} in {card.usable / GIB:.1f} of {card.memory / GIB:.1f}"
    yield f"\n{'traffic of a rank':36}{'link':>12}{'count':>9}{'GB sent':>10}{'ms':>10}"
    for (axis, kind), (count, size, seconds) in traffic(plan).items():
        link = plan.links[axis]
        where = f"  {axis} of {link.size}: {kind}"
        yield f"{where:36}{link.name:>12}{count:9}{size / 1e9:10.3f}{seconds * 1e3:10.2f}"
    yield f"\n{'time of a step':36}{'ms':>12}{'share':>9}"
    total = float(plan.seconds.sum())
    for name, seconds in parts(plan).items():
        yield f"  {name:34}{seconds * 1e3:12.2f}{seconds / total:9.1%}"
    yield f"  {'all':34}{total * 1e3:12.2f}"
    yield from _conclusion(plan, total)


def _conclusion(plan: Plan, total: float) -> Iterator[str]:
    c, name = plan.config, bound(plan)
    done, moved = sum(k.flops for k in plan.kernels), sum(k.bytes for k in plan.kernels)
    model = flops_per_token(c.model, c.seq_len) * plan.tokens_per_s / c.mesh.size / plan.card.flops
    yield f"\n{done / 1e12:.2f} TFLOP and {moved / 1e9:.1f} GB of memory traffic a rank and step"
    yield f"{plan.tokens_per_s:,.0f} tokens/s, MFU {model:.1%}, bound by {name[0]} ({name[1]:.0%} of the time)"


def check_picture(path: Path) -> None:
    """Raise ValueError where `plot` could not draw to `path`."""
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"picture {path} must end in one of {', '.join(f'.{name}' for name in sorted(known))}")
    if not path.parent.is_dir():
        raise ValueError(f"picture {path} lies in {path.parent}, which is no folder: make it or choose another")


def plot(plan: Plan, path: Path) -> None:
    """Draws a rank's memory over a step, and what the step's time goes to."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ends = plan.seconds.cumsum() * 1e3
    left.stackplot(ends, plan.memory / GIB, labels=KINDS, colors=[COLOURS[kind] for kind in KINDS], step="pre", lw=0)
    left.axhline(plan.card.usable / GIB, color="black", linestyle="--", linewidth=1, label=f"{plan.card.name}, usable")
    left.set(xlabel="ms of a step", ylabel="GiB of a rank", xlim=(0, ends[-1]))
    left.set_title(f"peak {plan.peak / GIB:.1f} GiB", fontsize=9)
    left.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.92))  # below the card's line
    times = parts(plan)
    right.barh(list(times), np.array(list(times.values())) * 1e3, color="#6baed6")
    right.invert_yaxis()
    right.set(xlabel="ms")
    right.set_title(f"{plan.tokens_per_s:,.0f} tokens/s, bound by {bound(plan)[0]}", fontsize=9)
    right.tick_params(labelsize=8)
    figure.suptitle(f"{name_of(plan.config.mesh)}: {plan.config.mesh.size} x {plan.card.name}", fontsize=10)
    figure.savefig(path, dpi=120)
