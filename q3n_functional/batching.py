"""Continuous batching: requests come and go, a running batch of fixed size writes for those that are there.

The batch is one `decode.Running` whose tensors are written in place, so that requests join and leave without another
compilation, and on CUDA a step is a graph. Prompts are read in pieces between the steps of those that write already.
Each row draws by its own settings and seed: a request's text is what it would be alone, whoever its neighbours are, up
to what rounding does in batches of other sizes.

An `Engine` changes, unlike everything else here: it owns a queue, the batch, and a store of common beginnings. It is
for one thread.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from tokenizers import Tokenizer

from q3n_functional import cache as caches
from q3n_functional import decode, prefix
from q3n_functional.cache import Cache
from q3n_functional.config import Config
from q3n_functional.decode import Running
from q3n_functional.generate import CHUNK, Piece, check
from q3n_functional.params import Parameters
from q3n_functional.sampling import Drawn, Options
from q3n_functional.tokenizer import Stream

Reason = Literal["stop", "length"]


class QueueFullError(ValueError):
    """As many requests wait as may; try again later."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to write. Text ends before a token of `stop_tokens` or a text of `stop`, or with the last new token."""

    prompt: Sequence[int]
    max_new_tokens: int
    options: Options = Options()  # noqa: RUF009  # immutable
    stop_tokens: Collection[int] = ()
    stop: Sequence[str] = ()


class Event(NamedTuple):
    """A token that a request has drawn, its log-probability, the text that is certain now, and why it ended, if so.

    The token may be a stop token, and its text may lie behind a stop string: `text` has only what counts.
    """

    id: int
    token: int
    logprob: float
    text: str
    finish_reason: Reason | None


class Counts(NamedTuple):
    """Requests that wait and that run; tokens so far: of prompts, of those found in the store, and drawn."""

    waiting: int
    running: int
    prompt_tokens: int
    reused_tokens: int
    drawn_tokens: int


@dataclass
class _Row:
    """A request in the batch: its tokens so far, and how many of them the cache has."""

    id: int
    request: Request
    text: Stream | None
    tokens: list[int]
    read: int = 0

    @property
    def reading(self) -> bool:
        return len(self.tokens) == len(self.request.prompt)

    @property
    def limit(self) -> int:
        return len(self.request.prompt) + self.request.max_new_tokens


