"""The page in a real browser: Chromium, driven by Playwright. Any error or warning of the browser fails a test.

GPTSMITH_SCREENSHOTS=DIRECTORY saves screenshots there.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.data.conversations import Counts
from gptsmith.data.images import decode_image
from gptsmith.data.preferences import Preference, read_preferences
from gptsmith.log import JsonLines
from gptsmith.server.inspect import inspect_text
from gptsmith.server.reward_check import RewardCheck
from gptsmith.server.service import Settings
from gptsmith.tokenizer.chat import ChatTemplate
from tests.channels import channel_model, channel_tokenizer
from tests.server.conftest import COLORS, Live, make_tokenizer, trained_seer

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
axe_playwright_python = pytest.importorskip("axe_playwright_python", reason="needs the package axe-playwright-python")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
TIMEOUT = 120_000  # ms: the machine may be busy

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

Page = Any
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open an address in a fresh browser context. Errors, warnings and requests to other servers fail the test."""
    contexts, complaints = [], []

    def open_(url: str, storage: dict[str, Any] | None = None, **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 820}, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        for name, value in (storage or {}).items():
            kept = json.dumps(json.dumps(value))
            context.add_init_script(
                f"localStorage.getItem('gptsmith.{name}') ?? localStorage.setItem('gptsmith.{name}', {kept})"
            )
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(complaint(m)) if m.type in ("error", "warning") else None)
        page.on(
            "request",
            lambda r: complaints.append(f"requested {r.url}") if not r.url.startswith((url, "blob:")) else None,
        )
        page.goto(url)
        return page

    open_.complaints = complaints  # type: ignore[attr-defined]
    yield open_
    for context in contexts:
        context.close()
    assert not complaints


def complaint(message: Any) -> str:
    """Return the message with the address that it is about; the message of a failed load does not name it."""
    return f"{message.text} {message.location.get('url', '')}".strip()


@pytest.fixture(scope="module")
def site(live_with_runs: tuple[Any, Path]) -> Any:
    """A server with two small models - `tiny` has a chat template, `plain` has none - and a directory of runs."""
    server, runs = live_with_runs
    write_run(runs / "bard", steps=400, rows=40)
    write_run(runs / "short", steps=200, rows=20)
    server.runs = runs
    return server


