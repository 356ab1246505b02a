"""A training step of Qwen3-Next at its real widths on one card: this package beside transformers.

    python examples/benchmarks/training_step.py [--commit HASH] [--out FOLDER] [--only q3n] [--cases 0 1] [--tiny]

Prints a table and writes results/training_step.json. Three linear layers and one of full attention (or two linear ones
with all 512 experts), vocabulary 151,936, bf16 parameters, gradients, AdamW with moments in bf16, random tokens, no
prediction module. Implementations: q3n, every kind of layer compiled once; q3n graph, the same in a CUDA graph; q3n
selective, recomputing what is cheap; q3n float8, with the blocks' linears in float8; q3n float8 experts, with the
routed experts too; q3n model, everything as one graph; q3n eager; transformers, Qwen3NextForCausalLM with
flash-linear-attention where that is installed, experts by grouped_mm, attention by SDPA; transformers compile, the same
under torch.compile. Metrics: first_step_s, from the first call to its end, compiling included; step_ms, the median of
forward plus backward; peak_gib, of that; with_optimizer_ms; loss, the cross-entropy of the first step; mfu, of the
card's bf16 peak. All run on the same weights and tokens, so that losses agree within what bf16 rounds, float8 aside.
This package minimises the routers' balancing loss besides, which transformers leaves out here. Every implementation
runs in a process of its own. --tiny is for a machine without a card.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import report
import torch
import torch.utils._pytree as pytree

from q3n_functional import compiled, cuda_graph, flops, metrics, model, names, optim, params
from q3n_functional.config import PRESETS, Config

LINEAR, FULL = "linear_attention", "full_attention"
CASES = {
    "4 layers 128 experts 2x4096": ((LINEAR, LINEAR, LINEAR, FULL), 128, 2, 4096),
    "4 layers 128 experts 1x32768": ((LINEAR, LINEAR, LINEAR, FULL), 128, 1, 32768),
    "2 layers 512 experts 2x4096": ((LINEAR, LINEAR), 512, 2, 4096),
}
UNITS = {"step_ms": "ms", "with_optimizer_ms": "ms", "peak_gib": "GiB", "first_step_s": "s", "loss": "nats", "mfu": "1"}
ADAMW = optim.OptimizerConfig(lr=1e-4, clip_norm=float("inf"))
Runner = tuple[Callable[[], torch.Tensor], Callable[[], object]]


def shape(case: str, tiny: bool) -> tuple[Config, int, int]:
    """The model, rows and length of a case."""
    kinds, experts, rows, length = CASES[case]
    base = PRESETS["tiny" if tiny else "qwen3_next_80b_a3b"]()
    config = dataclasses.replace(
        base,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        num_experts=experts // 16 if tiny else experts,
        num_nextn_predict_layers=0,
    )
    return config, rows, length // 64 if tiny else length


def random_tokens(config: Config, rows: int, length: int, device: str) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


def weights(config: Config, device: str) -> params.Parameters:
    """The distribution of `params.init`, drawn on the device: on the host it takes longer than the measurement.

    All are bf16 numbers, those kept in fp32 too: transformers keeps every one in bf16.
    """
    torch.manual_seed(0)

    def draw(leaf: params.Spec) -> torch.Tensor:
        if leaf.init == "normal":
            return torch.randn(leaf.shape, dtype=torch.bfloat16, device=device).mul_(config.initializer_range)
        return params.init_leaf("", leaf, 0, 0.0).to(device, torch.bfloat16).to(leaf.dtype or torch.bfloat16)

    return pytree.tree_map(draw, params.spec(config))


def ours(
    config: Config,
    rows: int,
    length: int,
    device: str,
    mode: str = "layers",
    recompute: str = "none",
    float8: str = "none",
    graph: bool = False,
) -> Runner:
    tree = weights(config, device)
    masters = params.named_leaves(tree)
    leaves = {name: p.requires_grad_() for name, p in masters.items()}
    groups = optim.groups(config, ADAMW)
    views = {name: p.detach() for name, p in leaves.items()}
    tokens, lr = random_tokens(config, rows, length, device), torch.tensor(1e-4, device=device)
    options = {"config": config, "recompute": recompute, "float8": float8}
    loss = compiled.compiled(functools.partial(model.loss, **options), mode)
    moves = optim.MOVES if mode == "none" else compiled.moves()
    update = functools.partial(optim.update_, groups=groups, optimizer=ADAMW, moves=moves)
    kept: dict[str, torch.Tensor] = {}
    states: list[optim.State] = []  # made at the first update, as torch.optim does: no part of a step without it

    def step(tokens: torch.Tensor) -> torch.Tensor:
        value, parts = loss(tree, tokens)
        kept.update(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        return parts.cross_entropy.detach()

    def whole(tokens: torch.Tensor) -> torch.Tensor:
        kept.clear()
        value = step(tokens)
        if not states:
            states.append(optim.init(views, groups))  # in bf16, as the parameters are
        update(views, kept, states[0], lr)
        kept.clear()
        return value

    def alone(tokens: torch.Tensor) -> torch.Tensor:
        kept.clear()
        value = step(tokens)
        kept.clear()
        return value

    captured: Callable[..., Any] = cuda_graph.CapturedStep if graph else lambda run: run
    return functools.partial(captured(alone), tokens), functools.partial(captured(whole), tokens)


@torch.no_grad()
def fill_(module: torch.nn.Module, tree: params.Parameters, config: Config) -> None:
    """Copies our parameters to transformers', which stacks the experts that files keep apart."""
    empty, leaves = dict(module.named_parameters()), params.named_leaves(tree)
    for name, source in names.sources(config).items():
        if source.expert is None:
            for part, leaf in source.pieces(empty.pop(name), leaves):
                part.copy_(leaf)
    for i in filter(config.is_sparse, range(config.num_hidden_layers)):
        theirs, ours = f"model.layers.{i}.mlp.experts.", f"layers.{i}.mlp.experts."
        gate, up = empty.pop(f"{theirs}gate_up_proj").chunk(2, dim=1)
        for part, name in ((gate, "gate"), (up, "up"), (empty.pop(f"{theirs}down_proj"), "down")):
            part.copy_(leaves[ours + name])
    assert not empty, f"parameters that keep what transformers drew: {sorted(empty)}"


