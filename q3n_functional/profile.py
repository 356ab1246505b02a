"""`q3n profile`: where the time of a training step goes, and how near each region comes to what the device can do.

Time is attributed by what the profiler names, which is the same eagerly and compiled: an operator of this package is a
region by itself, a matrix product is known by its two weight sizes, everything inside the update is the optimizer's,
and fused kernels carry the names of what they fuse. Two regions whose matrices have one size share its time by the
number of their products. Pointwise kernels in which no norm and no routing is fused are "elementwise".
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, record_function

from q3n_functional import flops, metrics, optim, params, step
from q3n_functional.config import Config
from q3n_functional.data import Batch
from q3n_functional.params import Parameters, named_leaves
from q3n_functional.train_config import TrainConfig

logger = logging.getLogger(__name__)

WARM_UP, STEPS = 3, 3
OPTIMIZER = "q3n_optimizer"
OPERATORS = {
    "gated_delta_rule": "delta rule",
    "causal_conv": "conv",
    "pre_norm": "norms",
    "rms_norm_gated": "norms",
    "router_logits": "router",
    "grouped_swiglu": "experts",
    "grouped_mm": "experts",
    "linear_cross_entropy": "loss",
    "linear_log_partition": "loss",
    "attention": "attention",
    "embedding": "embedding",
    "top_experts": "router",
    "softmax": "router",
    "scatter": "router",
    "rsqrt": "norms",
}
"""What a name contains, to its region; the first that fits."""


class Row(NamedTuple):
    """A region of a step: milliseconds, share of the step, and achieved operations and bytes a second."""

    region: str
    ms: float
    share: float
    flops: float
    bytes: float
    of_limit: float


class Ceilings(NamedTuple):
    """What the device does in a matrix product (operations a second) and in a copy (bytes a second), as measured."""

    flops: float
    bytes: float


def profile(config: TrainConfig) -> Path:
    """Profiles steps of `config` on random tokens; writes trace, table, picture and, on CUDA, a memory snapshot.

    Returns the folder, `config.run`/profile: trace.json for ui.perfetto.dev or chrome://tracing, table.txt,
    profile.json, profile.png, memory.pickle for pytorch.org/memory_viz. Raises ValueError for a device that is not
    here, a mesh, and `cuda_graph`.
    """
    if config.mesh.size > 1:
        raise ValueError(f"mesh has {config.mesh.size} ranks: a profile is of one device, so leave mesh out")
    if config.cuda_graph:
        raise ValueError("cuda_graph hides what launches a kernel from the profiler: profile with --no-cuda-graph")
    device, folder = step.pick_device(config.device), Path(config.run) / "profile"
    step.check_device(config, device)
    folder.mkdir(parents=True, exist_ok=True)
    run = _step(config, device)
    # Inductor's CPU code names its kernels to the profiler only when asked; on CUDA kernels have names.
    with torch._inductor.config.patch("cpp.enable_kernel_profile", True):
        for _ in range(WARM_UP):
            run()
    seconds = _timed(run, device)
    found = _profiled(run, device, folder / "trace.json")
    _memory(run, device, folder / "memory.pickle")
    rows = table(config, found, seconds, ceilings(device, getattr(torch, config.dtype)))
    text = "\n".join(_lines(config, rows, seconds, device))
    (folder / "table.txt").write_text(text + "\n")
    content = {"seconds": seconds, "regions": [row._asdict() for row in rows]}
    (folder / "profile.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(rows, folder / "profile.png")
    print(text)
    logger.info("trace, table and picture: %s", folder)
    return folder


def _step(config: TrainConfig, device: torch.device) -> Callable[[], None]:
    shape = config.model
    masters = params.init(shape, config.seed, device=device)
    groups = optim.groups(shape, config.optimizer)
    state = optim.init(named_leaves(masters), groups, getattr(torch, config.optimizer.state_dtype))
    loss, update = step.functions(config, shape, device)
    generator = torch.Generator().manual_seed(config.seed)
    shape_BT = (config.batch_size, config.seq_len)
    batches = [
        Batch(torch.randint(shape.vocab_size, shape_BT, generator=generator).to(device), None)
        for _ in range(config.accumulate)
    ]
    counts, lr = step.count(batches), torch.tensor(config.optimizer.lr, device=device)

    def run() -> None:
        copies: Parameters = step.working(masters, config, shape)
        new, _, _ = step.gradients(loss, copies, batches, counts)
        with record_function(OPTIMIZER):
            update(named_leaves(masters), new, state, lr)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(run: Callable[[], object], device: torch.device, times: int = STEPS) -> float:
    """Seconds of one of `times` runs, after one that does not count."""
    run()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return (time.perf_counter() - begin) / times


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured on a square product and a copy, large enough that launches and caches do not count."""
    large = device.type == "cuda"
    n, size = (8192, 1 << 30) if large else (1024, 1 << 27)
    a, source = torch.randn(n, n, device=device).to(dtype), torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = 10 if large else 3
    return Ceilings(
        2 * n**3 / _timed(lambda: a @ a, device, times),
        2 * size / _timed(lambda: target.copy_(source), device, times),
    )


def _profiled(run: Callable[[], None], device: torch.device, trace: Path) -> list[Any]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(STEPS):
            run()
        _wait(device)
    profiler.export_chrome_trace(str(trace))
    return list(profiler.events())


