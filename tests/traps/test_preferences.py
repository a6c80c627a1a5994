"""Public reports about preferences and reward models, replayed. Each docstring names the report."""

from __future__ import annotations

import itertools
import json
import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.errors import UsageError
from gptsmith.formats.hf_heads import save_classifier
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.train.objectives.preference_losses import LossOptions, PairLogprobs, ipo_loss, mismatched
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


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of characters, and pairs whose answers have very unequal lengths."""
    place = tmp_path_factory.mktemp("preferences")
    letters = train_char([string.ascii_lowercase + " ?.\n"])
    save_checkpoint(place / "base", tiny_model(vocab_size=letters.vocab_size, max_position_embeddings=64), letters)
    rows = [
        {"prompt": f"say {word}?", "chosen": f" {word}" * (1 + i % 3), "rejected": " no" * (1 + i % 5)}
        for i, word in enumerate(("cat", "dog", "bird", "fish", "tree", "house", "road", "sea", "sun", "moon"))
    ]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place / "base", place / "pairs.jsonl"


def dpo(preferences: tuple[Path, Path], out: Path, **options: Any) -> gptsmith.Run:
    quiet = {"sample_tokens": 0, "device": "cpu", "compile": "off", "log_every": 1, "steps": 2, "eval_every": 2}
    base, pairs = preferences
    return gptsmith.dpo(base, pairs, out=out, **{**quiet, "batch_size": 4, "lora": "off", **options})


def first_loss(run: gptsmith.Run) -> float:
    return float(next(row["loss"] for row in run.metrics if "loss" in row))


def test_A5_ipo_averages_over_the_tokens_of_each_answer() -> None:
    """TRL #1265, #1677, torchtune #1291: IPO with sums over tokens; LLaMA-Factory #6722: divided twice."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 11), (7, 2), (1, 1)]
    policy = [[torch.randn(n, generator=generator) for n in pair] for pair in lengths]
    reference = [[torch.randn(n, generator=generator) for n in pair] for pair in lengths]
    beta = 0.3
    expected = [
        ((c - rc).mean() - (r - rr).mean() - 1 / (2 * beta)) ** 2
        for (c, r), (rc, rr) in zip(policy, reference, strict=True)
    ]
    sums = [torch.stack([pair[i].sum() for pair in group]) for group in (policy, reference) for i in (0, 1)]
    counts = torch.tensor(lengths).T
    pairs = PairLogprobs(sums[0], sums[1], counts[0], counts[1], sums[2], sums[3])
    torch.testing.assert_close(ipo_loss(pairs, LossOptions(beta=beta)), torch.stack(expected))


def test_A6_every_loss_is_another_one(preferences: tuple[Path, Path], tmp_path: Path) -> None:
    """ms-swift #10167: the loss that was chosen is ignored, and it is always the sigmoid. Soup 0.73.3: four options are
    validated, documented and read by nothing."""
    found = {}
    for loss in ("sigmoid", "ipo", "hinge", "simpo", "orpo", "kto"):
        found[loss] = first_loss(dpo(preferences, tmp_path / loss, loss=loss))
    for one, other in itertools.combinations(found, 2):
        assert found[one] != pytest.approx(found[other], abs=1e-3), (one, other)


def test_F2_the_first_loss_is_that_of_no_difference(preferences: tuple[Path, Path], tmp_path: Path) -> None:
    """TRL #744, #2042, LLaMA-Factory #10779: with dropout, policy and reference differ before the first update."""
    run = dpo(preferences, tmp_path / "run")
    assert first_loss(run) == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(UsageError, match="with dropout, answers would differ"):
        dpo(preferences, tmp_path / "dropout", dropout=0.1)


def test_F3_both_log_probabilities_are_logged(preferences: tuple[Path, Path], tmp_path: Path) -> None:
    """dpo #8, #32, TRL #800, LLaMA-Factory #6153, #7643: chosen and rejected answers both become less probable."""
    run = dpo(preferences, tmp_path / "run")
    row = next(row for row in run.metrics if "chosen_logprob" in row)
    assert row["chosen_logprob"] < 0
    assert row["rejected_logprob"] < 0
    assert row["chosen_logprob"] != row["rejected_logprob"]


def test_F4_an_answer_is_never_mismatched_with_its_own_prompt() -> None:
    """TRL #1380, #1911, #2153, LLaMA-Factory #7509: in an odd batch a pair is compared with itself, one row is NaN."""
    for prompts in (list("ab"), list("abc"), list("aab"), list("abbca"), [*"ab" * 3, "c"]):
        partner = mismatched(prompts)
        assert all(prompts[i] != prompts[j] for i, j in enumerate(partner))
    with pytest.raises(ValueError, match="at least 2 rows"):
        mismatched(["a"])
