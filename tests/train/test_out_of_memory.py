"""Memory that runs out while training: smaller micro-batches, the same result; or a clear end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.checkpoint import load_train_state
from gptsmith.errors import TrainingError
from gptsmith.evaluate.validation import split_loss
from gptsmith.log import JsonLines
from gptsmith.model import loss as loss_module
from gptsmith.model.loss import token_loss_sum
from gptsmith.runtime import out_of_memory
from gptsmith.train.config import ModelOptions
from gptsmith.train.objectives import pretrain
from gptsmith.train.run import resume, start
from tests.factories import tiny_run_config

CONFIG = tiny_run_config(batch_size=12, steps=10, eval_every=5)


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in JsonLines(directory / "metrics.jsonl").read() if "loss" in row]


def saved_micro_batch(directory: Path) -> int:
    return int(load_train_state(directory / "last").values["micro_batch_size"])


class Scarce:
    """Memory for no more than `rows` sequences in training, from the `first` pass on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, first: int = 1, eval_rows: int = 10**9) -> None:
        self.rows, self.first, self.eval_rows, self.passes = rows, first, eval_rows, 0
        self.loss = token_loss_sum
        monkeypatch.setattr(loss_module, "token_loss_sum", self.training)
        monkeypatch.setattr(pretrain, "split_loss", self.evaluation(split_loss))

    def training(self, model: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        loss = self.loss(model, ids, *rest)  # random numbers are drawn before it fails
        self.passes += 1
        if self.passes >= self.first and len(ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return loss

    def evaluation(self, split_loss: Any) -> Any:
        def scarce(model: Any, batches: Any, **options: Any) -> Any:
            def checked() -> Any:
                for batch in batches:
                    if len(batch.ids) > self.eval_rows:
                        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")
                    yield batch

            return split_loss(model, checked(), **options)

        return scarce


def test_the_step_is_repeated_as_if_the_micro_batch_had_been_small_from_the_start(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With dropout: random numbers, too, are those of a run that never failed."""
    config = CONFIG.replace(dropout=0.2)
    start(str(text_file), config.replace(micro_batch_size=3), tmp_path / "small")
    Scarce(monkeypatch, rows=3)
    capsys.readouterr()
    start(str(text_file), config, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "small")
    said = [line for line in capsys.readouterr().err.splitlines() if "memory ran out" in line]
    assert said == [
        f"memory ran out at step 1: restarting the step with micro-batches of {new} instead of {old}"
        for old, new in ((12, 6), (6, 3))
    ]
    assert saved_micro_batch(tmp_path / "run") == 3


def test_in_the_middle_of_a_run_the_result_is_that_of_the_same_batches(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(str(text_file), CONFIG, tmp_path / "whole")
    Scarce(monkeypatch, rows=4, first=5)
    start(str(text_file), CONFIG, tmp_path / "run")
    whole, run = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert run[:4] == whole[:4]
    assert run == pytest.approx(whole, abs=1e-5)
    assert run[5:] != whole[5:]  # other sums
    assert saved_micro_batch(tmp_path / "run") == 3  # 12, 6, 3


def test_a_resumed_run_goes_on_with_the_smaller_micro_batch(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the run that was not interrupted, though memory is there again."""
    config = CONFIG.replace(dropout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        Scarce(patch, rows=4, first=3)
        start(str(text_file), config, tmp_path / "run")
    out = tmp_path / "run"
    expected = losses(out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "running"}))
    shutil.rmtree(out / "checkpoints" / "step-00000010")
    resume(out)
    assert losses(out) == expected


def test_one_sequence_too_much_ends_with_the_checkpoint_named(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(monkeypatch, rows=0, first=7)
    with pytest.raises(TrainingError) as error:
        start(str(text_file), CONFIG, tmp_path / "run")
    message = str(error.value)
    assert message.startswith("memory ran out at step 7: even one row at a time is too much (CUDA out of memory.")
    assert "step-00000005 is intact" in message
    assert "\n" not in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 10


def test_memory_short_in_the_optimizer_ends_clearly(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the optimizer cannot be made again: it may have changed half of the weights."""
    from gptsmith.optim.build import Optimizers

    step, calls = Optimizers.step, [0]

    def scarce(self: Optimizers) -> None:
        calls[0] += 1
        if calls[0] == 8:
            raise MemoryError
        step(self)

    monkeypatch.setattr(Optimizers, "step", scarce)
    with pytest.raises(TrainingError, match=r"at step 8: smaller micro-batches do not help here.*step-00000005 is"):
        start(str(text_file), CONFIG, tmp_path / "run")


def test_evaluation_takes_fewer_sequences_at_a_time(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(str(text_file), CONFIG, tmp_path / "whole")
    Scarce(monkeypatch, rows=100, eval_rows=20)
    start(str(text_file), CONFIG, tmp_path / "run")
    values = [
        [row["val_loss"] for row in JsonLines(tmp_path / name / "metrics.jsonl").read() if "val_loss" in row]
        for name in ("whole", "run")
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert len(values[0]) == 2


def test_other_errors_are_not_taken_for_it() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert not out_of_memory(ValueError("out of memory"))


LIMITED = """
import re, resource, sys
import numpy, safetensors, torch
import gptsmith.report.curves, gptsmith.train.run, matplotlib.figure
from gptsmith.cli import main
x = torch.nn.Parameter(torch.zeros(256, 256))
torch.autograd.backward((x @ x).sum())
torch.optim.AdamW([x], fused=True).step()
numpy.ones((256, 256)) @ numpy.ones((256, 256))  # numpy's BLAS takes its buffer at first use, and aborts without it
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize(("megabytes", "code"), [(330, 0), (25, 1)])
def test_a_real_limit(megabytes: int, code: int, text_file: Path, tmp_path: Path) -> None:
    """The process may take so much address space, the kernel refuses more: the same losses, or a clear end."""
    options = ["--batch-size", "96", "--context", "128", "--steps", "2", "--eval-every", "2", "--sample-tokens", "0"]
    options += ["--model.num-hidden-layers", "3", "--compile", "off", "--device", "cpu", "--log-every", "1"]
    command = ["train", str(text_file), "--out", str(tmp_path / "run"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes * 10**6), *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == code, ended.stderr
    assert "memory ran out at step 1: restarting the step with micro-batches of" in ended.stderr
    assert "Traceback" not in ended.stderr
    if code:
        assert "even one row at a time is too much" in ended.stderr or "do not help here" in ended.stderr
        return
    whole = subprocess.run(
        [sys.executable, "-m", "gptsmith", *command[:3], str(tmp_path / "whole"), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert whole.returncode == 0, whole.stderr
    assert "memory ran out" not in whole.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_that_is_too_small(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real limit: the batch does not fit, half of it does, and the run ends with the same losses."""
    from gptsmith.train.forecast import memory

    monkeypatch.setattr(memory, "certainly_fits", lambda *_: True)  # nobody foresaw it
    model = ModelOptions(num_hidden_layers=4, hidden_size=256, num_attention_heads=4)
    config = CONFIG.replace(model=model, context=256, batch_size=64, device="cuda", precision="fp32")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start(str(text_file), config, tmp_path / "enough")
    needed, whole = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.75 * needed / whole)
    try:
        start(str(text_file), config, tmp_path / "scarce")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert saved_micro_batch(tmp_path / "scarce") < 64
    assert losses(tmp_path / "scarce") == pytest.approx(losses(tmp_path / "enough"), abs=0.01)
