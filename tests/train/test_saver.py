"""A checkpoint is written while the next step computes: it is the state after its own step, to the bit."""

from __future__ import annotations

import errno
import re
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.checkpoint import CheckpointStore, TrainState, save_checkpoint, verify
from gptsmith.errors import TrainingError
from gptsmith.formats.safetensors_writer import write_tensors
from gptsmith.optim.build import Optimizers
from gptsmith.run_directory import read_run
from gptsmith.tokenizer import train_char
from gptsmith.train.config import OptimConfig, RunConfig
from gptsmith.train.run import resume, start
from gptsmith.train.saver import Saver
from gptsmith.train.trainer import Trainer
from tests.factories import tiny_model, tiny_run_config

# Dropout, accumulation, two optimizers; GPT-2's matrices are stored transposed, so that they are copied on the way.
CONFIG = tiny_run_config(
    steps=12, eval_every=6, save_every=2, keep_checkpoints=20, micro_batch_size=4, dropout=0.1, optim={"name": "muon"}
)
GPT2 = CONFIG.replace(model=replace(CONFIG.model, family="gpt2"))


def in_order(saver: Saver, write: Callable[[Callable[[], None]], Path]) -> Path | None:
    saver.start(1, write)
    saver.wait_until_read()
    return saver.finish()


def test_a_saver_waits_for_what_is_asked_for(tmp_path: Path) -> None:
    saver, may_read, may_end = Saver(torch.device("cpu")), threading.Event(), threading.Event()

    def write(read: Callable[[], None]) -> Path:
        may_read.wait(10)
        read()
        may_end.wait(10)
        return tmp_path

    saver.start(7, write)
    assert (saver.step, saver.done) == (7, False)
    threading.Timer(0.1, may_read.set).start()
    saver.wait_until_read()
    assert saver.stalled > 0.05
    assert not saver.done
    may_end.set()
    assert saver.finish() == tmp_path
    assert (saver.step, saver.finish()) == (None, None)


@pytest.mark.parametrize("when", ["reading", "later"])
def test_an_error_is_raised_once_and_the_next_checkpoint_is_written(when: str, tmp_path: Path) -> None:
    def fail(read: Callable[[], None]) -> Path:
        if when == "later":
            read()
            time.sleep(0.05)
        raise OSError(errno.EIO, "input/output error")

    saver = Saver(torch.device("cpu"))
    with pytest.raises(OSError, match="input/output"):
        in_order(saver, fail)
    assert saver.finish() is None
    assert in_order(saver, lambda read: tmp_path) == tmp_path  # also where nobody says that it has been read


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words)
    return path


def contents(run: Path) -> dict[str, bytes]:
    """Return the files of all checkpoints, but for what depends on the clock."""
    found = {}
    for path in sorted((run / "checkpoints").rglob("*")):
        if path.is_file() and path.name not in ("manifest.json", "state.json"):
            found[path.relative_to(run).as_posix()] = path.read_bytes()
    return found


@pytest.mark.parametrize("config", [CONFIG, GPT2.replace(optim=OptimConfig(name="adamw"))], ids=["muon", "adamw"])
def test_a_slow_writer_saves_the_same_bytes(
    config: RunConfig, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is written with a pause, in which training goes on as far as it can; or saving is waited for."""
    written = write_tensors
    overlapped: list[bool] = []

    def slowly(file: Any, tensors: Any) -> None:
        began = updates[0]
        slow: dict[str, Any] = {name: _Slow(tensor) for name, tensor in tensors.items()}
        written(file, slow)
        overlapped.append(updates[0] > began)

    updates, step = [0], Optimizers.step
    losses_computed: list[str] = []

    def counted(self: Optimizers) -> None:
        updates[0] += 1
        step(self)

    update = Trainer.update

    def watched(self: Trainer, factor: float) -> bool:
        if self.saver.step is not None and not self.saver.done:
            losses_computed.append("beside")
        return update(self, factor)

    with monkeypatch.context() as patch:
        patch.setattr("gptsmith.formats.hf.write_tensors", slowly)
        patch.setattr("gptsmith.checkpoint.write_tensors", slowly)
        patch.setattr(Optimizers, "step", counted)
        patch.setattr(Trainer, "update", watched)
        start(str(text), config, tmp_path / "slow")
    assert losses_computed, "no step was computed beside a save"
    assert overlapped
    assert not any(overlapped), "an update came while the state was read"
    with monkeypatch.context() as patch:
        begin = Saver.start

        def and_wait(self: Saver, step: int, write: Any) -> None:
            begin(self, step, write)
            self._read.wait()

        patch.setattr(Saver, "start", and_wait)
        start(str(text), config, tmp_path / "waited")
    slow, waited = contents(tmp_path / "slow"), contents(tmp_path / "waited")
    assert len(slow) == 6 * 6
    assert slow.keys() == waited.keys()
    assert [name for name in slow if slow[name] != waited[name]] == []


class _Slow:
    """A tensor that takes a while to read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tensor.shape

    def detach(self) -> torch.Tensor:
        time.sleep(0.002)
        return self.tensor.detach()


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails_at", ["gptsmith.formats.hf.write_tensors", "gptsmith.storage.fsync_tree"])
def test_a_disk_that_fills_stops_the_run(
    fails_at: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether before or after the state has been read; the checkpoint before is intact, and nothing else is left."""
    run, write = tmp_path / "run", CheckpointStore.write

    def fill(self: CheckpointStore, step: int, *rest: Any) -> Path:
        with monkeypatch.context() as patch:
            if step == 4:
                patch.setattr(fails_at, full_disk)
            return write(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "write", fill)
        with pytest.raises(TrainingError) as error:
            start(str(text), CONFIG, run)
    message = str(error.value)
    assert re.match(r"stopped at step ([4-9]|1\d): no space left on the disk", message)  # when it is noticed
    assert f"The checkpoint of step 2 is intact. Resume with: gptsmith train --resume {run}" in message
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    verify(run / "last")
    assert read_run(run).status == "failed"
    start(str(text), CONFIG, tmp_path / "whole")
    resume(run)
    assert contents(run) == contents(tmp_path / "whole")


def test_a_run_that_fails_completes_the_checkpoint_that_is_being_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptsmith import storage

    fsync_tree, batch = storage.fsync_tree, Trainer._next_batch

    def slow_fsync(path: Path) -> None:
        time.sleep(0.3)
        fsync_tree(path)

    def fail(self: Trainer) -> Any:
        if self.step == 4:
            assert self.saver.step == 4
            raise RuntimeError("out of memory")
        return batch(self)

    monkeypatch.setattr(storage, "fsync_tree", slow_fsync)
    monkeypatch.setattr(Trainer, "_next_batch", fail)
    with pytest.raises(TrainingError, match=r"The checkpoint .*step-00000004 is intact"):
        start(str(text), CONFIG, tmp_path / "run")
    verify(tmp_path / "run" / "checkpoints" / "step-00000004")


def test_saving_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Of GPT-2's matrices, which are laid out anew; whatever else is written is written from where it is."""
    model = tiny_model("gpt2", hidden_size=128, num_hidden_layers=6, intermediate_size=512)
    tokenizer = train_char(["abcdef"])
    state = TrainState({}, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    largest = max(p.numel() for p in model.parameters()) * 4
    save_checkpoint(tmp_path / "warm-up", model, tokenizer, state)
    tracemalloc.start()
    save_checkpoint(tmp_path / "model", model, tokenizer, state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * largest < 0.2 * model.num_parameters() * 4