def write_run(directory: Path, steps: int, rows: int, status: str = "finished") -> Path:
    directory.mkdir(parents=True)
    config = {"steps": steps, "batch_size": 16, "context": 64, "optim": {"lr": 0.02}}
    record = {
        "status": status,
        "started": f"2026-01-01T00:00:{rows}+00:00",
        "parameters": 812_544,
        "config": config,
        "model": {"num_hidden_layers": 4, "hidden_size": 128},
        "data": {"spec": "/texts/shakespeare.txt", "train_tokens": 1_000_000},
        "choice": {"reasons": ["a test of the plan"]},
    }
    (directory / "run.json").write_text(json.dumps(record))
    for i in range(1, rows + 1):
        write_row(directory, i * steps // rows, steps)
    JsonLines(directory / "metrics.jsonl").append(step=steps, time=steps / 10, tokens=steps * 1024, val_loss=1.7)
    JsonLines(directory / "samples.jsonl").append(
        step=steps // 2, temperature=0.8, prompt="ROMEO:", text=" early words"
    )
    JsonLines(directory / "samples.jsonl").append(
        step=steps, temperature=0.8, prompt="ROMEO:", text=" <b>late</b> words"
    )
    return directory


def write_row(directory: Path, step: int, steps: int) -> None:
    JsonLines(directory / "metrics.jsonl").append(
        step=step, time=step / 10, loss=1.4 + 20 / (step + 8), lr=0.02 * (1 - step / steps), grad_norm=1.0,
        tokens=step * 1024, tokens_per_second=20_000.0 + step,
    )  # fmt: skip


def screenshot(page: Page, name: str) -> None:
    directory = os.environ.get("GPTSMITH_SCREENSHOTS")
    if directory:
        page.screenshot(path=Path(directory) / f"{name}.png")


def assert_accessible(page: Page) -> None:
    """Assert that axe-core finds no serious violation."""
    page.evaluate(f"() => {{ {AXE} }}")
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    bad = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not bad, "\n".join(f"{v['id']}: {v['help']}\n  {[n['html'][:150] for n in v['nodes']][:4]}" for v in bad)


def assert_fits(page: Page) -> None:
    """Assert that the page does not scroll sideways."""
    content, window = page.evaluate(
        "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert content <= window


def write(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page: Page, count: int = 1) -> None:
    page.locator(".turn.assistant:not(.waiting) footer").nth(count - 1).wait_for()


def step_shown(page: Page, step: int) -> None:
    page.locator(".tile dd", has_text=re.compile(f"^{step}of ")).wait_for()


def continue_prompt(page: Page) -> None:
    page.get_by_role("button", name="Continue", exact=True).click()
    page.locator(".column .token").first.wait_for()
    page.locator(".columns:not(:has(.column.working))").wait_for()


# Chat ---------------------------------------------------------------------------------------------------------------

SHORT = {"sampling.chat": {"max_tokens": 12, "seed": 3}}


@pytest.mark.parametrize("view", ["chat", "playground"])
def test_a_request_waits_until_the_models_are_known(site: Any, open_page: Open, view: str) -> None:
    page = open_page(site.url, SHORT | PLAY | {"view": view, "model": "tiny"})
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    if view == "chat":
        write(page, "the cat")
        page.locator(".turn.assistant.waiting").wait_for()
    else:
        page.get_by_role("button", name="Continue", exact=True).click()
        page.locator(".column.working").first.wait_for()
    (route,) = held
    route.continue_()
    if view == "chat":
        answered(page)
        assert page.locator(".turn.assistant header").inner_text() == "tiny"
    else:
        page.locator(".columns:not(:has(.column.working))").wait_for()
        assert page.locator(".column .token").count() > 0
    assert page.locator(".failed").count() == 0


def test_a_conversation(site: Any, open_page: Open) -> None:
    page = open_page(site.url, SHORT)
    page.get_by_role("heading", name="Conversations").wait_for()
    page.get_by_label("System prompt").fill("the cat")
    write(page, "a cat sat on\n**a** mat <b>x</b>")
    answered(page)
    assert page.locator(".turn.user .body").inner_text() == "a cat sat on\n**a** mat <b>x</b>"  # as it was typed
    messages = [
        {"role": "system", "content": "the cat"},
        {"role": "user", "content": "a cat sat on\n**a** mat <b>x</b>"},
    ]
    (expected,) = site.answers(messages, max_tokens=12, seed=3, temperature=0.7, top_p=0.95)
    (kept,) = stored(page)
    assert [message["content"] for message in kept["messages"].values()][1] == expected
    assert re.search(r"\d+ tokens", page.locator(".stats").inner_text())

    write(page, "and then")
    answered(page, 2)
    page.locator(".turn.assistant").nth(1).get_by_label("Answer again").click()
    page.get_by_role("group", name="Version 2 of 2").wait_for()
    answered(page, 2)
    assert page.locator(".turn").count() == 4
    page.locator(".turn.user").first.get_by_label("Edit").click()
    page.get_by_label("Your message").fill("the mat")
    page.get_by_text("Later messages stay with the earlier version.").wait_for()
    page.get_by_role("button", name="Send", exact=True).first.click()
    page.locator(".turn").nth(2).wait_for(state="detached")
    answered(page)
    assert page.locator(".turn").count() == 2
    assert page.locator(".turn.user .body").inner_text() == "the mat"

    page.reload()  # the conversation is still there
    assert page.locator(".turn.user .body").inner_text() == "the mat"
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    write(page, "another")
    answered(page)
    assert page.locator(".conversation").count() == 2
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    exported = json.loads(Path(download.value.path()).read_text())
    assert exported["messages"][0] == {"role": "user", "content": "another"}
    with page.expect_download() as download:
        page.get_by_role("button", name="Markdown").click()
    assert "**You**\n\nanother\n" in Path(download.value.path()).read_text()
    page.locator(".conversations li").first.hover()
    page.get_by_label("Delete “another”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.locator(".conversation").nth(1).wait_for(state="detached")


def test_stopping_an_answer(site: Any, open_page: Open) -> None:
    page = open_page(site.url, {"sampling.chat": {"max_tokens": 200, "seed": 11, "temperature": 1.5, "top_p": 1}})
    with slow(site) as engine:
        write(page, "tell me everything")
        page.locator(".turn.assistant:not(.waiting)").wait_for()
        page.get_by_role("button", name="Stop", exact=True).click()
        answered(page)
        assert "stopped" in page.locator(".stats").inner_text()
        assert site.settled(lambda: engine.stats.running == 0)
        write(page, "again")
        page.locator(".turn.assistant:not(.waiting)").nth(1).wait_for()
        page.keyboard.press("Escape")
        answered(page, 2)
        assert "stopped" in page.locator(".stats").nth(1).inner_text()


@contextmanager
def slow(site: Any, model: str = "tiny") -> Iterator[Any]:
    """Let a model take a tenth of a second for a token, as a large one. Yield its engine."""
    engine = site.models.loaded()[model].engine
    step = engine.engine.step

    def slow_step() -> Any:
        time.sleep(0.1)
        return step()

    engine.engine.step = slow_step
    try:
        yield engine
    finally:
        del engine.engine.step


LONG = {"sampling.chat": {"max_tokens": 200, "seed": 11, "temperature": 1.5, "top_p": 1}}


def stored(page: Page) -> list[dict[str, Any]]:
    """Return the conversations that the browser has stored."""
    records = page.evaluate(
        "() => Object.entries(localStorage).filter(([key]) => key.startsWith('gptsmith.conversation.'))"
    )
    return [json.loads(text) for _, text in records]


def new_tab(page: Page) -> Page:
    tab = page.context.new_page()
    tab.set_default_timeout(TIMEOUT)
    tab.goto(page.url)
    return tab


def turns(page: Page) -> list[str]:
    page.locator(".turn").last.wait_for()  # what is not shown yet has its source as its text
    return page.locator(".turn .body").all_inner_texts()


def test_two_tabs_keep_all_conversations(site: Any, open_page: Open) -> None:
    first = open_page(site.url, SHORT)
    second = new_tab(first)
    write(first, "from the first tab")
    answered(first)
    second.get_by_role("button", name="from the first tab", exact=True).wait_for()  # without a reload
    write(second, "from the second tab")
    answered(second)
    first.get_by_role("button", name="from the second tab", exact=True).wait_for()
    write(first, "and on")
    answered(first, 2)
    third = new_tab(first)
    for tab in (first, second, third):
        assert sorted(tab.locator(".conversation").all_inner_texts()) == ["from the first tab", "from the second tab"]

    # both tabs show one conversation, and what one adds appears in the other
    second.get_by_role("button", name="from the first tab", exact=True).click()
    assert turns(second) == turns(first)
    write(second, "more")
    answered(second, 3)
    answered(first, 3)
    assert turns(first) == turns(second)
    assert len(turns(first)) == 6

    second.locator(".conversations li", has_text="from the first tab").hover()
    second.get_by_label("Delete “from the first tab”").click()
    second.get_by_role("button", name="Delete", exact=True).click()
    first.get_by_text("This conversation was deleted in another tab.").wait_for()
    assert first.locator(".turn").count() == 0
    assert [record["title"] for record in stored(first)] == ["from the second tab"]


def test_conversations_of_an_older_page_are_kept(site: Any, open_page: Open) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "finish": "stop"}]
    old = [{"id": name, "title": name, "updated": i, "messages": said} for i, name in enumerate(("older", "newer"))]
    page = open_page(site.url, SHORT | {"conversations": old})
    assert page.locator(".conversation").all_inner_texts() == ["newer", "older"]
    assert turns(page) == ["hi", "hello"]
    assert page.evaluate("() => localStorage.getItem('gptsmith.conversations')") is None
    write(page, "the cat")
    answered(page, 2)
    page.reload()
    answered(page, 2)
    assert turns(page)[:3] == ["hi", "hello", "the cat"]
    assert len(stored(page)) == 2


def test_branches_are_stepped_through(site: Any, open_page: Open) -> None:
    page = open_page(site.url, {"sampling.chat": {"max_tokens": 12, "temperature": 1.5, "top_p": 1}})
    for i, text in enumerate(("the cat", "the mat", "true")):
        write(page, text)
        answered(page, i + 1)
    before = turns(page)
    page.locator(".turn.assistant").first.get_by_label("Answer again").click()  # on the earliest answer
    versions = page.get_by_role("group", name="Version 2 of 2")
    versions.wait_for()
    answered(page)
    assert len(turns(page)) == 2
    assert_accessible(page)
    again = turns(page)
    versions.get_by_label("Previous version").click()
    assert turns(page) == before
    page.get_by_role("group", name="Version 1 of 2").get_by_label("Next version").click()
    assert turns(page) == again
    page.reload()
    assert turns(page) == again
    page.get_by_label("Previous version").click()

    page.locator(".turn.user").nth(1).get_by_label("Edit").click()
    page.get_by_label("Your message").fill("a mat")
    page.get_by_role("button", name="Send", exact=True).first.click()
    page.locator(".turn.user").nth(1).get_by_role("group", name="Version 2 of 2").wait_for()
    answered(page, 2)
    assert turns(page)[:3] == [*before[:2], "a mat"]
    page.locator(".turn.assistant").nth(1).get_by_label("Edit").click()
    page.get_by_label("Answer", exact=True).fill("my own words")
    page.get_by_role("button", name="Save", exact=True).click()
    page.locator(".turn.assistant").nth(1).get_by_role("group", name="Version 2 of 2").wait_for()
    assert turns(page)[3] == "my own words"
    page.locator(".turn.user").nth(1).get_by_label("Previous version").click()
    assert turns(page) == before
    (record,) = stored(page)
    assert len(record["messages"]) == 10  # six at first, an answer, a question with its answer, and its edited text


def test_a_reload_keeps_a_partial_answer(site: Any, open_page: Open) -> None:
    page = open_page(site.url, LONG)
    page.get_by_text("Start a conversation").wait_for()
    with slow(site) as engine:
        write(page, "tell me everything")
        page.locator(".turn.assistant:not(.waiting)").wait_for()
        part = next(m["content"] for m in stored(page)[0]["messages"].values() if m["role"] == "assistant")
        page.reload()
        page.locator(".stats", has_text="interrupted").wait_for()
        assert site.settled(lambda: engine.stats.running == 0)
    message = next(m for m in stored(page)[0]["messages"].values() if m["role"] == "assistant")
    assert message["finish"] == "interrupted"
    assert message["content"].startswith(part)
    assert len(message["content"]) > 0
    assert_accessible(page)
    page.get_by_role("button", name="Answer again").click()
    page.get_by_role("group", name="Version 2 of 2").wait_for()
    answered(page)
    assert "interrupted" not in page.locator(".stats").inner_text()
    page.get_by_label("Previous version").click()
    page.locator(".stats", has_text="interrupted").wait_for()


def test_a_tab_that_crashed_leaves_its_partial_answer(site: Any, open_page: Open) -> None:
    answer = {"id": "2", "parent": "1", "role": "assistant", "content": "half an", "created": 2, "updated": 2}
    question = {"id": "1", "parent": None, "role": "user", "content": "hi", "created": 1, "updated": 1}
    record = {"id": "x", "title": "hi", "updated": 1, "system": "", "leaf": "2"}
    page = open_page(site.url, SHORT | {"conversation.x": record | {"messages": {"1": question, "2": answer}}})
    page.locator(".stats", has_text="interrupted").wait_for()
    page.get_by_role("button", name="Answer again").wait_for()
    assert turns(page) == ["hi", "half an"]


def test_an_answer_goes_on_while_another_conversation_is_shown(site: Any, open_page: Open) -> None:
    page = open_page(site.url, LONG | {"sampling.chat": LONG["sampling.chat"] | {"max_tokens": 30}})
    page.get_by_text("Start a conversation").wait_for()
    with slow(site):
        write(page, "a long story")
        page.locator(".turn.assistant:not(.waiting)").wait_for()
        page.get_by_role("button", name="New conversation").click()
        assert page.locator(".turn").count() == 0
        page.locator(".conversations .busy", has_text="a long story").wait_for()
        assert_accessible(page)
        write(page, "another")  # two answers at once
        page.locator(".turn.assistant:not(.waiting)").wait_for()
        page.get_by_role("button", name=re.compile("a long story")).first.click()
        page.get_by_role("button", name="Stop", exact=True).wait_for()  # it is still growing
        answered(page)
        assert "30 tokens" in page.locator(".stats").inner_text()
        page.get_by_role("button", name="another").first.click()
        answered(page)
        assert "30 tokens" in page.locator(".stats").inner_text()


def test_the_oldest_turns_are_left_out_when_the_context_is_full(site: Any, open_page: Open) -> None:
    page = open_page(site.url, SHORT)
    asked: list[dict[str, Any]] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.url.endswith("chat/completions") else None)
    page.get_by_label("System prompt").fill("the cat")
    text = "a cat sat on a mat. " * 14
    for i in range(4):
        write(page, f"{text}{i}")
        answered(page, i + 1)
    counts = [site_tokens(site, each["messages"]) for each in asked]
    assert all(count + 12 <= 512 for count in counts)
    assert [m["messages"][0]["content"] for m in asked] == ["the cat"] * 4
    assert asked[-1]["messages"][-1]["content"] == f"{text}3"
    assert len(asked[-1]["messages"]) < 8
    assert asked[-1]["messages"][1]["content"] != f"{text}0"
    assert re.search(r"without the (\d+ )?oldest turn", page.locator(".stats").last.inner_text())
    assert len(turns(page)) == 8  # on the page, everything remains

    meter = page.get_by_role("meter")
    page.get_by_text("the next answer leaves out the oldest turns").wait_for()
    said = [{"role": "system", "content": "the cat"}]
    (record,) = stored(page)
    said += [{"role": m["role"], "content": m["content"]} for m in record["messages"].values()]
    assert page.locator("label[for=context]").inner_text().startswith(f"{site_tokens(site, said)} of 512 tokens")
    assert meter.get_attribute("max") == "512"
    assert_accessible(page)
    screenshot(page, "chat-full")

    page.get_by_role("button", name="New conversation").click()
    page.locator(".context").wait_for(state="hidden")
    write(page, "a cat sat on a mat. " * 100)
    page.get_by_text(re.compile(r"The message is too long: [\d,]+ tokens for a context of 512\.")).first.wait_for()


