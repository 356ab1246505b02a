"""The server, asked by the openai package: what it writes is what the same request writes offline."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys

import httpx
import openai
import pytest

from q3n_functional import chat, checkpoint, cli, serve, tokenizer
from q3n_functional.sampling import Options
from tests.servers import CONFIG, END, TEMPLATE, TREE, WORDS, alone, engine, metrics, served

LONG = {"prompt": "a", "max_tokens": 120, "seed": 1, "stream": True, "logit_bias": {END: -100}}
LETTERS = {str(65 + i): 30.0 for i in range(4)}


@pytest.fixture(scope="module")
def tiny():
    with served(engine(prefix_bytes=1 << 20)) as (_, server, address):
        yield server, address


@pytest.fixture(scope="module")
def client(tiny):
    with openai.OpenAI(base_url=f"{tiny[1]}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"temperature": 0}, Options(temperature=0)),
        ({"seed": 3}, Options(seed=3)),
        ({"seed": 4, "top_p": 0.8, "presence_penalty": 0.5}, Options(seed=4, top_p=0.8, presence_penalty=0.5)),
        ({"seed": 5, "logit_bias": {"65": 9.0}}, Options(seed=5, logit_bias={65: 9.0})),
        (
            {"seed": 5, "logit_bias": LETTERS, "stop": ["bb", "dda"]},
            Options(seed=5, logit_bias={int(token): bias for token, bias in LETTERS.items()}),
        ),
        (
            {"seed": 6, "extra_body": {"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.3}},
            Options(seed=6, top_k=9, min_p=0.1, repetition_penalty=1.3),
        ),
    ],
)
def test_completions_are_those_written_offline(client, asked, options, stream):
    reply = client.completions.create(model="tiny", prompt="Hear me", max_tokens=30, stream=stream, **asked)
    chunks = list(reply) if stream else [reply]
    assert "".join(c.choices[0].text for c in chunks) == alone("Hear me", 30, options, asked.get("stop", ()))
    assert [c.choices[0].finish_reason is None for c in chunks] == [True] * (len(chunks) - 1) + [False]
    assert len(chunks) > 5 or not stream


def test_several_prompts_and_choices(client):
    """Each prompt's choices draw by the seed and those behind it."""
    prompts = ["one", "two words"]
    expected = [alone(prompt, 9, Options(seed=seed)) for prompt in prompts for seed in (7, 8)]
    asked = {"model": "tiny", "prompt": prompts, "n": 2, "seed": 7, "max_tokens": 9}
    reply = client.completions.create(**asked)
    assert [c.text for c in reply.choices] == expected
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (12, 12 + reply.usage.completion_tokens)
    texts = [""] * 4
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    assert client.completions.create(**{**asked, "prompt": [[1, 2]], "n": 1}).choices[0].text == alone(
        [1, 2], 9, Options(seed=7)
    )


def test_null_is_as_good_as_nothing(tiny):
    asked = {"prompt": "a", "seed": 2, "max_tokens": None, "temperature": None, "stop": None, "n": None, "model": None}
    reply = httpx.post(tiny[1] + COMPLETIONS, json=asked)
    assert reply.json()["choices"][0]["text"] == alone("a", 16, Options(seed=2))


def test_without_a_seed_texts_differ(client):
    reply = client.completions.create(model="tiny", prompt="a", max_tokens=20)
    again = client.completions.create(model="tiny", prompt="a", max_tokens=20)
    assert reply.choices[0].text != again.choices[0].text


def test_a_stop_token_ends_a_text_and_is_not_in_it(client):
    reply = client.completions.create(
        model="tiny", prompt="a", max_tokens=20, temperature=0, logit_bias={str(END): 100}, logprobs=0
    )
    assert (reply.choices[0].text, reply.choices[0].finish_reason, reply.choices[0].logprobs) == ("", "stop", None)


def test_logprobs_are_those_of_the_tokens_drawn(client):
    asked = {"model": "tiny", "max_tokens": 8, "seed": 1, "logit_bias": LETTERS}
    choice = client.completions.create(prompt="a", logprobs=0, **asked).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == list(range(8))
    assert len(choice.logprobs.token_logprobs) == 8
    assert max(choice.logprobs.token_logprobs) < 0
    chunks = list(client.completions.create(prompt="a", logprobs=0, stream=True, **asked))
    assert [x for c in chunks for x in c.choices[0].logprobs.token_logprobs] == choice.logprobs.token_logprobs
    assert [x for c in chunks for x in c.choices[0].logprobs.text_offset] == list(range(8))
    message = [{"role": "user", "content": "a"}]
    content = client.chat.completions.create(messages=message, logprobs=True, **asked).choices[0].logprobs.content
    assert [(bytes(each.bytes).decode(), each.top_logprobs) for each in content] == [(e.token, []) for e in content]


