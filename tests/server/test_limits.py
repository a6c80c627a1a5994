"""Keys, limits, disconnecting clients and shutdown, over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter, Request

from gptsmith.server.app import register_router
from gptsmith.server.auth import RateLimiter
from gptsmith.server.service import Settings, service_of

ENDLESS = {"model": "tiny", "prompt": "the", "max_tokens": 1_000_000, "overflow": "shift", "ignore_eos": True}
Start = Callable[..., Any]


def connect(live: Any, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """Return a connection on which a request has been sent."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.sendall(head.encode() + data)
    return connection


def stats(live: Any) -> Any:
    return live.models.loaded()["tiny"].engine.stats


def idle(live: Any) -> bool:
    now = stats(live)
    service = live.app.state.service
    return now.blocks_used == now.running == now.waiting == service.limiter.in_use == service.open_requests == 0


# keys


def test_keys(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptsmith.server")
    live = start(Settings(keys=("first-secret", "second-secret")))
    with live.client(api_key="second-secret") as client:
        assert client.completions.create(model="tiny", prompt="the", max_tokens=1).choices
    for wrong in ("second-secre", "second-secrets", "-", "x" * 5000, "sécond"):
        answer = httpx.get(f"{live.url}/v1/models", headers={b"authorization": f"Bearer {wrong}".encode()})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
    for path in ("/v1/models", "/metrics", "/api/anything", "/v1/nothing"):
        assert httpx.get(live.url + path).status_code == 401
    for path in ("/tokenize", "/detokenize", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"):
        assert httpx.post(live.url + path, json={}).status_code == 401
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert httpx.get(live.url + path).status_code == 200
    with pytest.raises(openai.AuthenticationError), live.client(api_key="nonsense") as client:
        client.models.list()
    log = "\n".join(str(record.__dict__) for record in caplog.records)
    assert "'key': 'key 2'" in log
    assert "secret" not in log
    assert "secre" not in log


def test_registered_endpoints_need_a_key(start: Start, restored_registries: None) -> None:
    router = APIRouter()

    @router.get("/greeting")
    async def greet(request: Request, model: str) -> dict[str, int]:
        """Greet a model."""
        return {"context": (await service_of(request).served(request, model)).loaded.context}

    register_router(router)
    register_router(router)  # once is enough
    live = start(Settings(keys=("secret",)))
    assert httpx.get(f"{live.url}/greeting?model=tiny").status_code == 401
    headers = {"authorization": "Bearer secret"}
    assert httpx.get(f"{live.url}/greeting?model=tiny", headers=headers).json() == {"context": 512}
    assert httpx.get(f"{live.url}/greeting?model=none", headers=headers).json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{live.url}/docs").text.count("Greet a model.") == 1


def test_rate_limit_per_key(start: Start) -> None:
    live = start(Settings(keys=("a", "b"), rate=RateLimiter(3, 600)))
    with live.client(api_key="a") as one, live.client(api_key="b") as other:
        for _ in range(3):
            one.models.list()
        with pytest.raises(openai.RateLimitError) as refused:
            one.models.list()
        assert 190 <= int(refused.value.response.headers["retry-after"]) <= 200
        assert refused.value.code == "rate_limit_exceeded"
        other.models.list()


def test_allowed_hosts(start: Start) -> None:
    live = start(Settings(hosts=("localhost", "127.0.0.1", "[::1]")))
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:80"):
        assert httpx.get(f"{live.url}/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "", "1"):
        assert httpx.get(f"{live.url}/v1/models", headers={"host": host}).status_code in (400, 403)


# sizes, times, queues


def test_body_size_limit(start: Start) -> None:
    live = start(Settings(max_body=2000))
    for body in (b'{"model": "tiny", "prompt": "' + b"a" * 3000 + b'"}', b" " * 3_000_000):
        answer = httpx.post(f"{live.url}/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"

    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1000

    assert httpx.post(f"{live.url}/v1/completions", content=chunks()).status_code == 413
    assert httpx.post(f"{live.url}/v1/completions", json={"model": "tiny", "prompt": "a"}).status_code == 200


def test_invalid_json(start: Start) -> None:
    live = start(Settings())
    post = {"content-type": "application/json"}
    for content in (b"{", b"", b"[]", b"\xff", b'{"model": "tiny", "prompt": "\\ud800"}', b"[" * 100_000):
        answer = httpx.post(f"{live.url}/v1/completions", content=content, headers=post)
        assert answer.status_code == 400, content[:10]
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    # Browsers send text/plain to other origins without a preflight request.
    body = b'{"model": "tiny", "prompt": "a"}'
    assert httpx.post(f"{live.url}/v1/completions", content=body, headers={"content-type": "text/plain"}).is_error
    assert httpx.get(f"{live.url}/v1/completions").status_code == 405
    missing = httpx.get(f"{live.url}/v1/nothing")
    assert (missing.status_code, "/v1/nothing" in missing.json()["error"]["message"]) == (404, True)


def test_timeouts(start: Start) -> None:
    live = start(Settings(timeout=0.4))
    answer = httpx.post(f"{live.url}/v1/completions", json=ENDLESS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    with live.client() as client, pytest.raises(openai.APIError, match="timed out"):
        for _ in client.completions.create(
            model="tiny",
            prompt="the",
            max_tokens=1_000_000,
            stream=True,
            extra_body={"overflow": "shift", "ignore_eos": True},
        ):
            pass
    with socket.create_connection(("127.0.0.1", live.port)) as slow:  # a body that never arrives
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    assert live.settled(lambda: idle(live))


def test_queue_limit(start: Start) -> None:
    live = start(Settings(max_concurrency=2, queue_limit=1))
    with live.client() as client:
        client.completions.create(model="tiny", prompt="the", max_tokens=1)
    limiter = live.app.state.service.limiter
    working = [connect(live, ENDLESS) for _ in range(2)]
    assert live.settled(lambda: limiter.in_use == 2)
    waiting = connect(live, {"model": "tiny", "prompt": "the", "max_tokens": 2})
    assert live.settled(lambda: limiter.waiting == 1)
    refused = httpx.post(f"{live.url}/v1/completions", json=ENDLESS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert "gptsmith_queue_depth 1.0" in httpx.get(f"{live.url}/metrics").text
    working[0].close()  # a client that disconnects frees its slot
    assert waiting.recv(100).startswith(b"HTTP/1.1 200")
    left = connect(live, ENDLESS)
    gone = connect(live, ENDLESS)
    assert live.settled(lambda: limiter.waiting == 1)
    gone.close()  # and its place in the queue
    assert live.settled(lambda: limiter.waiting == 0)
    for connection in (working[1], waiting, left):
        connection.close()
    assert live.settled(lambda: idle(live))


# disconnecting clients


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_disconnect_cancels_generation(start: Start, stream: bool, n: int) -> None:
    live = start(Settings())
    connection = connect(live, {**ENDLESS, "stream": stream, "n": n, "overflow": "error" if n > 1 else "shift"})
    assert live.settled(lambda: "tiny" in live.models.loaded() and stats(live).blocks_used > 0)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0"
    )  # reset, as by a client that was killed
    connection.close()
    assert live.settled(lambda: idle(live), 5)


def test_slow_reader_gets_everything(start: Start) -> None:
    live = start(Settings())
    body = {"model": "tiny", "prompt": "the", "max_tokens": 2000, "overflow": "shift", "seed": 1, "stream": True}
    connection = connect(live, {**body, "ignore_eos": True})
    assert live.settled(lambda: "tiny" in live.models.loaded() and stats(live).requests == 1 and idle(live), 60)
    received = b""
    while b"[DONE]" not in received:
        time.sleep(0.001)
        received += connection.recv(3000)
    connection.close()
    events = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    (expected,) = live.texts("the", max_tokens=2000, overflow="shift", seed=1, stop_ids=())[:1]
    text = "".join(e["choices"][0]["text"] for e in events)
    assert text.startswith(expected)


def test_async_client_cancels_tasks(start: Start) -> None:
    live = start(Settings())

    async def cancel_all() -> None:
        async with live.async_client() as client:
            tasks = [
                asyncio.create_task(
                    client.completions.create(
                        model="tiny", prompt="the", max_tokens=1_000_000, extra_body={"overflow": "shift"}
                    )
                )
                for _ in range(8)
            ]
            generating = asyncio.to_thread(
                live.settled, lambda: "tiny" in live.models.loaded() and stats(live).blocks_used > 0
            )
            assert await generating
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(cancel_all())
    assert live.settled(lambda: idle(live))


# shutdown


def test_draining(start: Start) -> None:
    live = start(Settings())
    service = live.app.state.service
    body = {"model": "tiny", "prompt": "the", "max_tokens": 400, "overflow": "shift", "seed": 1, "ignore_eos": True}
    results: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: results.append(httpx.post(f"{live.url}/v1/completions", json=body, timeout=60))
    )
    thread.start()
    assert live.settled(lambda: service.limiter.in_use == 1)
    service.start_draining()
    for path in ("/v1/models", "/ready"):
        answer = httpx.get(live.url + path)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
    assert httpx.get(f"{live.url}/health").status_code == 200
    thread.join()
    assert results[0].json()["usage"]["completion_tokens"] == 400


# request ids, CORS, metrics


def test_request_ids(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptsmith.server")
    live = start(Settings())
    given = httpx.get(f"{live.url}/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"]
    made = [httpx.get(f"{live.url}/v1/models", headers={"x-request-id": bad}).headers for bad in ("a b", "x" * 200)]
    assert given == "abc-1"
    assert all(len(headers["x-request-id"]) == 32 for headers in made)
    httpx.post(f"{live.url}/v1/completions", json={"model": "tiny", "prompt": "the cat", "max_tokens": 3})
    assert live.settled(lambda: idle(live))
    logged: list[dict[str, Any]] = [getattr(record, "fields", {}) for record in caplog.records]
    (fields,) = [fields for fields in logged if "first_token_ms" in fields]
    assert fields["status"] == 200
    assert (fields["model"], fields["completion_tokens"]) == ("tiny", 3)
    assert "the cat" not in str(fields)


def test_cors_is_off_by_default(start: Start) -> None:
    closed, opened = start(Settings()), start(Settings(cors=("https://example.org",)))
    ask = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{closed.url}/v1/completions", headers=ask).headers
    answer = httpx.options(f"{opened.url}/v1/completions", headers=ask)
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    other = httpx.get(f"{opened.url}/health", headers={"origin": "https://example.com"})
    assert "access-control-allow-origin" not in other.headers


def test_metrics(start: Start) -> None:
    live = start(Settings())
    for _ in range(3):
        body = {"model": "tiny", "prompt": "the cat sat on a mat. " * 3, "max_tokens": 5, "ignore_eos": True}
        httpx.post(f"{live.url}/v1/completions", json=body)
    httpx.post(f"{live.url}/v1/completions", json={"model": "made-up", "prompt": "x"})
    httpx.get(f"{live.url}/made/up")
    assert live.settled(lambda: idle(live))
    text = httpx.get(f"{live.url}/metrics").text
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] not in "#"
    }
    endpoint = 'endpoint="/v1/completions"'
    assert values[f'gptsmith_requests_total{{{endpoint},model="tiny",status="200"}}'] == 3
    assert values[f'gptsmith_requests_total{{{endpoint},model="",status="404"}}'] == 1
    assert values['gptsmith_requests_total{endpoint="other",model="",status="404"}'] == 1
    assert values['gptsmith_generated_tokens_total{model="tiny"}'] == 15
    prompt = len(live.tokenizers["tiny"].encode("the cat sat on a mat. " * 3))
    assert values['gptsmith_prompt_tokens_total{model="tiny"}'] == 3 * prompt
    assert values['gptsmith_time_to_first_token_seconds_count{model="tiny"}'] == 3
    assert values['gptsmith_inter_token_seconds_count{model="tiny"}'] == 12
    assert values['gptsmith_kv_cache_use{model="tiny"}'] == 0
    assert 0 < values['gptsmith_prefix_hit_rate{model="tiny"}'] < 1
    assert values["gptsmith_queue_depth"] == values["gptsmith_requests_running"] == 0
    assert 'gptsmith_speculation_acceptance{model="tiny"}' in values
    assert "made/up" not in text
    assert "made-up" not in text


def test_models_are_loaded_on_first_request(start: Start) -> None:
    live = start(Settings())
    assert live.loads == []
    bodies = [{"model": "plain", "prompt": "hello", "max_tokens": 1}] * 4
    threads = [
        threading.Thread(target=httpx.post, args=(f"{live.url}/v1/completions",), kwargs={"json": body, "timeout": 60})
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live.loads == ["plain"]
    cards = {card["id"]: card for card in httpx.get(f"{live.url}/v1/models").json()["data"]}
    assert (cards["plain"]["loaded"], cards["tiny"]["loaded"]) == (True, False)
    assert cards["plain"]["max_model_len"] == 512


# tokenization and documentation


def test_tokenize_and_detokenize(start: Start) -> None:
    live = start(Settings())
    tokenizer = live.tokenizers["tiny"]
    made = httpx.post(f"{live.url}/tokenize", json={"model": "tiny", "prompt": "the cat", "return_token_strs": True})
    tokens = made.json()["tokens"]
    assert tokens == tokenizer.encode("the cat")
    assert made.json()["token_strs"] == [tokenizer.token_text(id) for id in tokens]
    back = httpx.post(f"{live.url}/detokenize", json={"model": "tiny", "tokens": tokens})
    assert back.json() == {"prompt": "the cat"}
    messages = {"model": "tiny", "messages": [{"role": "user", "content": "<|im_end|>"}]}
    ids = httpx.post(f"{live.url}/tokenize", json=messages).json()["tokens"]
    text = httpx.post(f"{live.url}/detokenize", json={"model": "tiny", "tokens": ids}).json()["prompt"]
    assert text == "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert httpx.post(f"{live.url}/detokenize", json={"model": "tiny", "tokens": [9999]}).status_code == 400


def test_documentation(start: Start) -> None:
    live = start(Settings())
    page = httpx.get(f"{live.url}/docs")
    assert "<script" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in httpx.get(f"{live.url}/openapi.json").json()["paths"]:
        assert path in page.text
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize"):
        assert path in page.text
