"""q3n: train, generate, serve, convert, export, inspect and plan Qwen3-Next models.

  q3n train CONFIG.toml [--key value ...]   train as the TOML file says; options override its keys
  q3n profile CONFIG.toml [--key value ...] where the time of a step of it goes: trace, table, picture
  q3n generate FOLDER PROMPT [options]      continue a text
  q3n chat FOLDER [options]                 talk with a model in the terminal
  q3n serve FOLDER [options]                OpenAI's endpoints over HTTP, and a page for trying prompts
  q3n convert SOURCE TARGET [--dtype TYPE]  write a Hugging Face folder again, in another precision
  q3n export FOLDER OUT [options]           programs of it that run without the model's code
  q3n inspect MODEL [--mesh dp=2,tp=4]      the parameter tree of a folder, a config.json or a preset
  q3n plan MODEL --mesh dp=64,tp=2          memory, traffic and time of a training step on cards that are not here

Each has its own --help. FOLDER is a Hugging Face folder, a checkpoint step-N, or a run with checkpoints.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro
from tyro.conf import Positional, arg

from q3n_functional.cli_serve import Sampling, chat, serve
from q3n_functional.sampling_options import Options

if TYPE_CHECKING:
    from q3n_functional.config import Config
    from q3n_functional.parallel.launch import World

# Commands import what they need: help and usage errors come without the second that torch takes to load, but for those
# of train and profile, whose options are defined beside it.


def train(arguments: Sequence[str]) -> None:
    """Runs `q3n train`, on one rank of a mesh under torchrun; exits with 128 + N where signal N ended it, after saving.

    Errors of a rank go to the terminal with its number, and to torchrun's report of the first that failed.
    """
    from q3n_functional.parallel.launch import world
    from q3n_functional.train import Stopped
    from q3n_functional.train import train as run
    from q3n_functional.train_config import parse

    with _as_rank(world()):
        try:
            run(parse(arguments))
        except Stopped as stopped:
            logging.info("%s", stopped)
            sys.exit(128 + stopped.number)


@contextmanager
def _as_rank(where: World) -> Iterator[None]:
    """Runs the block as one of the ranks that torchrun launched, whose process ends with it; or alone, as it is."""
    if where.size == 1:
        yield
        return
    if not where.lead:
        logging.basicConfig(level=logging.WARNING, format=f"[rank {where.rank}] %(message)s", force=True)
    try:
        yield
    except Exception as error:
        _end_rank(error, where)
    sys.stdout.flush()
    # Threads of gloo may outlive its groups, and now and then abort a process that goes down around them.
    os._exit(0)


def _end_rank(error: Exception, where: World) -> NoReturn:
    """Says what ended this rank of several, and exits: with 2 for a user's mistake."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from q3n_functional.parallel.launch import LostRankError, told_by

    lost, mistake = isinstance(error, LostRankError), isinstance(error, MISTAKES)
    if not (lost or mistake):  # where torchrun finds what to report
        get_error_handler().record_exception(error)
    if told_by(error, where):
        text = str(error) if lost or mistake else "".join(traceback.format_exception(error))
        print(f"q3n: rank {where.rank}: {text}", file=sys.stderr)
    sys.exit(2 if mistake else 1)


def profile(arguments: Sequence[str]) -> None:
    """Runs `q3n profile`, which takes what `q3n train` takes and reads no data."""
    from q3n_functional.profile import profile as run
    from q3n_functional.train_config import parse

    run(parse(arguments, "q3n profile"))


@dataclass(frozen=True)
class Shares:
    """The degrees of a mesh that writes; their product is the number of ranks."""

    tp: int = 1
    """The number of ranks that share heads, widths and vocabulary."""
    ep: int = 1
    """The number of ranks that share the experts."""


def generate(arguments: Sequence[str]) -> None:
    """Runs `q3n generate`, on one rank of a mesh under torchrun."""
    if {"-h", "--help"} & set(arguments):
        tyro.cli(_generate, prog="q3n generate", args=["--help"])
    from q3n_functional.parallel.launch import world

    with _as_rank(world()):
        tyro.cli(_generate, prog="q3n generate", args=arguments)


