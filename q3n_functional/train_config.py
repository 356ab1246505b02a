"""What a run is made of: the keys of its TOML file, each of which the command line can override."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import tyro

from q3n_functional.compiled import Mode
from q3n_functional.config import PRESETS, Config
from q3n_functional.float8 import Float8
from q3n_functional.optim import OptimizerConfig
from q3n_functional.parallel.mesh import Mesh, check, check_batch
from q3n_functional.parallel.overlap import SOUND
from q3n_functional.recompute import Recompute
from q3n_functional.sampling import Options


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from."""

    source: str
    """A .txt file, a .jsonl file with a "text" a line, or an .npy file of token ids."""
    tokenizer: str = "bpe"
    """"bpe", trained on the source to model.vocab_size; "byte"; the path of a tokenizer.json; or, with .npy, "none"."""
    validation_fraction: float = 0.1
    """The last part of the source, which is kept out of training; 0 for no validation."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What the model writes when the training is over."""

    prompt: str = "\n"
    max_new_tokens: int = 0
    """0 for no sample."""
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is measured and kept on the way; free to change when a run is resumed."""

    validate_every: int = 100
    """Steps between validations; 0 for one at the end."""
    validation_batches: int = 100
    """The most batches that a validation reads."""
    save_every: int = 1000
    """Steps between checkpoints; 0 for one at the end."""
    keep: int = 2
    """How many checkpoints stay, the newest ones."""
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a model from a TOML file of these options."""

    run: str
    """The folder for checkpoints, metrics and pictures."""
    preset: str = "tiny"
    """The model: a preset's name or the path of a config.json; the options under model change it."""
    init_from: str = ""
    """A Hugging Face folder, a checkpoint step-N or a run to continue from; it brings its own config.json."""
    resume: bool = False
    """Go on from the run's newest checkpoint, if it has one."""
    steps: int
    batch_size: int
    """Rows of one micro-batch, those of all ranks together."""
    accumulate: int = 1
    """Micro-batches of one step."""
    seq_len: int
    seed: int = 0
    """Of the initial weights and of the order of the batches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; parameters and optimizer state are always float32."""
    device: str = "auto"
    """"auto" is cuda where there is one, else cpu."""
    compile: Mode = "layers"
    """Where there is a compiler: layers compiles each kind of layer once, model all as one graph, none nothing."""
    recompute: Recompute = "none"
    """What a layer computes again in backward to save memory: none; full, all but its input; or selective, all but the
    results of attention, delta rule, experts and matrix products."""
    float8: Float8 = "none"
    """linears: products with the matrices of attention, linear attention, dense layers and shared experts in float8,
    forward and backward; linears_and_experts: those of routed experts too, but for the gradients of their matrices.
    Routers, gates, embedding and head stay in dtype, which must be bfloat16."""
    cuda_graph: bool = False
    """Every step from the third on is launched as one CUDA graph, for steps that wait for the host. Not with ep."""
    overlap: bool = False
    """Ranks exchange parameters and gradients while they compute: with compile layers those of one layer while the next
    one runs, with model in an order that Inductor makes."""
    reshard_after_forward: bool = True
    """Whether, with overlap and compile layers, a layer's whole parameters are gathered again in backward; kept, they
    take as much memory as the model has in dtype."""
    z_loss_coef: float = 0.0
    timeout: float = 600.0
    """Seconds after which ranks that wait for a silent one end the job; compiling is silent too."""
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    mesh: Mesh = field(default_factory=Mesh)
    model: Config


FREE_ON_RESUME = (
    "run",
    "resume",
    "device",
    "compile",
    "cuda_graph",
    "overlap",
    "reshard_after_forward",
    "timeout",
    "output",
    "mesh",
)
"""Keys that a resumed run may change, because the training does not depend on them."""


def parse(arguments: Sequence[str], prog: str = "q3n train") -> TrainConfig:
    """The configuration of `[CONFIG.toml] [--key value ...]`; later values win.

    Raises ValueError for a TOML file with an unknown key, naming the nearest known one, and for values out of range;
    a bad option or a value of the wrong type ends in tyro's usage message and exit status 2.
    """
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = [*_toml_arguments(Path(arguments[0])), *arguments[1:]]
    base = _base_model(arguments, prog)
    data = DataConfig(source=tyro.MISSING)
    default = TrainConfig(run=tyro.MISSING, steps=tyro.MISSING, batch_size=tyro.MISSING, seq_len=tyro.MISSING,
                          data=data, model=base)  # fmt: skip
    config = tyro.cli(TrainConfig, default=default, args=arguments, prog=f"{prog} CONFIG.toml")
    check_config(config)
    return config


@dataclass(frozen=True, kw_only=True)
class _Base:
    preset: str = "tiny"
    init_from: str = ""


def _base_model(arguments: Sequence[str], prog: str) -> Config:
    """The model that `preset` or `init_from` names: its values are the defaults of the options under model."""
    named = [a for a in arguments if a not in ("-h", "--help")]
    base, _ = tyro.cli(_Base, args=named, prog=prog, return_unknown_args=True)
    if base.init_from:
        from q3n_functional.train_state import model_folder  # which itself imports this module

        return Config.from_json(model_folder(Path(base.init_from)) / "config.json")
    if base.preset in PRESETS:
        return PRESETS[base.preset]()
    if not Path(base.preset).is_file():
        raise ValueError(f"preset is {base.preset!r}: neither a file nor one of {', '.join(sorted(PRESETS))}")
    return Config.from_json(Path(base.preset))


