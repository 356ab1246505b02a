"""Continuous batching: requests come and go, a running batch of fixed size writes for those that are there.

The batch is one `decode.Running`, or with drafts one `speculative.Speculating`, whose tensors are written in place, so
that requests join and leave without another compilation, and on CUDA a step is a graph. Prompts are read in pieces
between the steps of those that write already. Each row draws by its own settings and seed: a request's text is what it
would be alone, whoever its neighbours are and however many drafts are right, up to what rounding does in batches of
other sizes.

An `Engine` changes, unlike everything else here: it owns a queue, the batch, and a store of common beginnings. It is
for one thread.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from tokenizers import Tokenizer
from torch import Tensor

from q3n_functional import cache as caches
from q3n_functional import decode, prefix, speculative
from q3n_functional.cache import Cache, KeyValues
from q3n_functional.config import Config
from q3n_functional.decode import Running
from q3n_functional.generate import CHUNK, Piece, check
from q3n_functional.params import Parameters
from q3n_functional.sampling import Drawn, Options
from q3n_functional.speculative import Speculating, Verified
from q3n_functional.tokenizer import Stream

Reason = Literal["stop", "length", "error"]
Run = list[tuple[int, float]]
"""Tokens that a row draws in one step, and their log-probabilities."""


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

    The token may be a stop token, and its text may lie behind a stop string: `text` has only what counts. "error" is
    for a log-probability that is not finite: the token, drawn from NaN or infinity, means nothing.
    """

    id: int
    token: int
    logprob: float
    text: str
    finish_reason: Reason | None


