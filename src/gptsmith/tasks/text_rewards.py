"""Rewards that look at the text of an answer alone, and rewards by name. No torch is needed here.

gptsmith grpo MODEL PROMPTS --reward sentiment
gptsmith grpo MODEL PROMPTS --reward exact_answer --reward 'format:<answer>.*</answer>' --reward-weights 1,0.2
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gptsmith.errors import UsageError
from gptsmith.registry import Registry
from gptsmith.tasks.rewards import exact_answer, task

RewardFunction = Callable[..., Iterable[Any]]
"""`function(prompts, completions, **columns)`: one number for each completion."""


def sentiment(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Score the sentiment of each completion from -1, negative, to 1, positive, with VADER's lexicon (Hutto and Gilbert
    2014). It grows with the number of strong words, so a policy that it alone rewards learns to repeat them."""
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in completions]


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UsageError(
            "the reward sentiment needs the package vaderSentiment: pip install 'gptsmith[align]'."
        ) from None
    return SentimentIntensityAnalyzer()


def no_repeats(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Score the share of each completion's sequences of three words that are different ones: 1 without repetitions.

    Of fewer than three words, the share of different words; an empty completion gets 0.
    """
    scores = []
    for text in completions:
        words = text.lower().split()
        grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)] or [(word,) for word in words]
        scores.append(len(set(grams)) / len(grams) if grams else 0.0)
    return scores


def length(words: str) -> RewardFunction:
    """Return the reward for a length in words: 1 at that length, less the farther from it, 0 at none or at the double.

    Raises UsageError for what is no number above 0.
    """
    if not re.fullmatch(r"[0-9]+", words) or not int(words):
        raise UsageError(f"--reward length:{words}: write the number of words, such as length:40.")
    wanted = int(words)

    def length(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [max(0.0, 1 - abs(len(text.split()) - wanted) / wanted) for text in completions]

    return length


def format(regex: str) -> RewardFunction:
    """Return the reward for completions that match a regular expression as a whole, around which space does not count:
    1, else 0. `.` matches the end of a line, too. Raises UsageError for what is no regular expression."""
    try:
        pattern = re.compile(regex, re.DOTALL)
    except re.error as error:
        raise UsageError(f"--reward format:{regex} is no regular expression: {error}.") from None
    if pattern.fullmatch(""):
        raise UsageError(
            f"--reward format:{regex} pays for an empty answer. Write what an answer must look like, such as "
            "'format:<answer>.+</answer>'."
        )

    def format(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [float(pattern.fullmatch(text.strip()) is not None) for text in completions]

    return format


def without_argument(function: RewardFunction) -> Callable[[str], RewardFunction]:
    """Return how to make a reward that takes nothing after its name."""

    def make(argument: str) -> RewardFunction:
        if argument:
            raise UsageError(
                f"--reward {function.__name__}:{argument}: {function.__name__} takes nothing after a colon."
            )
        return function

    return make


def _sentiment(argument: str) -> RewardFunction:
    _analyzer()  # is the package there?
    return without_argument(sentiment)(argument)


REWARDS: Registry[Callable[[str], RewardFunction]] = Registry(
    "reward",
    {
        "task": without_argument(task),
        "exact_answer": without_argument(exact_answer),
        "sentiment": _sentiment,
        "no_repeats": without_argument(no_repeats),
        "length": length,
        "format": format,
    },
)
"""Rewards by name. Each is made from what follows its name and a colon, "" if nothing does."""


def register_reward(name: str, make: Callable[[str], RewardFunction]) -> None:
    """Make a reward known as `name`: `--reward name:argument` is `make("argument")`, a function `(prompts, completions,
    **columns)` that returns a number for each completion."""
    REWARDS.register(name, make)
