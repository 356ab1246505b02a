"""The page for trying prompts, in a real browser without a window."""

import json
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from q3n_functional import chat
from q3n_functional.sampling import Options
from tests.servers import END, TEMPLATE, WORDS, alone, engine, served, until

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Without the sandbox, which root may not have, and which a page of ours does not need.
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """A page whose errors, and what its own rules forbid, fail the test."""
    made, errors = browser.new_page(), []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    yield made
    made.close()
    assert errors == []


@pytest.fixture(scope="module")
def address():
    with served(engine(capacity=1024)) as (_, server, address):
        yield address
        until(lambda: server.thread.counts[:2] == (0, 0))


def write(page, prompt, *, tokens, seed, chat):
    page.set_checked("#chat", chat)
    for name, value in {"#max_tokens": tokens, "#seed": seed, "#prompt": prompt}.items():
        page.fill(name, str(value))
    page.click("#send")


def shown(page):
    return [(block.get_attribute("data-role"), block.text_content()) for block in page.locator("article").all()]


def test_a_prompt_is_continued(page, address):
    page.goto(address)
    expect(page.locator("#model")).to_have_text("tiny")
    write(page, "Hear me", tokens=25, seed=3, chat=False)
    expect(page.locator("#status")).to_contain_text("length")
    expect(page.locator("#send")).to_be_enabled()
    assert shown(page) == [("user", "Hear me"), ("assistant", alone("Hear me", 25, Options(seed=3)))]


def test_a_conversation_goes_on_and_is_cleared(page, address):
    page.goto(address)
    expect(page.locator("#chat")).to_be_checked()
    messages = []
    for said in ("<b>Hi</b>", "And you?"):
        write(page, said, tokens=12, seed=3, chat=True)
        messages.append({"role": "user", "content": said})
        answer = alone(chat.encode(WORDS, TEMPLATE, messages), 12, Options(seed=3))
        messages.append({"role": "assistant", "content": answer})
        expect(page.locator("#send")).to_be_enabled()
        assert shown(page) == [(m["role"], m["content"]) for m in messages]
    page.click("#clear")
    assert shown(page) == []


def test_what_is_refused_is_shown(page, address):
    page.goto(address)
    write(page, "a", tokens=5000, seed=3, chat=False)
    expect(page.locator("#error")).to_contain_text("max_tokens: 5000 are more than the 1023 that a prompt")
    expect(page.locator("#send")).to_be_enabled()
    write(page, "a", tokens=3, seed=3, chat=False)
    expect(page.locator("#error")).to_have_text("")


def endless(route):
    """Asks for the same without an end of its own."""
    asked = {**route.request.post_data_json, "logit_bias": {str(END): -100}}
    route.continue_(post_data=json.dumps(asked))


def test_stop_ends_the_writing(page, address):
    page.route("**/v1/completions", endless)
    page.goto(address)
    write(page, "a", tokens=1000, seed=3, chat=False)
    expect(page.locator("#status")).to_contain_text("pieces")
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("stopped")
    expect(page.locator("#send")).to_be_enabled()
    assert 0 < len(shown(page)[1][1]) < 900