def site_tokens(site: Any, messages: list[dict[str, Any]]) -> int:
    return len(ChatTemplate(site.tokenizers["tiny"]).encode(messages))


def test_untrusted_markdown_is_rendered_safely(site: Any, open_page: Open) -> None:
    answer = "**bold** <img src=x onerror=alert(1)> [x](javascript:alert(1))\n\n```\ncode\n```\n\n| a |\n|---|\n| b |"
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer, "model": "tiny"}]
    page = open_page(site.url, {"conversations": [{"id": "1", "title": "hi", "updated": 1, "messages": said}]})
    body = page.locator(".turn.assistant .body")
    body.locator("strong").wait_for()
    assert body.locator("img, a").count() == 0
    assert "<img src=x" in body.inner_text()
    assert body.locator("td").inner_text() == "b"
    page.get_by_label("Copy code").wait_for()
    assert_accessible(page)


def test_a_base_model_leads_to_the_playground(site: Any, open_page: Open) -> None:
    page = open_page(site.url, {"model": "plain"})
    page.get_by_text("plain is a base model: it continues text but does not follow instructions.").wait_for()
    assert not page.locator(".composer").is_visible()
    assert_accessible(page)
    page.get_by_role("button", name="Open the Playground").click()
    page.get_by_role("heading", name="Playground").wait_for()


def test_a_server_with_api_keys(
    start: Callable[..., Any], open_page: Open
) -> None:  # the page closes before the server
    server = start(Settings(keys=("open sesame",)))
    page = open_page(server.url, SHORT)
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile("server rejected this key|Invalid API key")).first.wait_for()
    if not page.get_by_label("Key", exact=True).is_visible():
        page.get_by_label("API key").click()
    page.get_by_label("Key", exact=True).fill("open sesame")
    page.keyboard.press("Enter")
    page.locator("#model option").first.wait_for(state="attached")
    page.get_by_text("Start a conversation").wait_for()
    write(page, "the cat")
    answered(page)
    assert page.evaluate("() => [localStorage, sessionStorage].map((s) => JSON.stringify(s).includes('sesame'))") == [
        False,
        True,
    ]
    page.locator(".turn.assistant .body:not(.plain)").wait_for()
    open_page.complaints[:] = [c for c in open_page.complaints if "401" not in c]  # type: ignore[attr-defined]


# Reasoning ----------------------------------------------------------------------------------------------------------

THINKER = {"model": "thinker", "sampling.chat": {"max_tokens": 60, "temperature": 0}}