def _generate(
    folder: Annotated[Path, arg(metavar="FOLDER"), Positional],
    prompt: Annotated[str, arg(metavar="PROMPT"), Positional],
    *,
    max_new_tokens: int = 256,
    stop: tuple[str, ...] = (),
    chunk_length: int = 4096,
    draft_tokens: int = 0,
    compile: bool = False,
    device: str = "auto",
    options: Sampling = Options(),  # noqa: B008  # immutable
    mesh: Shares = Shares(),
) -> None:
    """Continues PROMPT with the model in FOLDER, and prints the text as it is written.

    Args:
        folder: a Hugging Face folder, a checkpoint step-N, or a run with checkpoints.
        prompt: the text to continue.
        max_new_tokens: the most tokens to write.
        stop: texts that end the writing and are not printed.
        chunk_length: tokens of the prompt that are read at once, which bounds the memory.
        draft_tokens: tokens that the prediction module drafts a step; the text stays the same.
        compile: compile the step first, which pays for long texts on cuda.
        device: "auto" is cuda where there is one, else cpu.
        options: how tokens are drawn.
        mesh: how many ranks share the model.
    """
    from q3n_functional import tokenizer
    from q3n_functional.chat import stop_tokens
    from q3n_functional.checkpoint import read_config
    from q3n_functional.generate import check_drafts
    from q3n_functional.generate import generate as write
    from q3n_functional.parallel import decode, launch
    from q3n_functional.parallel.mesh import Mesh, check, check_size
    from q3n_functional.step import pick_device
    from q3n_functional.train_state import model_folder

    where, layout, found = launch.world(), Mesh(tp=mesh.tp, ep=mesh.ep), model_folder(folder)
    config = read_config(found)
    check(layout, config)
    check_size(layout, where.size)
    check_drafts(draft_tokens, where.size)
    words, on = tokenizer.read(found / "tokenizer.json"), launch.own_device(pick_device(device), where)
    ends = stop_tokens(found, config)
    with launch.joined(where, on), launch.watched(where, lambda: "launch it again"):
        model, parallel = decode.load(found, layout, on, where)
        start = partial(
            write, model.params, tokenizer.encode(words, [prompt])[0], parallel, config=model.config,
            max_new_tokens=max_new_tokens, options=options, stop_tokens=ends, chunk_length=chunk_length,
            draft_tokens=draft_tokens, compile=compile,
        )  # fmt: skip
        _print(chain([prompt], launch.together(lambda: tokenizer.stream(words, start(), stop))), where)


def _print(pieces: Iterable[str], where: World) -> None:
    """Every rank takes the pieces, whose making needs them all; the first one prints them."""
    from q3n_functional.chat import undisturbed

    with undisturbed():
        try:
            for piece in pieces:
                if where.lead:
                    print(piece, end="", flush=True)
        finally:  # what is said of an error begins a line too
            if where.lead:
                print(flush=True)


def convert(
    source: Annotated[Path, arg(metavar="SOURCE"), Positional],
    target: Annotated[Path, arg(metavar="TARGET"), Positional],
    *,
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
) -> None:
    """Writes the model in SOURCE to TARGET as a Hugging Face folder, with its tokenizer and unknown tensors.

    Args:
        source: a Hugging Face folder, a checkpoint step-N, or a run with checkpoints.
        target: a new folder.
        dtype: of the weights; those that are always float32 stay so.
    """
    import torch

    from q3n_functional import checkpoint
    from q3n_functional.train_state import model_folder

    if target.exists():
        raise ValueError(f"{target} exists: choose another target or remove it")
    kind = None if dtype == "keep" else getattr(torch, dtype)
    model = checkpoint.load(model_folder(source), dtype=kind)
    try:
        checkpoint.save(target, model.params, model.config, None if kind else model.dtypes, model.extras)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)  # the next try would be refused
        if isinstance(error, OSError):
            raise OSError(f"{target} cannot be written ({error}): make room, or choose another target") from error
        raise


def export(
    folder: Annotated[Path, arg(metavar="FOLDER"), Positional],
    out: Annotated[Path, arg(metavar="OUT"), Positional],
    *,
    rows: int,
    capacity: int,
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    device: str = "auto",
    aot: bool = False,
) -> None:
    """Writes the model in FOLDER to OUT as programs of torch.export: a prefill and a decoding step.

    Args:
        folder: a Hugging Face folder, a checkpoint step-N, or a run with checkpoints.
        out: a new folder.
        rows: sequences that run together.
        capacity: tokens that each has room for.
        dtype: of the weights; those that are always float32 stay so.
        device: on which the programs will run; "auto" is cuda where there is one, else cpu.
        aot: write AOTInductor packages too, which needs a C++ compiler.
    """
    import torch

    from q3n_functional.export import export as run
    from q3n_functional.step import pick_device
    from q3n_functional.train_state import model_folder

    kind = None if dtype == "keep" else getattr(torch, dtype)
    where = pick_device(device)
    run(model_folder(folder), out, rows=rows, capacity=capacity, dtype=kind, device=where, aot=aot)


