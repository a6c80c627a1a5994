"""What operators of a server see: its log, its health while models load, and its keys."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gptsmith.errors import UsageError
from gptsmith.server.runner import serve
from gptsmith.server.service import Settings
from gptsmith.server.sse import event
from gptsmith.tokenizer.tools import ToolCallFormat, ToolCallParser
from tests.server.conftest import Live


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    monkeypatch.setattr(logging.getLogger("gptsmith.server"), "propagate", True)
    caplog.set_level(logging.INFO, logger="gptsmith.server")
    return lambda: [vars(r)["fields"] for r in caplog.records if r.getMessage() == "request"]


def test_the_log_of_a_stream_that_was_read_to_its_end(live: Live, log: Callable[[], list[dict[str, Any]]]) -> None:
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 4, "stream": True}
    for _ in range(5):
        assert httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).text.endswith("data: [DONE]\n\n")
    assert live.settled(lambda: len(log()) == 5)
    assert not any(line.get("client_disconnected") for line in log())


def test_echoed_tokens_are_not_counted_as_generated(live: Live, log: Callable[[], list[dict[str, Any]]]) -> None:
    for max_tokens in (0, 3):
        body = {"model": "tiny", "prompt": "the cat", "max_tokens": max_tokens, "echo": True, "logprobs": 1, "n": 2}
        made = httpx.post(f"{live.url}/v1/completions", json={**body, "ignore_eos": True}, timeout=60).json()
        assert made["usage"]["completion_tokens"] == 2 * max_tokens
    assert live.settled(lambda: len(log()) == 2)
    assert [line["completion_tokens"] for line in log()] == [0, 6]


def test_the_log_has_no_text_of_the_client(live: Live, log: Callable[[], list[dict[str, Any]]]) -> None:
    secret = "Geheimnis"
    bodies: list[dict[str, Any]] = [
        {"model": "plain", "prompt": f"É {secret}"},
        {"model": secret, "prompt": "a"},
        {"model": "tiny", "prompt": "a", "regex": f"({secret}"},
        {"model": "tiny", "prompt": "a", secret: 1},
        {"model": "tiny", "prompt": "a", "logit_bias": {secret: 1}},
        {"model": "tiny", "prompt": "a", "logit_bias": {"1": secret}},
    ]
    for body in bodies:
        assert httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).status_code in (400, 404)
    assert live.settled(lambda: len(log()) == len(bodies))
    assert secret not in str(log())
    assert "É" not in str(log())
    assert all(line["error"] for line in log())


def test_probes_and_files_are_not_logged(live: Live, log: Callable[[], list[dict[str, Any]]]) -> None:
    for path in ("/", "/health", "/ready", "/metrics", "/favicon.ico"):
        assert httpx.get(live.url + path).status_code == 200
    assert httpx.get(live.url + "/static/x/none.js").status_code == 404
    assert live.settled(lambda: len(log()) == 1)
    assert log()[0]["status"] == 404


def test_health_while_the_model_loads(start: Callable[..., Live]) -> None:
    live = start(Settings())
    live.app.state.service.loading = True
    assert (httpx.get(f"{live.url}/health").status_code, httpx.get(f"{live.url}/ready").status_code) == (503, 503)
    assert httpx.get(f"{live.url}/health").json() == {"status": "loading"}
    live.app.state.service.loading = False
    assert (httpx.get(f"{live.url}/health").status_code, httpx.get(f"{live.url}/ready").status_code) == (200, 200)


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    live = Live()

    def fail() -> None:
        raise UsageError("no such weights")

    with pytest.raises(UsageError, match="no such weights"):
        serve(live.app, live.listening, fail)


def test_events_have_no_line_ends_inside() -> None:
    data = {"text": "a\u0085b\u2028c\u2029d\ne"}
    encoded = event(data).decode()
    assert len(encoded.splitlines()) == 2  # the line and the blank one after it
    assert json.loads(encoded.removeprefix("data: ")) == data


def test_a_call_that_is_cut_is_not_complete() -> None:
    call_format = ToolCallFormat("", "<call>", (" ",), "</call>", "", "", True, {})
    parser = ToolCallParser(call_format)
    parser.push('<call>weather {"city": "Ro')
    assert (parser.calls, parser.in_call) == (1, True)
    parser.push('me"}')
    assert (parser.calls, parser.in_call) == (1, False)


def test_keys_are_reloaded(start: Callable[..., Live]) -> None:
    keys = ["one"]
    live = start(Settings(keys=("one",), read_keys=lambda: keys))

    def status(key: str) -> int:
        return httpx.get(f"{live.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    assert (status("one"), status("two")) == (200, 401)
    keys[:] = ["two"]
    live.app.state.service.reload_keys()
    assert (status("one"), status("two")) == (401, 200)
