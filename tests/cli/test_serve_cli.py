"""`gptsmith serve` as a process, stopped by signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

RunCli = Callable[..., tuple[int, str, str]]


class Process:
    """A server in another process. Its standard error is collected in `lines`."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptsmith", "serve", *arguments, "--port", "0", "--device", "cpu"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list[str] = []
        self.url = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"at (http://\S+)", line)
            if found:
                self.url = found[1]
                break
        self._thread = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()))
        self._thread.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def wait(self) -> int:
        code = self.process.wait(timeout=120)
        self._thread.join()
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")
def test_sigterm_drains(finished: Path, tmp_path: Path) -> None:
    """SIGTERM during eight requests: they complete, new ones are refused, and the exit code is 0."""
    (tmp_path / "keys").write_text("# the key\nthe-secret\n")
    options = (str(finished), "--alias", "gpt-4=run", "--api-key-file", str(tmp_path / "keys"))
    with Process(*options, GPTSMITH_API_KEY="another-secret") as server:
        headers = {"authorization": "Bearer another-secret"}
        body = {"model": "gpt-4", "prompt": "ba", "max_tokens": 1500, "overflow": "shift", "ignore_eos": True}
        answers: list[Any] = []

        def ask(stream: bool) -> None:
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json={**body, "stream": stream}, headers=headers, timeout=120
            ) as answer:
                answers.append((answer.status_code, answer.read()))

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(8)]
        for thread in threads:
            thread.start()
        while "gptsmith_requests_running 8.0" not in httpx.get(f"{server.url}/metrics", headers=headers).text:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/ready").status_code != 503:
            time.sleep(0.01)
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 503
        for thread in threads:
            thread.join()
        assert server.wait() == 0
    assert len(answers) == 8
    for status, content in answers:
        assert status == 200
        if content.startswith(b"data:"):
            assert content.endswith(b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in content
        else:
            assert json.loads(content)["usage"]["completion_tokens"] == 1500
    requests = [line for line in server.log if line["event"] == "request" and line["path"] == "/v1/completions"]
    assert [line["completion_tokens"] for line in requests] == [1500] * 8
    assert all(line["key"] == "key 1" and line["request_id"] for line in requests)
    assert "secret" not in "".join(server.lines)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")
def test_second_signal_quits(finished: Path) -> None:
    with Process(str(finished)) as server:
        body = {"model": "run", "prompt": "ba", "max_tokens": 10**8, "overflow": "shift", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_raw())
            server.process.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.ConnectError):  # unless it no longer accepts connections
                while httpx.get(f"{server.url}/ready").status_code != 503:
                    time.sleep(0.01)
            server.process.send_signal(signal.SIGINT)
            server.process.wait(timeout=60)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "no model given"),
        (("no/such/model/here",), "no/such/model"),
        (("{run}", "--alias", "x"), "--alias"),
        (("{run}", "--alias", "x=nothing"), "nothing"),
        (("{run}", "--adapter", "x=nowhere"), "nowhere"),
        (("{run}", "--rate-limit", "often"), "--rate-limit"),
        (("{run}", "--api-key-file", "nowhere"), "--api-key-file"),
        (("{run}", "--api-key", " "), "--api-key"),
        (("{run}", "--timeout", "0"), "--timeout"),
        (("{run}", "--max-concurrency", "0"), "--max-concurrency"),
        (("{run}", "--port", "70000"), "--port"),
        (("{run}", "--host", "no.such.host.invalid"), "--host"),
        (("{run}", "--runs", "nowhere"), "--runs"),
        (("{run}", "{run}"), "two models"),
        (("{run}", "--allowed-host", "https://gpt.example.org/"), "--allowed-host"),
        (("{run}", "--trusted-proxy", "nginx"), "--trusted-proxy"),
    ],
)
def test_invalid_options(run_cli: RunCli, finished: Path, options: tuple[str, ...], named: str) -> None:
    code, out, err = run_cli("serve", *(option.replace("{run}", str(finished)) for option in options))
    assert code in (1, 2)
    assert named in err
    assert "Traceback" not in err
    assert out == ""


def test_port_in_use(run_cli: RunCli, finished: Path) -> None:
    from gptsmith.server.runner import listen

    taken = listen("127.0.0.1", 0)
    try:
        code, _, err = run_cli("serve", finished, "--port", taken.getsockname()[1])
    finally:
        taken.close()
    assert (code, "cannot listen" in err) == (2, True)


@pytest.mark.parametrize("trusted", ["127.0.0.0/8", "10.9.9.9"])
def test_behind_a_reverse_proxy(finished: Path, trusted: str) -> None:
    """The address that a trusted proxy reports counts for rate limits and the log; nobody else's does."""
    options = ["--allowed-host", "GPT.example.org:443", "--trusted-proxy", trusted, "--rate-limit", "2/h"]
    with Process(str(finished), *options, "--preload", "none") as server:

        def status(client: str, host: str = "gpt.example.org") -> int:
            headers = {"host": host, "x-forwarded-for": client, "x-forwarded-proto": "https"}
            return httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60).status_code

        assert status("203.0.113.1", "evil.example.org") == 403
        assert [status(client) for client in ("203.0.113.1", "203.0.113.2", "203.0.113.2")] == (
            [200, 200, 200] if trusted.startswith("127") else [200, 200, 429]
        )
        assert status("203.0.113.2", "GPT.Example.org:443") == 429
        server.process.kill()
        server.wait()
        clients = {line["client"] for line in server.log if line["event"] == "request"}
        assert clients == ({"203.0.113.1", "203.0.113.2"} if trusted.startswith("127") else {"127.0.0.1"})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_sighup_reloads_keys_and_logs_json_only(finished: Path, tmp_path: Path) -> None:
    """A server of two models with the same last path component, under names of their own."""
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / finished.name).symlink_to(finished)
    models = [f"a={finished}", f"b={tmp_path / 'other' / finished.name}"]
    options = ["--port", "0", "--device", "cpu", "--api-key-file", str(keys), "--allowed-host", "gpt.example.org"]
    command = [sys.executable, "-m", "gptsmith", "serve", *models, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())["event"]
        url = first.partition(" at ")[2].split()[0]
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
        reader.start()

        def names(key: str, host: str = "localhost") -> Any:
            headers = {"authorization": f"Bearer {key}", "host": host}
            answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=60)
            return [card["id"] for card in answer.json()["data"]] if answer.status_code == 200 else answer.status_code

        try:
            assert names("one") == ["a", "b"]
            assert names("one", "gpt.example.org") == ["a", "b"]
            assert names("one", "evil.example.org") == 403
            keys.write_text("two\n")
            process.send_signal(signal.SIGHUP)
            for _ in range(500):
                if names("two") == ["a", "b"]:
                    break
            assert names("one") == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            reader.join()
    assert all(isinstance(json.loads(line), dict) for line in lines)
