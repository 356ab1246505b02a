"""A small model behind a real server on a free port of this machine, for tests."""

import contextlib
import threading
import time

import httpx

from q3n_functional import chat, tokenizer
from q3n_functional.batching import Engine
from q3n_functional.generate import generate
from q3n_functional.serve import HTTPServer, Server
from tests.configs import perturbed, slower, small

WORDS = tokenizer.train_bpe([], tokenizer.BYTES)
END = WORDS.token_to_id(tokenizer.END)
CONFIG = small(
    num_hidden_layers=2,
    layer_types=("linear_attention", "full_attention"),
    initializer_range=0.2,
    vocab_size=tokenizer.BYTES,
    max_position_embeddings=1024,
)
TREE = slower(perturbed(CONFIG))
SOURCE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATE = chat.Template(SOURCE, {"eos_token": tokenizer.END})


def engine(kind=Engine, **changes):
    options = {"rows": 4, "capacity": 128, "chunk_length": 32, "block_size": 8, **changes}
    return kind(params=TREE, config=CONFIG, tokenizer=WORDS, **options)


def alone(prompt, max_tokens, options, stop=()):
    """The text that one request writes by itself, without a server or an engine."""
    tokens = prompt if isinstance(prompt, list) else tokenizer.encode(WORDS, [prompt])[0]
    ids = generate(TREE, tokens, config=CONFIG, max_new_tokens=max_tokens, options=options, stop_tokens=(END,))
    return "".join(tokenizer.stream(WORDS, ids, stop))


@contextlib.contextmanager
def served(made, template=TEMPLATE):
    """The server of an engine, with its address, while it runs."""
    server = Server(made, template, (END,), "tiny")
    http = HTTPServer(server, "127.0.0.1", 0)
    thread = threading.Thread(target=http.run)
    thread.start()
    try:
        until(lambda: http.started)
        port = http.servers[0].sockets[0].getsockname()[1]
        yield http, server, f"http://127.0.0.1:{port}"
    finally:
        http.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not server.thread.running


def until(true, seconds=20):
    """Wait for what another thread brings about."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


def metrics(address):
    """Names and values of /metrics."""
    lines = httpx.get(f"{address}/metrics").raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}
