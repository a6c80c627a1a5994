"""Rewards tried on degenerate answers, and the alarm that tells when a reward is hacked."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptsmith.errors import RewardError
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.train.rollout.checks import RIGHT, Findings, GoodhartAlarm, try_rewards
from gptsmith.train.rollout.rewards import Sample, open_rewards
from tests.train.rollout.test_rewards import Asked

TEXT = "what is two plus three? the sum is five of course abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char([TEXT])


def tried(function: Any, tokenizer: Tokenizer, *, limit: int = 60, said: str = "the sum is {}") -> Findings:
    prompts = [
        Asked(f"what is {i} plus 1?", {"answer": str(i + 1)}, ids=tokenizer.encode("what"), place=f"line {i}")
        for i in range(6)
    ]
    ordinary = []
    for i, prompt in enumerate(prompts):
        text = said.format(i + 1 if i % 2 else i)
        ordinary.append(Sample(prompt, [*tokenizer.encode(text), *tokenizer.end_ids[:1]], text))
    return try_rewards(open_rewards([function], tokenizer=tokenizer), prompts, tokenizer, limit, ordinary)


def rewarded(score: Any) -> Any:
    def reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        return [float(score(*row)) for row in zip(prompts, completions, answer, strict=True)]

    return reward


HACKED = {
    "empty answers": lambda prompt, text, answer: -len(text),
    "copies of the prompt": lambda prompt, text, answer: sum(word in text for word in prompt.split()),
    "a repeated token": lambda prompt, text, answer: max((text.count(letter) for letter in set(text)), default=0),
    "a repeated phrase": lambda prompt, text, answer: text.count("the s"),
    "answers of the greatest length": lambda prompt, text, answer: len(text),
}


@pytest.mark.parametrize("kind", list(HACKED))
def test_degenerate_answers_that_are_worth_more_are_named(kind: str, tokenizer: Tokenizer) -> None:
    """Visual-RFT #176: a reward was paid for "", since every answer contains it."""
    findings = tried(rewarded(HACKED[kind]), tokenizer)
    assert any(warning.startswith(f"{kind} (") for warning in findings.warnings), findings.lines()


def test_a_sound_reward_is_not_warned_of(tokenizer: Tokenizer) -> None:
    findings = tried(rewarded(lambda prompt, text, answer: text.split()[-1:] == [answer]), tokenizer)
    assert findings.warnings == []
    by_kind = {each.kind: each for each in findings.trials}
    assert set(by_kind) == {"ordinary answers", RIGHT, *HACKED}
    assert by_kind[RIGHT].mean == 1
    assert by_kind["ordinary answers"].mean == 0.5
    assert by_kind["empty answers"].mean == 0
    assert len(findings.lines()) == 7
    assert json.loads(json.dumps(findings.record()))["trials"][RIGHT]["mean"] == 1


def test_right_answers_that_are_worth_less_are_told(tokenizer: Tokenizer) -> None:
    found = tried(rewarded(lambda prompt, text, answer: f"the sum is {answer}" in text), tokenizer).warnings
    assert any(warning.startswith(f"{RIGHT} ('1'): worth 0, less than ordinary answers with 0.5") for warning in found)


def test_a_reward_that_is_always_the_same_is_told(tokenizer: Tokenizer) -> None:
    assert tried(rewarded(lambda *_: 0.25), tokenizer).warnings == [
        "every answer is worth 0.25: there is nothing to learn"
    ]


def test_a_reward_that_fails_for_a_degenerate_answer_is_found_before_training(tokenizer: Tokenizer) -> None:
    with pytest.raises(RewardError, match=r"tried on empty answers before training: .*ZeroDivisionError"):
        tried(rewarded(lambda prompt, text, answer: 1 / len(text)), tokenizer)


