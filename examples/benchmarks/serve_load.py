"""`q3n serve` under clients that come, leave and err, as the openai package sees it.

    python examples/benchmarks/serve_load.py FOLDER [--streams 64] [--requests 512] [--capacity 64] [--tokens 128]

Starts the server of the model in FOLDER on this machine, and keeps `--streams` streams open until there were
`--requests`. A fifth of the clients leave in the middle; for every four requests a malformed one comes beside them.
Prints a line and writes results/serve_load.json. Metrics: tokens_per_s of all streams; first_token_p50_s,
first_token_p95_s, from asking to the first text; between_p50_s, between two pieces of a text; finished and left,
requests; wrong_texts, finished ones that are not those written offline (in 16 bits rounding differs between batches of
other sizes, so that some may be); wrong_refusals; left_behind, requests that the server has in the end. The last three
should be 0.
"""

import asyncio
import dataclasses
import functools
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
from report import measured, parser, write

from q3n_functional import chat, tokenizer
from q3n_functional.generate import generate
from q3n_functional.sampling import Options
from q3n_functional.train_state import model_folder

KINDS = 16
MALFORMED = ("{", "[]", "{}", '{"prompt": ""}', '{"prompt": "a", "n": 0}', '{"prompt": "a", "max_tokens": 99999999}')
Asked = dict[str, int | str]


@dataclasses.dataclass
class Seen:
    """What clients saw."""

    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)
    finished: int = 0
    left: int = 0
    wrong_texts: int = 0
    wrong_refusals: int = 0


def kinds(tokens: int) -> list[Asked]:
    """Requests of different lengths and seeds, half of which begin alike."""
    system = "You are a helpful assistant. Be brief, and say where you are not certain. "
    return [
        {"prompt": system * (i % 2) + f"Question {i}: ", "seed": i, "max_tokens": tokens * (i + 1) // KINDS or 1}
        for i in range(KINDS)
    ]


def offline(folder: Path, asked: list[Asked]) -> list[str]:
    """The texts of the requests, one at a time, without a server."""
    model, words, _, stops = chat.load(model_folder(folder), None, "auto")

    def text(one: Asked) -> str:
        prompt, most = tokenizer.encode(words, [str(one["prompt"])])[0], int(one["max_tokens"])
        options = Options(seed=int(one["seed"]))
        ids = generate(
            model.params, prompt, config=model.config, max_new_tokens=most, options=options, stop_tokens=stops
        )
        return "".join(tokenizer.stream(words, ids))

    return [text(one) for one in asked]


@contextmanager
def serving(folder: Path, capacity: int) -> Iterator[str]:
    """The address of a server, in a process of its own."""
    command = [sys.executable, "-m", "q3n_functional", "serve", str(folder), "--port", "0", "--name", "load"]
    command += ["--capacity", str(capacity), "--max-queue", "4096"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        found = (re.findall(r"http://127\S+", line) for line in process.stderr)
        try:
            yield next(addresses[0] for addresses in found if addresses)
        finally:
            process.terminate()
            process.communicate()


async def write_one(web: openai.AsyncOpenAI, asked: Asked, expected: str, leaves: int, seen: Seen) -> None:
    """One stream, which is left behind so many pieces if it comes to that."""
    last, text, pieces = time.perf_counter(), "", 0
    async with await web.completions.create(model="load", stream=True, **asked) as stream:
        async for chunk in stream:
            now = time.perf_counter()
            (seen.between if pieces else seen.first).append(now - last)
            last, pieces, text = now, pieces + 1, text + chunk.choices[0].text
            if pieces == leaves:
                seen.left += 1
                return
    seen.finished += 1
    seen.wrong_texts += text != expected


async def err(web: httpx.AsyncClient, body: str, seen: Seen) -> None:
    """One malformed request."""
    reply = await web.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    seen.wrong_refusals += reply.status_code != 400 or not reply.json()["error"]["message"]


async def clients(address: str, asked: list[Asked], expected: list[str], streams: int, requests: int) -> Seen:
    """All of them, `streams` at a time."""
    generator, seen, gate = random.Random(0), Seen(), asyncio.Semaphore(streams)
    async with (
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as web,
        httpx.AsyncClient(base_url=address, timeout=600) as raw,
    ):

        async def one(number: int) -> None:
            async with gate:
                leaves = generator.randrange(1, 9) if generator.random() < 0.2 else 0
                await write_one(web, asked[number % KINDS], expected[number % KINDS], leaves, seen)
                if number % 4 == 0:
                    await err(raw, MALFORMED[number // 4 % len(MALFORMED)], seen)

        await asyncio.gather(*map(one, range(requests)))
    return seen


def counted(address: str, name: str) -> float:
    """A number of /metrics."""
    return float(re.findall(rf"^q3n_{name} (\S+)", httpx.get(f"{address}/metrics").text, re.MULTILINE)[0])


def load(folder: Path, capacity: int, streams: int, requests: int, tokens: int) -> dict[str, float]:
    """What a run of all clients measures."""
    asked = kinds(tokens)
    expected = offline(folder, asked)
    with serving(folder, capacity) as address:
        asyncio.run(clients(address, asked, expected, 1, KINDS))  # the first steps take longer
        before, start = counted(address, "drawn_tokens_total"), time.perf_counter()
        seen = asyncio.run(clients(address, asked, expected, streams, requests))
        seconds = time.perf_counter() - start
        drawn = counted(address, "drawn_tokens_total") - before
        time.sleep(1)  # those that left last have a step to go
        behind = counted(address, "requests_waiting") + counted(address, "requests_running")
    return {
        "tokens_per_s": drawn / seconds,
        "first_token_p50_s": statistics.median(seen.first),
        "first_token_p95_s": statistics.quantiles(seen.first, n=20)[-1],
        "between_p50_s": statistics.median(seen.between),
        **{name: getattr(seen, name) for name in ("finished", "left", "wrong_texts", "wrong_refusals")},
        "left_behind": behind,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("folder", type=Path)
    made.add_argument("--streams", type=int, default=64)
    made.add_argument("--requests", type=int, default=512)
    made.add_argument("--capacity", type=int, default=64)
    made.add_argument("--tokens", type=int, default=128, help="of the longest answer")
    options = made.parse_args()
    sizes = (options.capacity, options.streams, options.requests, options.tokens)
    case, run = f"{options.streams} streams, {options.capacity} rows", functools.partial(load, options.folder, *sizes)
    write(measured(case, "q3n", run), "serve_load", options.commit, options.out)


if __name__ == "__main__":
    main()
