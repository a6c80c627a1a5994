"""Public reports about preferences and reward models, replayed. Each docstring names the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.errors import UsageError
from gptsmith.formats.hf_heads import save_classifier
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.train.rollout.rewards import Sample, open_rewards
from tests.factories import tiny_model
from tests.traps.test_reinforcement import Asked


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["abcdefghijklmnopqrstuvwxyz"])


def reward_model(directory: Path, tokenizer: Tokenizer, scale: Any = None) -> SequenceClassifier:
    torch.manual_seed(0)
    model = SequenceClassifier(tiny_model(vocab_size=tokenizer.vocab_size), HeadConfig(("reward",), "regression"))
    directory.mkdir()
    save_classifier(model, directory, pad_token_id=tokenizer.eos_id, scale=scale)
    tokenizer.save(directory)
    return model


def test_F1_the_score_is_read_at_the_last_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """transformers #35352, TRL #6952, #5813, gpt-neox #1285: padding has the id of the end token, so the score is read
    before the end of the answer, or at an end token within the prompt."""
    model = reward_model(tmp_path / "rm", tokenizer)
    end = int(tokenizer.eos_id or 0)
    texts = [
        ([end, 5, end, 6], [7, 8, end]),
        ([5], [end]),
        ([end] * 3, [9, 10, 11, 12, 13, 14]),
        ([4, end], [end, end]),
    ]
    samples = [Sample(Asked(ids=prompt), answer, "") for prompt, answer in texts]
    scores = open_rewards([str(tmp_path / "rm")], tokenizer=tokenizer).score(samples).total
    with torch.no_grad():
        alone = [model(torch.tensor([[*prompt, *answer]])).item() for prompt, answer in texts]
    assert scores == pytest.approx(alone, abs=1e-6)
    assert len({round(score, 3) for score in scores}) == 4


def test_F5_rewards_have_the_scale_that_is_stored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """lm-human-preference-details #8 and unnormalized rewards that swamp the policy's loss: mean and spread are stored
    with the model, and applied."""
    reward_model(tmp_path / "raw", tokenizer)
    reward_model(tmp_path / "scaled", tokenizer, scale=(3.0, 0.25))
    samples = [Sample(Asked(ids=[4, 5]), [6 + i, 7], "") for i in range(4)]
    raw, scaled = (
        open_rewards([str(tmp_path / n)], tokenizer=tokenizer).score(samples).total for n in ("raw", "scaled")
    )
    assert scaled == pytest.approx([(score - 3) / 0.25 for score in raw], abs=1e-5)


def test_F6_another_tokenizer_than_the_policys_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """RLHF with a reward model of another family: ids mean other texts, and scores are noise."""
    reward_model(tmp_path / "rm", tokenizer)
    with pytest.raises(UsageError, match=r"has another tokenizer than the model that is trained: the token \d+ is 'z'"):
        open_rewards([str(tmp_path / "rm")], tokenizer=train_char(["abcdefghijklmnopqrstuvwxyé"]))