@dataclass
class Engine:
    """Writes for many requests at once.

    rows: requests that run at once. capacity: tokens of prompt and text that one may have. max_queue: requests that may
    wait. chunk_length: tokens of prompts that are read between two steps. prefix_bytes: memory for caches of common
    beginnings, in blocks of `block_size` tokens; 0 for none. tokenizer: for texts and stop strings; without it events
    have no text. compile: put the step through torch.compile first.
    """

    params: Parameters
    config: Config
    rows: int
    capacity: int
    tokenizer: Tokenizer | None = None
    max_queue: int = 64
    chunk_length: int = CHUNK
    prefix_bytes: int = 0
    block_size: int = 256
    compile: bool = False
    _queue: deque[tuple[int, Request]] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        for name in ("rows", "capacity", "max_queue", "chunk_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        self._batch: list[_Row | None] = [None] * self.rows
        self._ids, self._store = itertools.count(), prefix.empty(self.block_size, self.prefix_bytes)
        self._prompt_tokens = self._reused_tokens = self._drawn_tokens = 0
        with torch.no_grad():
            self._running = self._waiting([()] * self.rows, self._cache(self.rows, self.capacity))
            self._steps = {filtered: self._step_function(filtered) for filtered in (False, True)}

    def submit(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises ValueError for what `generate` refuses, no new token, more tokens than `capacity`, stop strings without a
        tokenizer or empty ones; `QueueFullError` where `max_queue` requests wait already.
        """
        self._check(request)
        if len(self._queue) >= self.max_queue:
            raise QueueFullError(f"{len(self._queue)} requests wait, the most that may: try again later")
        number = next(self._ids)
        self._queue.append((number, request))
        return number

    def cancel(self, id: int) -> bool:
        """Forget a request, which has no more events; whether it was there."""
        for entry in self._queue:
            if entry[0] == id:
                self._queue.remove(entry)
                return True
        for number, row in enumerate(self._batch):
            if row is not None and row.id == id:
                self._leave(number)
                return True
        return False

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Let requests in, read a piece of their prompts, draw a token for each that has read all; what came of it."""
        self._admit()
        events = self._read() if any(row and row.reading for row in self._batch) else []
        if any(row and not row.reading for row in self._batch):
            events += self._taken(self._steps[self._filtered()]())
        return events

    def counts(self) -> Counts:
        """What there is to do, and what has been done."""
        running = sum(row is not None for row in self._batch)
        return Counts(len(self._queue), running, self._prompt_tokens, self._reused_tokens, self._drawn_tokens)

    def _check(self, request: Request) -> None:
        check(request.prompt, request.max_new_tokens, request.options, self.config)
        if request.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be 1 or more, got 0")
        total = len(request.prompt) + request.max_new_tokens
        if total > self.capacity:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and max_new_tokens {request.max_new_tokens} make {total}, above "
                f"the engine's capacity of {self.capacity}: shorten one of them"
            )
        if request.stop and (self.tokenizer is None or "" in request.stop):
            raise ValueError("stop strings need a tokenizer, and none may be empty: leave them out")

    def _cache(self, batch: int, capacity: int) -> Cache:
        like = self.params.embed_tokens
        return caches.empty(self.config, batch, capacity, like.dtype, like.device)

    def _waiting(self, prompts: Sequence[Sequence[int]], cache: Cache, row: _Row | None = None) -> Running:
        requests = [Request(prompt=(), max_new_tokens=0)] * len(prompts) if row is None else [row.request]
        options, stops = [r.options for r in requests], [r.stop_tokens for r in requests]
        limits = [0 if row is None else row.limit] * len(prompts)
        return decode.waiting(cache, prompts, options, stops, limits, config=self.config)

    def _step_function(self, filtered: bool) -> Callable[[], Drawn]:
        step = partial(decode.step, config=self.config, filtered=filtered)
        return decode.repeated(step, self.params, self._running, compile=self.compile)

    def _filtered(self) -> bool:
        return any(row is not None and row.request.options.filtered for row in self._batch)

    def _admit(self) -> None:
        for number, row in enumerate(self._batch):
            if row is None and self._queue:
                self._enter(number, *self._queue.popleft())

    def _enter(self, number: int, id: int, request: Request) -> None:
        text = None if self.tokenizer is None else Stream(self.tokenizer, request.stop)
        row = _Row(id, request, text, list(request.prompt))
        # The last token of a prompt has to be read in any case: what is drawn behind it is in no cache.
        self._store, cache = prefix.find(self._store, row.tokens[:-1])
        cache = self._cache(1, 0) if cache is None else cache
        row.read = int(cache.lengths_B)
        decode.place_(self._running, number, self._waiting([request.prompt], cache, row))
        self._batch[number] = row
        self._prompt_tokens += len(request.prompt)
        self._reused_tokens += row.read

    def _leave(self, number: int) -> None:
        self._batch[number] = None
        self._running.finished_B[number] = True

    def _read(self) -> list[Event]:
        piece, parts = self._piece()
        join = decode.in_place(partial(decode.join, config=self.config, filtered=self._filtered()))
        drawn = join(self.params, self._running, *piece)
        for row, part in zip(self._batch, parts, strict=True):
            if row is not None:
                row.read += len(part)
        for number, part in enumerate(parts):
            if part:
                self._keep(number)
        return self._taken(drawn, taken_in=0)

    def _piece(self) -> tuple[Piece, list[list[int]]]:
        """The next tokens of the prompts that are being read, the earliest request's first; none crosses a block."""
        parts: list[list[int]] = [[] for _ in self._batch]
        left = self.chunk_length
        waiting = [(row.id, number, row) for number, row in enumerate(self._batch) if row is not None and row.reading]
        for _, number, row in sorted(waiting, key=lambda entry: entry[0]):
            size = min(left, self.block_size - row.read % self.block_size) if self.prefix_bytes else left
            parts[number] = row.tokens[row.read : row.read + size]
            left -= len(parts[number])
        complete = [
            bool(part) and row is not None and row.read + len(part) == len(row.tokens)
            for part, row in zip(parts, self._batch, strict=True)
        ]
        device = self._running.token_B.device
        cu_seqlens = torch.tensor([0, *itertools.accumulate(map(len, parts))], dtype=torch.int32)
        tokens_1T = torch.tensor([[token for part in parts for token in part]])
        return Piece(*(x.to(device) for x in (tokens_1T, cu_seqlens, torch.tensor(complete)))), parts

    def _keep(self, number: int) -> None:
        """Put the row's cache into the store where a block ends."""
        row = self._batch[number]
        if row is not None and self.prefix_bytes and row.read % self.block_size == 0:
            one = pytree.tree_map(lambda leaf: leaf[number : number + 1], self._running.cache)
            self._store = prefix.put(self._store, row.tokens[: row.read], one)

    def _taken(self, drawn: Drawn, taken_in: int = 1) -> list[Event]:
        """The events of what was drawn; the rows that drew have taken so many more tokens into the cache."""
        events = []
        for number, (token, logprob) in enumerate(zip(drawn.token_B.tolist(), drawn.logprob_B.tolist(), strict=True)):
            row = self._batch[number]
            if token < 0 or row is None:
                continue
            row.read += taken_in
            if taken_in:
                self._keep(number)
            row.tokens.append(token)
            self._drawn_tokens += 1
            events.append(_event(row, token, logprob))
            if events[-1].finish_reason:
                self._leave(number)
        return events


def _event(row: _Row, token: int, logprob: float) -> Event:
    ended = token in row.request.stop_tokens
    text = row.text.push(token) if row.text is not None and not ended else ""
    ended |= row.text is not None and row.text.stopped
    reason: Reason | None = "stop" if ended else "length" if len(row.tokens) == row.limit else None
    return Event(row.id, token, logprob, text + (row.text.end() if reason and row.text is not None else ""), reason)
