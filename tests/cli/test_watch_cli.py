"""`gptsmith watch` as a process. tests/server/test_browser.py tests its page during training."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvicorn

RunCli = Callable[..., tuple[int, str, str]]


def test_missing_directory(run_cli: RunCli, tmp_path: Path) -> None:
    code, _, error = run_cli("watch", tmp_path / "nowhere")
    assert code == 1
    assert "no such directory" in error


def test_invalid_port_and_port_in_use(run_cli: RunCli, tmp_path: Path) -> None:
    code, _, error = run_cli("watch", tmp_path, "--port", "70000")
    assert code == 2
    assert "--port must be from 0 to 65535" in error
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, error = run_cli("watch", tmp_path, "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot listen" in error


def test_log_handlers_of_other_libraries_stay_open(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new log configuration closes all handlers of the process, and those of absl close their stream."""
    closed: list[bool] = []

    class Handler(logging.Handler):
        def close(self) -> None:
            closed.append(True)
            super().close()

    handler = Handler()
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: [each.close() for each in sockets])
    assert run_cli("watch", tmp_path, "--port", "0")[0] == 0
    assert not closed
    handler.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")
def test_stops_with_an_open_stream(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"status": "running"}')
    command = [sys.executable, "-m", "gptsmith", "watch", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watch:
        try:
            assert watch.stderr is not None
            url = re.findall(r"http://127\.0\.0\.1:\d+/", watch.stderr.readline())[0]
            assert "<title>gptsmith</title>" in httpx.get(url).text
            with httpx.stream("GET", f"{url}api/runs/run/events", timeout=30) as stream:
                lines = stream.iter_lines()
                assert next(lines) == "event: snapshot"
                watch.send_signal(signal.SIGINT)
                assert watch.wait(20) == 0
        finally:
            watch.kill()
