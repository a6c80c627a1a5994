"""The server under fuzzing and under load."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptsmith.server.service import Settings

ROOT = Path(__file__).parents[2]
SECONDS = 300
_LENGTHS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fuzzing_causes_no_server_error(start: Callable[..., Any]) -> None:
    """Fuzz the server with schemathesis for five minutes, from its OpenAPI schema."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from schemathesis import GenerationMode

    live = start(Settings(timeout=60.0, max_body=1 << 18))
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    results: list[Any] = list(schema.get_all_operations())
    operations = [result.ok() for result in results]
    statuses: dict[str, Counter[int]] = {operation.path: Counter() for operation in operations}

    def send(case: Any) -> None:
        if isinstance(case.body, dict):  # use models that exist, and keep answers short
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny" if len(case.body["model"]) % 3 else "plain"
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of"):
                if isinstance(case.body.get(name), int) and case.body[name] > 4:
                    case.body[name] = 4
            if case.path in _LENGTHS and _LENGTHS[case.path] not in case.body:
                case.body[_LENGTHS[case.path]] = 4
        response = case.call(timeout=60)
        assert response.status_code < 500, (case.path, case.body, response.text)
        statuses[case.path][response.status_code] += 1

    for operation in operations:
        until = time.monotonic() + SECONDS / len(operations)
        cases = st.one_of(
            operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
            operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
        )
        check = settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
            given(cases)(send)
        )
        while time.monotonic() < until:
            check()
    print({path: dict(counts) for path, counts in statuses.items()})
    assert all(sum(counts.values()) > 20 for counts in statuses.values())
    assert statuses["/v1/chat/completions"][200] > 0
    assert live.settled(lambda: live.app.state.service.open_requests == 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_load_with_disconnecting_clients() -> None:
    """Run the load benchmark for half a minute."""
    command: list[str | Path] = [
        sys.executable,
        ROOT / "benchmarks" / "serving.py",
        "load",
        "--seconds",
        "30",
        "--clients",
        "64",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["wrong_answers"] == result["blocks_in_use_at_the_end"] == 0
    assert sum(result["requests"].values()) > 200


def test_invalid_bodies(start: Callable[..., Any]) -> None:
    """Bodies that schemathesis found, or could have found, are rejected with 400 or 404."""
    live = start(Settings())
    hello = [{"role": "user", "content": "a"}]
    bodies: list[tuple[str, Any]] = [
        ("/v1/completions", {"model": "tiny", "prompt": []}),
        ("/v1/completions", {"model": "tiny", "prompt": [[]]}),
        ("/v1/completions", {"model": "tiny", "prompt": [1, "a"]}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "logit_bias": {"-1": 1}}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "length_penalty": 1e308, "beams": 2}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "regex": "(?<=a)b"}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "regex": "a{100000}{1000}"}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "choice": [""]}),
        ("/v1/completions", {"model": "\x00", "prompt": "a"}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "wizard", "content": "a"}]}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "assistant"}]}),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": hello, "tools": [{"type": "function", "function": {"name": "a b"}}]},
        ),
        (
            "/v1/chat/completions",
            {
                "model": "tiny",
                "messages": hello,
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "nothing"}}}],
            },
        ),
        ("/v1/responses", {"model": "tiny", "input": []}),
        ("/v1/responses", {"model": "tiny", "input": "a", "previous_response_id": "x"}),
        ("/v1/embeddings", {"model": "tiny", "input": [[]]}),
        ("/v1/embeddings", {"model": "plain", "input": "日本"}),
        ("/tokenize", {"model": "tiny"}),
        ("/tokenize", {"model": "plain", "prompt": "É"}),
        ("/detokenize", {"model": "tiny", "tokens": [2**31 - 1]}),
    ]
    for path, body in bodies:
        answer = httpx.post(live.url + path, json=body, timeout=60)
        assert answer.status_code in (400, 404), (path, body, answer.text)
        assert answer.json()["error"]["message"], (path, body)
