"""Conversations as tokens, by the chat template of a Hugging Face folder, and a conversation in the terminal."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from q3n_functional import checkpoint, tokenizer
from q3n_functional.batching import Engine, Request
from q3n_functional.config import Config
from q3n_functional.generate import check_finite
from q3n_functional.sampling import Options
from q3n_functional.step import pick_device

Message = Mapping[str, str]
"""Has `role` and `content`."""


class Template(NamedTuple):
    """A chat template in Jinja, and the special tokens that it may name, such as `bos_token`."""

    source: str
    tokens: Mapping[str, str]


def read(folder: Path) -> Template | None:
    """The template of a folder: of chat_template.jinja, else of tokenizer_config.json; None where there is none.

    Raises ValueError, naming the file, for what is no JSON or no template.
    """
    file = folder / "tokenizer_config.json"
    try:
        about = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    alone = folder / "chat_template.jinja"
    source = alone.read_text() if alone.is_file() else _named(about.get("chat_template"))
    if source is None:
        return None
    # A token is a string, or an object of the library that wrote it.
    spelt = {k: v["content"] if isinstance(v, dict) else v for k, v in about.items() if k.endswith("_token")}
    made = Template(source, {k: v for k, v in spelt.items() if isinstance(v, str)})
    try:
        _environment().from_string(made.source)
    except TemplateError as error:
        raise ValueError(f"the chat template of {folder} is none: {error}") from error
    return made


def _named(source: object) -> str | None:
    """The template, which may stand under the name "default" among others."""
    if isinstance(source, list):
        source = {each["name"]: each["template"] for each in source}.get("default")
    return source if isinstance(source, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates of Hugging Face folders rely on. A template may not reach what it is not given."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return made


def _to_json(value: object, **options: Any) -> str:
    # Jinja's own escapes HTML, which the models were not trained on.
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def encode(words: Tokenizer, template: Template, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation, up to where the answer begins.

    Special tokens that the template writes are tokens; one that is spelt out in a message is text. Raises ValueError
    for what the template refuses, and for no messages.
    """
    if not messages:
        raise ValueError("messages has no entries: give at least one")
    special = {token.content: number for number, token in words.get_added_tokens_decoder().items() if token.special}
    try:
        text = (
            _environment()
            .from_string(template.source)
            .render(
                messages=[{k: _masked(v, special) for k, v in m.items()} for m in messages],
                add_generation_prompt=True,
                **template.tokens,
            )
        )
    except Exception as error:  # a template is a program, which fails in its own ways
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return list(_tokens(words, text, special))


_MARK = "\ue000"
"""Stands behind the first character of a special token in a message; a private character, which texts do not have."""


def _masked(text: str, special: Mapping[str, int]) -> str:
    for token in special:
        text = text.replace(token, token[0] + _MARK + token[1:])
    return text


def _tokens(words: Tokenizer, text: str, special: Mapping[str, int]) -> Iterator[int]:
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    for piece in re.split(f"({pattern})", text) if special else [text]:
        if piece in special:
            yield special[piece]
        elif piece:
            yield from tokenizer.encode(words, [piece.replace(_MARK, "")])[0]


def stop_tokens(folder: Path, config: Config) -> tuple[int, ...]:
    """The tokens that end a text: of config.json, and of generation_config.json, where chat models name theirs.

    Raises ValueError, naming the file, for what is no JSON object, and for what is no token of the vocabulary.
    """
    file = folder / "generation_config.json"
    ends = [config.eos_token_id, _end(file) if file.is_file() else None]
    own, theirs = ([end] if not isinstance(end, list | tuple) else end for end in ends)
    for end in theirs:
        if end is not None and not (type(end) is int and 0 <= end < config.vocab_size):
            raise ValueError(
                f"{file}: eos_token_id contains {end!r}; token ids are integers in [0, {config.vocab_size}): correct it"
            )
    return tuple(dict.fromkeys(end for end in (*own, *theirs) if end is not None))


def _end(file: Path) -> Any:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{file} holds {about!r:.40}, it must be an object such as {{}}: correct or remove it")
    return about.get("eos_token_id")


class Speaker(NamedTuple):
    """What a folder has for writing text."""

    model: checkpoint.Checkpoint
    words: Tokenizer
    template: Template | None
    stop_tokens: tuple[int, ...]


def load(folder: Path, dtype: torch.dtype | None, device: str) -> Speaker:
    """The model of a folder and what turns texts into its tokens."""
    words, template = tokenizer.read(folder / "tokenizer.json"), read(folder)
    ends = stop_tokens(folder, checkpoint.read_config(folder))
    return Speaker(checkpoint.load(folder, dtype=dtype, device=pick_device(device)), words, template, ends)


def room(config: Config, max_length: int) -> int:
    """`max_length`, or for 0 the model's positions, at most 8192. Raises ValueError for more than the model has."""
    most = config.max_position_embeddings
    if not 0 <= max_length <= most:
        raise ValueError(f"max_length must be 1 to {most}, the model's positions, or 0 to choose; got {max_length}")
    return max_length or min(most, 8192)


STORE_BYTES = 256 << 20
"""For what was said: a turn then reads only what is new."""


def talk(speaker: Speaker, system: str, max_length: int, max_new_tokens: int, options: Options) -> None:
    """A conversation in the terminal: reads a line, streams the answer, and so on until the end of input.

    An interrupt (Ctrl-C) ends the answer that is being written; what there is of it counts as said. The
    speaker has a template.
    """
    assert speaker.template is not None
    params, config = speaker.model.params, speaker.model.config
    engine = Engine(
        params, config, rows=1, capacity=max_length, tokenizer=speaker.words, prefix_bytes=STORE_BYTES
    )  # fmt: skip
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for line in _lines():
        asked = [*messages, {"role": "user", "content": line}]
        try:
            prompt = encode(speaker.words, speaker.template, asked)
            number = engine.submit(
                Request(
                    prompt=prompt,
                    max_new_tokens=min(max_new_tokens, max(max_length - len(prompt), 1)),
                    options=options,
                    stop_tokens=speaker.stop_tokens,
                )
            )
        except ValueError as error:
            print(f"q3n: {error}", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": _answer(engine, number)}]


def _lines() -> Iterator[str]:
    """What is typed, line by line, without those that are empty."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _answer(engine: Engine, number: int) -> str:
    """Print the text of the one request there is as it comes; it ends early where the user interrupts.

    Raises FloatingPointError for logits that are not finite.
    """
    text = ""
    with undisturbed():
        try:
            while engine.counts()[:2] != (0, 0):
                for event in engine.step():
                    check_finite(event.logprob)
                    text += event.text  # an interrupt may come while it is printed
                    print(event.text, end="", flush=True)
        except KeyboardInterrupt:
            engine.cancel(number)
        finally:
            print(flush=True)
    return text


@contextmanager
def undisturbed() -> Iterator[None]:
    """Lets what the block logs wait for its end: on a terminal it would stand amid the text that the block prints."""
    root = logging.getLogger()
    kept, waiting = root.handlers, BufferingHandler(sys.maxsize)
    root.handlers = [waiting]
    try:
        yield
    finally:
        root.handlers = kept
        for record in waiting.buffer:
            root.handle(record)
