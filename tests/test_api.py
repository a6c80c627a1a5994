"""Training from Python: silent, with options by their names, own batches, models and callbacks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.errors import TrainingError, UsageError
from gptsmith.model.config import ModelConfig
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Run
from gptsmith.tokenizer import train_char
from gptsmith.train.callbacks import Callback
from tests.factories import tiny_config, tiny_run_config

QUICK = tiny_run_config(steps=6, eval_every=3)


@pytest.mark.report
def test_a_run_from_options_is_that_of_the_command_line(
    text_file: Path, tmp_path: Path, run_cli: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"model.hidden_size": 32, "model.num_hidden_layers": 1, "optim": {"lr": 0.01}}
    run = gptsmith.fit(text_file, options, steps=6, eval_every=3, context=32, sample_tokens=0, out=tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    flags = ["--model.hidden-size", "32", "--model.num-hidden-layers", "1", "--optim.lr", "0.01", "--steps", "6"]
    flags += ["--eval-every", "3", "--context", "32", "--sample-tokens", "0"]
    assert run_cli("train", text_file, "--out", tmp_path / "b", *flags)[0] == 0
    other = gptsmith.runs(tmp_path)[1]
    assert (run.name, other.name, run.status) == ("a", "b", "finished")
    assert run.config == other.config
    assert [row["loss"] for row in run.metrics if "loss" in row] == [r["loss"] for r in other.metrics if "loss" in r]
    assert run.best is not None
    assert (tmp_path / "a" / "report.html").exists()
    model, tokenizer = gptsmith.load(run)
    assert len(gptsmith.generate(model, tokenizer, "ba", max_tokens=5, seed=0)) == 5


def test_wrong_options_are_named(text_file: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"stepz": 5}, "unknown option 'stepz'.*Did you mean 'steps'"),
        ({"steps": "many"}, "steps must be int"),
        ({"model.hidden_sise": 5}, "Did you mean 'model.hidden_size'"),
        ({"steps": 0}, "at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            gptsmith.fit(text_file, options, out=tmp_path / "run")
    with pytest.raises(UsageError, match="no data given"):
        gptsmith.fit()
    assert not (tmp_path / "run").exists()


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_log(self, run: Run, row: Mapping[str, Any]) -> None:
        self.seen.append(("log", row["step"]))

    def on_evaluation(self, run: Run, row: Mapping[str, Any]) -> bool:
        self.seen.append(("evaluation", row["step"]))
        return row["val_loss"] < 100 and row["step"] >= 3  # enough

    def on_save(self, run: Run, step: int, checkpoint: Path) -> None:
        assert (checkpoint / "model.safetensors").exists()
        self.seen.append(("save", step))

    def on_end(self, run: Run, outcome: str) -> None:
        self.seen.append(("end", outcome))


def test_callbacks_see_the_run_and_can_stop_it(text_file: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    run = gptsmith.fit(text_file, QUICK, out=tmp_path / "run", callbacks=[recorder])
    saved = recorder.seen.index(("save", 3))  # while the run goes on, so before or after the evaluation
    assert recorder.seen.index(("log", 3)) < saved
    del recorder.seen[saved]
    assert recorder.seen == [("log", 1), ("log", 2), ("log", 3), ("evaluation", 3), ("end", "interrupted")]
    assert run.status == "interrupted"
    done = gptsmith.fit(resume=run)
    whole = gptsmith.fit(text_file, QUICK, out=tmp_path / "whole")
    assert (done.status, done.directory) == ("finished", run.directory)
    assert [r["loss"] for r in done.metrics if "loss" in r] == [r["loss"] for r in whole.metrics if "loss" in r]


def batches(until: int | None = None) -> Iterator[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(1)
    for _ in itertools.count() if until is None else range(until):
        window = torch.randint(10, (8, 33), generator=generator)
        yield window[:, :-1], window[:, 1:].numpy()


def test_batches_from_an_iterator_and_resuming_them(tmp_path: Path) -> None:
    tokenizer = train_char(["abcdefghij"])
    whole = gptsmith.fit(batches(), QUICK, out=tmp_path / "whole", tokenizer=tokenizer)
    assert [row["step"] for row in whole.metrics] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(TrainingError, match="ended after 4.*step 4 is intact"):
        gptsmith.fit(batches(4), QUICK, out=tmp_path / "short", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="trained on batches from Python"):
        gptsmith.fit(resume=tmp_path / "short")
    run = gptsmith.fit(batches(), resume=tmp_path / "short")
    assert [row["loss"] for row in run.metrics] == [row["loss"] for row in whole.metrics]


class StochasticDepth(Transformer):
    """Skips the last block of every other forward pass in training."""

    calls = 0

    def hidden_states(self, *arguments: Any, **options: Any) -> torch.Tensor:
        self.calls += 1
        layers = self.layers
        if self.training and self.calls % 2:
            self.layers = layers[:-1]
        try:
            return super().hidden_states(*arguments, **options)
        finally:
            self.layers = layers


def skip_blocks(config: ModelConfig, dropout: float) -> Transformer:
    return StochasticDepth(config, dropout=dropout)


class Gated(Transformer):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gate = torch.nn.Parameter(torch.ones(1))


class Louder(Transformer):
    def hidden_states(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return 2 * super().hidden_states(*arguments, **options)


def test_a_variation_of_the_model_trains_and_is_resumed(text_file: Path, tmp_path: Path) -> None:
    run = gptsmith.fit(text_file, QUICK, out=tmp_path / "run", model=skip_blocks)
    plain = gptsmith.fit(text_file, QUICK, out=tmp_path / "plain")
    assert run.metrics[0]["loss"] != plain.metrics[0]["loss"]
    assert run.info["model_factory"].endswith("test_api:skip_blocks")
    assert type(gptsmith.load(run)[0]) is Transformer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda config, dropout: Gated(config), "Gated cannot be saved: .* no place for gate"),
        (lambda config, dropout: Louder(config), "Louder cannot be saved: in eval mode its logits differ"),
        (tiny_config("gpt2", vocab_size=40, max_position_embeddings=32, qk_norm=True), "no place for qk_norm"),
        (tiny_config("qwen3", vocab_size=5, max_position_embeddings=32), "rows for 5 tokens"),
        (tiny_config("qwen3", vocab_size=40, max_position_embeddings=16), "longer than the model's"),
    ],
    ids=["parameter", "logits", "option", "vocabulary", "context"],
)
def test_what_no_layout_can_save_is_refused_before_the_first_step(
    model: Any, message: str, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        gptsmith.fit(text_file, QUICK, out=tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()


def test_a_model_from_its_configuration(text_file: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config("llama", vocab_size=40, max_position_embeddings=32), rope_theta=123.0)
    run = gptsmith.fit(text_file, QUICK, out=tmp_path / "run", model=config)
    assert gptsmith.load(run)[0].config == config


def test_the_name_of_a_tokenizer(tmp_path: Path, text_file: Path) -> None:
    run = gptsmith.fit(text_file, QUICK, out=tmp_path / "run", tokenizer="bpe", vocab_size=300)
    assert run.config["init"]["tokenizer"] == "bpe"
    wrong: Any = 5
    with pytest.raises(UsageError, match="must be a Tokenizer, or a name such as 'bpe', not 5"):
        gptsmith.fit(text_file, QUICK, out=tmp_path / "other", tokenizer=wrong)
    with pytest.raises(UsageError, match="--tokenizer bpee: use char, bpe"):
        gptsmith.fit(text_file, QUICK, out=tmp_path / "other", tokenizer="bpee")
