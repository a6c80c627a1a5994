"""`gptsmith train --processes N` and torchrun: exit codes, messages, signals, a process that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptsmith.checkpoint import verify
from gptsmith.log import JsonLines

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")

TINY = [
    *("--model.hidden-size", "32", "--model.num-hidden-layers", "1", "--context", "32", "--batch-size", "4"),
    *("--steps", "600", "--eval-every", "600", "--save-every", "10", "--log-every", "1", "--sample-tokens", "0"),
    *("--compile", "off", "--device", "cpu", "--optim.schedule", "constant"),
]
RunCli = Callable[..., tuple[int, str, str]]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python program in its own process; whatever it has started ends with the test."""
    processes = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()  # its children notice
        process.communicate()


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def process_of_rank(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in JsonLines(run / "metrics.jsonl").read() if "loss" in row]


def assert_saved_once(run: Path, status: str) -> int:
    """The last step logged is the last one saved, and is intact; return it."""
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["config"]["parallel"]["processes"]) == (status, 2)
    last = losses(run)[-1][0]
    assert (run / "last").resolve().name == f"step-{last:08d}"
    verify(run / "last")
    return last


def test_ctrl_c_saves_once_and_one_process_goes_on(
    start: Start, text_file: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    run = tmp_path / "run"
    process = start("gptsmith", "train", text_file, "--out", run, *TINY, "--processes", "2")
    wait_for((run / "checkpoints" / "step-00000010").exists, process)
    ranks = [process_of_rank(process, rank) for rank in (0, 1)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == f"Stopped; progress saved. Resume with: gptsmith train --resume {run}\n"
    assert err.startswith("2 processes with OMP_NUM_THREADS=1, on ")
    assert err.count("Stopping after saving a checkpoint. Press Ctrl-C again to quit now.") == 1
    assert err.count("batch       4 sequences of 32 tokens, 2 on each of 2 processes") == 1
    assert "Traceback" not in err
    assert "death signal" not in err
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    last = assert_saved_once(run, "interrupted")

    steps = last + 15
    assert run_cli("train", "--resume", run, "--processes", "1", "--steps", steps)[0] == 0
    assert run_cli("train", text_file, "--out", tmp_path / "one", *TINY, "--steps", steps)[0] == 0
    expected = losses(tmp_path / "one")
    assert losses(run)[:10] == [pytest.approx(row, abs=1e-6) for row in expected[:10]]
    assert losses(run) == [pytest.approx(row, abs=1e-3) for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_stops_all(rank: int, start: Start, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("gptsmith", "train", text_file, "--out", run, *TINY, "--processes", "2")
    wait_for((run / "checkpoints" / "step-00000010").exists, process)
    process_of_rank(process, rank).kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert out == ""
    assert err.count("error: ") == 1
    assert f"process {rank} of 2 ended without a message." in err
    assert f"is intact. Resume with: gptsmith train --resume {run}" in err
    assert "Traceback" not in err
    newest = max((run / "checkpoints").glob("step-*"))
    verify(newest)
    if rank == 1:  # otherwise nobody was there to write it, as with one process
        record = json.loads((run / "run.json").read_text())
        assert record["status"] == "failed"
        assert "process 1 of 2 ended" in record["error"]


def test_what_is_wrong_is_said_before_processes_start(run_cli: RunCli, text_file: Path, tmp_path: Path) -> None:
    def message(*arguments: Any) -> str:
        code, out, err = run_cli(*arguments)
        assert (code, out) == (2, "")
        return err.splitlines()[-1]

    train = ("train", text_file, "--out", tmp_path / "run", *TINY)
    assert "3 processes cannot share batches of 4" in message(*train, "--processes", 3)
    assert "--processes must be at least 1" in message(*train, "--processes", 0)
    assert "--process-timeout must be above 0" in message(*train, "--process-timeout", 0)
    for command in ("plan", "find-lr", "scale"):
        assert f"gptsmith {command} is about a run in one process" in message(command, text_file, "--processes", 2)
    assert "--parallel fsdp=2 needs a multiple of 2 processes, not 1" in message(*train, "--parallel", "fsdp=2")
    assert "--parallel fsdp=3 needs a multiple of 3 processes, not 2" in message(
        *train, "--processes", 2, "--parallel", "fsdp=3"
    )
    assert "leave out --parallel and --exact" in message("plan", text_file, "--exact")
    generate = ("generate", tmp_path / "run", "--parallel", "tp=2")
    assert "--parallel tp=2 needs a multiple of 2 processes, not 1" in message(*generate)
    assert not (tmp_path / "run").exists()


def test_torchrun_and_the_option_must_agree(
    run_cli: RunCli, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    code, _, err = run_cli("train", text_file, "--out", tmp_path / "run", *TINY, "--processes", 2)
    assert code == 2
    assert "--processes 2: torchrun has started 1. Leave out --processes." in err


@pytest.mark.slow
def test_torchrun(start: Start, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gptsmith", "train")
    process = start(*torchrun, text_file, "--out", run, *TINY)
    wait_for((run / "checkpoints" / "step-00000010").exists, process)
    process_of_rank(process, 1).send_signal(signal.SIGTERM)  # one of them, as a cluster's scheduler might
    out, err = process.communicate(timeout=60)
    assert out == f"Stopped; progress saved. Resume with: gptsmith train --resume {run}\n", err
    assert "exitcode  : 143" in err
    assert_saved_once(run, "interrupted")

    process = start(*torchrun, "--resume", run, "--steps", losses(run)[-1][0] + 5)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith(("model ", "best validation loss"))

    process = start(*torchrun, tmp_path / "missing.txt")
    out, err = process.communicate(timeout=120)
    assert err.count("error: no such file, folder or named corpus") == 1
    assert "exitcode  : 2" in err


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_killed_processes_again(rank: int, start: Start, text_file: Path, tmp_path: Path) -> None:
    """The same command goes on from the last checkpoint, and ends as the run that was never disturbed."""
    command = ("-m", "gptsmith", "train", text_file, *TINY, "--steps", 60, "--eval-every", 60, "--save-every", 5)
    run = tmp_path / "run"
    process = start(*TORCHRUN, "--max-restarts", 3, *command, "--out", run)
    wait_for((run / "checkpoints" / "step-00000010").exists, process)
    process_of_rank(process, rank).kill()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"resuming {run} at step " in err
    assert out.count("best validation loss") == 1
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], "lost_process" in record, "error" in record) == ("finished", False, False)
    process = start(*TORCHRUN, *command, "--out", tmp_path / "whole")
    process.communicate(timeout=240)
    assert process.returncode == 0
    assert losses(run) == losses(tmp_path / "whole")
    for name in ("model.safetensors", "train/state.safetensors"):
        assert (run / "last" / name).read_bytes() == (tmp_path / "whole" / "last" / name).read_bytes()


@pytest.mark.slow
def test_what_would_fail_again_is_not_tried_again(start: Start, text_file: Path, tmp_path: Path) -> None:
    """A run that diverges is not trained a second time. Without --out it is found by its launch."""
    optim = ("--optim.lr", "1e38", "--optim.name", "adamw", "--optim.clip", 0, "--optim.warmup-steps", 0)
    command = (*TORCHRUN, "--max-restarts", 1, "-m", "gptsmith", "train", text_file, *TINY, *optim)
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert err.count("error: training diverged at step ") == 2  # by each start
    assert "resuming" not in err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [text_file.stem]


@pytest.mark.slow
def test_the_second_ctrl_c_quits_at_once(start: Start, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    large = ("--model.hidden-size", 128, "--model.num-hidden-layers", 4, "--context", 128, "--batch-size", 128)
    process = start("gptsmith", "train", text_file, "--out", run, *TINY, *large, "--save-every", 1, "--processes", 2)
    wait_for((run / "checkpoints" / "step-00000001").exists, process)
    ranks = [process_of_rank(process, rank) for rank in (0, 1)]
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    verify(run / "checkpoints" / "step-00000001")


@pytest.mark.slow
def test_a_divided_run_resumes_and_generates(start: Start, text_file: Path, tmp_path: Path, run_cli: RunCli) -> None:
    """By two processes with tensor parallelism, then by one; text is that of one process."""
    run = tmp_path / "run"
    few = ("--steps", 20, "--model.num-attention-heads", 2, "--tokenizer", "bpe", "--vocab-size", 300)
    process = start("gptsmith", "train", text_file, "--out", run, *TINY, *few, "--processes", 2, "--parallel", "tp=2")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "(tp=2)" in err
    assert run_cli("train", "--resume", run, "--processes", 1, "--parallel", "dp", "--steps", 30)[0] == 0
    options = (run, "--prompt", "the", "--max-tokens", 8, "--seed", 1)
    code, expected, _ = run_cli("generate", *options)
    assert code == 0
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gptsmith", "generate")
    process = start(*torchrun, *options, "--parallel", "tp=2")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out == expected