def test_chat_uses_the_template(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]},
    ]
    tokens = chat.encode(WORDS, TEMPLATE, [messages[0], {"role": "user", "content": "Hi there"}])
    expected = alone(tokens, 20, Options(seed=2))
    reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, seed=2)
    assert (reply.choices[0].message.role, reply.choices[0].message.content) == ("assistant", expected)
    assert reply.usage.prompt_tokens == len(tokens)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=20, seed=2, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == expected
    assert chunks[-1].usage == reply.usage
    assert chunks[-1].choices == []


def test_a_chat_answer_may_fill_the_room_there_is(client):
    bias = {str(END): -100}
    reply = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], logit_bias=bias)
    assert (reply.usage.total_tokens, reply.choices[0].finish_reason) == (128, "length")


def test_models_and_health(client, tiny):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len, model.chat) == ("tiny", 128, True)
    assert httpx.get(f"{tiny[1]}/health").json() == {"status": "ok"}


def test_metrics_count(tiny):
    before = metrics(tiny[1])
    prompt = "x" * 24
    for _ in range(2):
        httpx.post(f"{tiny[1]}/v1/completions", json={"prompt": prompt, "max_tokens": 4}).raise_for_status()
    httpx.post(f"{tiny[1]}/v1/completions", json={"prompt": ""})
    more = {name: value - before[name] for name, value in metrics(tiny[1]).items()}
    assert more["q3n_prompt_tokens_total"] == 48
    assert more["q3n_prefix_hit_tokens_total"] == 16
    assert 2 <= more["q3n_drawn_tokens_total"] <= 8
    assert more["q3n_engine_steps_total"] >= more["q3n_drawn_tokens_total"]
    assert more["q3n_time_to_first_token_seconds_count"] == 2
    assert more['q3n_http_requests_total{outcome="finished"}'] == 2
    assert more['q3n_http_requests_total{outcome="refused"}'] == 1


def test_drafts_change_no_text_and_are_counted():
    options = Options(seed=2, logit_bias={int(token): bias for token, bias in LETTERS.items()})
    asked = {"prompt": "Hear me", "max_tokens": 60, "seed": 2, "logit_bias": LETTERS, "stop": ["bbb"]}
    with served(engine(drafts=2)) as (_, _, address):
        reply = httpx.post(address + COMPLETIONS, json=asked).raise_for_status().json()
        counts = metrics(address)
    assert reply["choices"][0]["text"] == alone("Hear me", 60, options, ["bbb"])
    drafted, accepted = counts["q3n_drafted_tokens_total"], counts["q3n_accepted_tokens_total"]
    assert 0 < accepted < drafted
    assert counts["q3n_draft_acceptance_rate"] == accepted / drafted
    assert counts["q3n_engine_steps_total"] < counts["q3n_drawn_tokens_total"]


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REFUSED = [
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**30}, 400, f"max_tokens: {10**30} are more than the 127 that a "
     "prompt of 1 tokens leaves of the 128 that this server has for both: lower it or shorten the prompt",
     "max_tokens"),
    (COMPLETIONS, {"prompt": "a" * 3000}, 400, "prompt: 3000 tokens leave none of the 128 that this server has for "
     "prompt and answer together: shorten it", "prompt"),
    (COMPLETIONS, {"prompt": ""}, 400, "the prompt has no tokens: give at least one, such as the beginning-of-text "
     "token", "prompt"),
    (COMPLETIONS, {"prompt": [300]}, 400, "the prompt's tokens must lie in [0, 257), got 300 to 300", "prompt"),
    (COMPLETIONS, {}, 400, "prompt: Field required", "prompt"),
    (COMPLETIONS, {"prompt": "a", "user_id": 3}, 400, "user_id: this server has no such field: leave it out",
     "user_id"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature must be 0 (the likeliest token) or more, got "
     "-1.0", "temperature"),
    (COMPLETIONS, {"prompt": "a", "frequency_penalty": 3}, 400, "frequency_penalty must be in [-2, 2], 0 for none, got "
     "3.0", "frequency_penalty"),
    (COMPLETIONS, {"prompt": "a", "top_k": 2**40}, 400, "top_k: Input should be less than 2147483648, got "
     "1099511627776", "top_k"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**70}, 400, "seed must be a signed 64-bit integer, got "
     "1180591620717411303424", "seed"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"999": 1}}, 400, "a token of logit_bias must be in [0, 257), got 999",
     "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "stop": [""]}, 400, "stop", "stop"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 5}, 400, "logprobs: Input should be less than or equal to 0, got 5",
     "logprobs"),
    (COMPLETIONS, {"prompt": "a", "n": 65}, 400, "n 65 for 1 prompts makes 65 texts, above the queue's 64: ask for "
     "fewer at once", "n"),
    (COMPLETIONS, {"prompt": "a", "model": "other"}, 404, "there is no model 'other', only 'tiny'", "model"),
    (COMPLETIONS, b"{", 400, "the body is not JSON: Expecting property name enclosed in double quotes at character 1",
     None),
    (COMPLETIONS, b"[" * 100_000, 400, "POST /v1/completions: There was an error parsing the body", None),
    (COMPLETIONS, b" " * 1_100_000, 413, "POST /v1/completions: the body has more than 1056768 bytes: shorten it",
     None),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "prompt: Value error, 'utf-8' codec can't encode", "prompt"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "\ud800"}]},
        400,
        "messages.0.content: Value error, 'utf-8' codec can't encode character '\\ud800' in position 0",
        "messages",
    ),
    (CHAT, {"messages": []}, 400, "messages: List should have at least 1 item after validation, not 0", "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role: Input should be 'system', "
     "'developer', 'user' or 'assistant', got 'robot'", "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 3000}]}, 400, "messages: 3017 tokens leave none of the 128 "
     "that this server has for prompt and answer together: shorten it", "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 200}, 400,
     "max_completion_tokens: 200 are more than the 110 that a prompt of 18 tokens leaves", "max_completion_tokens"),
    ("/v1/embeddings", {}, 404, "POST /v1/embeddings: Not Found", None),
    ("/health", {}, 405, "POST /health: Method Not Allowed", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "message", "param"), REFUSED)
