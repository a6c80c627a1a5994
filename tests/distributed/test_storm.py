"""Twenty SIGKILLs at random moments, over changing numbers of processes: the run that was never disturbed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from gptsmith.checkpoint import CheckpointStore, verify
from gptsmith.formats.safetensors import open_weights
from gptsmith.log import JsonLines
from gptsmith.run_directory import read_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # five minutes on two idle cores
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no SIGKILL"),
]

STEPS = 400
WORLD_SIZES = (4, 1, 3, 2)
TINY = [
    *("--model.hidden-size", 48, "--model.num-hidden-layers", 2, "--context", 48, "--batch-size", 12),
    *("--steps", STEPS, "--eval-every", 100, "--save-every", 4, "--log-every", 1, "--sample-tokens", 0),
    *("--compile", "off", "--device", "cpu", "--optim.name", "adamw", "--optim.lr", "1e-3"),
]
Launch = Callable[..., psutil.Popen]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start torchrun with so many processes; what is left of it ends with the test."""
    agents: list[psutil.Popen] = []

    def start(processes: int, *arguments: object) -> psutil.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        command += ["--max-restarts", 50, "--monitor-interval", 0.1, "-m", "gptsmith", "train", *arguments]
        with open(tmp_path / "errors", "ab") as errors:
            agent = psutil.Popen(
                [str(word) for word in command],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        agents.append(agent)
        return agent

    yield start
    for agent in agents:
        if agent.is_running():
            for process in (*agent.children(recursive=True), agent):
                process.kill()
        agent.wait()


def wait_for(what: Callable[[], object], agent: psutil.Popen, errors: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert agent.poll() is None, errors.read_text()
        assert time.monotonic() < end, errors.read_text()
        time.sleep(0.0005)


def of_rank(agent: psutil.Popen, rank: int) -> psutil.Process | None:
    for child in agent.children(recursive=True):
        try:
            if child.environ().get("RANK") == str(rank):
                return child
        except psutil.Error:
            continue
    return None


@pytest.mark.parametrize("parallel", ["dp", "fsdp"])
def test_a_storm_of_kills(parallel: str, launch: Launch, text_file: Path, tmp_path: Path) -> None:
    rng, run, errors = random.Random(7), tmp_path / "run", tmp_path / "errors"
    store = CheckpointStore(run)
    kinds = ["rank"] * 8 + ["writer"] * 6 + ["agent"] * 2
    rng.shuffle(kinds)
    killed: list[str] = []
    agent = launch(WORLD_SIZES[0], text_file, "--out", run, *TINY, "--parallel", parallel)
    for processes in WORLD_SIZES:
        if killed:
            agent = launch(processes, "--resume", run)
        for number in range(5):
            kind = "agent" if number == 4 else kinds.pop()
            newest = max(store.steps(), default=0)
            wait_for(lambda newest=newest: max(store.steps(), default=0) > newest, agent, errors)  # type: ignore[misc]
            if kind == "writer":
                wait_for(lambda: list(store.directory.glob(".tmp-*")), agent, errors)
                victim = of_rank(agent, 0)
            else:
                time.sleep(rng.random() * 0.3)
                victim = agent if kind == "agent" else of_rank(agent, rng.randrange(processes))
            assert victim is not None
            ranks = agent.children(recursive=True)
            victim.kill()
            killed.append(kind)
            if kind == "agent":
                agent.wait()
                _, alive = psutil.wait_procs(ranks, timeout=60)
                assert not alive, "a process trains on without its agent"
                if number < 4:
                    agent = launch(processes, "--resume", run)
            verify(store.newest_intact())
    assert len(killed) == 20
    assert read_run(run).status != "finished"
    agent = launch(2, "--resume", run)
    assert agent.wait(timeout=600) == 0, errors.read_text()
    assert read_run(run).status == "finished"
    assert not list(store.directory.glob(".tmp-*"))

    whole = launch(1, text_file, "--out", tmp_path / "whole", *TINY)
    assert whole.wait(timeout=600) == 0, errors.read_text()
    expected, found = (JsonLines(each / "metrics.jsonl").read() for each in (tmp_path / "whole", run))
    assert [row["step"] for row in found] == [row["step"] for row in expected]  # none lost, none twice
    for key in ("tokens", "loss", "val_loss"):
        values = [row[key] for row in found if key in row]
        assert values == pytest.approx([row[key] for row in expected if key in row], abs=1e-4)
    weights, disturbed = open_weights(tmp_path / "whole" / "last"), open_weights(run / "last")
    for name in weights:
        assert torch.allclose(weights[name], disturbed[name], atol=1e-4), name
    shutil.rmtree(run)