def module_of(tree: params.Parameters, config: Config, device: str) -> Any:
    """transformers' model of the configuration, without the prediction module, in bf16, with a copy of our weights."""
    # The package's own kernels are compared: flash-linear-attention would otherwise call FlashQLA's.
    os.environ.setdefault("FLA_FLASH_QLA", "0")
    if find_spec("fla"):
        import fla  # noqa: F401  # transformers would go on without it, and slowly, whatever the reason
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    content = config.to_json()
    content.pop("architectures", None)
    hf = Qwen3NextConfig(**{k: v for k, v in content.items() if k not in ("model_type", "num_nextn_predict_layers")})
    hf._attn_implementation, hf._experts_implementation = "sdpa", "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        module = Qwen3NextForCausalLM(hf)
    torch.set_default_dtype(torch.float32)
    fill_(module, tree, config)
    return module


def theirs(config: Config, rows: int, length: int, device: str, compile_: bool = False) -> Runner:
    module = module_of(weights(config, device), config, device)  # our tree is gone when this returns
    module.train()
    called = torch.compile(module) if compile_ else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    tokens = random_tokens(config, rows, length, device)

    def step() -> torch.Tensor:
        # Asked for the router logits it would add the balancing loss, but torch.compile breaks its graph over them.
        value = called(input_ids=tokens, labels=tokens, use_cache=False).loss
        value.backward()
        return value.detach()

    def whole() -> None:
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def alone() -> torch.Tensor:
        value = step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return alone, whole


IMPLEMENTATIONS: dict[str, Callable[..., Runner]] = {
    "q3n": ours,
    "q3n graph": functools.partial(ours, graph=True),
    "q3n selective": functools.partial(ours, recompute="selective"),
    "q3n float8": functools.partial(ours, float8="linears"),
    "q3n float8 experts": functools.partial(ours, float8="linears_and_experts"),
    "q3n eager": functools.partial(ours, mode="none"),
    "q3n model": functools.partial(ours, mode="model"),
    "transformers": theirs,
    "transformers compile": functools.partial(theirs, compile_=True),
}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(case: str, implementation: str, tiny: bool, device: str) -> dict[str, float]:
    config, rows, length = shape(case, tiny)
    alone, whole = IMPLEMENTATIONS[implementation](config, rows, length, device)
    wait(device)
    begin = time.perf_counter()
    loss = float(alone())
    values = {"loss": loss, "first_step_s": time.perf_counter() - begin}
    times = 1 if tiny else 10
    alone()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    values["step_ms"] = report.step_ms(alone, times)
    if device == "cuda":
        values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if peak := metrics.peak_flops(torch.device(device)):
            per_token = flops.flops_per_token(config, length)
            values["mfu"] = per_token * rows * length / (values["step_ms"] / 1e3) / peak
    values["with_optimizer_ms"] = report.step_ms(whole, times)
    return values


def in_a_process(case: str, implementation: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one measurement, printed too; a failure is a row with its last line."""
    command = [sys.executable, __file__, "--measure", case, implementation, *(["--tiny"] if options.tiny else [])]
    process = subprocess.run(command, capture_output=True, text=True)
    row = {"case": case, "implementation": implementation}
    if process.returncode:
        said = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        print(f"{case:30}{implementation:22}{said[:200]}", flush=True)
        return [{**row, "metric": "failure", "value": said}]
    values = json.loads(process.stdout.strip().splitlines()[-1])
    told = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
    print(f"{case:30}{implementation:22}{told}", flush=True)
    return [{**row, "metric": k, "value": float(f"{v:.5g}"), "unit": UNITS[k]} for k, v in values.items()]


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("transformers", "flash-linear-attention"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)), help="their numbers, from 0")
    parser.add_argument("--tiny", action="store_true", help="small sizes, once, to see that it runs")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.measure:
        print(json.dumps(measure(*options.measure, options.tiny, device)))
        return
    if device == "cpu" and not options.tiny:
        raise SystemExit("there is no CUDA card here: --tiny runs it at a small size")
    rows = []
    for case in [list(CASES)[number] for number in options.cases]:
        for implementation in options.only:
            rows += in_a_process(case, implementation, options)
            report.write(rows, "training_step", options.commit, options.out, **versions())


if __name__ == "__main__":
    main()
