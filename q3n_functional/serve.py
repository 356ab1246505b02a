"""A server of OpenAI's completions and chat completions: FastAPI and uvicorn before one engine in a thread of its own.

The event loop never waits for the model: it hands jobs to the engine's thread and passes on what comes of them. A
client that leaves takes its requests with it, within a step.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from copy import deepcopy
from importlib import resources

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from q3n_functional import chat, tokenizer
from q3n_functional.batching import Engine, QueueFullError
from q3n_functional.generate import check_finite
from q3n_functional.serve_loop import ClosedError, Drawn, EngineThread, Job
from q3n_functional.serve_metrics import Metrics
from q3n_functional.serve_schema import (
    Body,
    ChatBody,
    Choice,
    CompletionBody,
    Form,
    Json,
    check_length,
    error,
    field_of,
    invalid_error,
    requests,
    usage,
)

RETRY_SECONDS = 1
"""When a client that was turned away may come again."""

LEFT = 499
"""The status, which nobody reads, of what a client did not wait for."""


class RefusalError(Exception):
    """A request that is not done: what the client is told."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, error(message, kind, param)


def _refusal(cause: Exception) -> RefusalError:
    """What a client is told of what the engine or the template has refused with."""
    if isinstance(cause, QueueFullError):
        return RefusalError(429, str(cause), "rate_limit_error")
    if isinstance(cause, ClosedError):
        return RefusalError(503, str(cause), "server_error")
    if isinstance(cause, FloatingPointError):
        return RefusalError(500, str(cause), "server_error")
    if isinstance(cause, ValueError):
        return RefusalError(400, str(cause), param=field_of(str(cause)))
    raise cause


class Answer:
    """What comes of one HTTP request. `end` must be called in any case: it takes back what is left."""

    def __init__(self, thread: EngineThread, metrics: Metrics, job: Job, form: Form, prompts: list[list[int]]) -> None:
        self._thread, self._metrics, self._job = thread, metrics, job
        self._form, self._prompts = form, prompts
        self._came, self._outcome, self._drawn = time.monotonic(), "cancelled", 0

    async def accepted(self) -> None:
        """Hand the job over. Raises RefusalError where the engine does not take it."""
        try:
            self._thread.submit(self._job)
            update = await self._job.updates.get()
        except ClosedError as closed:
            update = closed
        if isinstance(update, Exception):
            self._outcome = "failed" if isinstance(update, ClosedError) else "refused"
            raise _refusal(update)

    async def whole(self) -> Json:
        """All choices. Raises RefusalError where the engine ends before they do, or logits are not finite."""
        choices = [Choice() for _ in self._job.requests]
        try:
            async for index, event in self._draws():
                choices[index].add(event)
        except (ClosedError, FloatingPointError) as ended:
            raise _refusal(ended) from ended
        return self._form.whole(choices, self._usage())

    async def stream(self, *, include_usage: bool) -> AsyncIterator[str]:
        """The choices piece by piece as server-sent events; an error where `whole` has one."""
        try:
            async for piece in self._pieces():
                yield _event(piece)
            if include_usage:
                yield _event(self._form.closing(self._usage()))
        except (ClosedError, FloatingPointError) as ended:
            yield _event(_refusal(ended).body)
        yield "data: [DONE]\n\n"

    def end(self) -> None:
        """Forget what is left, and count; refusals are counted where the client is told."""
        self._thread.cancel(self._job)
        if self._outcome != "refused":
            self._metrics.outcomes.labels(self._outcome).inc()

    async def _pieces(self) -> AsyncIterator[Json]:
        indices = range(len(self._job.requests))
        for index in indices if self._form.chat else ():
            yield self._form.opening(index)
        pieces = [Choice() for _ in indices]
        async for index, event in self._draws():
            piece = pieces[index]
            piece.add(event)
            # Bytes of a character that is not complete have no text yet.
            if piece.text or piece.reason:
                yield self._form.piece(index, piece)
                pieces[index] = Choice(start=piece.start + len(piece.text))

    async def _draws(self) -> AsyncIterator[Drawn]:
        """What the engine draws, until all requests have ended.

        Raises ClosedError where it ends before, FloatingPointError for logits that are not finite.
        """
        left = len(self._job.requests)
        while left:
            update = await self._job.updates.get()
            if isinstance(update, Exception):
                self._outcome = "failed"
                raise update
            assert isinstance(update, Drawn)
            if update.event.finish_reason == "error":
                self._outcome = "failed"
            check_finite(update.event.logprob)
            if not self._drawn:
                self._metrics.first_token.observe(time.monotonic() - self._came)
            self._drawn += 1
            left -= update.event.finish_reason is not None
            if not left:
                self._outcome = "finished"
            yield update

    def _usage(self) -> Json:
        return usage(self._prompts, self._drawn)


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Stream(StreamingResponse):
    """Server-sent events of an answer, which ends however the response does."""

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answer.stream(include_usage=include_usage), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.end()