def inspect(model: Annotated[str, arg(metavar="MODEL"), Positional], *, mesh: str = "") -> None:
    """Prints the parameter tree of MODEL with shapes, axes, counts and bytes; loads no weights.

    Args:
        model: a folder, a config.json, or a preset such as qwen3_next_80b_a3b.
        mesh: degrees such as dp=2,tp=4 (also replicate, cp, ep): shows what each rank holds.
    """
    from q3n_functional.parallel.mesh import parse
    from q3n_functional.summary import summary

    print(summary(_config(model), parse(mesh) if mesh else None))


def plan(
    model: Annotated[str, arg(metavar="MODEL"), Positional],
    *,
    mesh: str = "",
    search: bool = False,
    gpus: int = 8,
    card: Literal["h100", "h200", "a100", "b200"] = "h100",
    batch_size: int = 0,
    seq_len: int = 4096,
    recompute: Literal["none", "selective", "full"] = "selective",
    state_dtype: Literal["float32", "bfloat16"] = "float32",
    picture: Path = Path("plan.png"),
) -> None:
    """Says what a training step of MODEL takes on cards that are not here: memory, traffic, time and what bounds it.

    The step's own program runs on tensors without data, as one rank of as many; a picture is drawn of its memory.

    Args:
        model: a folder, a config.json, or a preset such as qwen3_next_80b_a3b.
        mesh: degrees such as dp=64,ep=4,tp=2 (also replicate, cp).
        search: try the meshes of `gpus` ranks, and rank the best.
        gpus: how many cards a search has.
        card: what each rank has; hosts have eight.
        batch_size: rows of a step, of all ranks together; 0 for as many as there are ranks.
        seq_len: tokens of a row.
        recompute: what backward computes again, as in training.
        state_dtype: of the optimizer's moments.
        picture: the file to draw to.
    """
    from q3n_functional import plan_report, plan_search
    from q3n_functional.optim import OptimizerConfig
    from q3n_functional.parallel.mesh import parse
    from q3n_functional.plan import plan as run
    from q3n_functional.plan_cards import CARDS
    from q3n_functional.train_config import DataConfig, TrainConfig, check_config

    if search == bool(mesh):
        raise ValueError("give either --mesh, such as dp=4,tp=2, or --search with --gpus")
    layout = parse(mesh)
    config = TrainConfig(
        run="", steps=1, batch_size=batch_size or (gpus if search else layout.size), seq_len=seq_len, dtype="bfloat16",
        recompute=recompute, data=DataConfig(source=""), optimizer=OptimizerConfig(state_dtype=state_dtype),
        mesh=layout, model=_config(model),
    )  # fmt: skip
    check_config(config)
    plan_report.check_picture(picture)
    plans = plan_search.search(config, gpus, CARDS[card]) if search else [run(config, CARDS[card])]
    if search:
        print(*plan_search.table(plans), "", sep="\n")
    print(*plan_report.lines(plans[0]), sep="\n")
    plan_report.plot(plans[0], picture)
    logging.info("picture: %s", picture)


def _config(model: str) -> Config:
    """The configuration that `model` names: a preset, a config.json, or a folder that has one."""
    from q3n_functional.config import PRESETS, Config
    from q3n_functional.train_state import model_folder

    path = Path(model)
    if model in PRESETS:
        return PRESETS[model]()
    if not path.exists():
        raise ValueError(f"{model} is neither a file, a folder nor one of the presets {', '.join(sorted(PRESETS))}")
    return Config.from_json(path if path.is_file() else model_folder(path) / "config.json")


MISTAKES = (ValueError, OSError, FloatingPointError)
"""Of the user, or of the files given: they end in one line rather than a traceback."""

PARSING = {"train": train, "profile": profile, "generate": generate}
"""Commands that parse their arguments themselves."""

COMMANDS: dict[str, Callable[..., None]] = {
    "chat": chat,
    "serve": serve,
    "convert": convert,
    "export": export,
    "inspect": inspect,
    "plan": plan,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one line on stderr and exit status 2."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if name in ("", "-h", "--help"):
        print(__doc__)
        sys.exit(0 if name else 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(name, rest)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MISTAKES as error:
        print(f"q3n: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _run(name: str, arguments: Sequence[str]) -> None:
    if name in PARSING:
        PARSING[name](arguments)
    elif name in COMMANDS:
        tyro.cli(COMMANDS[name], prog=f"q3n {name}", args=arguments)
    else:
        raise ValueError(f"there is no command {name!r}, only {', '.join([*PARSING, *COMMANDS])}")
