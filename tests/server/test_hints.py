"""Fields that other servers accept and that cannot change the result here."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import Live

HINTS: dict[str, Any] = {
    "metadata": {"trip": "1"},
    "store": True,
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "safety_identifier": "b",
    "service_tier": "flex",
}


@pytest.mark.parametrize(
    ("path", "body", "more"),
    [
        ("completions", {"prompt": "the cat", "max_tokens": 4}, {}),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
            {"verbosity": "low", "reasoning_effort": "high", "top_logprobs": 0},
        ),
        (
            "responses",
            {"input": "a", "max_output_tokens": 4},
            {
                "reasoning": {"effort": "low", "summary": "auto"},
                "include": ["reasoning.encrypted_content"],
                "top_logprobs": 0,
            },
        ),
    ],
)
def test_hints_change_nothing(live: Live, path: str, body: dict[str, Any], more: dict[str, Any]) -> None:
    def texts(hints: dict[str, Any]) -> Any:
        request = {"model": "tiny", "seed": 3, **body, **hints}
        answer = httpx.post(f"{live.url}/v1/{path}", json=request, timeout=60)
        assert answer.status_code == 200, answer.text
        values = answer.json()
        return (
            [[part["text"] for part in item["content"]] for item in values["output"]]
            if path == "responses"
            else [choice.get("text", choice.get("message")) for choice in values["choices"]]
        )

    assert texts(HINTS | more) == texts({})


def test_a_hint_with_a_wrong_value_is_named(live: Live) -> None:
    body = {"model": "tiny", "prompt": "a", "service_tier": "gold"}
    answer = httpx.post(f"{live.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "service_tier")


def test_switched_off_filters(live: Live) -> None:
    def text(**params: Any) -> str:
        body = {"model": "tiny", "prompt": "the cat", "max_tokens": 8, "seed": 4, **params}
        answer = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        result: str = answer.json()["choices"][0]["text"]
        return result

    assert text(top_k=0) == text(top_k=-1) == text()
    assert text(top_p=0) == text(temperature=0)
