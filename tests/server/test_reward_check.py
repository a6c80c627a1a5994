"""How well a reward model predicts a person's choices: against scores that are computed here."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats.hf_heads import load_classifier, save_classifier
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.server.reward_check import RewardCheck
from gptsmith.server.service import Settings
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate

spec = importlib.util.spec_from_file_location("server_conftest", Path(__file__).parent / "conftest.py")
assert spec is not None
assert spec.loader is not None
server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(server)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made: Tokenizer = server.make_tokenizer()
    return made


def write_reward_model(directory: Path, tokenizer: Tokenizer, seed: int, labels: tuple[str, ...] = ("reward",)) -> Path:
    directory.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    classifier = SequenceClassifier(server.make_model(tokenizer, seed), HeadConfig(labels, "regression"))
    save_classifier(classifier, directory)
    tokenizer.save(directory)
    return directory


def rows(count: int) -> list[dict[str, Any]]:
    draw = random.Random(1)
    words = ["the cat", "a mat", "sat on", "Rome", "true", "false"]
    found = []
    for _ in range(count):
        chosen, rejected = (" ".join(draw.sample(words, 3)) for _ in range(2))
        prompt = [{"role": "user", "content": draw.choice(words)}]
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected + ".", "choice": "left"})
    return found


def predictions(directory: Path, tokenizer: Tokenizer, choices: list[dict[str, Any]]) -> list[bool]:
    """Return whether the score at the end of the answer, as it is served, is higher for the chosen one."""
    classifier, _ = load_classifier(directory)
    template = ChatTemplate(tokenizer)

    def score(row: dict[str, Any], name: str) -> float:
        ids = [*template.encode(row["prompt"]), *tokenizer.encode(row[name]), tokenizer.eos_id]
        with torch.no_grad():
            return float(classifier(torch.tensor([ids]))[0, 0])

    return [score(row, "chosen") > score(row, "rejected") for row in choices]


def test_the_accuracy_is_that_of_the_scores(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = write_reward_model(tmp_path / "rm", tokenizer, 1)
    choices = rows(30)
    expected = predictions(directory, tokenizer, choices)
    assert 5 < sum(expected) < 25
    status = RewardCheck(str(directory)).status(choices, 0, seconds=60)
    assert (status.name, status.scored, status.correct) == ("rm", 30, sum(expected))
    assert status.accuracy == sum(expected) / 30
    assert (status.pending, status.skipped) == (0, 0)


def test_choices_are_scored_once_and_a_few_at_a_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = write_reward_model(tmp_path / "rm", tokenizer, 1)
    choices = rows(6)
    check = RewardCheck(str(directory))
    assert check.status([], 0).accuracy is None
    for i in range(1, 7):
        status = check.status(choices, 0, seconds=0)
        assert (status.scored, status.pending) == (i, 6 - i)
    expected = predictions(directory, tokenizer, choices)
    assert status.correct == sum(expected)
    status = check.status(choices[3:], 1, seconds=60)  # another file
    assert (status.scored, status.correct) == (3, sum(expected[3:]))


def test_a_model_that_is_trained_again_is_asked_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = write_reward_model(tmp_path / "rm", tokenizer, 1)
    choices = rows(30)
    check = RewardCheck(str(directory))
    before = check.status(choices, 0, seconds=60).correct
    (directory / "model.safetensors").write_bytes(b"half a model")
    assert check.status(choices, 0, seconds=60).correct == before
    write_reward_model(directory, tokenizer, 2)
    expected = sum(predictions(directory, tokenizer, choices))
    assert expected != before
    assert check.status(choices, 0, seconds=60).correct == expected


def test_what_cannot_be_scored_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = write_reward_model(tmp_path / "rm", tokenizer, 1)
    good = rows(1)[0]
    odd = [
        good | {"chosen": "the cat " * 2000},  # longer than the context
        good | {"chosen": [1]},
        good | {"prompt": [{"role": "nobody", "content": "x"}]},
        good | {"rejected": ""},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ]
    status = RewardCheck(str(directory)).status([*odd, good], 0, seconds=60)
    assert (status.scored, status.skipped) == (1, 5)


def test_a_reward_model_that_is_none_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    two = write_reward_model(tmp_path / "two", tokenizer, 1, ("good", "bad"))
    with pytest.raises(UsageError, match=r"--reward-model .*two is a classifier with 2 labels"):
        RewardCheck(str(two))
    with pytest.raises(CheckpointError, match="no model at"):
        RewardCheck(str(tmp_path / "absent"))


def test_the_server_counts_predictions(tmp_path: Path, tokenizer: Tokenizer, start: Callable[..., Any]) -> None:
    directory = write_reward_model(tmp_path / "rm", tokenizer, 1)
    file = tmp_path / "preferences.jsonl"
    choices = rows(8)
    file.write_text("".join(json.dumps(row) + "\n" for row in choices[:7]))
    site = start(Settings(collect=file, reward_model=str(directory)))
    body = {"model": "tiny", "prompt": choices[7]["prompt"], "choice": "right"}
    body["completions"] = [choices[7]["rejected"], choices[7]["chosen"]]
    for i in range(3):
        answer = httpx.post(f"{site.url}/api/comparisons", json=body | {"choice": ("right", "tie", "both_bad")[i]})
        assert answer.status_code == 200
    found = answer.json()["reward_model"]
    expected = sum(predictions(directory, tokenizer, choices))
    assert (found["scored"], found["correct"], found["pending"]) == (8, expected, 0)
