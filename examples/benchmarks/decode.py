"""Writing text with Qwen3-Next at its real widths on one card: this package beside transformers.

    python examples/benchmarks/decode.py [--commit HASH] [--out FOLDER] [--only q3n] [--cases 0 1] [--tiny]

Prints a table and writes results/decode.json. Three linear layers and one of full attention, 128 experts, vocabulary
151,936, bf16, the same weights and prompts for all. Cases "batch 1" and "batch 32": steps behind prompts of 1,024
tokens, drawn at temperature 1 (transformers: the likeliest token). Cases "prefill 32768" and "prefill 1048576": one
prompt into a cache, here 32,768 tokens at a time. Cases "drafts 1" to "drafts 3": batch 1 with so many drafts a step of
the prediction module, beside "drafts 0"; with --folder they run on a trained model, without one on drawn weights, whose
acceptance says little. Implementations: q3n, compiled; q3n graph, compiled and in a CUDA graph; q3n captured, the same
without compiling; q3n eager; q3n forward, that of training over the prompt without a cache, for the first of the two
prompts; transformers, with flash-linear-attention where that is installed. Metrics: ms_per_token, of one sequence;
first_step_s, compiling and capturing; prefill_ms, tokens_per_s and peak_gib, weights and cache included;
acceptance_rate. Every implementation runs in a process of its own. --tiny is for a machine without a card.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from training_step import module_of, random_tokens, versions, wait, weights

from q3n_functional import cache as caches
from q3n_functional import checkpoint, decode, generate, model, params, speculative, tokenizer
from q3n_functional.config import PRESETS, Config
from q3n_functional.sampling import Options
from q3n_functional.train_state import model_folder

LINEAR, FULL = "linear_attention", "full_attention"
CASES = ("batch 1", "batch 32", "prefill 32768", "drafts 0", "drafts 1", "drafts 2", "drafts 3", "prefill 1048576")
UNITS = {
    "ms_per_token": "ms", "first_step_s": "s", "prefill_ms": "ms", "acceptance_rate": "1",
    "peak_gib": "GiB",
}  # fmt: skip
PROMPT, STEPS, WARM, ROUNDS = 1024, 64, 4, 3
PIECE = 32768
"""Tokens of a long prompt that are read at a time."""
Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a step of this package runs."""

    compile: bool
    graph: bool


def shape(tiny: bool, drafts: bool) -> Config:
    return dataclasses.replace(
        PRESETS["tiny" if tiny else "qwen3_next_80b_a3b"](),
        num_hidden_layers=4,
        layer_types=(LINEAR, LINEAR, LINEAR, FULL),
        num_experts=8 if tiny else 128,
        num_nextn_predict_layers=int(drafts),
    )


