"""What the client gets wrong is answered with 400 and names the field; nothing that a client sends causes a 500."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptsmith.server.webapp import watch_app
from tests.server.conftest import Live

HELLO = [{"role": "user", "content": "a cat"}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def post(live: Live, path: str, body: Any, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body}).encode()
    headers = options.pop("headers", {"content-type": "application/json"})
    return httpx.post(live.url + path, content=content, headers=headers, timeout=60)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (RESPONSES, {"input": "a", "metadata": {"a": "\ud800"}}, "metadata.a"),
        (RESPONSES, {"input": "a", "metadata": {"\ud800": "a"}}, None),
        (CHAT, {"messages": [{"role": "user", "content": "\udfff"}]}, "messages.0.content"),
        (CHAT, {"messages": HELLO, "user": "\ud83d"}, "user"),
        (CHAT, {"messages": HELLO, "seed": 2**63}, "seed"),
        (COMPLETIONS, {"prompt": "a", "seed": -(2**64)}, "seed"),
        (CHAT, {"messages": HELLO, "\ud83d": 1}, None),
        (COMPLETIONS, {"prompt": "a\ud800"}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "temperature": float("nan")}, "temperature"),
        (
            RESPONSES,
            {
                "input": "a",
                "tools": [{"type": "function", "name": "f", "parameters": {"default": float("inf")}}],
            },
            "tools.0.parameters.default",
        ),
        ("/v1/embeddings", {"input": ["a", "\ud800"]}, "input.1"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/api/inside", {"text": "\ud800"}, "text"),
        ("/api/inside", {"text": "a", "\ud800": 1}, None),
    ],
)
def test_values_that_json_cannot_hold(live: Live, path: str, body: dict[str, Any], param: str | None) -> None:
    answer = post(live, path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_no_token_is_allowed(live: Live) -> None:
    size = live.tokenizers["tiny"].vocab_size
    everything: dict[str, Any] = {
        "logit_bias": {str(i): -100 for i in range(size)},
    }
    for more in (everything, everything | {"beams": 2, "temperature": 0}):
        answer = post(live, COMPLETIONS, {"prompt": "a", **more})
        assert answer.status_code == 400
        assert "logit_bias" in answer.json()["error"]["message"]
    answer = post(live, CHAT, {"messages": HELLO, "min_tokens": 2, "stop_token_ids": list(range(size))})
    assert answer.status_code == 400
    assert "min_tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("temperature", [1e-5 / 2, 1e-38, 1e-45, 5e-324])
def test_tiny_temperatures_choose_the_most_probable_token(live: Live, temperature: float) -> None:
    answer = post(live, COMPLETIONS, {"prompt": "the cat", "temperature": temperature, "max_tokens": 8})
    assert answer.json()["choices"][0]["text"] == live.texts("the cat", temperature=0, max_tokens=8)[0]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content must be a string or a list, not"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]},
            "messages.0.content.1.type must be 'text', 'image_url', not 'input_audio'.",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            "messages.0.content.1.image_url is missing.",
        ),
        (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role must be 'system'"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages.0.role is missing."),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content is missing."),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.tool_call_id is missing."),
        (CHAT, {"messages": HELLO, "tool_choice": {"type": "function"}}, "tool_choice.function is missing."),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type must be 'text'"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt.1 must be a valid integer"),
        (COMPLETIONS, {"prompt": [1, -1]}, "prompt.1 must be greater than or equal to 0."),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt.0 must be a string or an integer or a list, not 1.5."),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt.1 must be a valid string, not 1."),
        (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, "stop must have at most 16 items"),
        (COMPLETIONS, {"prompt": "a", "stream": "maybe"}, 'stream must be true or false, not "maybe".'),
        (COMPLETIONS, {"prompt": "a", "logit_bias": [1]}, "logit_bias must be an object, not a list."),
        (CHAT, {"messages": "hello"}, 'messages must be a list, not "hello".'),
        (CHAT, {"messages": ["hello"]}, 'messages.0 must be an object, not "hello".'),
        (CHAT, {"messages": HELLO, "response_format": "json"}, 'response_format must be an object, not "json".'),
        (CHAT, {"messages": [{"role": "user", "content": [None]}]}, "messages.0.content.0 must be an object, not null"),
        (RESPONSES, {"input": ["a"]}, 'input.0 must be an object, not "a".'),
        (RESPONSES, {"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type must be 'function', not \"web"),
        (RESPONSES, {"input": "a", "metadata": {"b": 1}}, "metadata.b must be a valid string, not 1."),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt must be a string or a list, not an object."),
        (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop.0 must be a valid string"),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature must be a valid number"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input.0.content.0.type must be 'input_text', 'output_text', 'input_image', not 'input_file'.",
        ),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0] is a picture, and the model tiny reads text only.",
        ),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type must be 'message', 'reasoning'"),
        (RESPONSES, {"input": []}, "input must have at least 1 item"),
        (
            RESPONSES,
            {
                "instructions": "a",
                "input": [
                    {"role": "user", "content": "a"},
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"},
                ],
            },
            "input.1.arguments: the arguments are not valid JSON",
        ),
    ],
)
def test_messages_name_the_field_that_was_sent(live: Live, path: str, body: dict[str, Any], message: str) -> None:
    answer = post(live, path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(message), error
    assert error["message"].startswith(error["param"])


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_without_a_json_content_type(live: Live, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    answer = post(live, COMPLETIONS, body, headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"{", b'{"model": ' + b"[" * 10_000, b'{"model": ' + b"9" * 5_000 + b"}", b"\xff{}", b"3"]
)
def test_bodies_that_are_no_json_object(live: Live, body: bytes) -> None:
    answer = post(live, COMPLETIONS, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_head_works_where_get_does(live_with_runs: tuple[Live, Path]) -> None:
    live, runs = live_with_runs
    run = runs / "headed"
    run.mkdir()
    (run / "run.json").write_text("{}")
    paths = ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json", "/api/runs"]
    for path in paths:
        head, get = httpx.head(live.url + path), httpx.get(live.url + path)
        assert (head.status_code, head.content) == (get.status_code, b"") == (200, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
    assert httpx.head(live.url + "/api/runs/headed/events", timeout=10).status_code == 200  # GET has no end
    assert httpx.head(live.url + "/v1/models/none").status_code == 404
    assert httpx.head(live.url + COMPLETIONS).status_code == 405
    assert live.settled(lambda: live.app.state.service.open_requests == 0)


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_run_directory_with_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    run = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        run.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    (run / "run.json").write_text("{")
    with TestClient(watch_app(tmp_path)) as client:
        (row,) = client.get("/api/runs").json()["runs"]
        assert (row["name"], row["status"]) == ("caf\\udce9", "unreadable")
        assert client.get("/api/runs/caf%5Cudce9").status_code == 409  # found, and unreadable
