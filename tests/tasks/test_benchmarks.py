"""The records of the built-in benchmarks, as they are in the packages."""

from __future__ import annotations

from collections import Counter

import pytest

from gptsmith.errors import UsageError
from gptsmith.tasks import benchmarks

pytestmark = pytest.mark.network


def test_mmlu() -> None:
    rows, shots = list(benchmarks.mmlu()), list(benchmarks.mmlu_shots())
    assert len(rows) == 13_985
    assert Counter(Counter(row["subject"] for row in shots).values()) == {5: 57}
    assert {row["subject"] for row in rows} == {row["subject"] for row in shots}
    assert len({row["subject"] for row in rows}) == 57
    assert all(len(row["choices"]) == 4 and all(row["choices"]) and row["answer"] in "ABCD" for row in rows)
    assert all("Let's think" not in row["question"] and "\n(A)" not in row["question"] for row in rows)
    assert all(row["solution"].endswith((f"({row['answer']}).", f"({row['answer']})")) for row in shots)
    # Two medical subjects have each other's questions as solved examples, as published; none has its own.
    whole = {(row["subject"], row["question"], *row["choices"]) for row in rows}
    assert not whole & {(row["subject"], row["question"], *row["choices"]) for row in shots}


def test_one_subject() -> None:
    rows = list(benchmarks.mmlu(["anatomy"]))
    assert len(rows) == 134
    assert rows[0]["question"] == 'A "dished face" profile is often associated with'
    assert rows[0]["choices"][1] == "a recessive maxilla due to failure of elongation of the cranial base."
    with pytest.raises(UsageError, match="Did you mean 'anatomy'"):
        list(benchmarks.mmlu(["anatomie"]))


def test_bbh() -> None:
    rows, shots = list(benchmarks.bbh()), list(benchmarks.bbh_shots())
    assert len(rows) == 6_511
    assert Counter(Counter(row["task"] for row in shots).values()) == {3: 27}
    assert all(row["question"] and row["answer"] and row["instruction"] for row in rows)
    assert all(row["solution"].endswith(f"the answer is {row['answer']}.") for row in shots)


def test_worked_examples() -> None:
    assert [row["answer"] for row in benchmarks.gsm8k_shots()] == ["4", "201", "140", "146", "1", "180", "115", "52"]
    assert [row["answer"] for row in benchmarks.math_shots()][:2] == ["0", "1000"]
    problems = list(benchmarks.math_problems())
    assert len(problems) == 5_000
    assert len({row["subject"] for row in problems}) == 7


def test_banking77() -> None:
    rows = list(benchmarks.banking77())
    assert len(rows) == 3_080
    assert len(rows[0]["intents"]) == 77
    assert all(row["answer"] in row["intents"] for row in rows)
