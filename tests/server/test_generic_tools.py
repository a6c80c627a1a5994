"""Tools with models whose templates do not know them: what instructor and LangChain send by default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tokenizers import AddedToken

from gptsmith.server.app import create_app
from gptsmith.server.models import ModelRegistry, load
from tests.foreign import byte_level, write_model

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "tool_templates"
USER = {  # as pydantic describes a model
    "title": "User",
    "description": "Correctly extracted `User` with all the required parameters with correct types",
    "$defs": {"Pet": {"title": "Pet", "enum": ["cat", "dog"], "type": "string"}},
    "properties": {
        "age": {"title": "Age", "type": "integer", "minimum": 0, "maximum": 9},
        "pet": {"anyOf": [{"$ref": "#/$defs/Pet"}, {"type": "null"}]},
    },
    "required": ["age", "pet"],
    "type": "object",
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "User", "description": "a user", "parameters": USER}}
NAMED = {"type": "function", "function": {"name": "User"}}
QUESTION = [{"role": "user", "content": "The house"}]


@pytest.fixture(scope="module", params=["gemma3", "qwen3_coder", "plain", "mistral_nemo"])
def http(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    directory = tmp_path_factory.mktemp("model")
    special = ["</s>", "<|im_end|>", "<end_of_turn>", "<start_of_turn>", "[TOOL_CALLS]", "[INST]", "[/INST]"]
    pipeline = byte_level()
    pipeline.add_special_tokens([AddedToken(text, special=True) for text in special])
    end = {"gemma3": "<end_of_turn>", "mistral_nemo": "</s>"}.get(request.param, "<|im_end|>")
    config = {"eos_token": end, "bos_token": "<|endoftext|>"}
    if request.param != "plain":
        config["chat_template"] = (TEMPLATES / f"{request.param}.jinja").read_text()
    write_model(directory, "llama", pipeline, config, max_position_embeddings=2048)
    models = ModelRegistry({"model": str(directory)}, lambda spec: load(spec, device="cpu"))
    with TestClient(create_app(models), base_url="http://127.0.0.1") as client:
        yield client
    models.close()


def ask(http: TestClient, **body: Any) -> dict[str, Any]:
    made = http.post("/v1/chat/completions", json={"model": "model", "messages": QUESTION, "max_tokens": 150, **body})
    assert made.status_code == 200, made.text
    choice: dict[str, Any] = made.json()["choices"][0]
    return choice


def checked(call: dict[str, Any]) -> None:
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "User"
    assert arguments["age"] in range(10)
    assert arguments["pet"] in ("cat", "dog", None)


@pytest.mark.parametrize("extra", [{}, {"parallel_tool_calls": False, "strict": None}])
def test_a_named_function(http: TestClient, extra: dict[str, Any]) -> None:
    extra.pop("strict", None)
    choice = ask(http, tools=[TOOL], tool_choice=NAMED, seed=4, **extra)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    checked(call)


def test_a_call_and_its_result_in_the_conversation(http: TestClient) -> None:
    choice = ask(http, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=1)
    (call,) = choice["message"]["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "saved"}
    history = [*QUESTION, choice["message"], result]
    for tools in ([TOOL], None):
        ask(http, messages=history, tools=tools, seed=2, max_tokens=5)


@pytest.mark.parametrize("seed", range(4))
def test_auto_is_a_text_or_calls(http: TestClient, seed: int) -> None:
    choice = ask(http, tools=[TOOL], seed=seed, max_tokens=60)
    for call in (choice["message"]["tool_calls"] or [])[:-1]:
        checked(call)
    assert choice["message"]["content"] or choice["message"]["tool_calls"] or choice["finish_reason"] == "stop"
