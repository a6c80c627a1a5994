"""A model that answers in channels: its reasoning, text and calls reach clients in fields of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from gptsmith.checkpoint import save_checkpoint
from gptsmith.server.app import create_app
from gptsmith.server.models import ModelRegistry, load
from tests.channels import PARAMETERS, TOOL, channel_model, channel_tokenizer


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    directory = tmp_path_factory.mktemp("model") / "model"
    save_checkpoint(directory, channel_model(), channel_tokenizer())
    models = ModelRegistry({"model": str(directory)}, lambda spec: load(spec, device="cpu"))
    with TestClient(create_app(models), base_url="http://127.0.0.1") as client:
        yield client
    models.close()


def events(http: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = http.post(path, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def asked(question: str, **more: Any) -> dict[str, Any]:
    return {"model": "model", "messages": [{"role": "user", "content": question}], "temperature": 0, **more}


def test_reasoning_and_text_are_separate(http: TestClient) -> None:
    choice = http.post("/v1/chat/completions", json=asked("hi", logprobs=True)).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "I think."
    assert choice["message"]["content"] == "Hello you"
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["content"]) > 10
    deltas = [event["choices"][0] for event in events(http, "/v1/chat/completions", asked("hi"))]
    assert "".join(each["delta"].get("reasoning_content", "") for each in deltas) == "I think."
    assert "".join(each["delta"].get("content", "") for each in deltas) == "Hello you"
    assert deltas[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_calls_are_calls(http: TestClient, tools: Any) -> None:
    body = asked("go", **({} if tools is None else {"tools": tools}))
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "I think."
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"x": 7}'}
    streamed = [event["choices"][0] for event in events(http, "/v1/chat/completions", body)]
    pieces = [piece for each in streamed for piece in each["delta"].get("tool_calls", ())]
    assert pieces[0]["function"]["name"] == "f"
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"x": 7}'
    assert streamed[-1]["finish_reason"] == "tool_calls"
    history = [*body["messages"], choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "1"}]
    history[1] = {key: value for key, value in history[1].items() if value is not None}
    again = http.post("/v1/chat/completions", json={**body, "messages": history, "max_tokens": 4})
    assert again.status_code == 200, again.text


def test_a_call_that_is_required(http: TestClient) -> None:
    choice = http.post("/v1/chat/completions", json=asked("hi", tools=[TOOL], tool_choice="required")).json()
    (call,) = choice["choices"][0]["message"]["tool_calls"]
    assert isinstance(json.loads(call["function"]["arguments"])["x"], int)


@pytest.mark.parametrize(
    "form", [{"regex": "[ab]{3}"}, {"choice": ["aa", "b"]}, {"response_format": {"type": "json_object"}}]
)
def test_a_form_that_is_asked_for_is_that_of_the_text(http: TestClient, form: dict[str, Any]) -> None:
    choice = http.post("/v1/chat/completions", json=asked("hi", max_tokens=40, **form)).json()["choices"][0]
    assert choice["message"]["reasoning_content"] is None
    assert choice["message"]["content"][:1] in "ab{"
    assert "<|" not in choice["message"]["content"]


def test_responses(http: TestClient) -> None:
    body = {"model": "model", "input": "hi", "temperature": 0}
    made = http.post("/v1/responses", json=body).json()
    assert [item["type"] for item in made["output"]] == ["reasoning", "message"]
    assert made["output"][0]["content"] == [{"type": "reasoning_text", "text": "I think."}]
    assert made["output"][1]["content"][0]["text"] == "Hello you"
    assert {item["status"] for item in made["output"]} == {"completed"}
    assert made["usage"]["output_tokens_details"]["reasoning_tokens"] > 1
    streamed = events(http, "/v1/responses", body)
    assert "".join(e["delta"] for e in streamed if e["type"] == "response.reasoning_text.delta") == "I think."
    assert [e["item"]["type"] for e in streamed if e["type"] == "response.output_item.done"] == ["reasoning", "message"]
    tool = {"type": "function", "name": "f", "description": "f", "parameters": PARAMETERS}
    called = http.post("/v1/responses", json={**body, "input": "go", "tools": [tool]}).json()
    assert [item["type"] for item in called["output"]] == ["reasoning", "function_call"]
    call = called["output"][1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "1"}
    question = {"role": "user", "content": "go"}
    more = {**body, "input": [question, *called["output"], result], "tools": [tool], "max_output_tokens": 4}
    again = http.post("/v1/responses", json=more)
    assert again.status_code == 200, again.text
