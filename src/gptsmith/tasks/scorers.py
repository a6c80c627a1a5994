"""Scorers of generated answers, by the `metric` of a task."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.tasks.answers import find_answer, same_answer
from gptsmith.tasks.definition import Item, load_function

ItemScorer = Callable[[str, Item], float]
"""Takes a generated answer and its item; returns 1 for right, 0 for wrong, or something in between."""


def find_scorer(metric: str | Mapping[str, str]) -> ItemScorer:
    """Return the scorer that a task's `metric` names. Raises UsageError for an unknown one."""
    name, value = (metric, "") if isinstance(metric, str) else next(iter(metric.items()))
    if name == "exact_match":
        return lambda text, item: float(any(text.strip() == answer.strip() for answer in accepted(item)))
    if name == "number":
        return _number
    if name == "regex":
        return _regex(value)
    if name == "python":
        return _python(value)
    raise UsageError(f"unknown metric {name!r}.")


def accepted(item: Item) -> tuple[str, ...]:
    """Return the accepted answers of an item."""
    return item.answer if isinstance(item.answer, tuple) else (item.answer_text,)


def _number(text: str, item: Item) -> float:
    found = find_answer(text)
    return float(found is not None and any(same_answer(found, answer) for answer in accepted(item)))


def _regex(pattern: str) -> ItemScorer:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the metric's regular expression {pattern!r} is wrong: {error}.") from None

    def score(text: str, item: Item) -> float:
        found = compiled.search(text)
        if found is None:
            return 0.0
        answer = next((group for group in found.groups() if group is not None), found[0])
        return float(any(same_answer(answer, right) for right in accepted(item)))

    return score


def _python(spec: str) -> ItemScorer:
    function = load_function(spec)

    def score(text: str, item: Item) -> float:
        try:
            return float(function(text, item))
        except Exception as error:  # whatever the user's function raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise GptsmithError(f"the metric {spec} fails on example {item.index}: {reason}.") from error

    return score
