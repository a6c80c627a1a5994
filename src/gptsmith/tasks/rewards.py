"""Rewards that check answers: functions `(prompts, completions, **columns) -> scores`, as training takes them.

gptsmith grpo MODEL task:arithmetic --reward gptsmith.tasks.rewards:task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptsmith.errors import DataError
from gptsmith.tasks.answers import find_answer, same_answer
from gptsmith.tasks.specs import open_task


def task(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
    """Score each completion as its task does: from 0, wrong, to 1, right. Columns: `task` and `index`."""
    tasks, indices = _column("task", columns), _column("index", columns)
    return [
        open_task(spec).score(int(i), _text(completion))
        for spec, i, completion in zip(tasks, indices, completions, strict=True)
    ]


def exact_answer(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
    """Score 1.0 for completions whose answer is that of the column `answer`, 0.0 for others.

    The answer of a completion is what `find_answer` finds in it, or all of it. That of the column is what is marked (by
    tags, \\boxed{…}, ####), or all of it. Numbers are compared as numbers.
    """
    scores = []
    for expected, completion in zip(_column("answer", columns), completions, strict=True):
        if expected is None:
            raise DataError("a prompt has no answer to compare with: the column answer is empty.")
        text, right = _text(completion), str(expected)
        found, known = find_answer(text), find_answer(right, numbers=False) or right
        scores.append(float(same_answer(text, known) or (found is not None and same_answer(found, known))))
    return scores


def _column(name: str, columns: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    if name not in columns:
        known = ", ".join(columns) or "none"
        raise DataError(f"this reward needs prompts with a column {name!r}; the columns are: {known}.")
    return columns[name]


def _text(completion: Any) -> str:
    """Return the text of a completion, which may be a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message["content"]) for message in completion)
