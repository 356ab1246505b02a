"""The server under load and at its limits: full queues, clients that leave, engines that fail, the way down."""

import asyncio
import dataclasses
import json
import random
import threading

import httpx
import openai
import pytest
import torch

from q3n_functional.batching import Engine, Request
from q3n_functional.sampling import Options
from q3n_functional.serve_loop import Accepted, ClosedError, EngineThread, Job
from tests.servers import TREE, WORDS, alone, engine, metrics, served, until
from tests.test_serve import COMPLETIONS, LONG, REFUSED


class Gated(Engine):
    """An engine that takes `few` steps, and more when its gate is open."""

    few = 0

    def __post_init__(self):
        super().__post_init__()
        self.gate, self.entered = threading.Event(), threading.Event()

    def step(self):
        self.entered.set()
        self.few -= 1
        assert self.few >= 0 or self.gate.wait(20)
        return super().step()


class Short(Gated):
    """One that waits in the middle of a text."""

    few = 4


def test_a_full_queue_turns_clients_away():
    """The first has the row; of those that come during its first step, one may wait."""
    made, replies = engine(Gated, rows=1, max_queue=1), []
    with served(made) as (_, server, address):
        asked = {"prompt": "a", "max_tokens": 3, "seed": 1}

        def ask():
            replies.append(httpx.post(address + COMPLETIONS, json=asked, timeout=20))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        threads[0].start()
        assert made.entered.wait(20)
        for thread in threads[1:]:
            thread.start()
        until(lambda: server.thread._commands.qsize() == 5)
        made.gate.set()
        for thread in threads:
            thread.join()
        assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429, 429, 429]
        for reply in replies:
            if reply.status_code == 200:
                assert reply.json()["choices"][0]["text"] == alone("a", 3, Options(seed=1))
            else:
                assert reply.headers["Retry-After"] == "1"
                told = reply.json()["error"]
                assert told["type"] == "rate_limit_error"
                assert told["message"] == "1 requests wait, the most that may: try again later"
        assert metrics(address)['q3n_http_requests_total{outcome="refused"}'] == 4


def test_choices_are_taken_or_refused_together():
    async def scene():
        made = engine(max_queue=3)
        thread = EngineThread(made)
        ok = Request(prompt=[1], max_new_tokens=2)
        job = Job([ok, ok, Request(prompt=[1], max_new_tokens=500)])
        thread.submit(job)
        assert isinstance(await job.updates.get(), ValueError)
        until(lambda: thread.counts[:2] == (0, 0))
        thread.stop()
        thread.join()
        assert made.counts().drawn_tokens == 0

    asyncio.run(scene())


def test_cancelling_counts_within_a_step():
    async def scene():
        made = engine(Gated)
        thread = EngineThread(made)
        job = Job([Request(prompt=[1], max_new_tokens=50)] * 2)
        thread.submit(job)
        assert isinstance(await job.updates.get(), Accepted)
        assert made.entered.wait(20)
        thread.cancel(job)
        made.gate.set()
        await asyncio.to_thread(until, lambda: thread.counts[:2] == (0, 0))
        assert thread.steps == 1
        thread.stop()
        thread.join()
        with pytest.raises(ClosedError, match="the engine has stopped: start the server again"):
            thread.submit(Job([]))
        assert not thread.running

    asyncio.run(scene())


def leave(address, *, stream):
    """Ask for three long texts, and leave when nothing comes."""
    asked, limits = {**LONG, "stream": stream, "n": 3}, httpx.Timeout(20, read=2)
    with httpx.stream("POST", address + COMPLETIONS, json=asked, timeout=limits) as reply:
        list(reply.iter_lines())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_requests_along(stream):
    made = engine(Short, rows=2)
    with served(made) as (_, server, address):
        with pytest.raises(httpx.ReadTimeout):
            leave(address, stream=stream)
        until(lambda: server.thread._commands.qsize() == 1)
        assert server.thread.steps == 4
        made.gate.set()
        until(lambda: server.thread.counts[:2] == (0, 0))
        assert server.thread.steps == 5
        assert 0 < server.thread.counts.drawn_tokens <= 12
        until(lambda: metrics(address)['q3n_http_requests_total{outcome="cancelled"}'] == 1)