class Counts(NamedTuple):
    """Requests that wait and that run; tokens so far: of prompts, of those found in the store, and drawn.

    drafted_tokens, accepted_tokens: the drafts that were verified, and those of them that were right.
    """

    waiting: int
    running: int
    prompt_tokens: int
    reused_tokens: int
    drawn_tokens: int
    drafted_tokens: int
    accepted_tokens: int


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
    have no text. drafts: tokens that the prediction module drafts for each row in a step, which changes the speed and
    not the text; 0 for none. compile: put the step through torch.compile first.

    Raises ValueError for sizes that are too small, or drafts without a prediction module.
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
    drafts: int = 0
    compile: bool = False
    _queue: deque[tuple[int, Request]] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        for name in ("rows", "capacity", "max_queue", "chunk_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.drafts < 0:
            raise ValueError(f"drafts must be 0 (none) or more, got {self.drafts}")
        self._batch: list[_Row | None] = [None] * self.rows
        self._ids, self._store = itertools.count(), prefix.empty(self.block_size, self.prefix_bytes)
        self._prompt_tokens = self._reused_tokens = self._drawn_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        with torch.no_grad():
            self._state = self._waiting([()] * self.rows, self._cache(self.rows, self.capacity + self.drafts))
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
            events += self._write()
        return events

    def counts(self) -> Counts:
        """What there is to do, and what has been done."""
        running = sum(row is not None for row in self._batch)
        return Counts(
            len(self._queue), running, self._prompt_tokens, self._reused_tokens, self._drawn_tokens,
            self._drafted_tokens, self._accepted_tokens,
        )  # fmt: skip

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

    @property
    def _running(self) -> Running:
        return self._state.running if isinstance(self._state, Speculating) else self._state

    def _cache(self, batch: int, capacity: int) -> Cache:
        """Without tokens. With drafts the module's keys and values are the last layer: the store keeps them too."""
        like = self.params.embed_tokens
        cache = caches.empty(self.config, batch, capacity, like.dtype, like.device)
        if not self.drafts:
            return cache
        return _with_module(cache, caches.key_values(self.config, batch, capacity, like.dtype, like.device))

    def _waiting(
        self, prompts: Sequence[Sequence[int]], cache: Cache, row: _Row | None = None
    ) -> Running | Speculating:
        requests = [Request(prompt=(), max_new_tokens=0)] * len(prompts) if row is None else [row.request]
        options, stops = [r.options for r in requests], [r.stop_tokens for r in requests]
        limits = [0 if row is None else row.limit] * len(prompts)
        layers = cache.layers[: len(self.config.layer_types)]
        running = decode.waiting(Cache(layers, cache.lengths_B), prompts, options, stops, limits, config=self.config)
        if not self.drafts:
            return running
        module = cache.layers[-1]
        assert isinstance(module, KeyValues)
        state = speculative.waiting(self.params, running, self.drafts, 0, config=self.config)
        return state._replace(module=module)

    def _step_function(self, filtered: bool) -> Callable[[], Drawn | Verified]:
        step: Callable[..., tuple[Any, Drawn | Verified]] = decode.step
        if self.drafts:
            step = partial(speculative.step, block_size=self.block_size if self.prefix_bytes else 0)
        step = partial(step, config=self.config, filtered=filtered)
        return decode.repeated(step, self.params, self._state, compile=self.compile)

    def _filtered(self) -> bool:
        return any(row is not None and row.request.options.filtered for row in self._batch)

    def _admit(self) -> None:
        for number, row in enumerate(self._batch):
            if row is None and self._queue:
                self._enter(number, *self._queue.popleft())

    def _enter(self, number: int, id: int, request: Request) -> None:
        text = None if self.tokenizer is None else Stream(self.tokenizer, request.stop)
        row = _Row(id, request, text, list(request.prompt))
        self._store, cache = prefix.find(self._store, self._keys(row.tokens))
        cache = self._cache(1, 0) if cache is None else cache
        row.read = int(cache.lengths_B)
        decode.place_(self._state, number, self._waiting([request.prompt], cache, row))
        self._batch[number] = row
        self._prompt_tokens += len(request.prompt)
        self._reused_tokens += row.read

    def _keys(self, tokens: Sequence[int]) -> Sequence[int]:
        """What the store knows all tokens but the last by, which has to be read to draw what is behind it.

        The prediction module's keys and values at a token depend on the one behind it as well.
        """
        if not self.drafts:
            return tokens[:-1]
        return [token * self.config.vocab_size + behind for token, behind in itertools.pairwise(tokens)]

    def _leave(self, number: int) -> None:
        self._batch[number] = None
        self._running.finished_B[number] = True

    def _read(self) -> list[Event]:
        piece, next_1T = self._piece()
        static: dict[str, Any] = {"config": self.config, "filtered": self._filtered()}
        if self.drafts:
            tokens_1T, *rest = piece
            join = decode.in_place(partial(speculative.join, **static))
            drawn = join(self.params, self._state, tokens_1T, next_1T, *rest)
        else:
            drawn = decode.in_place(partial(decode.join, **static))(self.params, self._state, *piece)
        for number, (row, size) in enumerate(zip(self._batch, piece.cu_seqlens.diff().tolist(), strict=True)):
            if row is not None and size:
                row.read += size
                if row.read < len(row.tokens):
                    self._keep(number, row)
        return self._taken(_runs(drawn))

    def _piece(self) -> tuple[Piece, Tensor]:
        """The next tokens of the prompts that are being read, the earliest request's first; none crosses a block.

        Beside it the tokens one place later, 0 behind a prompt.
        """
        parts: list[list[int]] = [[] for _ in self._batch]
        later, complete = list(parts), [False] * self.rows
        left = self.chunk_length
        waiting = [(row.id, number, row) for number, row in enumerate(self._batch) if row is not None and row.reading]
        for _, number, row in sorted(waiting, key=lambda entry: entry[0]):
            size = min(left, self.block_size - row.read % self.block_size) if self.prefix_bytes else left
            end = min(row.read + size, len(row.tokens))
            parts[number] = row.tokens[row.read : end]
            later[number] = [*row.tokens[row.read + 1 : end + 1], 0][: len(parts[number])]
            complete[number] = bool(parts[number]) and end == len(row.tokens)
            left -= len(parts[number])
        cu_seqlens = torch.tensor([0, *itertools.accumulate(map(len, parts))], dtype=torch.int32)
        tokens_1T, next_1T = (torch.tensor([list(itertools.chain(*each))]) for each in (parts, later))
        device = self._running.token_B.device
        return Piece(*(x.to(device) for x in (tokens_1T, cu_seqlens, torch.tensor(complete)))), next_1T.to(device)

    def _write(self) -> list[Event]:
        runs = _runs(self._steps[self._filtered()]())
        self._drafted_tokens += self.drafts * len(runs)
        self._accepted_tokens += sum(len(run) - 1 for run in runs.values())
        return self._taken(runs)

    def _keep(self, number: int, row: _Row) -> None:
        """Put the row's cache into the store where a block ends."""
        if self.prefix_bytes and row.read % self.block_size == 0:
            one = pytree.tree_map(lambda leaf: leaf[number : number + 1], _cache_of(self._state))
            self._store = prefix.put(self._store, self._keys(row.tokens[: row.read + 1]), one)

    def _taken(self, runs: Mapping[int, Run]) -> list[Event]:
        """The events of what the rows have drawn."""
        return [event for number, run in runs.items() for event in self._added(number, run)]

    def _added(self, number: int, run: Run) -> list[Event]:
        """A row goes on by what it has drawn, up to a stop string."""
        row, events = self._batch[number], list[Event]()
        assert row is not None, "rows that nobody has do not draw"
        for token, logprob in run:
            row.tokens.append(token)
            events.append(_event(row, token, logprob))
            if events[-1].finish_reason:
                break
        self._drawn_tokens += len(events)
        row.read = len(row.tokens) - 1
        if events[-1].finish_reason != "error":
            self._keep(number, row)  # not where a stop string has cut the run: runs end with blocks
        if events[-1].finish_reason:
            self._leave(number)
        return events


def _with_module(cache: Cache, module: KeyValues) -> Cache:
    return Cache((*cache.layers, module), cache.lengths_B)


def _cache_of(state: Running | Speculating) -> Cache:
    """What rows leave behind, with drafts the prediction module's keys and values as the last layer."""
    return state.cache if isinstance(state, Running) else _with_module(state.running.cache, state.module)


def _runs(drawn: Drawn | Verified) -> dict[int, Run]:
    """What each row has drawn, by its number, of those that have; -1 is no token."""
    rows = zip(*(x.view(len(x), -1).tolist() for x in drawn), strict=True)
    runs = [[pair for pair in zip(*row, strict=True) if pair[0] >= 0] for row in rows]
    return {number: run for number, run in enumerate(runs) if run}


def _event(row: _Row, token: int, logprob: float) -> Event:
    if not math.isfinite(logprob):
        return Event(row.id, token, logprob, "" if row.text is None else row.text.end(), "error")
    ended = token in row.request.stop_tokens
    text = row.text.push(token) if row.text is not None and not ended else ""
    ended |= row.text is not None and row.text.stopped
    reason: Reason | None = "stop" if ended else "length" if len(row.tokens) == row.limit else None
    return Event(row.id, token, logprob, text + (row.text.end() if reason and row.text is not None else ""), reason)
