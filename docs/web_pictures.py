"""Take the pictures of docs/web.md: python docs/web_pictures.py runs demo

The arguments are a directory of runs and the name of the run whose model the Playground and Inside pictures show. Needs
Chromium, and SmolLM2, which is downloaded on first use.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from gptsmith.server.app import create_app
from gptsmith.server.models import ModelRegistry, load
from gptsmith.server.runner import listen
from gptsmith.server.service import Settings

IMAGES = Path(__file__).parent / "images"
LINE = "ROMEO:\nBut soft, what light"
QUESTION = "Give me three ideas for a quiet weekend, as a short list."


def main(runs: Path, run: str) -> None:
    models = ModelRegistry(["smollm2-135m", str(runs / run)], load)
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(models, Settings(runs=runs)), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.1)
    try:
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            take_pictures(browser, f"http://127.0.0.1:{listening.getsockname()[1]}/", run)
            browser.close()
    finally:
        server.should_exit = True
        thread.join()


def take_pictures(browser: Browser, url: str, run: str) -> None:
    def open_page(storage: dict[str, Any], **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": {"width": 1200, "height": 780}, "reduced_motion": "reduce", **options}
        )
        for name, value in storage.items():
            kept = json.dumps(json.dumps(value))
            context.add_init_script(
                f"localStorage.getItem('gptsmith.{name}') ?? localStorage.setItem('gptsmith.{name}', {kept})"
            )
        page = context.new_page()
        page.set_default_timeout(600_000)
        page.goto(url)
        return page

    def continue_prompt(page: Page) -> None:
        page.get_by_role("button", name="Continue", exact=True).click()
        page.locator(".column .token").first.wait_for()
        page.locator(".columns:not(:has(.column.working))").wait_for()

    play = {"view": "playground", "model": run, "prompt": LINE, "sampling.playground": {"max_tokens": 90, "seed": 4}}
    page = open_page(play)
    continue_prompt(page)
    page.locator(".column").nth(1).locator(".token[data-p='4'], .token[data-p='5']").nth(2).click()
    page.get_by_role("dialog").wait_for()
    page.screenshot(path=IMAGES / "web-playground.png")
    page = open_page(play, color_scheme="dark")
    continue_prompt(page)
    page.locator(".column").nth(2).locator(".token[data-p='4'], .token[data-p='5']").nth(3).click()
    page.get_by_role("dialog").wait_for()
    page.screenshot(path=IMAGES / "web-dark.png")

    look = {"view": "inside", "model": run, "inside.text": "But soft, what light through yonder"}
    page = open_page(look, viewport={"width": 1200, "height": 1330})
    page.get_by_role("heading", name="The logit lens").wait_for()
    page.get_by_role("radio", name="Head 3").click()
    page.locator("#attention-title").evaluate("(title) => scrollTo(0, title.getBoundingClientRect().top - 80)")
    page.screenshot(path=IMAGES / "web-inside.png")
    phone = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
    page = open_page(look, **phone)
    page.get_by_role("heading", name="The logit lens").wait_for()
    page.locator("#attention-title").evaluate("(title) => scrollTo(0, title.getBoundingClientRect().top - 80)")
    page.screenshot(path=IMAGES / "web-phone.png")

    page = open_page({"view": "runs", "runs.shown": [run]}, viewport={"width": 1200, "height": 900})
    page.locator(".run", has_text=run).last.click()
    for box in page.locator(".runs input").all():
        box.check()
    page.locator(".run", has_text=run).last.click()
    page.locator(".series").nth(5).wait_for()
    page.locator(".plot").first.hover(position={"x": 190, "y": 120})
    page.screenshot(path=IMAGES / "web-runs.png")

    page = open_page({"model": "smollm2-135m", "sampling.chat": {"max_tokens": 300, "seed": 1, "temperature": 0.5}})
    page.get_by_text("Start a conversation").wait_for()
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    page.locator(".turn.assistant .stats").wait_for()
    page.screenshot(path=IMAGES / "web-chat.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
