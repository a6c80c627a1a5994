"""Stop anywhere, resume: bit for bit the run that never stopped. By SIGKILL at random moments, saves included."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptsmith.checkpoint import CheckpointStore
from gptsmith.errors import CheckpointError, TrainingError, UsageError
from gptsmith.log import JsonLines
from gptsmith.run_directory import read_run
from gptsmith.train import trainer
from gptsmith.train.config import OptimConfig
from gptsmith.train.run import _refuse_changes, resume, start
from tests.factories import tiny_run_config
from tests.forked import Forked

KILLED = 1 if os.name == "nt" else -signal.SIGKILL  # the exit status of a killed process
# Dropout (random numbers), accumulation (cursor), two optimizers, logging out of step with saving: all is restored.
CONFIG = tiny_run_config(
    micro_batch_size=4,
    dropout=0.1,
    steps=60,
    eval_every=20,
    save_every=5,
    log_every=3,
    sample_tokens=10,
    optim=OptimConfig(name="muon", weight_decay=0.01),
)


def trace(directory: Path) -> list[dict[str, float]]:
    """Everything in the metrics but the times."""
    rows = JsonLines(directory / "metrics.jsonl").read()
    return [{k: v for k, v in row.items() if k not in ("time", "update_time", "tokens_per_second")} for row in rows]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(directory)
    path = store.path(store.steps()[-1])
    tensors = load_file(path / "model.safetensors")
    tensors.update({f"train/{k}": v for k, v in load_file(path / "train" / "state.safetensors").items()})
    return tensors


def assert_same_run(a: Path, b: Path) -> None:
    assert trace(a) == trace(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    samples = [
        [{k: v for k, v in row.items() if k != "time"} for row in JsonLines(d / "samples.jsonl").read()] for d in (a, b)
    ]
    assert samples[0] == samples[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words)
    return path


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped, computed with one thread as the killed ones are."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = launch(text, out)
    assert process.wait(timeout=120) == 0
    return out


def launch(text: Path, out: Path, *, resuming: bool = False, slow_save: bool = False) -> Forked:
    """Train in a process of its own. slow_save: every fsync takes a while, so that kills fall into saves."""
    fsync = os.fsync

    def slow_fsync(fd: Any) -> None:
        time.sleep(0.01)
        fsync(fd)

    def run() -> None:
        if slow_save:
            os.fsync = slow_fsync
        if resuming:
            resume(out)
        else:
            start(str(text), CONFIG, out)

    return Forked(run, errors_of(out))


def errors_of(out: Path) -> Path:
    return out.with_suffix(".stderr")


def wait_for(directory: Path, step: int, process: Forked) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        rows = JsonLines(directory / "metrics.jsonl").read()
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_steps(seed: int, text: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL two or three times, wherever it falls, then run to the end."""
    rng, out = random.Random(seed), tmp_path / "run"
    process = launch(text, out)
    kills = 0
    for target in sorted(rng.sample(range(6, 50), 2)):
        wait_for(out, target, process)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.wait()
        kills += process.returncode == KILLED
        process = launch(text, out, resuming=True)
    assert process.wait(timeout=120) == 0, errors_of(out).read_text()
    assert kills >= 1
    assert_same_run(uninterrupted, out)


def test_killed_during_a_save(text: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL while a checkpoint is half-written: what is there stays whole, and the half is cleared away."""
    out = tmp_path / "run"
    process = launch(text, out, slow_save=True)
    deadline, store = time.monotonic() + 60, CheckpointStore(out)
    while time.monotonic() < deadline and process.poll() is None:
        half = list(store.directory.glob(".tmp-*")) if store.directory.is_dir() else []
        if len(store.steps()) >= 2 and half and (half[0] / "model.safetensors").exists():
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert process.returncode == KILLED
    assert list(store.directory.glob(".tmp-*")), "the kill missed the save"
    process = launch(text, out, resuming=True)
    assert process.wait(timeout=120) == 0, errors_of(out).read_text()
    assert not list(store.directory.glob(".tmp-*"))
    assert_same_run(uninterrupted, out)


def test_killed_before_the_first_checkpoint(text: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launch(text, out)
    wait_for(out, 3, process)
    process.kill()
    process.wait()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    process = launch(text, out, resuming=True)
    assert process.wait(timeout=120) == 0, errors_of(out).read_text()
    assert_same_run(uninterrupted, out)


def interrupted_copy(uninterrupted: Path, tmp_path: Path, step: int) -> Path:
    """The uninterrupted run's directory as a crash after the save at `step` would leave it."""
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out, symlinks=True)
    record = json.loads((out / "run.json").read_text())
    record["status"] = "running"
    (out / "run.json").write_text(json.dumps(record))
    for later in CheckpointStore(out).steps():
        if later > step:
            shutil.rmtree(CheckpointStore(out).path(later))
    return out


