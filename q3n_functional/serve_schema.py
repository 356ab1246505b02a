"""The JSON of OpenAI's completions and chat completions: requests, answers, and pieces of answers.

Beside OpenAI's fields there are top_k, min_p and repetition_penalty, as other servers of open models have them. A field
that is not here is refused, not ignored: what it asks for would not be done.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator
from tokenizers import Tokenizer

from q3n_functional.batching import Event, Request
from q3n_functional.sampling import Options


def _encodable(text: str) -> str:
    text.encode()  # JSON can spell halves of characters, which are in no text; the error says where one is
    return text


Json = dict[str, Any]
Unicode = Annotated[str, AfterValidator(_encodable)]
Text = Annotated[Unicode, Field(min_length=1)]
Tokens = Annotated[list[StrictInt], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream has beside the text."""

    include_usage: bool = False


class Body(_Strict):
    """What both kinds of requests have; `sampling.Options` says what the settings do and their limits."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: object) -> object:
        """A field that is null is one that is not there, as with OpenAI."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def options(self) -> Options:
        """How to draw; without a seed, by a random one. Raises ValueError for values out of range."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        return Options(
            **{name: getattr(self, name) for name in (*names, "frequency_penalty")},
            logit_bias=self.logit_bias or {},
            seed=secrets.randbits(62) if self.seed is None else self.seed,
        )

    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionBody(Body):
    """POST /v1/completions. A prompt is text or tokens. `logprobs` 0 gives those of the tokens drawn."""

    prompt: Unicode | Tokens | Annotated[list[Unicode] | list[Tokens], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts as several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Part(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class MessageBody(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Unicode

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: object) -> object:
        if isinstance(content, list):
            return "".join(Part.model_validate(part).text for part in content)
        return content


class ChatBody(Body):
    """POST /v1/chat/completions. Without a limit an answer may have as many tokens as there is room for."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None


FIELDS = CompletionBody.model_fields | ChatBody.model_fields


def field_of(message: str) -> str | None:
    """The first field of a body that a refusal names, whatever refused: settings are called the same everywhere."""
    return next((word for word in re.findall(r"\w+", message) if word in FIELDS), None)


def check_length(body: Body, prompts: Sequence[Sequence[int]], max_tokens: int, limit: int) -> None:
    """Raise ValueError, naming the field, where a text would have more tokens than the server's `limit`."""
    longest, chat = max(map(len, prompts)), isinstance(body, ChatBody)
    if longest >= limit:
        raise ValueError(
            f"{'messages' if chat else 'prompt'}: {longest} tokens leave none of the {limit} that this server has for "
            "prompt and answer together: shorten it"
        )
    if longest + max_tokens > limit:
        name = "max_completion_tokens" if isinstance(body, ChatBody) and body.max_completion_tokens else "max_tokens"
        raise ValueError(
            f"{name}: {max_tokens} are more than the {limit - longest} that a prompt of {longest} tokens leaves of the "
            f"{limit} that this server has for both: lower it or shorten the prompt"
        )


def requests(
    body: Body, prompts: Sequence[Sequence[int]], max_tokens: int, stop_tokens: Collection[int]
) -> list[Request]:
    """`n` requests for each prompt; the first draws by the body's seed, each other by the next."""
    options = body.options()
    fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
    seeds = [(options.seed + i + 2**63) % 2**64 - 2**63 for i in range(body.n)]
    each = [Options(**{**fields, "seed": seed}) for seed in seeds]
    common = {"max_new_tokens": max_tokens, "stop_tokens": stop_tokens, "stop": body.stops()}
    return [Request(prompt=prompt, options=o, **common) for prompt in prompts for o in each]  # type: ignore[arg-type]


def error(message: str, kind: str = "invalid_request_error", param: str | None = None) -> Json:
    """An error, as clients of OpenAI read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def invalid_error(found: Sequence[Any]) -> Json:
    """The error of a body that is none, from what pydantic says of it."""
    first = found[0]
    if isinstance(first["input"], bytes):
        return error("the request has no header Content-Type: application/json, so its body is not read: add it")
    if first["type"] == "json_invalid":
        return error(f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    return error("; ".join(map(_complaint, found[:3])), param=param)


def _complaint(each: Any) -> str:
    # Among the names pydantic has those of the types that it tried, such as list[str].
    where = ".".join(x for x in map(str, each["loc"][1:]) if x.isidentifier() or x.isdigit()) or "the body"
    if each["type"] == "extra_forbidden":
        return f"{where}: this server has no such field: leave it out"
    got = f", got {each['input']!r:.40}" if isinstance(each["input"], int | float | str) else ""
    return f"{where}: {each['msg']}{got}"


@dataclass
class Choice:
    """An answer as far as it has come, or a piece of it that begins behind `start` characters."""

    start: int = 0
    text: str = ""
    events: list[Event] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    reason: str | None = None

    def add(self, event: Event) -> None:
        """Take an event in."""
        self.events.append(event)
        self.offsets.append(self.start + len(self.text))
        self.text += event.text
        self.reason = event.finish_reason


@dataclass(frozen=True)
class Form:
    """What the answers to one request look like."""

    model: str
    words: Tokenizer
    chat: bool
    logprobs: bool
    stop_tokens: Collection[int]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """The answer that is not streamed."""
        each = [self._whole(index, choice) for index, choice in enumerate(choices)]
        return {**self._head(stream=False), "choices": each, "usage": usage}

    def piece(self, index: int, choice: Choice) -> Json:
        """A piece of a streamed answer: what has come in."""
        body: Json = {"delta": {"content": choice.text}} if self.chat else {"text": choice.text}
        return self._streamed([self._choice(index, body, choice)])

    def opening(self, index: int) -> Json:
        """The first piece of a streamed chat answer: whose it is."""
        return self._streamed([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, Choice())])

    def closing(self, usage: Json) -> Json:
        """The last piece of a stream that was asked to have one."""
        return {**self._streamed([]), "usage": usage}

    def _whole(self, index: int, choice: Choice) -> Json:
        body: Json = {"text": choice.text}
        if self.chat:
            body = {"message": {"role": "assistant", "content": choice.text}}
        return self._choice(index, body, choice)

    def _streamed(self, choices: list[Json]) -> Json:
        return {**self._head(stream=True), "choices": choices}

    def _head(self, *, stream: bool) -> Json:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, body: Json, choice: Choice) -> Json:
        return {"index": index, **body, "logprobs": self._logprobs(choice), "finish_reason": choice.reason}

    def _logprobs(self, choice: Choice) -> Json | None:
        """Of the tokens drawn, but for one that ended the text; the engine has none of those not drawn."""
        kept = [(e, at) for e, at in zip(choice.events, choice.offsets, strict=True) if e.token not in self.stop_tokens]
        if not self.logprobs or not kept:
            return None
        spelt = [self.words.decode([e.token], skip_special_tokens=False) for e, _ in kept]
        values = [e.logprob for e, _ in kept]
        if self.chat:
            return {"content": [_token(text, value) for text, value in zip(spelt, values, strict=True)]}
        offsets = [at for _, at in kept]
        return {"tokens": spelt, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


def _token(text: str, logprob: float) -> Json:
    # A token that is a part of a character has bytes that no text shows.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known, "top_logprobs": []}


def usage(prompts: Sequence[Sequence[int]], drawn: int) -> Json:
    """Tokens of the prompts, each once, and of the answers, with those that ended them."""
    read = sum(map(len, prompts))
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
