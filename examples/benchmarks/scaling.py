"""A training step of Qwen3-Next at its real widths on two or eight cards of one host, beside one card and the planner.

    python examples/benchmarks/scaling.py [--commit HASH] [--out FOLDER] [--cards 2] [--cases 0 2] [--plan] [--tiny]

Prints a table and writes results/scaling.json. Computed in bf16 over fp32 parameters, AdamW with moments in bf16,
random tokens, vocabulary 151,936, no prediction module, every kind of layer compiled once. --cards 2: three linear
layers and one of full attention, 128 experts. With dp and ep, cards also exchange one layer ahead (`ahead`, the
`--overlap` of training; `kept`, with `--no-reshard-after-forward` besides), and steps that wait for the host are CUDA
graphs too (`graph`, with dp ahead and kept). Cases: fsdp 2 and ep 2, twice the rows on twice the cards; tp 2 with
sequence parallelism and cp 2 on a row of 128k tokens (layers recomputed), the same batch on twice the cards. --cards 8:
twelve layers, 64 experts where one card has to hold them, 512 where eight do. Metrics: step_ms, the median of forward,
backward and update, of the slowest rank; tokens_per_s of all cards; peak_gib of the fullest card; efficiency, tokens a
second over cards times those of one card, in a graph where they are. Each measurement is a launch of torchrun. Ranks
draw equal shards, as values do not matter here.

--plan measures nothing, needs no card and writes what `q3n plan` expects of the same steps on H100s, graphs aside, to
scaling_plan_N.json, for N cards. --tiny is for a machine without cards: small sizes, gloo, eager, once, to see it run.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, cast

import report
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from q3n_functional import compiled, cuda_graph, model, optim, params
from q3n_functional import plan as planner
from q3n_functional import step as training_step
from q3n_functional.config import PRESETS, Config
from q3n_functional.parallel import launch, mesh, placement, rules
from q3n_functional.plan_cards import CARDS
from q3n_functional.recompute import Recompute
from q3n_functional.train_config import DataConfig, TrainConfig


class Case(NamedTuple):
    """A layout, its batch (rows x length), that of one card (0 rows where none holds it), and the model's size."""

    layout: str
    rows: int
    length: int
    rows_of_one: int
    recompute: Recompute = "none"
    layers: int = 4
    experts: int = 128


CASES = {
    "fsdp 2 4x4096": Case("dp=2", 4, 4096, 2),
    "tp 2 + sp 2x4096": Case("tp=2", 2, 4096, 2),
    "cp 2 1x131072": Case("cp=2", 1, 131072, 1, "full"),
    "ep 2 4x4096": Case("ep=2", 4, 4096, 2),
    "fsdp 8 16x4096": Case("dp=8", 16, 4096, 2, "selective", 12, 64),
    "fsdp 2 x tp 4 + sp 4x4096": Case("dp=2,tp=4", 4, 4096, 2, "selective", 12, 64),
    "hsdp 2x4 16x4096": Case("replicate=2,dp=4", 16, 4096, 2, "selective", 12, 64),
    "cp 8 1x1048576": Case("cp=8", 1, 1048576, 0, "full", 12, 64),
    "ep 8 16x4096, 512 experts": Case("ep=8", 16, 4096, 0, "selective", 12, 512),
}
ONE, ALL, AHEAD, KEPT = "q3n one card", "q3n all cards", "q3n all cards, ahead", "q3n all cards, kept"
PLANS = {ALL: "q3n plan", AHEAD: "q3n plan, ahead", KEPT: "q3n plan, kept"}
ONE_GRAPH, GRAPH = "q3n one card, graph", "q3n all cards, graph"
UNITS = {"step_ms": "ms", "peak_gib": "GiB", "efficiency": "1", "first_step_s": "s"}
ADAMW = optim.OptimizerConfig(lr=1e-4)


