"""Continued pretraining: `--init MODEL` starts from its weights, with its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.errors import UsageError
from gptsmith.tokenizer import train_char
from gptsmith.train.config import ModelOptions
from tests.factories import tiny_model, tiny_run_config

CONFIG = tiny_run_config(steps=6, eval_every=3, context=24, model=ModelOptions())
NEW = {"family": "gpt2", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    place = tmp_path_factory.mktemp("base")
    (place / "words.txt").write_text(words)
    config = CONFIG.replace(steps=60, eval_every=30, model=NEW)
    return gptsmith.fit(place / "words.txt", config, out=place / "run").directory


def test_it_starts_where_the_model_is(base: Path, text_file: Path, tmp_path: Path, run_cli: Any) -> None:
    before = gptsmith.runs(base)[0]
    assert before.best is not None
    run = gptsmith.fit(text_file, steps=6, eval_every=3, log_every=1, init=base, out=tmp_path / "more", sample_tokens=0)
    assert run.metrics[0]["loss"] == pytest.approx(before.best["val_loss"], abs=0.3)
    assert run.options["context"] == 24  # the model's
    assert run.options["optim"]["lr"] == pytest.approx(0.002)  # a tenth of that of a new model
    assert run.info["model"] == before.info["model"]
    code, _, err = run_cli(
        *("train", text_file, "--init", base, "--out", tmp_path / "cli", "--steps", 6, "--eval-every", 3),
        *("--log-every", 1, "--sample-tokens", 0),
    )
    assert code == 0, err
    assert [r.get("loss") for r in gptsmith.runs(tmp_path / "cli")[0].metrics] == [r.get("loss") for r in run.metrics]


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_any_model_will_do(kind: str, base: Path, text_file: Path, tmp_path: Path, run_cli: Any) -> None:
    if kind == "gguf":
        pytest.importorskip("gguf")
        model = tmp_path / "model.gguf"
        assert run_cli("export", base, "--to", "gguf", "--out", model)[0] == 0
    else:
        model = base / "best"
    run = gptsmith.fit(text_file, CONFIG, init=model, out=tmp_path / "run")
    assert run.metrics[0]["loss"] < 2.5  # a new one starts at ln 20 = 3


def test_killed_before_its_first_checkpoint_it_starts_again(base: Path, text_file: Path, tmp_path: Path) -> None:
    whole = gptsmith.fit(text_file, CONFIG, init=base, out=tmp_path / "whole")
    out = Path(shutil.copytree(whole.directory, tmp_path / "run", symlinks=True))
    shutil.rmtree(out / "checkpoints")
    (out / "run.json").write_text(json.dumps({**whole.info, "status": "running"}))
    again = gptsmith.fit(resume=out)
    assert [row.get("loss") for row in again.metrics] == [row.get("loss") for row in whole.metrics]


def test_resuming_does_not_need_the_first_model(base: Path, text_file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base", symlinks=True))
    whole = gptsmith.fit(text_file, CONFIG, init=copy, out=tmp_path / "run", save_every=3)
    shutil.rmtree(copy)
    shutil.rmtree(whole.directory / "checkpoints" / "step-00000006")
    (whole.directory / "run.json").write_text(json.dumps({**whole.info, "status": "running"}))
    again = gptsmith.fit(resume=whole)
    assert [row.get("loss") for row in again.metrics] == [row.get("loss") for row in whole.metrics]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "25"], "--context 25 is longer than the model's 24: its learned positions cannot be extended"),
        (["--model.hidden-size", "64"], "with --init the model and its tokenizer are those of"),
        (["--tokenizer", "bpe"], "leave out --tokenizer"),
        (["--preset", "char-small"], "leave out --preset"),
        (["--depth", "4"], "leave out --depth"),
    ],
)
def test_contradictions_are_refused(
    options: list[str], message: str, base: Path, text_file: Path, tmp_path: Path, run_cli: Any
) -> None:
    code, _, err = run_cli("train", text_file, "--init", base, "--out", tmp_path / "run", *options)
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_rotary_positions_name_the_way_to_extend_them(text_file: Path, tmp_path: Path, words: str) -> None:
    save_checkpoint(tmp_path / "model", tiny_model("qwen3", vocab_size=40), train_char([words]))
    with pytest.raises(UsageError, match="longer than the model's 24: extend it first: gptsmith export"):
        gptsmith.fit(text_file, init=tmp_path / "model", context=100, out=tmp_path / "run")


def test_a_tokenizer_that_lacks_characters(base: Path, tmp_path: Path, run_cli: Any) -> None:
    text = tmp_path / "other.txt"
    text.write_text("Grüße aus Köln 12345\n" * 200)
    code, _, err = run_cli("train", text, "--init", base, "--out", tmp_path / "run")
    assert code == 1
    assert "'G'" in err
    assert not (tmp_path / "run").exists()


def test_no_model(text_file: Path, tmp_path: Path, run_cli: Any) -> None:
    code, _, err = run_cli("train", text_file, "--init", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert code == 1
    assert "nowhere" in err
    assert not (tmp_path / "run").exists()


def test_a_budget_keeps_the_size(base: Path, text_file: Path, tmp_path: Path) -> None:
    run = gptsmith.fit(text_file, init=base, budget="20ktok", out=tmp_path / "run", sample_tokens=0)
    assert run.info["parameters"] == gptsmith.runs(base)[0].info["parameters"]
    assert any("--init" in reason for reason in run.info["plan"]["reasons"])
    assert run.metrics[-1]["tokens"] == pytest.approx(20_000, rel=0.05)


def test_plan_knows_the_model(base: Path, text_file: Path, run_cli: Any) -> None:
    code, out, err = run_cli("plan", text_file, "--init", base, "--json", "--device", "cpu", "--compile", "off")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["model"]["hidden_size"] == 32
    assert plan["parameters"]["total"] == gptsmith.runs(base)[0].info["parameters"]


def test_dropout_of_the_new_run(base: Path, text_file: Path, tmp_path: Path) -> None:
    run = gptsmith.fit(text_file, CONFIG, init=base, dropout=0.5, out=tmp_path / "run")
    plain = gptsmith.fit(text_file, CONFIG, init=base, out=tmp_path / "plain")
    assert run.metrics[0]["loss"] > plain.metrics[0]["loss"]
    assert torch.isfinite(torch.tensor(run.metrics[0]["loss"]))
