"""What a run starts from: its text as batches, and fresh, continued or resumed parameters."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from tokenizers import Tokenizer

from q3n_functional import checkpoint, corpus, data, optim, tokenizer, train_config, train_state
from q3n_functional.checkpoint import Checkpoint, Extras
from q3n_functional.config import Config
from q3n_functional.data import Reader
from q3n_functional.parallel import launch
from q3n_functional.parallel.distributed_checkpoint import Storage
from q3n_functional.parallel.rules import init
from q3n_functional.params import named_leaves, named_specs
from q3n_functional.train_config import TrainConfig
from q3n_functional.train_state import TrainState, model_folder

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """What a run reads. `bytes_per_token` are of the training and the validation part, 0 where unknown.

    `signature` is that of the source.
    """

    training: Reader
    validation: Reader | None
    tokenizer: Tokenizer | None
    bytes_per_token: tuple[float, float]
    signature: str


def newest(run: Path, config: TrainConfig) -> Path | None:
    """The checkpoint to resume from; ValueError where the run folder and the configuration contradict each other."""
    checkpoints = train_state.complete(run)
    if not config.resume and checkpoints:
        raise ValueError(f"{checkpoints[0]} exists: add --resume to go on from it, or choose another --run")
    if not checkpoints:
        if config.resume:
            logger.info("%s has no complete checkpoint: starting at step 0", run)
        return None
    if changed := train_config.difference(train_state.record(checkpoints[0])["config"], config):
        raise ValueError(
            f"{checkpoints[0]} cannot be resumed: {changed}; change it back, "
            f"or start another --run with --init-from {checkpoints[0] / 'model'}"
        )
    logger.info("resuming from %s", checkpoints[0])
    return checkpoints[0]


def text(config: TrainConfig, run: Path, newest: Path | None) -> Text:
    """The text of a run, tokenised once into its folder; `newest` is the checkpoint whose tokenizer and source go on.

    All ranks of a mesh call it together: the first one makes the tokenizer and the tokens.
    """
    source = launch.together(partial(_source, config))
    signature = launch.same(launch.together(partial(_unchanged, source, newest)), "what is in data.source")
    words = launch.from_lead(partial(_tokenizer, config, source, newest))
    launch.in_turn(partial(_make, run))
    ids = source
    if source.suffix != ".npy":
        ids = launch.in_turn(partial(corpus.tokenize, source, cast(Tokenizer, words), run))
    return launch.together(partial(_read, config, ids, words, signature))


def _source(config: TrainConfig) -> Path:
    source = Path(config.data.source)
    if not source.is_file():
        raise ValueError(f"data.source {source} does not exist: give a .txt, .jsonl or .npy file")
    return source


def _unchanged(source: Path, newest: Path | None) -> str:
    """The signature of `source`; ValueError where it is not what `newest` was trained on."""
    signature = corpus.signature(source)
    # Checkpoints from before it was noted go on with what there is.
    if newest and train_state.record(newest).get("source", signature) != signature:
        raise ValueError(
            f"{newest} cannot be resumed: {source} is not what it was then; put the old one back, "
            f"or start another --run with --init-from {newest / 'model'}"
        )
    return signature


def _read(config: TrainConfig, ids: Path, words: Tokenizer | None, signature: str) -> Text:
    whole, c = corpus.read(ids, config.model.vocab_size), config
    training, validation = data.readers(whole, c.data.validation_fraction, c.batch_size, c.seq_len)
    return Text(training, validation, words, _bytes_per_token(config, training, validation, words), signature)


def _make(run: Path) -> None:
    if launch.world().lead:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run {run} cannot be made ({error}): choose another --run") from error
    elif not run.is_dir():
        raise ValueError(f"{run} is on another machine: all ranks must see one file system there")


def _tokenizer(config: TrainConfig, source: Path, newest: Path | None) -> Tokenizer | None:
    name = config.data.tokenizer
    if source.suffix not in (".txt", ".jsonl", ".npy"):
        raise ValueError(f"data.source {source} must end in .txt, .jsonl or .npy")
    if source.suffix == ".npy" and name == "none":
        return None
    if (source.suffix == ".npy" and name in ("bpe", "byte")) or name == "none":
        raise ValueError(
            f"data.tokenizer is {name!r} with {source}: "
            'token ids need the tokenizer.json that made them, or "none"; text needs a tokenizer'
        )
    if config.init_from and name in ("bpe", "byte"):
        raise ValueError(
            f"data.tokenizer is {name!r} with init_from {config.init_from}: "
            f"that model knows its own tokens, so give {model_folder(Path(config.init_from)) / 'tokenizer.json'}"
        )
    if newest:
        return tokenizer.read(newest / "model" / "tokenizer.json")
    return _checked(tokenizer.make(name, partial(corpus.blocks, source), config.model.vocab_size), config)


def _checked(words: Tokenizer, config: TrainConfig) -> Tokenizer:
    size = words.get_vocab_size()
    if size > config.model.vocab_size:
        raise ValueError(f"data.tokenizer has {size} tokens, model.vocab_size is {config.model.vocab_size}: raise it")
    return words


def _bytes_per_token(
    config: TrainConfig, training: Reader, validation: Reader | None, words: Tokenizer | None
) -> tuple[float, float]:
    if words is None:
        return 0.0, 0.0
    ids = training.corpus.ids[: 1 << 20]
    most = config.output.validation_batches
    return (
        tokenizer.num_bytes(words, ids) / len(ids),
        data.bytes_per_token(validation, most, words) if validation else 0.0,
    )


def model(
    config: TrainConfig, newest: Path | None, words: Tokenizer | None, device: torch.device, rank: int = 0
) -> Checkpoint:
    """The model before the first step: of checkpoint `newest`, of the `init_from` folder, or random.

    On a mesh, of `rank`, its shards; no more than these, and one leaf, is in memory at a time.
    """
    if newest:
        return checkpoint.load(newest / "model", torch.float32, device, config.mesh, rank)
    return _continued(config, device, rank) if config.init_from else _initial(config, words, device, rank)


def start(config: TrainConfig, newest: Path | None, model: Checkpoint, storage: Storage | None = None) -> TrainState:
    """The state before the first step: `model` with the optimizer of checkpoint `newest` or a fresh one."""
    groups, dtype = optim.groups(model.config, config.optimizer), getattr(torch, config.optimizer.state_dtype)
    optimizer = optim.init(named_leaves(model.params), groups, dtype)
    return train_state.load(newest, model, optimizer, storage) if newest else TrainState(0, model, optimizer)


def _initial(config: TrainConfig, words: Tokenizer | None, device: torch.device, rank: int) -> Checkpoint:
    c, files = config.model, {}
    if words is not None:
        files = tokenizer.files(words)
        if c.eos_token_id is None:
            c = dataclasses.replace(c, eos_token_id=words.token_to_id(tokenizer.END))
    return Checkpoint(init(c, config.seed, config.mesh, rank, device=device), c, {}, Extras({}, files))


def _continued(config: TrainConfig, device: torch.device, rank: int) -> Checkpoint:
    """The model of `init_from` with what the options under model change in its configuration."""
    folder = model_folder(Path(config.init_from))
    loaded = checkpoint.load(folder, torch.float32, device, config.mesh, rank)
    own = Config.from_json(folder / "config.json")
    names = [f.name for f in dataclasses.fields(Config)]
    changes = {n: getattr(config.model, n) for n in names if getattr(config.model, n) != getattr(own, n)}
    changed = dataclasses.replace(loaded.config, **changes)
    wanted, found = (
        {name: leaf.shape for name, leaf in named_specs(each).items()} for each in (changed, loaded.config)
    )
    if different := sorted(wanted.items() ^ found.items()):
        raise ValueError(
            f"init_from {folder} has another {different[0][0]} than {', '.join(f'model.{n}' for n in changes)} "
            "would make: leave the sizes of the model as they are"
        )
    return loaded._replace(config=changed)
