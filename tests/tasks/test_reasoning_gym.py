"""Tasks of reasoning-gym, where it is installed, and what is said where it is not."""

from __future__ import annotations

import sys

import pytest

from gptsmith.errors import UsageError
from gptsmith.tasks.rewards import task
from gptsmith.tasks.specs import open_task, task_rows


def test_it_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UsageError, match=r'not installed. Install it: pip install "gptsmith\[reasoning\]"'):
        open_task("reasoning-gym:leg_counting?seed=17")


@pytest.mark.filterwarnings("ignore")  # of its own imports
@pytest.mark.parametrize("name", ["spell_backward", "basic_arithmetic", "game_of_life", "prime_factorization"])
def test_own_answers_score(name: str) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    spec = f"reasoning-gym:{name}?size=5&seed=3"
    rows = list(task_rows(spec))
    columns = {key: [columns[key] for _, columns in rows] for key in ("task", "index", "answer")}
    assert len(rows) == 5
    assert task([], columns["answer"], **columns) == [1.0] * 5
    assert task([], [f"Well: <answer>{answer}</answer>" for answer in columns["answer"]], **columns) == [1.0] * 5
    assert max(task([], ["{}", "x", "", "[1, 2", "((("], **columns)) < 0.5
    assert [row for row, _ in task_rows(spec)] == [row for row, _ in rows]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spell_backwards", "Did you mean 'spell_backward'"),
        ("spell_backward?min_word_length=3", "has no option 'min_word_length'. Did you mean 'min_word_len'"),
        ("spell_backward?size=many", "size must be an integer, not 'many'"),
        ("spell_backward?size=0", "size must be at least 1"),
        ("spell_backward?min_word_len=9&max_word_len=3", "max_word_len must be >= min_word_len"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    with pytest.raises(UsageError, match=message):
        open_task(f"reasoning-gym:{spec}")
