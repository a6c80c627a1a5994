"""Model families that other packages register."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith.errors import CheckpointError, UsageError
from gptsmith.model.config import ModelConfig
from gptsmith.model.families import FAMILIES, llama, register_family
from gptsmith.train.budget.recipe import Text, choose
from gptsmith.train.config import ModelOptions, run_config
from tests.factories import tiny_run_config

SIZE: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}


def biased(**options: Any) -> ModelConfig:
    return llama(**{"attention_bias": True, "mlp_bias": True, **options})


def gpt2_with_qk_norm(**options: Any) -> ModelConfig:
    return FAMILIES["gpt2"](**{"qk_norm": True, **options})


@pytest.fixture(autouse=True)
def registered(restored_registries: None) -> None:
    register_family("biased", biased)
    register_family("unsaveable", gpt2_with_qk_norm)


def test_it_trains_and_resumes_and_its_model_needs_no_plugin(text_file: Path, tmp_path: Path, run_cli: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": {"family": "biased", **SIZE}}))
    options = ["--config", tmp_path / "config.json", "--context", 32, "--batch-size", 4, "--sample-tokens", 0]
    code, _, err = run_cli("train", text_file, *options, "--steps", 3, "--compile", "off", "--out", tmp_path / "run")
    assert code == 0, err
    run = gptsmith.runs(tmp_path)[0]
    assert run.options["model"]["family"] == "biased"
    del FAMILIES["biased"]
    model, _ = gptsmith.load(run)
    assert (model.config.attention_bias, model.config.mlp_bias, model.config.model_type) == (True, True, "llama")
    run.update(status="interrupted")
    with pytest.raises(CheckpointError, match=r"run.json cannot be used: there is no model family 'biased'.*PLUGINS"):
        gptsmith.fit(resume=run)


def test_a_depth_sizes_it() -> None:
    text = Text(1_000_000, 100_000, 300, None)
    chosen = choose(run_config(depth=3, model=ModelOptions(family="biased")), {"model.family"}, text).config
    assert (chosen.model.num_hidden_layers, chosen.model.hidden_size) == (3, 128)
    assert chosen.model.build(300, 64).mlp_bias


def test_one_that_no_layout_can_save_is_refused_before_the_first_step(text_file: Path, tmp_path: Path) -> None:
    config = tiny_run_config(steps=1, model=ModelOptions(family="unsaveable", **SIZE))
    with pytest.raises(UsageError, match="the gpt2 layout has no place for qk_norm"):
        gptsmith.fit(text_file, config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_help_lists_it(run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run_cli("train", "--help")[1]
    assert re.search(r"--model\.family \{gpt1,gpt2,[a-z0-9_,]+,biased,unsaveable\}", text)
    assert "biased" not in text.partition("presets:")[2]  # it has no published sizes


def test_an_unknown_one_is_an_error_with_the_nearest_name(text_file: Path, tmp_path: Path, run_cli: Any) -> None:
    code, _, err = run_cli("train", text_file, "--model.family", "baised", "--out", tmp_path / "run")
    assert code == 2
    assert "there is no model family 'baised'. Did you mean 'biased'? Known: gpt1, gpt2," in err
    with pytest.raises(UsageError, match="there is no model family 'qwen4'. Did you mean 'qwen"):
        gptsmith.fit(text_file, {"model.family": "qwen4"})