@pytest.fixture(scope="module")
def thinking_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a model that answers in channels."""
    settings = Settings(collect=tmp_path_factory.mktemp("thinking") / "preferences.jsonl")
    server = Live(settings, more={"thinker": (channel_tokenizer(), lambda _: channel_model())}).start()
    yield server
    server.stop()


def test_reasoning_is_a_block_above_the_answer(thinking_site: Live, open_page: Open) -> None:
    page = open_page(thinking_site.url, THINKER)
    asked: list[dict[str, Any]] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.url.endswith("chat/completions") else None)
    assert thinking_site.settled(lambda: "thinker" in thinking_site.models.loaded())
    block = page.locator(".turn.assistant .reasoning")
    with slow(thinking_site, "thinker"):
        write(page, "hi")
        block.locator("summary", has_text="Thinking …").wait_for()
        assert page.locator(".turn.assistant.waiting").count() == 1  # the answer itself has not begun
        assert not block.locator("div").is_visible()
        block.locator("summary").click()
        block.get_by_text(re.compile("^I t?h?i?n?k?")).wait_for()
        assert page.locator(".turn.assistant.waiting").count() == 1
        answered(page)
    assert block.locator("summary").inner_text() == "Reasoning"
    assert block.locator("div").inner_text() == "I think."  # it is still open
    assert turns(page) == ["hi", "Hello you"]
    assert_accessible(page)
    assert_fits(page)
    screenshot(page, "reasoning")
    page.reload()
    block.locator("summary").wait_for()
    assert not block.locator("div").is_visible()
    assert_accessible(page)
    write(page, "go")
    answered(page, 2)
    assert asked[-1]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello you"},
        {"role": "user", "content": "go"},
    ]
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    assert "I think" not in Path(download.value.path()).read_text()


def test_two_answers_with_their_reasoning(thinking_site: Live, open_page: Open) -> None:
    sampling = {"sampling.compare": {"max_tokens": 60, "temperature": 0}}
    page = open_page(thinking_site.url, THINKER | sampling | {"view": "compare"})
    page.get_by_label("Your prompt").wait_for()
    assert two_answers(page, "hi") == ["Hello you"] * 2
    assert page.locator(".answer .reasoning summary").all_inner_texts() == ["Reasoning"] * 2
    page.locator(".answer .reasoning summary").first.click()
    assert page.locator(".answer .reasoning div").first.inner_text() == "I think."
    assert_accessible(page)


# Pictures -----------------------------------------------------------------------------------------------------------

SEER = SHORT | {"model": "seer", "sampling.chat": {"max_tokens": 12, "temperature": 0}}
PUT = """([selector, type, encoded, name, kind]) => {
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: kind }));
  const options = { bubbles: true, cancelable: true };
  const event = type === "paste"
    ? new ClipboardEvent(type, { ...options, clipboardData: data })
    : new DragEvent(type, { ...options, dataTransfer: data });
  document.querySelector(selector).dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def seeing_site() -> Iterator[Live]:
    server = Live(more={"seer": (make_tokenizer(image_token=True), trained_seer)}).start()
    yield server
    server.stop()


def colored(name: str, size: tuple[int, int] = (24, 24), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, COLORS[name]).save(file, format)
    return file.getvalue()


def put(page: Page, event: str, data: bytes, selector: str = ".chat-main", kind: str = "image/png") -> None:
    """Drop a file on an element, or paste it there."""
    page.evaluate(PUT, [selector, event, base64.b64encode(data).decode(), f"file.{kind[6:]}", kind])


def thumbnails(page: Page, count: int) -> Any:
    page.wait_for_function(f"document.querySelectorAll('.composer .thumbnails img').length === {count}")
    return page.locator(".composer .thumbnails img")


def test_a_picture_is_dropped_and_named_and_its_patches_are_shown(seeing_site: Live, open_page: Open) -> None:
    page = open_page(seeing_site.url, SEER)
    page.locator(".composer").get_by_label("Add a picture").wait_for()
    page.evaluate(PUT, [".chat-main", "dragover", "", "x.png", "image/png"])
    assert page.locator(".dropping").count() == 1
    put(page, "drop", colored("red"))
    assert thumbnails(page, 1).get_attribute("alt") == "Picture 1"
    assert page.locator(".dropping").count() == 0
    assert_accessible(page)
    write(page, "What is this?")
    answered(page)
    assert turns(page)[1] == "red"
    assert page.locator(".composer .thumbnails img").count() == 0
    picture = page.locator(".turn.user .pictures img")
    assert picture.evaluate("(e) => [e.alt, e.naturalWidth]") == ["Picture", 24]
    page.locator(".context label", has_text="of 512 tokens").wait_for()
    assert_accessible(page)
    screenshot(page, "picture")
    page.reload()
    assert picture.evaluate("(e) => e.decode().then(() => e.naturalWidth)") == 24
    put(page, "drop", colored("blue"))
    thumbnails(page, 1)
    write(page, "What is this?")
    answered(page, 2)

    page.locator(".turn.user").first.get_by_label("Look inside").click()
    page.get_by_role("heading", name="Inside").wait_for()
    page.locator(".patch-card").wait_for()
    model, tokenizer = seeing_site.reference["seer"].model, seeing_site.tokenizers["seer"]
    found = inspect_text(model, tokenizer, "What is this?", image=decode_image(colored("red")))
    tokens, weights = found["tokens"], found["image"]["weights"][0][-1]
    page.get_by_text(f"{len(tokens)} tokens · 2 layers").wait_for()
    strongest = max(range(16), key=lambda i: weights[i])
    place = f"row {strongest // 4 + 1}, column {strongest % 4 + 1}"
    label = page.locator(".patches").get_attribute("aria-label")
    assert label.startswith("The picture in 4 × 4 patches.")
    assert place in label
    assert page.locator(".patch-card .bars li").first.inner_text().startswith(place)
    first = page.locator("#next-title + .bars li").first  # after the beginning of an answer comes the name
    assert first.locator("code").inner_text() == found["next"][-1][0]["text"]
    assert "red".startswith(found["next"][-1][0]["text"].strip("▁Ġ "))
    bright = "(e) => { const d = e.getContext('2d').getImageData(0, 0, e.width, e.height).data;"
    bright += " return [Math.max(...d.filter((_, i) => i % 4 === 0)), Math.min(...d.filter((_, i) => i % 4 === 0))]; }"
    most, least = page.locator(".patches").evaluate(bright)
    assert most > 200  # the strongest patch has no shade
    assert least < most
    before = page.locator(".patches").get_attribute("aria-label")
    page.locator(".strip .token").first.click()
    assert "does not see it" in page.locator(".patches").get_attribute("aria-label")
    page.locator(".strip .token").last.click()
    assert page.locator(".patches").get_attribute("aria-label") == before
    assert_accessible(page)
    assert_fits(page)
    screenshot(page, "patches")
    page.locator(".view-inside").get_by_label("Remove picture 1").click()
    page.locator(".patch-card").wait_for(state="hidden")


def test_pictures_on_a_phone(seeing_site: Live, open_page: Open) -> None:
    page = open_page(seeing_site.url, SEER, **PHONE)
    page.locator(".composer").get_by_label("Add a picture").wait_for()
    files = [{"name": f"{name}.png", "mimeType": "image/png", "buffer": colored(name)} for name in ("green", "blue")]
    page.locator(".composer input[type=file]").set_input_files(files[0])
    page.locator(".composer input[type=file]").set_input_files(files[1])
    thumbnails(page, 2)
    assert_fits(page)
    assert_accessible(page)
    screenshot(page, "picture-phone")
    page.locator(".composer").get_by_label("Remove picture 2").click()
    thumbnails(page, 1)
    write(page, "What is this?")
    answered(page)
    assert turns(page)[1] == "green"
    assert_fits(page)
    page.locator(".turn.user").get_by_label("Look inside").click()
    page.locator(".patch-card").wait_for()
    assert_fits(page)
    assert_accessible(page)
    screenshot(page, "patches-phone")