def test_what_is_tried(tokenizer: Tokenizer) -> None:
    seen: dict[str, list[int]] = {}

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.update(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    tried(reward, tokenizer, limit=30)
    assert max(map(len, seen.values())) == 30  # no answer is longer than one can be
    assert seen[""] == [tokenizer.eos_id]
    copied = tokenizer.encode("what is 3 plus 1?")
    assert seen["what is 3 plus 1?"] == [*copied, tokenizer.eos_id]
    full = [text for text, ids in seen.items() if len(ids) == 30 and tokenizer.eos_id not in ids]
    assert len(set(full)) == 6


def test_the_rewards_that_prefer_a_degenerate_answer_are_named(tokenizer: Tokenizer) -> None:
    def long(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    def no_digit(prompts: list[str], completions: list[str]) -> list[float]:
        return [-float(any(letter.isdigit() for letter in text)) for text in completions]

    asked = [Asked("what?", ids=[1]) for _ in range(4)]
    ordinary = [Sample(prompt, tokenizer.encode("the sum is 5"), "the sum is 5") for prompt in asked]
    rewards = open_rewards([long, no_digit], [1, 0.1], tokenizer=tokenizer)
    warnings = try_rewards(rewards, asked, tokenizer, 40, ordinary).warnings
    assert any("greatest length" in warning and "(because of long)" in warning for warning in warnings)


# The alarm ------------------------------------------------------------------------------------------------------------


def fed(alarm: GoodhartAlarm, proxies: list[float], golds: list[float], *, spread: float = 0.3, n: int = 256) -> Any:
    """Give evaluations with these means. Answers to hard prompts are worse by `spread`, and all have noise."""
    random_number = random.Random(0)
    hard = [random_number.gauss(0, spread) for _ in range(n)]
    messages = []
    for step, (proxy, gold) in enumerate(zip(proxies, golds, strict=True)):
        values = [[mean + h + random_number.gauss(0, 0.1) for h in hard] for mean in (proxy, gold)]
        messages.append(alarm.add(10 * step, *values))
    return messages


def test_the_alarm_names_the_step_and_the_best_one() -> None:
    alarm = GoodhartAlarm("vader")
    messages = fed(alarm, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5, 0.6, 0.7, 0.7, 0.7, 0.5, 0.4])
    assert [message is not None for message in messages] == [False] * 5 + [True, False]
    assert alarm.step == 50
    assert alarm.best_step in (20, 30, 40)
    assert "step 50: the reward rises at the cost of vader. Since step 40" in messages[5]
    assert f"best at step {alarm.best_step}" in messages[5]


@pytest.mark.parametrize(
    ("proxies", "golds"),
    [
        ([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4], [0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6]),  # both rise
        ([0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], [0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),  # both fall: that is another fault
        ([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4], [0.5] * 7),  # gold does not move
        ([0.5] * 40, [0.5] * 40),
    ],
)
def test_there_is_no_alarm_without_a_fall(proxies: list[float], golds: list[float]) -> None:
    assert not any(fed(GoodhartAlarm("gold"), proxies, golds))


def test_prompts_are_compared_with_themselves() -> None:
    """The difference is a thirtieth of the spread between prompts, and four standard errors of the noise."""
    alarm = GoodhartAlarm("gold")
    assert any(fed(alarm, [0, 0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.4, 0.4], spread=3.0))


def test_the_alarm_goes_on_where_it_was() -> None:
    whole, halves = GoodhartAlarm("gold"), GoodhartAlarm("gold")
    numbers = random.Random(1)
    rows = [
        ([numbers.random() + 0.1 * i for _ in range(64)], [numbers.random() - 0.1 * i for _ in range(64)])
        for i in range(6)
    ]
    for step, row in enumerate(rows):
        expected = whole.add(step, *row)
        resumed = GoodhartAlarm("gold")
        resumed.load_state(json.loads(json.dumps(halves.state())))
        halves = resumed
        assert halves.add(step, *row) == expected
    assert whole.step is not None
    assert halves.state() == whole.state()


def test_scores_that_cannot_be_compared_are_refused() -> None:
    alarm = GoodhartAlarm("gold")
    for proxy, gold in [([1.0], []), ([], []), ([float("nan")], [1.0])]:
        with pytest.raises(ValueError, match="equally many finite ones"):
            alarm.add(0, proxy, gold)
    alarm.add(0, [1.0], [1.0])
    with pytest.raises(ValueError, match="2 held-out answers, but 1"):
        alarm.add(1, [1.0, 2.0], [1.0, 2.0])


def test_few_answers_raise_no_alarm() -> None:
    assert not any(fed(GoodhartAlarm("gold"), [0, 1, 2, 3], [3, 2, 1, 0], n=4))


# Planted rewards ------------------------------------------------------------------------------------------------------


def planted() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "alignment" / "reward_checks.py"
    specification = importlib.util.spec_from_file_location("reward_checks", path)
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules["reward_checks"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_planted_rewards_raise_alarms_in_time_and_sound_ones_none() -> None:
    toy = planted()
    assert len(toy.HACKABLE) == len(toy.SOUND) == 10
    hacked = [toy.optimize(name, score, seed=0, until_alarm=True) for name, score in toy.HACKABLE.items()]
    in_time = [each.name for each in hacked if each.alarm is not None and each.lost_at_alarm < 0.1]
    assert len(in_time) >= 9, {each.name: (each.alarm, each.lost_at_alarm) for each in hacked}
    for name, score in toy.SOUND.items():
        sound = toy.optimize(name, score, seed=0)
        assert sound.alarm is None, name
        assert sound.gold[-1] > sound.gold[0], name
        assert toy.warnings(score, seed=0) == [], name
