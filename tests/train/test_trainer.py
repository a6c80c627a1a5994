"""The trainer's promises that need no process of their own; kill-and-resume is in test_resume.py."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.errors import TrainingError
from gptsmith.log import JsonLines
from gptsmith.model import loss as loss_module
from gptsmith.train.config import OptimConfig, RunConfig
from gptsmith.train.run import start
from tests.factories import tiny_run_config

TINY = tiny_run_config(steps=12, eval_every=6)


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in JsonLines(directory / "metrics.jsonl").read() if "loss" in row]


def val_losses(directory: Path) -> dict[int, float]:
    rows = JsonLines(directory / "metrics.jsonl").read()
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def train(text: Path, out: Path, config: RunConfig) -> Path:
    start(str(text), config, out)
    return out


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learns(family: Any, optimizer: Any, text_file: Path, tmp_path: Path) -> None:
    config = TINY.replace(
        steps=60,
        eval_every=60,
        model=replace(TINY.model, family=family),
        optim=OptimConfig(name=optimizer, lr=0.02 if optimizer == "muon" else 0.01),
    )
    run = train(text_file, tmp_path / "run", config)
    assert val_losses(run)[60] < 2.2  # ln 20 = 3.0 is a uniform guess


def test_same_seed_same_losses_and_another_seed_others(text_file: Path, tmp_path: Path) -> None:
    first = losses(train(text_file, tmp_path / "a", TINY))
    assert losses(train(text_file, tmp_path / "b", TINY)) == first
    assert losses(train(text_file, tmp_path / "c", TINY.replace(seed=1))) != first


def test_micro_batches_add_up_to_one_batch(text_file: Path, tmp_path: Path) -> None:
    whole = losses(train(text_file, tmp_path / "a", TINY))
    parts = losses(train(text_file, tmp_path / "b", TINY.replace(micro_batch_size=2)))
    assert parts == pytest.approx(whole, abs=1e-5)


def test_micro_batches_of_unequal_weight_add_up(tmp_path: Path, words: str) -> None:
    """Documents of very different length leave rows with few targets: they must not count for more."""
    lines = [line[: 3 + 37 * (i % 3)] for i, line in enumerate(words.splitlines())]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = TINY.replace(mask_documents=True)
    whole = losses(train(path, tmp_path / "a", config))
    parts = losses(train(path, tmp_path / "b", config.replace(micro_batch_size=1)))
    assert parts == pytest.approx(whole, abs=1e-5)


def test_whole_split_loss_is_that_of_every_validation_token(text_file: Path, tmp_path: Path) -> None:
    """Recomputed the slow way from the saved model: each validation token but the first predicted once."""
    import gptsmith

    run = train(text_file, tmp_path / "run", TINY)
    model, tokenizer = gptsmith.load(run / "last")
    ids = tokenizer.encode(text_file.read_text())
    record = json.loads((run / "run.json").read_text())["data"]
    held_out = ids[-record["val_tokens"] :]
    assert record["val_tokens"] == pytest.approx(0.1 * len(ids), abs=2)
    total = 0.0
    with torch.no_grad():
        for at in range(0, len(held_out) - 1, 32):
            window = torch.tensor(held_out[at : at + 33])
            logits = model(window[None, :-1])[0]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert val_losses(run)[12] == pytest.approx(total / (len(held_out) - 1), abs=1e-5)


def test_the_best_checkpoint_is_kept_and_loaded(text_file: Path, tmp_path: Path) -> None:
    import gptsmith

    config = TINY.replace(
        steps=40,
        eval_every=4,
        keep_checkpoints=1,
        optim=OptimConfig(lr=0.3, embedding_lr=0.3, schedule="constant"),
    )
    run = train(text_file, tmp_path / "run", config)
    values = val_losses(run)
    best = min(values, key=values.__getitem__)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {f"step-{best:08d}", "step-00000040"}
    assert (run / "best").resolve().name == f"step-{best:08d}"
    model, _ = gptsmith.load(run)
    expected, _ = gptsmith.load(run / "checkpoints" / f"step-{best:08d}")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_divergence_stops_and_names_the_last_good_checkpoint(text_file: Path, tmp_path: Path) -> None:
    config = TINY.replace(
        steps=400,
        eval_every=2,
        optim=OptimConfig(name="adamw", lr=50.0, clip=0.0, schedule="constant", warmup_steps=6),
    )
    with pytest.raises(TrainingError, match=r"diverged at step \d+.*(step-0000\d{4}|no checkpoint)") as error:
        train(text_file, tmp_path / "run", config)
    assert "--optim.lr" in str(error.value)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "diverged"


def test_nan_is_never_saved(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = loss_module.token_loss_sum, [0]

    def poisoned(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        loss = original(*arguments)
        return loss * math.nan if calls[0] == 9 else loss

    monkeypatch.setattr(loss_module, "token_loss_sum", poisoned)
    with pytest.raises(TrainingError, match="step 9: the loss is not a number.*step-00000008"):
        train(text_file, tmp_path / "run", TINY.replace(save_every=4))
    import gptsmith

    model, _ = gptsmith.load(tmp_path / "run")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_metrics_hold_what_a_report_needs(text_file: Path, tmp_path: Path) -> None:
    run = train(text_file, tmp_path / "run", TINY.replace(log_every=4))
    rows = [row for row in JsonLines(run / "metrics.jsonl").read() if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [row["tokens"] for row in rows] == [8 * 32 * step for step in (4, 8, 12)]
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["lr"] < rows[0]["lr"]


def test_speed_is_that_of_work_that_is_done(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is given its work long before it has done it."""
    from gptsmith.train import trainer

    monkeypatch.setattr(trainer, "synchronize", lambda device: time.sleep(0.2))
    run = train(text_file, tmp_path / "run", TINY.replace(steps=4, eval_every=4, log_every=2))
    rows = JsonLines(run / "metrics.jsonl").read()
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    assert max(speeds) < 2 * TINY.loop.batch_size * TINY.loop.context / 0.2
    assert next(row["update_time"] for row in rows if "update_time" in row) > 0.6  # two lines and a checkpoint