def test_pasted_large_and_refused_pictures(seeing_site: Live, open_page: Open) -> None:
    page = open_page(seeing_site.url, SEER)
    page.locator(".composer").get_by_label("Add a picture").wait_for()
    put(page, "paste", colored("green", (2400, 1200)), "#message")
    thumb = thumbnails(page, 1)
    assert thumb.evaluate("(e) => e.decode().then(() => [e.naturalWidth, e.naturalHeight])") == [768, 384]
    assert thumb.get_attribute("src").startswith("data:image/jpeg")
    put(page, "drop", b"no picture at all")
    page.get_by_text("is damaged, or in a format").wait_for()
    put(page, "drop", b"<svg/>", kind="image/svg+xml")
    page.get_by_text("is no PNG, JPEG, WebP or GIF picture").wait_for()
    thumbnails(page, 1)
    page.get_by_label("Send", exact=True).click()  # a picture alone is a message
    answered(page)
    assert page.locator(".conversation").first.inner_text() == "Picture"
    page.locator("#model").select_option("tiny")
    page.locator(".composer").get_by_label("Add a picture").wait_for(state="hidden")
    put(page, "drop", colored("red"))
    page.get_by_text("tiny reads text only").wait_for()
    write(page, "and now?")  # the conversation has a picture, which this model cannot see
    page.get_by_role("alert").get_by_text("messages[0].content[0] is a picture").wait_for()
    open_page.complaints[:] = [c for c in open_page.complaints if "400" not in c]  # type: ignore[attr-defined]


# Playground ---------------------------------------------------------------------------------------------------------

PLAY = {
    "view": "playground",
    "model": "plain",
    "prompt": "abc",
    "inside.text": "abc abc",
    "temperatures": "0, 1",
    "sampling.playground": {"max_tokens": 14, "seed": 5},
}


def test_tokens_are_colored_and_an_alternative_is_chosen(site: Any, open_page: Open) -> None:
    page = open_page(site.url, PLAY)
    continue_prompt(page)
    columns = page.locator(".column")
    assert columns.count() == 2
    for column, temperature in ((columns.nth(0), 0.0), (columns.nth(1), 1.0)):
        (expected,) = site.texts("abc", "plain", max_tokens=14, temperature=temperature, seed=5)
        assert column.locator(".tokens").inner_text() == expected.rstrip("\n") or expected.endswith("\n")
        assert column.locator(".token").count() == len(expected)
        assert set(column.locator(".token").evaluate_all("(all) => all.map((t) => t.dataset.p)")) <= set("012345")

    first = columns.nth(0)
    before = first.locator(".token").all_inner_texts()
    first.locator(".token").nth(3).click()
    popover = page.get_by_role("dialog")
    popover.wait_for()
    assert popover.locator("button").count() == 8
    assert_accessible(page)
    screenshot(page, "playground")
    other = popover.locator("button:not([aria-current])").first
    text = other.locator("code").inner_text().replace("␣", " ").replace("⏎", "\n")
    other.click()
    page.locator(".columns:not(:has(.column.working))").wait_for()
    first.locator(".token[data-picked]").wait_for()
    (rest,) = site.texts("abc" + "".join(before[:3]) + text, "plain", max_tokens=14, temperature=0.0, seed=5)
    made = first.locator(".token").evaluate_all("(all) => all.map((t) => t.textContent)")
    assert "".join(made) == "".join(before[:3]) + text + rest
    first.get_by_label("Undo choice").click()
    assert first.locator(".token").all_inner_texts() == before


def test_a_line_end_can_be_pointed_at(site: Any, open_page: Open) -> None:
    page = open_page(site.url, PLAY | {"prompt": "ab\n\nc", "temperatures": "0", "echo": True})
    continue_prompt(page)
    token = page.locator(".token[data-from-prompt]").nth(2)
    assert token.evaluate("(e) => e.textContent") == "\n"
    assert token.locator(".glyph").evaluate("(e) => getComputedStyle(e, '::before').content") == '"⏎"'
    box = token.evaluate(
        "(e) => { const {x, y, width, height} = e.getClientRects()[0]; return [x, y, width, height]; }"
    )
    assert box[2] > 5
    page.mouse.move(box[0] + box[2] / 2, box[1] + box[3] / 2)
    page.get_by_role("dialog", name="Alternatives to ⏎").wait_for()
    assert_accessible(page)
    screenshot(page, "newline")


def test_keyboard_only(site: Any, open_page: Open) -> None:
    page = open_page(site.url, PLAY | {"prompt": "def", "temperatures": "0", "echo": True})
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    page.locator(".columns:not(:has(.column.working)) .token:not([data-from-prompt])").nth(13).wait_for()
    assert page.locator(".token[data-from-prompt]").all_inner_texts() == ["d", "e", "f"]
    page.locator(".token").first.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    chosen = page.locator(":focus code").inner_text()
    page.keyboard.press("Enter")
    page.locator(".token[data-picked]").wait_for()
    page.locator(".columns:not(:has(.column.working))").wait_for()
    assert page.locator(".token[data-picked]").inner_text().replace(" ", "␣") == chosen.replace("⏎", "\n")
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+3")
    page.get_by_role("heading", name="Inside").wait_for()
    page.keyboard.press("/")
    assert page.evaluate("() => document.activeElement.id") == "inside-text"
    page.locator("#tab-inside").focus()
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keyboard shortcuts").wait_for()
    assert_accessible(page)
    page.keyboard.press("Escape")


# Compare ------------------------------------------------------------------------------------------------------------

COMPARE = {"view": "compare", "model": "tiny", "sampling.compare": {"max_tokens": 10, "temperature": 1.2, "top_p": 1}}
SMALL_PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def collecting(start: Callable[..., Any], tmp_path: Path) -> Any:
    """A server that appends comparisons to the file `collecting.file`."""
    file = tmp_path / "preferences.jsonl"
    server = start(Settings(collect=file))
    server.file = file
    return server


def two_answers(page: Page, text: str) -> list[str]:
    """Ask, wait for both answers, and return them."""
    page.locator("#compare-prompt").fill(text)
    page.locator("#compare-prompt").press("Enter")
    return answers_shown(page)


def answers_shown(page: Page) -> list[str]:
    page.locator(".choices:visible").wait_for()
    return page.locator(".answer .body").all_inner_texts()


def counted(page: Page, text: str) -> None:
    try:
        page.locator(".counter", has_text=re.compile(f"^{text}")).wait_for()
    except playwright.TimeoutError as error:
        said = page.locator(".counter, .toast, .view-compare .help, .failed").all_inner_texts()
        focus = page.evaluate("() => document.activeElement.outerHTML.slice(0, 200)")
        choices = "(all) => all.map((e) => `${e.dataset.choice} ${e.disabled}`)"
        chosen = page.locator("[data-choice]").evaluate_all(choices)
        raise AssertionError(f"not {text}: {said}, {chosen}, focus {focus}") from error