def _memory(run: Callable[[], None], device: torch.device, path: Path) -> None:
    if device.type != "cuda":
        logger.info("no memory snapshot: only CUDA's allocator keeps a history, this is %s", device.type)
        return
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    run()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def milliseconds(events: list[Any], config: Config, tokens: int) -> dict[str, float]:
    """Device time of a step in every region, from the profiler's events of `STEPS` steps of batches of `tokens`."""
    sizes, found = _sizes(config), Counter[str]()
    on_cuda = any(event.kernels for event in events)
    for event in events:
        micros = sum(kernel.duration for kernel in event.kernels) if on_cuda else event.self_cpu_time_total
        names = [event.name, *(kernel.name for kernel in event.kernels)]
        for region, share in _regions(event, names, sizes, tokens) if micros else ():
            found[region] += micros * share / 1e3 / STEPS
    return dict(found)


def _sizes(config: Config) -> dict[frozenset[int], dict[str, float]]:
    """Regions by the two sizes of the matrix of a product, with each one's share of such products."""
    counts, met = dict[frozenset[int], Counter[str]](), flops.products(config)
    for name, (region, _, columns) in met.items():
        layer, _, leaf = name.rpartition(".")
        # One product are q, k and v of linear attention, its a and b, gate and up of a SwiGLU.
        linear, feed_forward = f"{layer}.z" in met, f"{layer}.up" in met
        joined = ["qkv", "ba"] if linear else [("gate", "up")] if feed_forward else []
        parts = next((together for together in joined if leaf in together), (leaf,))
        if region in ("experts", "router", "loss") or leaf != parts[0]:
            continue
        together = sum(met[f"{layer}.{part}"][1] for part in parts)
        counts.setdefault(frozenset((together, columns)), Counter())[region] += 1
    return {size: {r: n / sum(c.values()) for r, n in c.items()} for size, c in counts.items()}


def _regions(
    event: Any, names: list[str], sizes: Mapping[frozenset[int], Mapping[str, float]], tokens: int
) -> Iterator[tuple[str, float]]:
    ancestors = list(_ancestors(event))
    if any(OPTIMIZER in above.name for above in ancestors):
        yield "optimizer", 1.0
        return
    if region := next(filter(None, (_named(above.name) for above in reversed(ancestors))), None):
        yield region, 1.0
        return
    for above in ancestors:
        if above.name.startswith(("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm")):
            yield from _product(above, sizes, tokens).items()
            return
    kernel = "" if len(names) == 1 and not names[0].startswith(("aten::", "graph_", "triton_")) else " ".join(names)
    yield _named(kernel) or ("elementwise" if kernel else "host"), 1.0


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _named(text: str) -> str | None:
    return next((region for part, region in OPERATORS.items() if part in text.lower()), None)


def _product(event: Any, sizes: Mapping[frozenset[int], Mapping[str, float]], tokens: int) -> Mapping[str, float]:
    dims = {d for shape in event.input_shapes for d in shape}
    if len(dims) > 2:  # their number may be a matrix's size as well
        dims.discard(tokens)
    fitting = [shares for size, shares in sizes.items() if size <= dims]
    return fitting[0] if len(fitting) == 1 else _together(fitting) or {"projections": 1.0}


def _together(fitting: list[Mapping[str, float]]) -> dict[str, float]:
    regions = Counter[str]()
    for shares in fitting:
        regions.update({region: share / len(fitting) for region, share in shares.items()})
    return dict(regions)


def table(config: TrainConfig, events: list[Any], seconds: float, limits: Ceilings) -> list[Row]:
    """The regions of a step of `seconds`, the longest first, with what they achieve of the measured `limits`."""
    tokens = config.batch_size * config.seq_len * config.accumulate
    narrow = config.dtype == "bfloat16"
    costs = flops.costs(config.model, tokens, config.seq_len, 2 if narrow else 4)
    moments = 2 if config.optimizer.state_dtype == "bfloat16" else 4
    wide_sums = narrow and config.accumulate == 1
    costs["optimizer"] = flops.optimizer_cost(config.model, 2 if wide_sums else 4, moments)
    found = milliseconds(events, config.model, tokens // config.accumulate)
    rows = []
    for region, ms in sorted(found.items(), key=lambda item: -item[1]):
        cost = costs.get(region, flops.Cost(0.0, 0.0))
        took = ms / 1e3
        least = max(cost.flops / limits.flops, cost.bytes / limits.bytes)
        rows.append(Row(region, ms, took / seconds, cost.flops / took, cost.bytes / took, least / took))
    rest = seconds - sum(found.values()) / 1e3
    return [*rows, Row("not in kernels", max(rest, 0.0) * 1e3, max(rest, 0.0) / seconds, 0.0, 0.0, 0.0)]


def _lines(config: TrainConfig, rows: list[Row], seconds: float, device: torch.device) -> Iterator[str]:
    tokens = config.batch_size * config.seq_len * config.accumulate
    yield f"{'region':20}{'ms':>10}{'share':>8}{'TFLOP/s':>10}{'GB/s':>9}{'of limit':>10}"
    for row in rows:
        achieved = f"{row.flops / 1e12:10.2f}{row.bytes / 1e9:9.1f}{row.of_limit:10.0%}" if row.of_limit else ""
        yield f"{row.region:20}{row.ms:10.3f}{row.share:8.1%}{achieved}"
    speed = metrics.speed(tokens, seconds, config.model, config.seq_len, device)
    told = ", ".join(f"{name} {value:.4g}" for name, value in speed.items())
    yield f"step {seconds * 1e3:.2f} ms, {told}"


def plot(rows: list[Row], path: Path) -> None:
    """Draws the regions' times, the part that the limit explains in a darker shade."""
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    names, times = [row.region for row in rows], [row.ms for row in rows]
    axes.barh(names, times, color="#9ecae1", label="time")
    axes.barh(names, [row.ms * min(row.of_limit, 1.0) for row in rows], color="#3182bd", label="least, by the limits")
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.legend()
    figure.savefig(path, dpi=120)
