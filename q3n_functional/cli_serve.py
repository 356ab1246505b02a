"""The commands of `q3n` that talk: with a person in the terminal, and with clients over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from tyro.conf import Positional, arg

from q3n_functional.sampling_options import Options, check_bias

if TYPE_CHECKING:
    import torch

DType = Literal["keep", "float32", "bfloat16", "float16"]


Sampling = Annotated[Options, arg(name="")]
"""`sampling.Options` as options of a command."""


def chat(
    folder: Annotated[Path, arg(metavar="FOLDER"), Positional],
    *,
    system: str = "",
    max_length: int = 0,
    max_new_tokens: int = 1024,
    dtype: DType = "keep",
    device: str = "auto",
    options: Sampling = Options(),  # noqa: B008  # immutable
) -> None:
    """Talks with the model in FOLDER by its chat template: a line is a turn, Ctrl-C ends an answer, Ctrl-D the talk.

    Args:
        folder: a Hugging Face folder, a checkpoint step-N, or a run with checkpoints.
        system: what the model is told first.
        max_length: tokens of the whole conversation; 0 for the model's positions, at most 8192.
        max_new_tokens: the most tokens of an answer.
        dtype: of the weights; those that are always float32 stay so.
        device: "auto" is cuda where there is one, else cpu.
        options: how tokens are drawn.
    """
    from q3n_functional import chat as chats
    from q3n_functional.config import Config
    from q3n_functional.train_state import model_folder

    found = model_folder(folder)
    config = Config.from_json(found / "config.json")
    length = chats.room(config, max_length)
    check_bias(options, config.vocab_size)
    if chats.read(found) is None:
        raise ValueError(f"{found} has no chat template (chat_template.jinja): use q3n generate")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    chats.talk(chats.load(found, _dtype(dtype), device), system, length, max_new_tokens, options)


def serve(
    folder: Annotated[Path, arg(metavar="FOLDER"), Positional],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "",
    capacity: int = 16,
    max_length: int = 0,
    max_queue: int = 256,
    prefix_mib: int = 256,
    chunk_length: int = 4096,
    draft_tokens: int = 0,
    compile: bool = False,
    dtype: DType = "keep",
    device: str = "auto",
) -> None:
    """Answers OpenAI's completions and chat completions with the model in FOLDER, and has a page for trying prompts.

    There is no password and no encryption: whoever reaches HOST may use it.

    Args:
        folder: a Hugging Face folder, a checkpoint step-N, or a run with checkpoints.
        host: the address to listen at; 0.0.0.0 for all.
        port: the port to listen at.
        name: what the model is called; the folder's name where empty.
        capacity: texts that are written at once.
        max_length: tokens of prompt and text together; 0 for the model's positions, at most 8192.
        max_queue: texts that may wait; more are refused with status 429.
        prefix_mib: memory for common beginnings, in MiB, which are then read once; 0 for none.
        chunk_length: tokens of prompts that are read at once, which bounds the memory.
        draft_tokens: tokens that the prediction module drafts a step for each text, which stays the same.
        compile: compile the step first, which pays on cuda.
        dtype: of the weights; those that are always float32 stay so.
        device: "auto" is cuda where there is one, else cpu.
    """
    from q3n_functional import chat as chats
    from q3n_functional.batching import Engine
    from q3n_functional.checkpoint import read_config
    from q3n_functional.generate import check_drafts
    from q3n_functional.train_state import model_folder

    try:
        from q3n_functional.serve import run
    except ModuleNotFoundError as error:
        raise ValueError(f"q3n serve: {error}: pip install 'q3n-functional[serve]'") from error
    if capacity < 1:
        raise ValueError(f"capacity must be 1 or more, got {capacity}")
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be in [0, 65535], 0 for one that is free, got {port}")
    check_drafts(draft_tokens, 1)
    found = model_folder(folder)
    config = read_config(found)
    if draft_tokens and not config.num_nextn_predict_layers:
        raise ValueError(f"the model in {found} has no prediction module (mtp) to draft with: leave out --draft-tokens")
    length = chats.room(config, max_length)
    speaker = chats.load(found, _dtype(dtype), device)
    engine = Engine(
        speaker.model.params, speaker.model.config, rows=capacity, capacity=length, tokenizer=speaker.words,
        max_queue=max_queue, chunk_length=chunk_length, prefix_bytes=prefix_mib << 20, drafts=draft_tokens,
        compile=compile,
    )  # fmt: skip
    run(engine, speaker, name or folder.resolve().name, host, port)


def _dtype(name: DType) -> torch.dtype | None:
    import torch

    return None if name == "keep" else cast("torch.dtype", getattr(torch, name))