def _toml_arguments(path: Path) -> list[str]:
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: the first argument is the run's TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    _check_keys(table, TrainConfig, path)
    return [argument for key, value in _flat(table) for argument in _option(key, value)]


def _check_keys(table: Mapping[str, Any], kind: type, path: Path, prefix: str = "") -> None:
    known = get_type_hints(kind)
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"{path}: unknown key {prefix}{key}: {remedy}")
        if is_dataclass(known[key]) != isinstance(value, Mapping):
            wanted = "a table" if is_dataclass(known[key]) else "a value"
            raise ValueError(f"{path}: {prefix}{key} is {value!r}, it must be {wanted}")
        if isinstance(value, Mapping):
            _check_keys(value, known[key], path, f"{prefix}{key}.")


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _option(key: str, value: object) -> list[str]:
    if isinstance(value, bool):
        parent, _, name = key.rpartition(".")
        return [f"--{parent}{'.' * bool(parent)}{'' if value else 'no-'}{name}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


LEAST = {
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "seq_len": 2,
    "seed": 0,
    "timeout": 1,
    "z_loss_coef": 0,
    "optimizer.lr": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.eps": 0,
    "optimizer.final_lr": 0,
    "output.validate_every": 0,
    "output.validation_batches": 1,
    "output.save_every": 0,
    "output.keep": 1,
    "output.sample.max_new_tokens": 0,
}
FRACTIONS = ("optimizer.beta1", "optimizer.beta2", "optimizer.momentum", "data.validation_fraction")


def check_config(c: TrainConfig) -> None:
    """Raise ValueError, naming the key and what it may be, for values that are out of range or do not go together."""
    values, sample = flatten(c), c.output.sample
    for name, low in LEAST.items():
        if not values[name] >= low:
            raise ValueError(f"{name} is {values[name]}, it must be at least {low}")
    for name in FRACTIONS:
        if not 0 <= values[name] < 1:
            raise ValueError(f"{name} is {values[name]}, it must be in [0, 1)")
    # An infinite norm clips nothing; one of 0 would leave nothing of the gradient.
    if not c.optimizer.clip_norm > 0:
        raise ValueError(f"optimizer.clip_norm is {c.optimizer.clip_norm}, it must be above 0; inf for no limit")
    if not 0 < c.optimizer.decay_fraction <= 1:
        raise ValueError(f"optimizer.decay_fraction is {c.optimizer.decay_fraction}, it must be in (0, 1]")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value) and name != "optimizer.clip_norm":
            raise ValueError(f"{name} is {value}, it must be finite")
    if c.seed >= 1 << 32:
        raise ValueError(f"seed is {c.seed}, it must be below 2**32")
    if c.float8 != "none" and c.dtype != "bfloat16":
        raise ValueError(f"float8 is {c.float8!r} with dtype {c.dtype!r}: it is between bfloat16 tensors, so set that")
    if c.cuda_graph and c.dtype == "float32":
        raise ValueError("cuda_graph with dtype 'float32': fp32 attention waits for the device, so compute in bfloat16")
    if c.cuda_graph and c.mesh.ep > 1:
        raise ValueError(
            f"cuda_graph with ep = {c.mesh.ep}: the host has to know how many tokens each rank sends, so leave it out"
        )
    if c.float8 != "none" and c.mesh.size > 1:
        raise ValueError(f"float8 is {c.float8!r} with a mesh of {c.mesh.size} ranks: it is for one device, set none")
    if c.overlap and (c.compile == "none" or c.mesh.size == 1):
        raise ValueError(
            f"overlap with compile {c.compile!r} and a mesh of {c.mesh.size}: it is an order of compiled code in which "
            "ranks exchange something, so leave it out, or set compile and mesh"
        )
    if c.overlap and c.compile == "model" and not SOUND:
        raise ValueError(
            f"overlap with compile 'model' and torch {torch.__version__}: it needs 2.13, as 2.11 then gives wrong "
            "gradients; set compile layers"
        )
    if not (c.reshard_after_forward or (c.overlap and c.compile == "layers")):
        raise ValueError(
            f"reshard_after_forward is false with overlap {c.overlap} and compile {c.compile!r}: only layers that are "
            "sent for ahead can keep their parameters, so leave it out, or set overlap and compile layers"
        )
    check(c.mesh, c.model)
    check_batch(c.mesh, c.model, c.batch_size, c.seq_len)
    if sample.max_new_tokens and not sample.prompt:
        raise ValueError("output.sample.prompt is empty: a sample continues a text, so give one, such as a line break")
    Options(temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p, seed=sample.seed)  # checks them


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Dotted name to value, as JSON would give them back."""
    return dict(_flat(json.loads(json.dumps(dataclasses.asdict(config)))))


def difference(saved: Mapping[str, Any], config: TrainConfig) -> str | None:
    """What keeps a run saved under `saved` (of `flatten`) from going on under `config`, or None."""
    now = flatten(config)
    for name in sorted(saved.keys() | now.keys()):
        if name.split(".")[0] not in FREE_ON_RESUME and saved.get(name) != now.get(name):
            return f"{name} was {saved.get(name)!r} and is now {now.get(name)!r}"
    return None
