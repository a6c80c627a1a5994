"""Addition problems."""

from __future__ import annotations

import re

import pytest

from gptsmith.errors import UsageError
from gptsmith.tasks import make_task
from gptsmith.tasks.arithmetic import Arithmetic


def test_problems_depend_on_the_seed_alone() -> None:
    one, same, other = Arithmetic(), Arithmetic(num_examples=5), Arithmetic(seed=1)
    assert [one.example(i) for i in range(5)] == [same.example(i) for i in range(5)]
    assert [one.example(i) for i in range(5)] != [other.example(i) for i in range(5)]
    assert len({str(one.example(i)) for i in range(len(one))}) > 900


def test_scores_are_those_of_the_sums() -> None:
    task = Arithmetic(num_examples=200, digits=3)
    for i in range(len(task)):
        ((role, content),) = [(message["role"], message["content"]) for message in task.example(i)]
        a, b = map(int, re.findall(r"\d+", content))
        assert role == "user"
        assert 0 <= max(a, b) < 1000
        for answer in (f"{a + b}", f" {a + b:,}.\n", f"{content} {a + b}", f"Well: {a} and {b} are **{a + b}**"):
            assert task.score(i, answer) == 1.0
        for answer in ("", "I do not know", f"{a + b + 1}", f"-{a + b}" if a + b else "1", f"{a + b} or {a + b + 2}"):
            assert task.score(i, answer) == 0.0


def test_bad_options_and_indices_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one example"):
        make_task("arithmetic", num_examples=0)
    with pytest.raises(IndexError):
        Arithmetic(num_examples=3).example(3)
    with pytest.raises(UsageError, match="there is no task 'arithmetics'. Did you mean 'arithmetic'?"):
        make_task("arithmetics")
