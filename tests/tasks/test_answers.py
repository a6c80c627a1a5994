"""Answers that are found by rule, and the rewards that compare them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.errors import DataError
from gptsmith.tasks.answers import find_answer, last_number, same_answer
from gptsmith.tasks.rewards import exact_answer, task


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I think so.\n<answer> 42 </answer> or 43", "42"),
        ("<answer>1</answer><answer>two\nlines</answer>", "two\nlines"),
        (r"so \boxed{\frac{1}{2}} and 3", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{never closed 7", "7"),
        ("He has 3 + 4 = 7 apples.\n#### 7 apples\nbye 9", "7 apples"),
        ("#### 1,234", "1,234"),
        ("first 3, then 1,250.50.", "1,250.50"),
        ("17-5", "5"),
        ("it is -5", "-5"),
        ("x=-0.5", "-0.5"),
        ("\N{MINUS SIGN}3", "-3"),
        ("2 + 2 = 4", "4"),
        ("1,2,3", "3"),
        ("one of 12345,678", "678"),
        ("about .5", ".5"),
        ("no number", None),
        ("", None),
        ("<answer>open", None),
    ],
)
def test_find_answer(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc \n.,:;!?", max_size=10))
def test_the_last_number_is_found_in_any_text(number: int, text: str) -> None:
    assert last_number(f"{text} 7 {number}") == str(number)
    found = last_number(f"7 {text} {number:,}. ")
    assert found is not None
    assert same_answer(found, str(number))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,000", "1000.0", True),
        ("$5", "5", True),
        (".5", "0.50", True),
        ("-3", "3", False),
        ("Paris.", " paris", True),
        ("a  b", "a b", True),
        ("1/2", "0.5", False),
        ("", "0", False),
        ("1,00", "100", False),
        ("1e3", "1000", False),
        ("-", "0", False),
    ],
)
def test_same_answer(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same


def test_exact_answer() -> None:
    completions = ["It is 7.", "#### 8", r"\boxed{7}", "", "Paris", "I say <answer>Paris</answer>", "London", "3 or 4"]
    answers = [7, "She has 3 + 4.\n#### 7", "7.0", "7", "paris", "Paris", "Paris", "4"]
    assert exact_answer([], completions, answer=answers) == [1, 0, 1, 0, 1, 1, 0, 1]
    # texts with a number in them are compared as a whole
    assert exact_answer([], ["3 cats", "3 dogs"], answer=["3 cats", "3 cats"]) == [1, 0]
    assert exact_answer([], [[{"role": "assistant", "content": "7"}]], answer=["7"]) == [1]


def test_rewards_need_their_columns() -> None:
    with pytest.raises(DataError, match="a column 'answer'; the columns are: solution"):
        exact_answer([], ["7"], solution=["7"])
    with pytest.raises(DataError, match="column answer is empty"):
        exact_answer([], ["7"], answer=[None])
    with pytest.raises(DataError, match="a column 'task'; the columns are: none"):
        task([], ["7"])
