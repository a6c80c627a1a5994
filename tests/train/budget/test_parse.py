from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.errors import UsageError
from gptsmith.train.budget.parse import Budget


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("5m", "seconds", 300),
        ("2h", "seconds", 7200),
        ("90s", "seconds", 90),
        ("1h30m", "seconds", 5400),
        ("1.5 min", "seconds", 90),
        ("1d", "seconds", 86400),
        ("1e15flop", "flops", 1e15),
        ("3PFLOP", "flops", 3e15),
        ("2.5e12 flops", "flops", 2.5e12),
        ("200Mtok", "tokens", 2e8),
        ("1Btokens", "tokens", 1e9),
        ("5000tok", "tokens", 5000),
    ],
)
def test_reads_what_people_write(text: str, kind: str, amount: float) -> None:
    assert Budget.parse(text) == Budget(kind, pytest.approx(amount))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "5", "m", "-3m", "5x", "1e400s", "0s", "0tok", "nans", "5mm flop", "1..5m", "m5"])
def test_refuses_what_is_none_and_gives_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"200Mtok"):
        Budget.parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_a_clear_no(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert Budget.parse(text).amount > 0