def sizes(tiny: bool) -> tuple[int, int]:
    """Tokens of a prompt, and steps between two looks at the clock."""
    return (PROMPT // 16, 4) if tiny else (PROMPT, STEPS)


def timed(step: Callable[[], object], steps: int, device: str, warm: int = WARM, rounds: int = ROUNDS) -> float:
    """The milliseconds of a step: the best of some rounds of so many, with no wait between them."""
    for _ in range(warm):
        step()
    found = []
    for _ in range(rounds):
        wait(device)
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        found.append((time.perf_counter() - begin) * 1e3 / steps)
    return min(found)


def first(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What the call gives, and the seconds that it takes."""
    begin = time.perf_counter()
    result = call()
    wait(device)
    return result, time.perf_counter() - begin


def repeated(function: Callable[..., Any], tree: params.Parameters, state: Any, mode: Mode) -> Callable[[], Any]:
    if mode.graph:
        return decode.repeated(function, tree, state, compile=mode.compile)
    step = functools.partial(decode.in_place(function, compile=mode.compile), tree, state)
    step()
    return step


def prompts_of(config: Config, rows: int, length: int, folder: Path | None) -> list[list[int]]:
    """Random tokens; for a trained model the beginning of the plays that the demo learns."""
    if folder is None:
        return random_tokens(config, rows, length, "cpu").tolist()
    words = tokenizer.read(model_folder(folder) / "tokenizer.json")
    text = (Path(__file__).parents[1] / "shakespeare.txt").read_text()[: 8 * length]
    return [tokenizer.encode(words, [text])[0][:length]] * rows


def waiting(config: Config, prompts: list[list[int]], limit: int, capacity: int, device: str) -> decode.Running:
    rows = len(prompts)
    cache = caches.empty(config, rows, capacity, torch.bfloat16, device)
    options = [Options(seed=row) for row in range(rows)]
    return decode.waiting(cache, prompts, options, [()] * rows, [limit] * rows, config=config)


def batch(
    config: Config, tree: params.Parameters, rows: int, mode: Mode, tiny: bool, device: str, folder: Path | None
) -> Values:
    length, steps = sizes(tiny)
    limit = length + 1 + 2 * WARM + ROUNDS * steps + 8
    prompts = prompts_of(config, rows, length, folder)
    state = waiting(config, prompts, limit, limit, device)
    function = functools.partial(decode.step, config=config, filtered=False)
    step, seconds = first(lambda: repeated(function, tree, state, mode), device)
    join = decode.in_place(functools.partial(decode.join, config=config, filtered=False))
    for piece in generate.pieces(prompts, generate.CHUNK, device):
        join(tree, state, *piece)
    milliseconds = timed(step, steps, device)
    assert not state.finished_B.any(), "a row came to its end, and the time of its steps counts for nothing"
    return {"ms_per_token": milliseconds, "first_step_s": seconds}


def drafts(
    config: Config, tree: params.Parameters, num: int, mode: Mode, tiny: bool, device: str, folder: Path | None
) -> Values:
    """Time by the token, of which a step adds one and those that were accepted."""
    length, steps = sizes(tiny)
    limit = length + (1 + num) * (2 * WARM + ROUNDS * steps + 8)
    prompts = prompts_of(config, 1, length, folder)
    running = waiting(config, prompts, limit, limit + num, device)
    state = speculative.waiting(tree, running, num, limit + num, config=config)
    function = functools.partial(speculative.step, config=config, filtered=False)
    step, seconds = first(lambda: repeated(function, tree, state, mode), device)
    join = decode.in_place(functools.partial(speculative.join, config=config, filtered=False))
    later = generate.pieces([[*prompts[0][1:], 0]], generate.CHUNK, device)
    for piece, after in zip(generate.pieces(prompts, generate.CHUNK, device), later, strict=True):
        join(tree, state, piece.tokens_1T, after.tokens_1T, *piece[1:])
    milliseconds = timed(step, steps, device)
    assert not running.finished_B.any(), "the text came to its end, and the time of its steps counts for nothing"
    rate = speculative.acceptance_rate(state)
    return {"ms_per_token": milliseconds / (1 + num * rate), "first_step_s": seconds, "acceptance_rate": rate}


def prefill(config: Config, tree: params.Parameters, length: int, mode: Mode, device: str) -> Values:
    prompt = random_tokens(config, 1, length, "cpu").tolist()
    extend = torch.compile(decode.extend, fullgraph=True) if mode.compile else decode.extend

    def run(end: int = length) -> torch.Tensor:
        cache = caches.empty(config, 1, length, torch.bfloat16, device)
        beginning = [prompt[0][:end]]
        return generate.prefill(tree, beginning, cache, config=config, chunk_length=PIECE, extend=extend)[0]

    return read(run, length, device)


def read(run: Callable[..., object], length: int, device: str) -> Values:
    """What reading a prompt takes; a long one is read once, behind its first two pieces, which compile all there is."""
    long = length > PIECE
    _, seconds = first(functools.partial(run, 2 * PIECE) if long else run, device)
    milliseconds = timed(run, 1, device, *((0, 1) if long else ()))
    values = {"prefill_ms": milliseconds, "tokens_per_s": length / milliseconds * 1e3, "first_step_s": seconds}
    return values | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {})


@torch.no_grad()
def ours(case: str, tiny: bool, device: str, folder: Path | None, mode: Mode) -> Values:
    kind, number = case.split()
    config = shape(tiny, kind == "drafts")
    if kind == "drafts" and folder is not None:
        loaded = checkpoint.load(model_folder(folder), device=device, dtype=torch.bfloat16)
        config, tree = loaded.config, loaded.params
    else:
        tree = weights(config, device)
    if kind == "prefill":
        return prefill(config, tree, int(number) // (64 if tiny else 1), mode, device)
    if kind == "drafts" and number != "0":
        return drafts(config, tree, int(number), mode, tiny, device, folder)
    rows, folder = (1, folder) if kind == "drafts" else (int(number), None)
    return batch(config, tree, rows, mode, tiny, device, folder)


@torch.no_grad()
def forward(case: str, tiny: bool, device: str, folder: Path | None) -> Values:
    config, length = shape(tiny, False), int(case.split()[1]) // (64 if tiny else 1)
    tree, tokens = weights(config, device), random_tokens(config, 1, length, device)
    compiled = torch.compile(functools.partial(model.hidden_states, config=config), fullgraph=True)
    return read(lambda: compiled(tree, tokens)[0][:, -1] @ model.head(tree).mT, length, device)


@torch.no_grad()
def theirs(case: str, tiny: bool, device: str, folder: Path | None) -> Values:
    kind, number = case.split()
    config = shape(tiny, False)
    module = module_of(weights(config, device), config, device).eval()
    if kind == "prefill":
        tokens = random_tokens(config, 1, int(number) // (64 if tiny else 1), device)
        run = functools.partial(module, input_ids=tokens, use_cache=True, logits_to_keep=1)
        return read(run, tokens.shape[1], device)
    length, steps = sizes(tiny)
    out, seconds = first(lambda: module(input_ids=random_tokens(config, int(number), length, device)), device)
    kept = {"cache": out.past_key_values, "token": out.logits[:, -1:].argmax(-1)}

    def step() -> None:
        new = module(input_ids=kept["token"], past_key_values=kept["cache"], use_cache=True)
        kept.update(cache=new.past_key_values, token=new.logits[:, -1:].argmax(-1))

    return {"ms_per_token": timed(step, steps, device), "first_step_s": seconds}


IMPLEMENTATIONS: dict[str, Callable[..., Values]] = {
    "q3n": functools.partial(ours, mode=Mode(compile=True, graph=False)),
    "q3n graph": functools.partial(ours, mode=Mode(compile=True, graph=True)),
    "q3n captured": functools.partial(ours, mode=Mode(compile=False, graph=True)),
    "q3n eager": functools.partial(ours, mode=Mode(compile=False, graph=False)),
    "q3n forward": forward,
    "transformers": theirs,
}


def fits(case: str, implementation: str) -> bool:
    """transformers has no prediction module, and reads a prompt in one piece."""
    if implementation == "q3n forward":
        return case == "prefill 32768"
    return implementation != "transformers" or not (case.startswith("drafts") or case.endswith("1048576"))


def in_a_process(case: str, implementation: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one measurement, printed too; a failure is a row with its last line."""
    command = [sys.executable, __file__, "--measure", case, implementation, *(["--tiny"] if options.tiny else [])]
    command += ["--folder", str(options.folder)] if options.folder else []
    process = subprocess.run(command, capture_output=True, text=True)
    row = {"case": case, "implementation": implementation}
    if process.returncode:
        said = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        print(f"{case:16}{implementation:16}{said[:200]}", flush=True)
        return [{**row, "metric": "failure", "value": said}]
    values = json.loads(process.stdout.strip().splitlines()[-1])
    print(f"{case:16}{implementation:16}" + "  ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)
    return [{**row, "metric": k, "value": float(f"{v:.5g}"), "unit": UNITS[k]} for k, v in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)), help="their numbers, from 0")
    parser.add_argument("--folder", type=Path, help="a trained model with prediction module, for the drafts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.measure:
        case, implementation = options.measure
        print(json.dumps(IMPLEMENTATIONS[implementation](case, options.tiny, device, options.folder)))
        return
    if device == "cpu" and not options.tiny:
        raise SystemExit("there is no CUDA card here: --tiny runs it at a small size")
    rows = []
    for case in [CASES[number] for number in options.cases]:
        for implementation in options.only:
            if fits(case, implementation):
                rows += in_a_process(case, implementation, options)
                report.write(rows, "decode", options.commit, options.out, **versions())
    if found := report.by_implementation(rows, "ms_per_token"):
        report.bars(found, "ms a token, of one sequence", options.out / "decode.png", log=True)


if __name__ == "__main__":
    main()