def test_what_is_refused_is_said_as_openai_says_it(tiny, path, body, status, message, param):
    content = body if isinstance(body, bytes) else json.dumps(body)
    reply = httpx.post(tiny[1] + path, content=content, headers={"Content-Type": "application/json"})
    told = reply.json()["error"]
    assert (reply.status_code, told["param"], told["type"]) == (status, param, "invalid_request_error")
    assert told["message"].startswith(message)
    assert len(told["message"]) < 300


def test_a_body_that_is_not_called_json_is_refused(tiny):
    reply = httpx.post(tiny[1] + COMPLETIONS, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    told = "the request has no header Content-Type: application/json, so its body is not read: add it"
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, told)


def test_without_a_template_there_is_no_chat():
    with served(engine(), template=None) as (_, _, address):
        reply = httpx.post(address + CHAT, json={"messages": [{"role": "user", "content": "a"}]})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "tiny has no chat template: use /v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served") / "tiny"
    checkpoint.save(made, TREE, CONFIG, None, checkpoint.Extras({}, tokenizer.files(WORDS)))
    return made


def test_the_command_serves_until_it_is_told_to_end(folder):
    """In a process of its own: a stream ends cleanly though SIGTERM comes in the middle of it."""
    command = [sys.executable, "-m", "q3n_functional", "serve", str(folder), "--port", "0", "--max-length", "999"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        address = next(found[0] for line in process.stderr if (found := re.findall(r"http://127\S+", line)))
        (model,) = httpx.get(f"{address}/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"], model["chat"]) == ("tiny", 999, False)
        asked = {**LONG, "max_tokens": 990}
        with httpx.stream("POST", address + COMPLETIONS, json=asked, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "the server is shutting down" in rest[-2]
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--capacity", "0"), "capacity must be 1 or more, got 0"),
        (("--port", "99999"), "port must be in [0, 65535], 0 for one that is free, got 99999"),
        (("--port", "-1"), "port must be in [0, 65535], 0 for one that is free, got -1"),
        (("--max-length", "2000"), "max_length must be 1 to 1024, the model's positions, or 0 to choose; got 2000"),
        (("--max-queue", "0"), "max_queue must be 1 or more, got 0"),
        (("--draft-tokens", "-1"), "draft_tokens must be 0 (none) or more, got -1"),
        (("--prefix-mib", "-1"), "max_bytes must be 0 (nothing is kept) or more, got -1048576"),
    ],
)
def test_options_out_of_range_are_refused(folder, capsys, option, told):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", str(folder), *option])
    assert capsys.readouterr().err == f"q3n: {told}\n"


def test_drafts_need_a_prediction_module(tmp_path, monkeypatch, capsys):
    """Which is known from the headers, before the weights are read."""
    checkpoint.save(tmp_path, TREE._replace(mtp=()), dataclasses.replace(CONFIG, num_nextn_predict_layers=0))
    monkeypatch.setattr(chat, "load", lambda *_: pytest.fail("the weights are read"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", str(tmp_path), "--draft-tokens", "2"])
    assert capsys.readouterr().err == (
        f"q3n: the model in {tmp_path} has no prediction module (mtp) to draft with: leave out --draft-tokens\n"
    )


def test_config_json_need_not_name_the_prediction_module(folder, tmp_path, monkeypatch):
    """That of the published model does not."""
    made = shutil.copytree(folder, tmp_path / "published")
    said = json.loads((made / "config.json").read_text())
    del said["num_nextn_predict_layers"]
    (made / "config.json").write_text(json.dumps(said))
    given = []
    monkeypatch.setattr(serve, "run", lambda engine, *_: given.append(engine))
    cli.main(["serve", str(made), "--draft-tokens", "2", "--prefix-mib", "1"])
    assert (given[0].drafts, given[0].prefix_bytes) == (2, 1 << 20)


def test_without_the_extra_the_command_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "q3n_functional.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", str(folder)])
    assert capsys.readouterr().err.endswith(": pip install 'q3n-functional[serve]'\n")
