"""Public reports about policy gradients, replayed with GRPO. Each docstring names the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.train.config import GrpoConfig
from gptsmith.train.objectives.base import Models
from gptsmith.train.objectives.grpo import Grpo
from gptsmith.train.prompts import Prompt
from gptsmith.train.rollout.rollout import Rollout
from tests.factories import tiny_model

WORDS = "the cat sees the tree. a dog runs home at noon."
OPTIONS: dict[str, Any] = {
    "sample_tokens": 0,
    "device": "cpu",
    "steps": 2,
    "batch_size": 8,
    "group_size": 4,
    "answer_tokens": 8,
    "eval_every": 2,
    "eval_prompts": 2,
    "lora": "off",
    "context": 40,
    "check_rewards": False,
}


def letters(prompts: list[Any], completions: list[str]) -> list[float]:
    return [len(set(text)) + 0.1 * len(text) for text in completions]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char([WORDS])


@pytest.fixture(scope="module")
def place(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("policy")
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    save_checkpoint(place / "base", model, tokenizer)
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS.split() * 2))
    return place


def trained(place: Path, out: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the weights and the metrics after a few updates."""
    spec = f"{Path(__file__)}:letters"
    run = gptsmith.grpo(place / "base", place / "prompts.jsonl", reward=spec, out=out, **{**OPTIONS, **options})
    times = ("time", "update_time", "tokens_per_second")
    metrics = [{key: value for key, value in row.items() if key not in times} for row in run.metrics]
    return load_file(run.directory / "last" / "model.safetensors"), metrics


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_A2_the_update_does_not_depend_on_the_micro_batch(normalize: str, place: Path, tmp_path: Path) -> None:
    """TRL #6024 (gradients scaled by 0.5 to 4 in silence), ms-swift #10117: the loss is divided by the tokens of
    something else than the update."""
    optim = {"name": "adamw", "lr": 1e-3}
    whole, _ = trained(place, tmp_path / "whole", normalize=normalize, optim=optim)
    parts, _ = trained(place, tmp_path / "parts", normalize=normalize, optim=optim, micro_batch_size=2)
    start = load_file(place / "base" / "model.safetensors")
    moved = max(float((whole[name] - start[name]).abs().max()) for name in whole)
    for name, weights in whole.items():
        torch.testing.assert_close(parts[name], weights, rtol=0, atol=0.02 * moved)


def test_A3_answers_that_were_cut_count_in_neither_part_of_the_mean(tokenizer: Tokenizer) -> None:
    """TRL #6369, #6439: they are left out of the sum, but not of what it is divided by."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    prompt = Prompt([1, 2], "th", {}, "line 1")

    def rollout(n: int, *, ended: bool = True) -> Rollout:
        return Rollout(prompt, 0, [3 + i % 4 for i in range(n)], [-1.0 - 0.1 * i for i in range(n)], "", ended)

    def loss(answers: list[Rollout], scores: list[float]) -> float:
        method = GrpoConfig(reward=("sentiment",), group_size=len(answers), mask_unended=True, scale="none")
        arguments: Any = (None, tokenizer, None, method)
        grpo = Grpo.__new__(Grpo)
        grpo.prompts, grpo.tokenizer, grpo.rewards, grpo.method = arguments
        grpo.frozen_reference = None
        batch, _ = grpo.batch_of(Models(model), answers, torch.tensor(scores))
        batch = grpo.finish(batch, 0)
        with torch.no_grad():
            return float(grpo.loss(Models(model), batch).loss_sum / grpo.normalizer(batch)[0])

    ended = [rollout(3), rollout(7), rollout(5)]
    cut = rollout(16, ended=False)
    # The cut answer has the mean reward, so that the advantages of the others are the same with and without it.
    without, with_cut = loss(ended, [0.0, 1.0, 2.0]), loss([*ended, cut], [0.0, 1.0, 2.0, 1.0])
    assert with_cut == pytest.approx(without, rel=1e-5)
    assert without != 0


def test_E8_the_same_seed_gives_the_same_run(place: Path, tmp_path: Path) -> None:
    """verl #1683 ("no way to reproduce exactly"), #3126, #6570, ms-swift #3607."""
    one, first = trained(place, tmp_path / "one", steps=3)
    two, second = trained(place, tmp_path / "two", steps=3)
    other, third = trained(place, tmp_path / "other", steps=3, seed=1)
    assert first == second
    assert first != third
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