class _Limited:
    """Refuses bodies above `limit` bytes before they are read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, f"the body has more than {self._limit} bytes: shorten it")
            return message

        await self._app(scope, counted, send)


class Server:
    """The endpoints of one engine, which is theirs from then on.

    The engine has a tokenizer. template: of conversations; without it they are refused. stop_tokens: what ends texts.
    name: what the model is called.
    """

    def __init__(self, engine: Engine, template: chat.Template | None, stop_tokens: Sequence[int], name: str) -> None:
        if engine.tokenizer is None:
            raise ValueError("the engine has no tokenizer: give it one")
        # A tokenizer is not for several threads, and the engine's is in use by its own.
        self._words, self._spelling = deepcopy(engine.tokenizer), deepcopy(engine.tokenizer)
        self._max_length, self._max_queue = engine.capacity, engine.max_queue
        self._template, self._stop_tokens, self._name = template, tuple(stop_tokens), name
        self.thread = EngineThread(engine)
        self._metrics, self._created = Metrics(self.thread), int(time.time())
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self.app = self._app()

    def close(self) -> None:
        """End what is being written, and wait for the threads."""
        self.thread.stop()
        self.thread.join()
        self._encoder.shutdown()

    def _app(self) -> FastAPI:
        app = FastAPI(title="q3n serve", lifespan=self._lifespan)
        # Sixty-four bytes are more than a token has, also in JSON's escapes.
        app.add_middleware(_Limited, limit=(1 << 20) + 64 * self._max_length)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.post("/v1/chat/completions", response_model=None)(self.chat_completions)
        app.get("/v1/models")(self.models)
        app.get("/health", response_model=None)(self.health)
        app.get("/metrics", response_model=None)(self.metrics)
        app.get("/", response_model=None, include_in_schema=False)(self.page)
        app.exception_handler(RefusalError)(self._refused)
        app.exception_handler(RequestValidationError)(self._invalid)
        app.exception_handler(HTTPException)(self._http_error)
        app.exception_handler(Exception)(self._broken)
        return app

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.close)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Text behind prompts."""
        prompts = await self._encoded(lambda: [self._tokens(prompt) for prompt in body.prompts()])
        return await self._answered(body, request, prompts, body.max_tokens, body.logprobs is not None)

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """The next message of a conversation."""
        if self._template is None:
            raise RefusalError(400, f"{self._name} has no chat template: use /v1/completions", param="messages")
        template, messages = self._template, [message.model_dump() for message in body.messages]
        prompts = await self._encoded(lambda: [chat.encode(self._words, template, messages)])
        most = body.max_completion_tokens or body.max_tokens or max(self._max_length - len(prompts[0]), 1)
        return await self._answered(body, request, prompts, most, body.logprobs)

    async def models(self) -> Json:
        """The one model there is."""
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "q3n"}
        more = {"max_model_len": self._max_length, "chat": self._template is not None}
        return {"object": "list", "data": [{**model, **more}]}

    async def health(self) -> Response:
        """200 while the engine's thread takes requests, else 503."""
        if self.thread.running:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed" if self.thread.error else "stopped"}, 503)

    async def metrics(self) -> Response:
        """The counts in Prometheus's text form."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """A page for trying prompts."""
        text = resources.files("q3n_functional").joinpath("serve_page.html").read_text(encoding="utf-8")
        rules = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        return HTMLResponse(text, headers={"Content-Security-Policy": rules})

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        return tokenizer.encode(self._words, [prompt])[0] if isinstance(prompt, str) else prompt

    async def _encoded(self, encode: Callable[[], list[list[int]]]) -> list[list[int]]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except ValueError as cause:
            raise _refusal(cause) from cause

    async def _answered(
        self, body: Body, request: Request, prompts: list[list[int]], max_tokens: int, logprobs: bool
    ) -> Response:
        answer = self._answer(body, prompts, max_tokens, logprobs)
        try:
            await answer.accepted()
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                return _Stream(answer, include_usage=usage)
            whole = await _unless_left(request, answer.whole())
        except BaseException:
            answer.end()
            raise
        answer.end()
        return JSONResponse(whole)

    def _answer(self, body: Body, prompts: list[list[int]], max_tokens: int, logprobs: bool) -> Answer:
        if body.model not in (None, self._name):
            raise RefusalError(404, f"there is no model {body.model!r}, only {self._name!r}", param="model")
        if body.n * len(prompts) > self._max_queue:
            raise RefusalError(
                400,
                f"n {body.n} for {len(prompts)} prompts makes {body.n * len(prompts)} texts, above the queue's "
                f"{self._max_queue}: ask for fewer at once",
                param="n",
            )
        try:
            check_length(body, prompts, max_tokens, self._max_length)
            wanted = requests(body, prompts, max_tokens, self._stop_tokens)
        except ValueError as cause:
            raise _refusal(cause) from cause
        form = Form(self._name, self._spelling, isinstance(body, ChatBody), logprobs, self._stop_tokens)
        return Answer(self.thread, self._metrics, Job(wanted), form, prompts)

    async def _refused(self, _: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, RefusalError)
        if refusal.status < LEFT:
            self._metrics.outcomes.labels("refused").inc()
        headers = {"Retry-After": str(RETRY_SECONDS)} if refusal.status == 429 else None
        return JSONResponse(refusal.body, refusal.status, headers)

    async def _invalid(self, _: Request, invalid: Exception) -> Response:
        assert isinstance(invalid, RequestValidationError)
        self._metrics.outcomes.labels("refused").inc()
        return JSONResponse(invalid_error(invalid.errors()), 400)

    async def _http_error(self, request: Request, failed: Exception) -> Response:
        assert isinstance(failed, HTTPException)
        return JSONResponse(error(f"{request.method} {request.url.path}: {failed.detail}"), failed.status_code)

    async def _broken(self, _: Request, __: Exception) -> Response:
        return JSONResponse(error("the server has failed: its log says how", "server_error"), 500)


async def _unless_left(request: Request, work: Awaitable[Json]) -> Json:
    """The result of `work`, which is given up where the client leaves before."""
    result, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((result, left), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise RefusalError(LEFT, "the client has left")
        return result.result()
    finally:
        result.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class HTTPServer(uvicorn.Server):
    """Uvicorn, which on its way down ends the texts that are being written instead of waiting for them."""

    def __init__(self, server: Server, host: str, port: int, grace_seconds: int = 10) -> None:
        super().__init__(uvicorn.Config(server.app, host, port, timeout_graceful_shutdown=grace_seconds))
        self._server = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, behind the engine's end."""
        self._server.thread.stop()
        await super().shutdown(sockets)


def run(engine: Engine, speaker: chat.Speaker, name: str, host: str, port: int) -> None:
    """Serve until a signal ends it."""
    HTTPServer(Server(engine, speaker.template, speaker.stop_tokens, name), host, port).run()
