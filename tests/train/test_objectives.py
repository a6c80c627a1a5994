"""An objective of one's own, from a file of 60 lines: it samples, holds tensors, maximizes, and resumes bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gptsmith
from gptsmith.errors import TrainingError, UsageError
from gptsmith.run_directory import read_run
from gptsmith.tokenizer import Tokenizer, train_char
from tests.factories import tiny_run_config
from tests.forked import Forked, command
from tests.train.toy_objective import Samples, WriteLiked

CONFIG = tiny_run_config(
    steps=60, eval_every=20, save_every=5, log_every=3, micro_batch_size=2, batch_size=4, optim={"lr": 0.05}
)
ROOT = Path(__file__).parents[2]


def alphabet() -> Tokenizer:
    return train_char(["abcdefghij"])


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = run / "last"
    return {**load_file(last / "model.safetensors"), **load_file(last / "train" / "state.safetensors")}


def trace(run: Path) -> list[dict[str, Any]]:
    times = ("time", "update_time", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in read_run(run).metrics]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "whole"
    gptsmith.fit(None, CONFIG, out=out, objective=WriteLiked, tokenizer=alphabet())
    return out


def test_it_learns_and_its_best_is_the_highest(whole: Path) -> None:
    run = read_run(whole)
    rewards = {row["step"]: row["reward"] for row in run.metrics if "reward" in row}
    assert sorted(rewards) == [20, 40, 60]
    assert run.best is not None
    assert run.best["reward"] == max(rewards.values()) > 0.3  # a tenth by chance
    assert (whole / "best").resolve().name == f"step-{run.best['step']:08d}"
    assert run.selection == ("reward", "max")
    assert any("advantage" in row for row in run.metrics)
    model, tokenizer = gptsmith.load(run)
    assert gptsmith.generate(model, tokenizer, "a", max_tokens=8, seed=1).count("e") >= 2  # token 5; 0 ends a document


def test_killed_at_random_moments_it_ends_in_the_same_bits(whole: Path, tmp_path: Path) -> None:
    out, environment = tmp_path / "run", {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    rng, kills, errors = random.Random(5), 0, tmp_path / "errors"

    def train() -> None:
        gptsmith.fit(None, CONFIG, out=out, objective=WriteLiked, tokenizer=alphabet())

    process = Forked(train, errors)
    while kills < 3:
        while process.poll() is None:
            time.sleep(0.01)
            steps = len(list(out.glob("checkpoints/step-*")))
            if steps > kills and rng.random() < 0.3:
                process.kill()
                break
        process.wait()
        assert process.returncode == -signal.SIGKILL, errors.read_text()
        kills += 1
        if kills < 3:
            process = command("train", "--resume", out, errors=errors)
    # A new process finds the objective by the name in run.json.
    script = f"from pathlib import Path; from gptsmith.train.run import resume; resume(Path({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_run(out).status == "finished"
    ours, theirs = tensors(out), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert "objective/baseline" in ours
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert trace(out) == trace(whole)


class Empty(WriteLiked):
    def next_batch(self, models: Any, step: int) -> Samples:
        return super().next_batch(models, step) if step < 7 else self.example_batch(0)


class Uncounted(WriteLiked):
    def normalizer(self, batch: Samples) -> tuple[float, int]:
        return 0.0, 5


class Failing(WriteLiked):
    def next_batch(self, models: Any, step: int) -> Samples:
        if step == 7:
            raise ValueError("the reward is out of order")
        return super().next_batch(models, step)


@pytest.mark.parametrize("objective", [Empty, Uncounted])
def test_an_objective_without_rows_or_counts_ends_clearly(objective: type, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=f"{objective.__name__}.next_batch returned 100 batches in a row"):
        gptsmith.fit(None, CONFIG, out=tmp_path / "run", objective=objective, tokenizer=alphabet())
    run = read_run(tmp_path / "run")
    assert run.status == "failed"
    assert "batches in a row" in run.info["error"]


def test_where_the_objective_fails_the_run_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of order"):
        gptsmith.fit(None, CONFIG, out=tmp_path / "run", objective=Failing, tokenizer=alphabet())
    assert (tmp_path / "run" / "checkpoints" / "step-00000007").is_dir()
    run = read_run(tmp_path / "run")
    assert (run.status, run.info["error"]) == ("failed", "the reward is out of order")


def test_evaluations_must_have_the_metric_that_selects(tmp_path: Path) -> None:
    class Wrong(WriteLiked):
        def evaluate(self, models: Any, rows: int) -> dict[str, float]:
            return {"accuracy": 1.0}

    with pytest.raises(TrainingError, match="returned accuracy, without 'reward'"):
        gptsmith.fit(None, CONFIG, out=tmp_path / "run", objective=Wrong, tokenizer=alphabet())


def test_an_unknown_objective_is_named(tmp_path: Path) -> None:
    for name, message in (("pretrian", "Did you mean 'pretrain'"), ("nowhere:Thing", "cannot be imported")):
        with pytest.raises(UsageError, match=message):
            gptsmith.fit(None, CONFIG, out=tmp_path / "run", objective=name, tokenizer=alphabet())
    assert not (tmp_path / "run").exists()