def test_ten_clicks_make_ten_preferences(collecting: Any, open_page: Open, tmp_path: Path) -> None:
    page = open_page(collecting.url, COMPARE)
    counted(page, "0 comparisons")
    asked: list[dict[str, Any]] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.url.endswith("chat/completions") else None)
    page.get_by_label("Your prompt").wait_for()
    clicks = ["left", "right", "left", "tie", "right", "both_bad", "left", "right", "left", "right"]
    for i, choice in enumerate(clicks, 1):
        if i == 6:
            page.get_by_role("button", name="New conversation").click()
        two_answers(page, f"a cat {i}")
        if i == 1:
            assert_accessible(page)
            screenshot(page, "compare")
        page.locator(f"button[data-choice={choice}]").click()
        counted(page, f"{i} comparisons?")
    rows = read_lines(collecting.file)
    assert [row["choice"] for row in rows] == clicks
    for row in rows:
        # what was asked, with which seeds, and what the model answers to that
        assert row["prompt"][-1]["role"] == "user"
        sent = [body for body in asked if body["seed"] in row["seeds"]]
        assert [body["messages"] for body in sent] == [row["prompt"]] * 2
        assert row["options"] == {"temperature": 1.2, "max_tokens": 10}
        answers = expected_answers(collecting, row)
        if row["choice"] in ("tie", "both_bad"):
            assert row["completions"] == answers
        else:
            pair = [row["chosen"], row["rejected"]]
            assert pair == (answers if row["choice"] == "left" else answers[::-1])
    said = [message["content"] for message in rows[4]["prompt"]]
    assert said[::2] == [f"a cat {i}" for i in range(1, 6)]  # goes on with what was chosen, and after a tie
    assert said[1::2] == [rows[0]["chosen"], rows[1]["chosen"], rows[2]["chosen"], rows[3]["completions"][0]]
    assert [len(row["prompt"]) for row in rows] == [1, 3, 5, 7, 9, 1, 1, 3, 5, 7]  # after two bad ones, asked again
    assert "10 comparisons · 1 tie · 1 both bad" in page.locator(".counter").inner_text()

    counts = Counts()
    said = []
    for _, preference in read_preferences(collecting.file, counts=counts):
        assert isinstance(preference, Preference)
        said += [preference.chosen.messages[-1]["content"], preference.rejected.messages[-1]["content"]]
    assert said == [row[name] for row in rows if "chosen" in row for name in ("chosen", "rejected")]
    assert len(said) == 16

    base = tmp_path / "base"
    save_checkpoint(base, collecting.reference["tiny"].model, collecting.tokenizers["tiny"])
    options = {"steps": 2, "batch_size": 2, "val_fraction": 0.25, "device": "cpu", "compile": "off"}
    trained = gptsmith.reward(base, collecting.file, out=tmp_path / "rm", **options)
    assert trained.status == "finished"
    judged = RewardCheck(str(tmp_path / "rm")).status([row for row in rows if "chosen" in row], 0, seconds=60)
    assert (judged.scored, judged.pending, judged.skipped) == (8, 0, 0)