def test_a_kill_between_saving_and_evaluating(uninterrupted: Path, tmp_path: Path) -> None:
    out = interrupted_copy(uninterrupted, tmp_path, 55)
    rows = [row for row in JsonLines(out / "metrics.jsonl").read() if row["step"] != 60]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 57, "lo')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resume(out)
    finally:
        torch.set_num_threads(threads)
    assert_same_run(uninterrupted, out)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
@pytest.mark.parametrize("name", ["model.safetensors", "train/state.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    damage: str, name: str, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(uninterrupted)
    newest, before = store.steps()[-1], store.steps()[-2]
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out, symlinks=True)
    path = CheckpointStore(out).path(newest) / name
    contents = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(contents[:-5])
    elif damage == "flip":
        path.write_bytes(contents[:-5] + bytes([contents[-5] ^ 1]) + contents[-4:])
    elif damage == "remove":
        path.unlink()
    else:
        name = "manifest.json"
        (CheckpointStore(out).path(newest) / name).write_text("{")
    assert CheckpointStore(out).newest_intact() == CheckpointStore(out).path(before)
    message = capfd.readouterr().err
    assert str(CheckpointStore(out).path(newest) / name) in message
    assert "Trying the previous checkpoint" in message


def test_all_checkpoints_damaged(uninterrupted: Path, tmp_path: Path) -> None:
    out = interrupted_copy(uninterrupted, tmp_path, 60)
    for step in CheckpointStore(out).steps():
        (CheckpointStore(out).path(step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint .* is intact"):
        resume(out)


def test_what_cannot_be_resumed(uninterrupted: Path, text: Path, tmp_path: Path) -> None:
    out = interrupted_copy(uninterrupted, tmp_path, 55)
    with pytest.raises(UsageError, match=r"hidden_size \(32 → 64\)"):
        resume(out, CONFIG.replace(model=replace(CONFIG.model, hidden_size=64)))
    with pytest.raises(UsageError, match="already finished"):
        resume(uninterrupted)
    with pytest.raises(CheckpointError, match="not a run"):
        resume(tmp_path)
    record = json.loads((out / "run.json").read_text())
    changed = tmp_path / "changed.txt"
    changed.write_text(text.read_text() + "and one more line\n")
    record["data"]["spec"] = str(changed)
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="has changed"):
        resume(out)


def test_two_processes_cannot_train_one_run(uninterrupted: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    out = interrupted_copy(uninterrupted, tmp_path, 55)
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process"):
            resume(out)


def test_a_new_run_refuses_an_occupied_directory(text: Path, uninterrupted: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in uninterrupted.iterdir())
    with pytest.raises(UsageError, match="--resume"):
        start(str(text), CONFIG, uninterrupted)
    assert sorted(p.name for p in uninterrupted.iterdir()) == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="not an empty directory"):
        start(str(text), CONFIG, tmp_path)


def test_saving_by_time_changes_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(steps=20, eval_every=10, save_every=None, keep_checkpoints=20)
    start(str(text), config, tmp_path / "by-steps")
    assert CheckpointStore(tmp_path / "by-steps").steps() == [10, 20]
    monkeypatch.setattr(trainer, "FIRST_SAVE_SECONDS", 0.0)
    start(str(text), config, tmp_path / "first-early")
    assert CheckpointStore(tmp_path / "first-early").steps() == [1, 10, 20]
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    start(str(text), config, tmp_path / "by-time")
    assert CheckpointStore(tmp_path / "by-time").steps() == list(range(1, 21))
    assert_same_run(tmp_path / "by-steps", tmp_path / "first-early")
    assert_same_run(tmp_path / "by-steps", tmp_path / "by-time")
    resume(interrupted_copy(tmp_path / "by-time", tmp_path, 7))
    assert_same_run(tmp_path / "by-steps", tmp_path / "run")


def test_the_first_checkpoint_comes_within_a_minute() -> None:
    assert trainer.FIRST_SAVE_SECONDS < 60


@pytest.mark.parametrize(
    "optim",
    [OptimConfig(schedule="constant"), OptimConfig(decay_fraction=0.0), OptimConfig(final_factor=1.0, name="adamw")],
)
def test_a_finished_run_is_extended(optim: OptimConfig, text: Path, tmp_path: Path) -> None:
    """The extended run is the one that had all the steps from the beginning."""
    config = CONFIG.replace(steps=12, eval_every=6, optim=optim)
    start(str(text), config, tmp_path / "whole")
    start(str(text), config.replace(steps=6), tmp_path / "extended")
    with pytest.raises(UsageError, match="--steps 12"):
        resume(tmp_path / "extended")
    result = resume(tmp_path / "extended", config)
    assert result.outcome == "finished"
    assert read_run(tmp_path / "extended").info["config"]["loop"]["steps"] == 12
    left, right = weights(tmp_path / "extended"), weights(tmp_path / "whole")
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert trace(tmp_path / "extended") == trace(tmp_path / "whole")


def test_a_run_that_was_killed_while_it_was_extended(text: Path, tmp_path: Path) -> None:
    """The checkpoint is older than the extension, which the run remembers."""
    config = CONFIG.replace(steps=12, eval_every=6, optim=OptimConfig(schedule="constant"))
    start(str(text), config, tmp_path / "whole")
    start(str(text), config.replace(steps=6), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["config"]["loop"]["steps"], record["status"] = 12, "running"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    resume(tmp_path / "run")
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_steps_that_cannot_change(text: Path, tmp_path: Path) -> None:
    start(str(text), CONFIG.replace(steps=15, eval_every=15), tmp_path / "falling")
    with pytest.raises(UsageError, match="learning rate .* has begun to fall .*--init"):
        resume(tmp_path / "falling", CONFIG.replace(steps=20, eval_every=15))
    constant = CONFIG.replace(steps=10, eval_every=10, optim=OptimConfig(schedule="constant"))
    start(str(text), constant, tmp_path / "constant")
    with pytest.raises(UsageError, match="has a checkpoint of step 10 already"):
        resume(tmp_path / "constant", constant.replace(steps=8))
    before = json.loads((tmp_path / "constant" / "run.json").read_text())
    assert (before["status"], before["config"]["loop"]["steps"]) == ("finished", 10)


def test_a_decay_that_has_not_begun_moves(text: Path, tmp_path: Path) -> None:
    optim = OptimConfig(decay_fraction=0.25)
    config = CONFIG.replace(steps=40, eval_every=20, save_every=5, keep_checkpoints=20, optim=optim)
    start(str(text), config, tmp_path / "whole")
    start(str(text), config.replace(steps=20), tmp_path / "short")
    out = interrupted_copy(tmp_path / "short", tmp_path, 15)
    resume(out, config)
    left, right = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_intervals_may_change(uninterrupted: Path, tmp_path: Path) -> None:
    out = interrupted_copy(uninterrupted, tmp_path, 55)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resume(out, CONFIG.replace(log_every=1, eval_every=2, save_every=4))
    finally:
        torch.set_num_threads(threads)
    left, right = weights(out), weights(uninterrupted)
    assert all(torch.equal(left[name], right[name]) for name in right)
    rows = JsonLines(out / "metrics.jsonl").read()
    assert [row["step"] for row in rows if "val_loss" in row] == [20, 40, 56, 58, 60]
    assert read_run(out).info["config"]["loop"]["log_every"] == 1


def test_intervals_of_evaluation_are_part_of_a_plan_for_a_time() -> None:
    config = CONFIG.replace(budget="1m")
    _refuse_changes(config, config.replace(log_every=1))
    with pytest.raises(UsageError, match="eval_every"):
        _refuse_changes(config, config.replace(eval_every=7))


def test_a_text_that_has_moved(text: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """run.json names the new place from then on."""
    out = interrupted_copy(uninterrupted, tmp_path, 55)
    record = json.loads((out / "run.json").read_text())
    record["data"]["spec"] = str(tmp_path / "old" / "words.txt")
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=f"--resume {out} NEWPLACE"):
        resume(out)
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 100)
    with pytest.raises(CheckpointError, match="has changed"):
        resume(out, data=str(other))
    place = tmp_path / "new" / "renamed.txt"
    place.parent.mkdir()
    shutil.copy(text, place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resume(out, data=str(place))
    finally:
        torch.set_num_threads(threads)
    assert_same_run(uninterrupted, out)
    assert read_run(out).info["data"]["spec"] == str(place.resolve())


@pytest.mark.slow
def test_compiled_runs_resume_bit_for_bit(text: Path, tmp_path: Path) -> None:
    from gptsmith.runtime import compiler_available

    if not compiler_available(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler")
    config = CONFIG.replace(compile="on", dropout=0.0, steps=20, eval_every=10)
    start(str(text), config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "copy", symlinks=True)
    out = interrupted_copy(tmp_path / "copy", tmp_path, 15)
    resume(out)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", "off"), ("bf16", "off"), ("bf16", "on")])
def test_runs_on_a_gpu_resume_bit_for_bit(precision: Any, compiled: Any, text: Path, tmp_path: Path) -> None:
    dropout = 0.0 if compiled == "on" else CONFIG.loop.dropout
    config = CONFIG.replace(
        device="cuda", precision=precision, compile=compiled, dropout=dropout, steps=20, eval_every=10
    )
    start(str(text), config, tmp_path / "whole")
    out = interrupted_copy(tmp_path / "whole", tmp_path, 15)
    resume(out)
    assert_same_run(tmp_path / "whole", out)


def test_without_a_working_compiler_training_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from gptsmith.errors import GptsmithError
    from gptsmith.train import compile as compiled
    from gptsmith.train import session as module

    def broken(forward: object, **_: object) -> object:
        def fail(*_: object) -> None:
            raise RuntimeError("the compiler has no header\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(module, "compiler_available", lambda device: True)
    monkeypatch.setitem(compiled.COSTS, "cpu", (0.0, 0.28))
    config = CONFIG.replace(compile="auto", steps=10, eval_every=10)
    start(str(text), config, tmp_path / "auto")
    assert "compiling failed, continuing without: the compiler has no header" in capfd.readouterr().err
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["compile"] is False
    with pytest.raises(GptsmithError, match="--compile on failed: the compiler has no header"):
        start(str(text), config.replace(compile="on"), tmp_path / "on")


# -- processes that TorchElastic has started again ---------------------------------------------------------------------


@pytest.fixture
def restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that torchrun has started a second time."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


SHORT = CONFIG.replace(steps=6, eval_every=3, save_every=3)


def begun(text: Path, out: Path | None, monkeypatch: pytest.MonkeyPatch, **record: Any) -> Path:
    """Return a run that torchrun started the first time, as one that was killed after step 3 leaves it."""
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "launch-7")
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        run = start(str(text), SHORT, out).run
    CheckpointStore(run.directory).delete_after(3)
    run.update(status="running", **record)
    return run.directory


@pytest.mark.parametrize("named", [True, False])
def test_the_same_command_goes_on_after_a_restart(
    named: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: None
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run" if named else None
    directory = begun(text, out, monkeypatch)
    expected = trace(directory)
    result = start(str(text), SHORT, out)
    assert (result.outcome, result.run.directory.resolve()) == ("finished", directory.resolve())
    assert trace(directory) == expected
    assert start(str(text), SHORT, out).outcome == "finished"  # and a process was killed after that
    assert resume(directory).outcome == "finished"


def test_a_run_that_lost_a_process_goes_on_and_one_that_failed_does_not(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: None
) -> None:
    lost = begun(text, tmp_path / "lost", monkeypatch, lost_process=True, error="process 1 of 2 ended")
    run = read_run(lost)
    run.update(status="failed")
    assert start(str(text), SHORT, lost).outcome == "finished"
    assert not {"lost_process", "error"} & read_run(lost).info.keys()

    run.update(status="diverged", error="training diverged at step 4.", lost_process=False)
    for again in (lambda: start(str(text), SHORT, lost), lambda: resume(lost)):
        with pytest.raises(TrainingError, match=r"^training diverged at step 4\.$"):
            again()
    run.update(status="interrupted")
    assert resume(lost).outcome == "interrupted"
    run.update(status="failed", launch="another")  # in an earlier launch, which this one is to continue
    assert resume(lost).outcome == "finished"


def test_a_restart_before_there_was_a_run(text: Path, tmp_path: Path, restarted: None) -> None:
    out = tmp_path / "run"
    (out / "tokenizer").mkdir(parents=True)
    (out / "tokenizer" / "tokenizer.json").write_text("{")
    (out / ".lock").touch()
    assert start(str(text), SHORT, out).outcome == "finished"
    assert read_run(out).info["launch"] == "launch-7"
