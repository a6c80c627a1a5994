"""Tasks about letters: questions of their seed alone, and scores that only right answers have."""

from __future__ import annotations

import collections
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.errors import UsageError
from gptsmith.tasks import make_task
from gptsmith.tasks.base import AnsweredTask

NAMES = ("sort-letters", "spell-backwards", "count-letters")


def solve(question: str) -> str:
    """Answer a question from its text alone."""
    if word := re.fullmatch(r"Sort the letters of (\w+):", question):
        counts = collections.Counter(word[1])
        return "".join(letter * counts[letter] for letter in "abcdefghijklmnopqrstuvwxyz")
    if word := re.fullmatch(r"Spell (\w+) backwards:", question):
        return "".join(word[1][-k] for k in range(1, len(word[1]) + 1))
    found = re.fullmatch(r"How many times is (\w) in (\w+)\?", question)
    assert found is not None
    return str(len(re.findall(found[1], found[2])))


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), letters=st.integers(2, 12), i=st.integers(0, 99))
def test_only_right_answers_score(name: str, seed: int, letters: int, i: int) -> None:
    task = make_task(name, num_examples=100, letters=letters, seed=seed)
    ((role, question),) = [(message["role"], message["content"]) for message in task.example(i)]
    right = solve(question)
    assert role == "user"
    assert isinstance(task, AnsweredTask)
    assert task.answer(i) == right
    for answer in (right, f" {right.upper()}.\n", f"The answer is **{right}**", f"{question} {right}"):
        assert task.score(i, answer) == 1.0
    for answer in ("", "?", right + right, f"{right} {right}x", f"x{right}", right[1:]):
        assert task.score(i, answer) == 0.0
    assert make_task(name, num_examples=i + 1, letters=letters, seed=seed).example(i) == task.example(i)


@pytest.mark.parametrize("name", NAMES)
def test_answers_vary(name: str) -> None:
    task = make_task(name)
    assert isinstance(task, AnsweredTask)
    answers = collections.Counter(task.answer(i) for i in range(len(task)))
    assert max(answers.values()) < 0.75 * len(task)
    assert len({str(task.example(i)) for i in range(200)}) > 100


@pytest.mark.parametrize("options", [{"num_examples": 0}, {"letters": 1}, {"alphabet": 27}, {"alphabet": 1}])
def test_bad_options(options: dict[str, int]) -> None:
    for name in NAMES:
        with pytest.raises(UsageError, match="tasks about words need"):
            make_task(name, **options)
    with pytest.raises(IndexError):
        make_task(NAMES[0], num_examples=3).example(3)
