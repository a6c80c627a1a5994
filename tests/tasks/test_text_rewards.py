"""Rewards that look at the text of an answer alone."""

from __future__ import annotations

import sys

import pytest

from gptsmith.errors import UsageError
from gptsmith.tasks import text_rewards
from gptsmith.tasks.text_rewards import REWARDS, no_repeats, register_reward, sentiment


def scores(spec: str, *texts: str) -> list[float]:
    name, _, argument = spec.partition(":")
    return list(REWARDS.find(name)(argument)(["asked"] * len(texts), list(texts)))


def test_sentiment() -> None:
    pytest.importorskip("vaderSentiment", reason="needs vaderSentiment")
    good, bad, neutral = sentiment([""] * 3, ["What a wonderful, funny film!", "A terrible, boring mess.", "A film."])
    assert good > 0.5
    assert bad < -0.5
    assert neutral == 0


def test_sentiment_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    text_rewards._analyzer.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'gptsmith\[align\]'"):
        scores("sentiment", "fine")


def test_repetitions_are_worth_less() -> None:
    """minimind's samples after reinforcement learning repeat one phrase for a paragraph."""
    once, twice, often, short, empty = no_repeats(
        [""] * 5, ["we dance in the evening", "we dance in a row we dance in a row", "we dance " * 20, "no no", "  "]
    )
    assert once == 1
    assert twice == 5 / 8
    assert often == pytest.approx(2 / 38)
    assert short == 0.5
    assert empty == 0


def test_length_has_its_highest_at_the_wanted_number_of_words() -> None:
    assert scores("length:4", "", "a b", "a b c d", "a b c d e", "a " * 8, "a " * 20) == [0, 0.5, 1, 0.75, 0, 0]
    for bad in ("", "0", "-3", "long", "4.5"):
        with pytest.raises(UsageError, match="write the number of words"):
            scores(f"length:{bad}")


def test_format_matches_the_whole_answer() -> None:
    spec = r"format:<think>.+</think>\s*<answer>\d+</answer>"
    right = "\n<think>one\nand two</think> <answer>3</answer> "
    assert scores(spec, right, "so " + right, right + "so", "<think></think><answer>3</answer>", "") == [1, 0, 0, 0, 0]
    with pytest.raises(UsageError, match="is no regular expression: unterminated"):
        scores("format:[a")
    with pytest.raises(UsageError, match="pays for an empty answer"):
        scores("format:.*")


def test_rewards_of_others() -> None:
    with pytest.raises(UsageError, match="no_repeats takes nothing after a colon"):
        scores("no_repeats:3")
    register_reward(
        "vowels", lambda argument: lambda prompts, completions: [text.count(argument) for text in completions]
    )
    try:
        assert scores("vowels:a", "banana", "bee") == [3, 0]
    finally:
        del REWARDS["vowels"]
    with pytest.raises(UsageError, match="is part of gptsmith"):
        register_reward("length", REWARDS["length"])