def shape(case: Case, tiny: bool) -> Config:
    kinds = ("linear_attention",) * 3 + ("full_attention",)
    base = PRESETS["tiny" if tiny else "qwen3_next_80b_a3b"]()
    experts = {} if tiny else {"num_experts": case.experts}
    layers = 4 if tiny else case.layers
    return dataclasses.replace(
        base,
        num_hidden_layers=layers,
        layer_types=kinds * (layers // 4),
        num_nextn_predict_layers=0,
        **cast(dict[str, Any], experts),
    )


def shards(config: Config, layout: mesh.Mesh, device: torch.device) -> params.Parameters:
    """fp32 shards of the distribution of `params.init`, drawn on the device: on the host it takes minutes."""
    torch.manual_seed(0)

    def draw(where: Any) -> torch.Tensor:
        if where.spec.init == "normal":
            return torch.randn(where.local_shape, device=device).mul_(config.initializer_range)
        return params.init_leaf("", dataclasses.replace(where.spec, shape=where.local_shape), 0, 0.0).to(device)

    return cast(params.Parameters, pytree.tree_map(draw, rules.layouts(config, layout)))


def stepper(
    case: Case, config: Config, layout: mesh.Mesh, device: torch.device, tiny: bool, implementation: str
) -> Callable[[], object]:
    """A whole step of this rank."""
    graph = implementation in (ONE_GRAPH, GRAPH)
    kept = implementation == KEPT or (implementation == GRAPH and layout.dp > 1)
    settings, parallel = training(case, tiny), None
    if layout.size > 1:
        parallel = placement.connect(layout, rules.layouts(config, layout), device, timedelta(seconds=600))
    masters = shards(config, layout, device)
    views, groups = params.named_leaves(masters), optim.groups(config, ADAMW)
    state = optim.init(views, groups, torch.bfloat16)
    rows = (case.rows if layout.size > 1 else case.rows_of_one) // layout.rows
    tokens = torch.randint(config.vocab_size, (rows, case.length), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    function = functools.partial(model.loss, parallel=parallel, config=config, recompute=case.recompute)
    loss = compiled.compiled(function, "none" if tiny else "layers", kept or implementation == AHEAD, not kept)
    moves = optim.MOVES if tiny else compiled.moves()
    update = functools.partial(optim.update_, parallel=parallel, groups=groups, optimizer=ADAMW, moves=moves)
    lr = torch.tensor(1e-4, device=device)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        tree = training_step.working(masters, settings, config)
        value, _ = loss(tree, tokens)
        leaves = params.named_leaves(tree)
        gradients = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        update(views, gradients, state, lr)
        return value.detach()

    return functools.partial(cuda_graph.CapturedStep(step) if graph else step, tokens)


def measure(name: str, implementation: str, tiny: bool) -> dict[str, float]:
    """Runs on every rank; the slowest rank's time, the fullest card's memory."""
    case, where, alone = CASES[name], launch.world(), implementation in (ONE, ONE_GRAPH)
    config = shape(case, tiny)
    layout = mesh.Mesh() if alone else mesh.parse(case.layout)
    case = case._replace(length=case.length // 64) if tiny else case
    mesh.check_batch(layout, config, case.rows, case.length)
    device = launch.own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"), where)
    with launch.joined(where, device):
        own = timed(stepper(case, config, layout, device, tiny, implementation), tiny)
        everyone: list[Any] = [own] * where.size
        if where.size > 1:
            dist.all_gather_object(everyone, own)
    values = {metric: max(each[metric] for each in everyone) for metric in own}
    rows = case.rows_of_one if alone else case.rows
    return {**values, "tokens_per_s": rows * case.length / values["step_ms"] * 1e3}


def timed(step: Callable[[], object], tiny: bool) -> dict[str, float]:
    """The first step, which compiles, and the median of later ones, behind those that a graph waits for."""
    card = torch.cuda.is_available()
    wait = torch.cuda.synchronize if card else (lambda: None)
    begin = time.perf_counter()
    step()
    wait()
    own = {"first_step_s": time.perf_counter() - begin}
    if card:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if tiny else cuda_graph.WARM_UP):
        step()
    own["step_ms"] = report.step_ms(step, 1 if tiny else 10)
    if card:
        own["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return own


def launched(name: str, implementation: str, tiny: bool) -> dict[str, float]:
    """What a launch of torchrun measured; its last words where it failed."""
    ranks = 1 if implementation in (ONE, ONE_GRAPH) else mesh.parse(CASES[name].layout).size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "--measure", name, implementation, *(["--tiny"] if tiny else [])]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        said = [line for line in process.stderr.splitlines() if "Error" in line and "ChildFailedError" not in line]
        raise RuntimeError(said[0] if said else f"exit status {process.returncode}")
    values: dict[str, float] = json.loads(process.stdout.strip().splitlines()[-1])
    return values


def training(case: Case, tiny: bool, implementation: str = ALL) -> TrainConfig:
    """The step as `q3n train` would have it."""
    return TrainConfig(
        run="", steps=1, batch_size=case.rows, seq_len=case.length // (64 if tiny else 1),
        dtype="float32" if tiny else "bfloat16", recompute=case.recompute, data=DataConfig(source=""),
        mesh=mesh.parse(case.layout), model=shape(case, tiny),
        optimizer=dataclasses.replace(ADAMW, state_dtype="bfloat16"), overlap=implementation in (AHEAD, KEPT),
        reshard_after_forward=implementation != KEPT,
    )  # fmt: skip


def expected(case: Case, tiny: bool, implementation: str) -> dict[str, float]:
    """What `q3n plan` expects of the step on H100s."""
    found = planner.plan(training(case, tiny, implementation), CARDS["h100"])
    milliseconds = float(found.seconds.sum() * 1e3)
    return {"step_ms": milliseconds, "tokens_per_s": found.tokens_per_s, "peak_gib": found.peak / 2**30}


def kinds(case: Case, tiny: bool) -> list[str]:
    """What is measured of a case: the exchange of experts waits for the host, long steps of a row do not."""
    layout = mesh.parse(case.layout)
    ahead = [AHEAD] * (layout.dp > 1 or layout.ep > 1) + [KEPT] * (layout.dp > 1)
    graphs = not tiny and layout.ep == layout.cp == 1
    return [ONE] * bool(case.rows_of_one) + [ALL, *ahead] + ([ONE_GRAPH, GRAPH] if graphs else [])


def measured(names: list[str], options: argparse.Namespace) -> None:
    """One card once for all cases that ask the same of it; the file grows with every case."""
    rows: report.Rows = []
    of_one: dict[tuple[str, Case], report.Rows] = {}
    for name in names:
        case = CASES[name]
        alike = case._replace(layout="", rows=case.rows_of_one)
        for kind in kinds(case, options.tiny):
            if kind in (ONE, ONE_GRAPH):
                if (kind, alike) not in of_one:
                    run = functools.partial(launched, name, kind, options.tiny)
                    of_one[kind, alike] = report.measured(name, kind, run)
                rows += [{**row, "case": name} for row in of_one[kind, alike]]
            else:
                one = of_one.get((ONE_GRAPH if kind == GRAPH else ONE, alike), [])
                rows += report.measured(name, kind, functools.partial(beside, name, kind, one, options.tiny))
            report.write(rows, "scaling", options.commit, options.out)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--cards", type=int, choices=(2, 8), default=2)
    parser.add_argument("--cases", nargs="+", type=int, help="their numbers, from 0; all of them")
    parser.add_argument("--plan", action="store_true", help="what the planner expects, without cards")
    parser.add_argument("--tiny", action="store_true", help="small sizes, once, to see that it runs")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        values = measure(*options.measure, options.tiny)
        if launch.world().lead:
            print(json.dumps(values))
        return
    if not (options.plan or options.tiny) and torch.cuda.device_count() < options.cards:
        raise SystemExit(
            f"there are {torch.cuda.device_count()} CUDA cards here, not {options.cards}: see --tiny, --plan"
        )
    report.UNITS.update(UNITS)
    all_names = [name for name, case in CASES.items() if mesh.parse(case.layout).size == options.cards]
    names = all_names if options.cases is None else [all_names[number] for number in options.cases]
    if not options.plan:
        measured(names, options)
        return
    rows: report.Rows = []
    for name in names:
        for kind in filter(PLANS.__contains__, kinds(CASES[name], options.tiny)):
            run = functools.partial(expected, CASES[name], options.tiny, kind)
            rows += report.measured(name, PLANS[kind], run)
    report.write(rows, f"scaling_plan_{options.cards}", options.commit, options.out)


def beside(name: str, implementation: str, one: report.Rows, tiny: bool) -> dict[str, float]:
    """The measurement of all cards with their efficiency beside one, if that could be measured."""
    values, before = launched(name, implementation, tiny), {row["metric"]: row["value"] for row in one}
    if "tokens_per_s" in before:
        ranks = mesh.parse(CASES[name].layout).size
        values["efficiency"] = values["tokens_per_s"] / ranks / before["tokens_per_s"]
    return values


if __name__ == "__main__":
    main()
