"""Ctrl-C and SIGTERM, sent to `gptsmith train` in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptsmith.checkpoint import verify
from gptsmith.log import JsonLines

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")

Start = Callable[..., subprocess.Popen[str]]
LARGER = ["--model.hidden-size", "128", "--model.num-hidden-layers", "4", "--context", "128", "--batch-size", "64"]


@pytest.fixture
def start(text_file: Path, tmp_path: Path, tiny: list[str]) -> Iterator[Start]:
    """Start `gptsmith train` into tmp_path/run."""
    processes = []

    def run(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gptsmith", "train", str(text_file), "--out", str(tmp_path / "run")]
        process = subprocess.Popen(
            [*command, *tiny, "--sample-tokens", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_stops(
    number: signal.Signals, start: Start, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    process = start("--steps", "250", "--eval-every", "250", "--save-every", "10")
    wait_for((run / "checkpoints" / "step-00000010").exists, process)
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 15  # it writes the report too
    assert process.returncode == 128 + number
    assert out == f"Stopped; progress saved. Resume with: gptsmith train --resume {run}\n"
    assert "Stopping after saving a checkpoint." in err
    assert "Traceback" not in err

    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert "<html" in (run / "report.html").read_text()
    logged = JsonLines(run / "metrics.jsonl").read()[-1]["step"]
    last = (run / "last").resolve()
    assert last.name == f"step-{logged:08d}"  # no step was lost
    assert 10 <= logged < 250
    verify(last)

    code, out, err = run_cli("train", "--resume", run)
    assert code == 0
    assert f"resuming {run} at step {logged} of 250" in err
    steps = [row["step"] for row in JsonLines(run / "metrics.jsonl").read() if "loss" in row]
    assert steps == list(range(1, 251))


def test_the_second_signal_quits_at_once(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*LARGER, "--steps", "100", "--eval-every", "100", "--save-every", "1")  # a step takes a second
    wait_for((run / "checkpoints" / "step-00000001").exists, process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "Press Ctrl-C again to quit now" not in process.stderr.readline():
        assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=30)
    assert time.monotonic() - began < 1
    assert code == 130
    verify(run / "checkpoints" / "step-00000001")
    assert json.loads((run / "run.json").read_text())["status"] == "running"  # there was no time to update it


def test_ctrl_c_before_the_first_step(
    run_cli: Callable[..., tuple[int, str, str]],
    text_file: Path,
    tmp_path: Path,
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the text is prepared there is nothing to save: the command stops and leaves no run directory."""

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("gptsmith.train.text.prepare", interrupted)
    assert run_cli("train", text_file, "--out", tmp_path / "run", *tiny) == (130, "", "\nStopped.\n")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_at_the_last_step_costs_nothing(
    run_cli: Callable[..., tuple[int, str, str]],
    text_file: Path,
    tmp_path: Path,
    tiny: list[str],
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last step is saved without its evaluation, which the resumed run does."""
    from gptsmith.train.trainer import Trainer

    log: Callable[..., None] = Trainer._log

    def log_and_stop(self: Trainer, factor: float) -> None:
        log(self, factor)
        if self.step == 20:
            signal.raise_signal(signal.SIGINT)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", log_and_stop)
        assert run_cli("train", text_file, "--out", run, *tiny)[0] == 130
    assert run_cli("train", "--resume", run)[0] == 0

    def val_losses(directory: Path) -> list[float]:
        return [row["val_loss"] for row in JsonLines(directory / "metrics.jsonl").read() if "val_loss" in row]

    assert val_losses(run) == val_losses(finished)
    assert (run / "best").resolve().name == "step-00000020"
