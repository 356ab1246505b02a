"""The engine's thread: it steps while there is something to write, and does in between what others ask of it.

Only this thread touches the engine. Others leave commands, which it obeys in their order before the next step, so a
cancellation counts within one step. What comes of a job is told to the event loop that the job was made in.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from q3n_functional.batching import Engine, Event, Request

logger = logging.getLogger(__name__)


class ClosedError(RuntimeError):
    """The engine writes no more: it was stopped, or has failed."""


class Accepted(NamedTuple):
    """All requests of a job are queued."""


class Drawn(NamedTuple):
    """An event of one of the job's requests, by its place."""

    place: int
    event: Event


Update = Accepted | Drawn | Exception


class Job:
    """Requests that are accepted or refused together. Made within a running event loop, whose `updates` it fills.

    The first update is `Accepted` or what the engine refused with (ValueError, `QueueFullError`); then come the draws.
    `ClosedError` ends a job that the engine does not finish.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests, self.updates = requests, asyncio.Queue[Update]()
        self._loop = asyncio.get_running_loop()

    def tell(self, update: Update) -> None:
        """Add an update, from any thread."""
        with suppress(RuntimeError):  # the event loop is gone, and so are those who waited
            self._loop.call_soon_threadsafe(self.updates.put_nowait, update)


class EngineThread:
    """Runs an engine, which must not be used elsewhere from then on.

    counts: the engine's, as of the last step or command. steps: how many there were. error: what the engine failed
    with, if so.
    """

    def __init__(self, engine: Engine) -> None:
        self.counts, self.steps = engine.counts(), 0
        self.error: Exception | None = None
        self._engine = engine
        self._jobs: dict[int, tuple[Job, int]] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock, self._stopping, self._closed = threading.Lock(), False, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, job: Job) -> None:
        """Queue the job's requests; its updates say what comes of it. Raises ClosedError behind the end."""
        self._ask(partial(self._submit, job))

    def cancel(self, job: Job) -> None:
        """Forget what is left of a job."""
        with suppress(ClosedError):
            self._ask(partial(self._cancel, job))

    def stop(self) -> None:
        """End all jobs with `ClosedError` behind the present step, and the thread."""
        with suppress(ClosedError):
            self._ask(self._stop)

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def _ask(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("the engine has stopped: start the server again")
            self._commands.put(command)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                self.counts = self._engine.counts()
                self._step()
        except Exception as error:
            logger.exception("the engine failed")
            self.error = error
        self._close()

    def _obey(self) -> None:
        """Do what was asked; where there is nothing to write, wait until something is."""
        with suppress(queue.Empty):
            self._commands.get(block=not self._jobs)()
            while True:
                self._commands.get_nowait()()

    def _step(self) -> None:
        if not self._jobs:
            return
        events = self._engine.step()
        # Before anybody is told: who has its text may ask for the counts.
        self.counts, self.steps = self._engine.counts(), self.steps + 1
        for event in events:
            job, place = self._jobs[event.id]
            if event.finish_reason:
                del self._jobs[event.id]
            job.tell(Drawn(place, event))

    def _submit(self, job: Job) -> None:
        ids: list[int] = []
        try:
            for request in job.requests:
                ids.append(self._engine.submit(request))
        except ValueError as error:
            for number in ids:
                self._engine.cancel(number)
            return job.tell(error)
        self._jobs.update({number: (job, place) for place, number in enumerate(ids)})
        job.tell(Accepted())

    def _cancel(self, job: Job) -> None:
        for number in [n for n, (other, _) in self._jobs.items() if other is job]:
            self._engine.cancel(number)
            del self._jobs[number]

    def _stop(self) -> None:
        self._stopping = True

    def _close(self) -> None:
        with self._lock:
            self._closed = True
        with suppress(queue.Empty):  # jobs that came too late are answered as well
            while True:
                self._commands.get_nowait()()
        for job in {job for job, _ in self._jobs.values()}:
            job.tell(ClosedError("the engine failed" if self.error else "the server is shutting down"))
        if self.error is None:  # else nothing is certain of it
            for number in self._jobs:
                self._engine.cancel(number)
            self.counts = self._engine.counts()
        self._jobs.clear()