def test_on_the_way_down_streams_end_cleanly():
    made = engine(Short)
    with served(made) as (http, server, address), httpx.stream("POST", address + COMPLETIONS, json=LONG) as reply:
        lines = reply.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["index"] == 0
        until(lambda: made.few < 0)  # it waits
        http.should_exit = True
        until(lambda: server.thread._commands.qsize() == 1)
        made.gate.set()
        rest = [line for line in lines if line]
        told = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert (told["message"], told["type"]) == ("the server is shutting down", "server_error")
        assert rest[-1] == "data: [DONE]"


class Failing(Engine):
    """An engine that breaks at its fifth token."""

    def step(self):
        if self.counts().drawn_tokens == 5:
            raise RuntimeError("out of memory")
        return super().step()


def test_an_engine_that_fails_is_told_to_all(caplog):
    with served(engine(Failing)) as (_, server, address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as web:
            with pytest.raises(openai.APIError, match="the engine failed"):
                list(web.completions.create(model="tiny", **LONG))
            with pytest.raises(openai.InternalServerError, match="the engine has stopped: start the server again"):
                web.completions.create(model="tiny", prompt="a")
        until(lambda: not server.thread.running)
        reply = httpx.get(f"{address}/health")
        assert (reply.status_code, reply.json()) == (503, {"status": "failed"})
        assert metrics(address)['q3n_http_requests_total{outcome="failed"}'] == 2
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_not_finite_fail_their_request_alone(stream):
    embedding = TREE.embed_tokens.clone()
    embedding[WORDS.token_to_id("x")] = torch.nan
    with served(dataclasses.replace(engine(), params=TREE._replace(embed_tokens=embedding))) as (_, _, address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as web:
            asked = {"model": "tiny", "max_tokens": 5, "seed": 1, "stream": stream}
            with pytest.raises(openai.APIError, match="the logits are not finite"):
                list(web.completions.create(prompt="x", **asked))
            reply = web.completions.create(**{**asked, "prompt": "a", "stream": False})
            assert reply.choices[0].text == alone("a", 5, Options(seed=1))
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        counts = metrics(address)
    assert counts['q3n_http_requests_total{outcome="failed"}'] == 1
    assert counts['q3n_http_requests_total{outcome="refused"}'] == 0


def test_load_of_clients_that_come_leave_and_err():
    """64 streams at once over 8 rows: no wrong text, nothing left behind."""
    generator = random.Random(0)
    kinds = [
        {"prompt": "Hear me " * generator.randrange(3) + str(i), "max_tokens": generator.randrange(5, 40), "seed": i}
        for i in range(16)
    ]
    expected = [alone(k["prompt"], k["max_tokens"], Options(seed=k["seed"])) for k in kinds]

    async def write(web, number):
        kind, leaves = number % 16, generator.random() < 0.3
        after = generator.randrange(1, 5) if leaves else 1000
        await asyncio.sleep(generator.random() / 5)
        text = ""
        async with await web.completions.create(model="tiny", stream=True, **kinds[kind]) as stream:
            async for chunk in stream:
                text += chunk.choices[0].text
                after -= 1
                if not after:
                    return False
        assert text == expected[kind], number
        return True

    async def err(web, number):
        path, body, status, message, _ = REFUSED[number % len(REFUSED)]
        content = body if isinstance(body, bytes) else json.dumps(body)
        reply = await web.post(path, content=content, headers={"Content-Type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["message"][:4]) == (status, message[:4])

    async def scene(address):
        address_v1 = f"{address}/v1"
        async with (
            openai.AsyncOpenAI(base_url=address_v1, api_key="none", max_retries=0, timeout=60) as web,
            httpx.AsyncClient(base_url=address, timeout=60) as raw,
        ):
            writers = [write(web, number) for number in range(64)]
            finished, _ = await asyncio.gather(
                asyncio.gather(*writers), asyncio.gather(*(err(raw, n) for n in range(24)))
            )
            return finished

    with served(engine(rows=8, max_queue=64, prefix_bytes=1 << 20)) as (_, server, address):
        finished = asyncio.run(scene(address))
        assert 30 < sum(finished) < 64
        until(lambda: server.thread.counts[:2] == (0, 0))
        assert server.thread.running
        assert server.thread._jobs == {}

        def ended(outcome):
            return metrics(address)[f'q3n_http_requests_total{{outcome="{outcome}"}}']

        until(lambda: ended("finished") + ended("cancelled") == 64)
        assert ended("failed") == 0
        assert ended("finished") >= sum(finished)
        reply = httpx.post(address + COMPLETIONS, json=kinds[0])
        assert reply.json()["choices"][0]["text"] == expected[0]