def test_no_validation_split(text_file: Path, tmp_path: Path) -> None:
    run = train(text_file, tmp_path / "run", TINY.replace(val_fraction=0.0))
    assert val_losses(run) == {}
    import gptsmith

    gptsmith.load(run)


def test_bf16_autocast_trains(text_file: Path, tmp_path: Path) -> None:
    run = train(text_file, tmp_path / "run", TINY.replace(precision="bf16", steps=40, eval_every=40))
    assert val_losses(run)[40] < 2.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_precisions_train(precision: Any, text_file: Path, tmp_path: Path) -> None:
    config = TINY.replace(device="cuda", precision=precision, steps=40, eval_every=40)
    assert val_losses(train(text_file, tmp_path / "run", config))[40] < 2.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_compiled_run_on_a_gpu_learns_as_one_that_is_not(optimizer: Any, text_file: Path, tmp_path: Path) -> None:
    optim = OptimConfig(name=optimizer, lr=0.02 if optimizer == "muon" else 0.01)
    config = TINY.replace(device="cuda", precision="bf16", steps=40, eval_every=40, optim=optim)
    plain = val_losses(train(text_file, tmp_path / "plain", config))[40]
    compiled = train(text_file, tmp_path / "compiled", config.replace(compile="on"))
    assert json.loads((compiled / "run.json").read_text())["compile"] is True
    assert val_losses(compiled)[40] == pytest.approx(plain, abs=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_fp8_trains_on_a_gpu_that_has_it(text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao.float8", reason="torchao is not installed (an extra: gptsmith[fp8])")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    config = TINY.replace(device="cuda", precision="fp8", compile="on", steps=40, eval_every=40)
    assert val_losses(train(text_file, tmp_path / "run", config))[40] < 2.6