def read_lines(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def expected_answers(site: Any, row: dict[str, Any]) -> list[str]:
    return [site.answers(row["prompt"], seed=seed, **row["options"])[0] for seed in row["seeds"]]


def test_comparing_with_the_keyboard(collecting: Any, open_page: Open) -> None:
    page = open_page(collecting.url, COMPARE)
    counted(page, "0 comparisons")
    keys = ["1", "2", "ArrowLeft", "ArrowRight", "t", "b", "T"]
    for i, key in enumerate(keys, 1):
        two_answers(page, "the cat" if i != 7 else "t1b2")  # these keys are letters while one writes
        page.keyboard.press(key)
        counted(page, f"{i} comparisons?")
        assert page.evaluate("() => document.activeElement.id") == "compare-prompt"
    choices = [row["choice"] for row in read_lines(collecting.file)]
    assert choices == ["left", "right", "left", "right", "tie", "both_bad", "tie"]

    two_answers(page, "the mat")
    page.keyboard.press("e")
    editor = page.get_by_label("Edit answer 1", exact=True)
    assert editor.evaluate("(area) => area === document.activeElement")
    page.keyboard.press("End")
    page.keyboard.type(" t1")  # no choices: it is text
    assert_accessible(page)
    page.keyboard.press("Escape")
    page.keyboard.press("e")
    assert "t1" not in editor.input_value()  # canceled
    editor.fill("")
    page.keyboard.press("Control+Enter")
    page.get_by_text("The edited answer must not be empty").wait_for()
    editor.fill("exactly so")
    page.keyboard.press("Control+Enter")
    counted(page, "8 comparisons")
    row = read_lines(collecting.file)[-1]
    assert (row["choice"], row["chosen"], row["edited"]) == ("left", "exactly so", True)
    assert [row["unedited"], row["rejected"]] == expected_answers(collecting, row)
    two_answers(page, "and")
    assert page.locator(".compared .turn").nth(-2).inner_text().endswith("exactly so")  # the conversation goes on
    page.locator(".answer").nth(1).get_by_role("button", name="Edit answer 2").focus()
    page.keyboard.press("e")
    page.get_by_label("Edit answer 2", exact=True).wait_for()


def test_comparing_on_a_phone(collecting: Any, open_page: Open) -> None:
    page = open_page(collecting.url, COMPARE, **SMALL_PHONE, color_scheme="dark")
    counted(page, "0 comparisons")
    assert_fits(page)
    two_answers(page, "the cat " + "x" * 200)
    assert_fits(page)
    first, second = (page.locator(".answer").nth(i).bounding_box() for i in range(2))
    assert second["y"] >= first["y"] + first["height"]  # one below the other
    assert first["width"] <= 360
    assert_accessible(page)
    screenshot(page, "phone-compare")
    page.locator(".answer").nth(1).get_by_role("button", name="This one is better").tap()
    counted(page, "1 comparison")
    two_answers(page, "the cat")
    page.locator(".answer").nth(0).get_by_role("button", name="Edit answer 1").tap()
    page.get_by_label("Edit answer 1", exact=True).fill("mine")
    assert_fits(page)
    page.get_by_role("button", name="Choose this text").tap()
    counted(page, "2 comparisons")
    assert [row["choice"] for row in read_lines(collecting.file)] == ["right", "left"]


def test_a_server_that_restarts_loses_no_comparison(start: Callable[..., Any], tmp_path: Path, open_page: Open) -> None:
    file = tmp_path / "preferences.jsonl"
    with_file = Settings(collect=file)
    server = start(with_file)
    page = open_page(server.url, COMPARE)
    two_answers(page, "the cat")
    page.keyboard.press("1")
    counted(page, "1 comparison")
    shown = two_answers(page, "the mat")
    server.stop()
    server.stop = lambda: None
    page.keyboard.press("2")
    page.get_by_text("The connection to the server was lost.").first.wait_for()
    assert len(read_lines(file)) == 1
    file.write_bytes(file.read_bytes() + b'{"prompt": [{"role": "us')  # as a crash leaves it
    server = start(with_file, port=server.port)
    assert page.locator(".answer .body").all_inner_texts() == shown
    page.keyboard.press("2")
    counted(page, "2 comparisons")
    row = read_lines(file)[1]
    assert [row["rejected"], row["chosen"]] == expected_answers(server, row)
    lost = ("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")
    open_page.complaints[:] = [c for c in open_page.complaints if not any(e in c for e in lost)]  # type: ignore[attr-defined]


def test_two_tabs_append_to_one_file(collecting: Any, open_page: Open) -> None:
    first = open_page(collecting.url, COMPARE)
    second = new_tab(first)
    for i in range(3):
        for tab in (first, second):
            two_answers(tab, f"the cat {i}")
        for tab in (first, second):  # both requests are on their way before either is awaited
            tab.evaluate("() => document.querySelector('button[data-choice=left]').click()")
        for tab in (first, second):
            tab.locator("#compare-prompt:visible").wait_for()
    rows = read_lines(collecting.file)
    assert len(rows) == 6
    assert sorted(row["prompt"][-1]["content"] for row in rows) == sorted(2 * [f"the cat {i}" for i in range(3)])
    first.reload()
    counted(first, "6 comparisons")


def test_a_base_model_continues_a_text_twice(collecting: Any, open_page: Open) -> None:
    page = open_page(collecting.url, COMPARE | {"model": "plain"})
    page.get_by_label("Text to continue").wait_for()
    two_answers(page, "abc ")
    page.keyboard.press("2")
    counted(page, "1 comparison")
    (row,) = read_lines(collecting.file)
    assert row["prompt"] == "abc "
    (expected,) = collecting.texts("abc ", "plain", seed=row["seeds"][1], **row["options"])
    assert row["chosen"] == expected
    assert page.locator("#compare-prompt").input_value() == f"abc {row['chosen']}"  # to go on from there


def test_answers_that_are_the_same_are_no_choice(collecting: Any, open_page: Open) -> None:
    page = open_page(collecting.url, COMPARE | {"sampling.compare": {"temperature": 0, "max_tokens": 4}})
    two_answers(page, "the cat")
    page.locator(".view-compare .help", has_text="The two answers are the same.").wait_for()
    assert page.locator(".answer button[data-choice]:enabled").count() == 0
    page.keyboard.press("1")
    page.keyboard.press("e")  # but one can be made better
    page.get_by_label("Edit answer 1", exact=True).fill("the mat")
    page.get_by_role("button", name="Choose this text").click()
    counted(page, "1 comparison")
    two_answers(page, "the cat")
    page.keyboard.press("t")
    counted(page, "2 comparisons")


def test_stopping_two_answers(collecting: Any, open_page: Open) -> None:
    page = open_page(collecting.url, COMPARE | {"sampling.compare": {"max_tokens": 200, "temperature": 1.5}})
    two_answers(page, "the")
    page.keyboard.press("t")
    counted(page, "1 comparison")
    with slow(collecting) as engine:
        page.locator("#compare-prompt").fill("tell me everything")
        page.locator("#compare-prompt").press("Enter")
        page.locator(".answer .body:not(:has(.dots))").nth(1).wait_for()
        page.wait_for_function(  # empty or equal answers cannot be compared
            """() => {
                const [a, b] = [...document.querySelectorAll(".answer .body")].map((e) => e.innerText.trim());
                return a.length > 5 && b.length > 5 && a !== b;
            }"""
        )
        page.keyboard.press("Escape")
        page.locator(".choices:visible").wait_for()
        assert collecting.settled(lambda: engine.stats.running == 0)
    assert page.locator(".answer .stats").all_inner_texts() == ["stopped", "stopped"]
    page.keyboard.press("2")
    counted(page, "2 comparisons")
    assert read_lines(collecting.file)[1]["finish_reasons"] == ["stopped", "stopped"]


# Inside -------------------------------------------------------------------------------------------------------------


def test_the_attention_map(site: Any, open_page: Open) -> None:
    page = open_page(site.url, {"view": "inside", "model": "plain", "inside.text": "abcab cab."})
    page.get_by_role("heading", name="The logit lens").wait_for()
    assert page.locator(".strip .token").all_inner_texts() == list("abcab␣cab.")
    assert page.locator(".lens tbody tr").count() == 3  # the embeddings, two layers
    page.locator(".strip .token").nth(4).click()
    assert page.locator("#attended-title").inner_text() == "What b attends to"
    shares = page.locator("section:has(#attended-title) .number").all_inner_texts()
    assert len(shares) == 5  # itself and the tokens before it
    # weights below the diagonal, the mask above it
    map_ = page.locator("canvas.map")
    label = map_.get_attribute("aria-label")
    assert label.startswith("Attention of layer 1, head 1 over 10 tokens. Token 5, b, attends most to")
    map_.focus()
    page.keyboard.press("ArrowUp")
    assert "Token 4" in map_.get_attribute("aria-label")
    box = map_.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + 40)
    assert "masked (future token)" in page.locator(".tip").first.inner_text()
    page.mouse.move(box["x"] + 40, box["y"] + box["height"] - 8)
    assert re.search(r"\. → a [<\d.]+%", page.locator(".tip").first.inner_text())
    page.get_by_role("radio", name="Head 2").click()
    assert "head 2" in map_.get_attribute("aria-label")
    page.locator("#layer").focus()
    with page.expect_response("**/api/inside"):
        page.keyboard.press("ArrowRight")
    page.locator("canvas.map[aria-label*='layer 2']").wait_for()
    assert_accessible(page)
    screenshot(page, "inside")
    page.get_by_label("Short text").fill("z" * 300 + "!")
    page.get_by_text("is not among").first.wait_for()
    open_page.complaints[:] = [c for c in open_page.complaints if "400" not in c]  # type: ignore[attr-defined]


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_is_followed_live(site: Any, open_page: Open) -> None:
    live = write_run(site.runs / "live", steps=1000, rows=5, status="running")
    (live / "metrics.jsonl").write_text("")
    try:
        page = open_page(site.url, {"view": "runs"})
        page.get_by_role("heading", name="live").wait_for()
        page.locator(".live").wait_for()
        for i in range(1, 30):
            write_row(live, 10 * i, 1000)
        step_shown(page, 290)
        path = page.locator(".series.s0 path").first
        before = len(path.get_attribute("d"))
        stop = threading.Event()

        def write() -> None:
            for i in range(1, 11):
                write_row(live, 290 + 10 * i, 1000)
                stop.wait(0.05)

        threading.Thread(target=write).start()
        step_shown(page, 390)
        stop.set()
        assert len(path.get_attribute("d")) > before
        JsonLines(live / "samples.jsonl").append(step=390, temperature=0.8, prompt="", text="fresh from the model")
        page.get_by_text("fresh from the model").wait_for()
        record = json.loads((live / "run.json").read_text())
        (live / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
        page.locator(".headline .badge", has_text="interrupted").wait_for()
        JsonLines(live / "metrics.jsonl").truncate_after(200)
        (live / "run.json").write_text(json.dumps(record))
        step_shown(page, 200)
    finally:
        shutil.rmtree(live)


def test_a_run_that_learns_from_rewards(site: Any, open_page: Open) -> None:
    run = write_run(site.runs / "aligned", steps=100, rows=10)
    try:
        for step in range(10, 110, 10):
            JsonLines(run / "metrics.jsonl").append(
                step=step, time=step, reward=step / 50, kl=step / 20, dead_groups=0.5
            )
            JsonLines(run / "metrics.jsonl").append(step=step, time=step, val_reward=step / 60, val_gold=0.5)
        JsonLines(run / "evaluations.jsonl").append(step=80, reward=[1.0], gold=[0.5], alarm="gold has fallen")
        page = open_page(site.url, {"view": "runs"})
        page.get_by_role("button", name=re.compile("^aligned")).click()
        page.get_by_role("heading", name="aligned").wait_for()
        page.get_by_text("Alarm at step 80: gold has fallen").wait_for()
        page.locator(".tile", has_text="Reward").get_by_text("2.000").wait_for()
        titles = page.locator(".chart:visible figcaption").all_inner_texts()
        assert [title.split("\n")[0].strip() for title in titles][:1] == ["Reward"]  # and no loss
        assert any("Dead groups" in title for title in titles)
        assert not any(title.startswith("Loss") for title in titles)
        assert_accessible(page)
        assert_fits(page)
        screenshot(page, "aligned")
    finally:
        shutil.rmtree(run)


def test_comparing_runs(site: Any, open_page: Open) -> None:
    page = open_page(site.url, {"view": "runs"})
    page.get_by_role("heading", name="bard").wait_for()
    page.get_by_text("<b>late</b> words").wait_for()
    assert page.locator("pre.sample").inner_text() == "ROMEO: <b>late</b> words"
    page.locator("#sample").focus()
    page.keyboard.press("ArrowLeft")
    assert "early words" in page.locator("pre.sample").inner_text()
    page.get_by_label("Show short").check()
    page.locator(".chart").first.locator(".series").nth(3).wait_for()
    plot = page.locator(".plot").first
    plot.focus()
    page.keyboard.press("Home")
    readings = page.locator(".tip.in-plot").first.inner_text()
    assert "bard training" in readings
    assert "short training" in readings
    assert "step 10" in readings
    page.locator("label.segment", has_text="tokens").click()
    page.get_by_label("logarithmic").check()
    page.get_by_text("a test of the plan").wait_for()
    page.get_by_text("All settings").click()
    page.get_by_text("optim.lr").wait_for()
    assert_accessible(page)
    screenshot(page, "runs")


def test_twelve_runs_are_told_apart(site: Any, open_page: Open) -> None:
    many = [write_run(site.runs / f"many-{i:02}", steps=100, rows=10) for i in range(12)]
    try:
        page = open_page(site.url, {"view": "runs"})
        page.get_by_label("Show many-00").wait_for()
        page.locator(".headline").wait_for()
        first = page.locator(".run-list li.primary .run").inner_text().split("\n")[0]
        for directory in many:
            page.get_by_label(f"Show {directory.name}").check()
        if not first.startswith("many-"):
            page.get_by_label(f"Show {first}").uncheck()
        page.locator(".series-legend li").nth(11).wait_for()
        looks = page.locator(".series-legend line").evaluate_all(
            "(all) => all.map((line) => [getComputedStyle(line).stroke, getComputedStyle(line).strokeDasharray])"
        )
        assert len(looks) == 12
        assert len({color for color, _ in looks}) == 12
        page.locator(".chart").first.locator(".series").nth(23).wait_for()
        lines = (
            page.locator(".chart")
            .first.locator(".series path")
            .evaluate_all(
                "(all) => all.map((line) => [getComputedStyle(line).stroke, getComputedStyle(line).strokeDasharray])"
            )
        )
        assert {tuple(look) for look in lines} == {tuple(look) for look in looks}
        assert_accessible(page)
        screenshot(page, "twelve-runs")
    finally:
        for directory in many:
            shutil.rmtree(directory)


SMALL = "--context 32 --batch-size 8 --steps 120 --eval-every 60 --sample-tokens 20 --compile off"
SMALL += " --model.num-hidden-layers 1 --model.hidden-size 32 --model.num-attention-heads 2"


def test_watch_follows_a_real_training_run(tmp_path: Path, text_file: Path, open_page: Open) -> None:
    """Start `gptsmith watch` on an empty directory, then `gptsmith train` in it."""
    runs = tmp_path / "runs"
    runs.mkdir()
    command = [sys.executable, "-m", "gptsmith"]
    with subprocess.Popen([*command, "watch", str(runs), "--port", "0"], stderr=subprocess.PIPE, text=True) as watch:
        try:
            assert watch.stderr is not None
            page = open_page(re.findall(r"http://127\.0\.0\.1:\d+/", watch.stderr.readline())[0])
            page.get_by_text("No runs yet.").wait_for()
            assert page.locator(".tab:visible, #model:visible").count() == 0
            train = [*command, "train", str(text_file), "--out", str(runs / "words"), *SMALL.split()]
            with subprocess.Popen(train, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as training:
                page.get_by_role("heading", name="words").wait_for(timeout=4 * TIMEOUT)
                page.locator(".headline .badge", has_text="finished").wait_for(timeout=4 * TIMEOUT)
            assert training.returncode == 0
            step_shown(page, 120)
            rows = JsonLines(runs / "words" / "metrics.jsonl").read()
            loss = [row["loss"] for row in rows if "loss" in row][-1]
            page.locator(".tile", has_text="training").get_by_text(f"{loss:.3f}").wait_for()
            page.locator("#samples-title").wait_for()
            watch.send_signal(2)
            assert watch.wait(20) == 0
            page.close()
            refused = "net::ERR_CONNECTION_REFUSED"  # the open page may have polled the stopped server
            open_page.complaints[:] = [c for c in open_page.complaints if refused not in c]  # type: ignore[attr-defined]
        finally:
            watch.kill()


# Every view, on every kind of screen --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_accessible(site: Any, open_page: Open, scheme: str) -> None:
    page = open_page(site.url, SHORT | PLAY | {"view": "chat", "model": "tiny"}, color_scheme=scheme)
    write(page, "the cat")
    answered(page)
    assert_accessible(page)
    screenshot(page, f"chat-{scheme}")
    page.get_by_role("link", name="Playground").click()
    continue_prompt(page)
    assert_accessible(page)
    page.get_by_role("link", name="Inside").click()
    page.get_by_role("heading", name="The logit lens").wait_for()
    assert_accessible(page)
    page.get_by_role("link", name="Runs").click()
    page.locator(".headline").wait_for()
    assert_accessible(page)
    screenshot(page, f"runs-{scheme}")
    page.get_by_label(re.compile("Theme: system")).click()
    page.get_by_label(re.compile("Theme: light")).click()
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 23)"


def test_on_a_phone(site: Any, open_page: Open) -> None:
    page = open_page(site.url, SHORT | PLAY | {"view": "chat", "model": "tiny"}, **PHONE)
    write(page, "the cat")
    answered(page)
    assert_fits(page)
    assert_accessible(page)
    screenshot(page, "phone-chat")
    page.get_by_role("button", name="Settings", exact=True).tap()
    page.get_by_label("Temperature", exact=True).wait_for()
    assert_accessible(page)
    page.get_by_role("button", name="Close settings").tap()
    page.get_by_role("link", name="Playground").tap()
    continue_prompt(page)
    page.locator(".token").nth(2).tap()
    page.get_by_role("dialog").wait_for()
    assert_fits(page)
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Inside").tap()
    page.get_by_role("heading", name="The logit lens").wait_for()
    assert_fits(page)
    screenshot(page, "phone-inside")
    page.get_by_role("link", name="Runs").tap()
    page.locator(".headline").wait_for()
    page.get_by_label("Show short").check()
    assert_fits(page)
    assert_accessible(page)
