"""Paired comparisons: the tests against their definitions, and how often they are wrong."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptsmith.errors import DataError, UsageError
from gptsmith.evaluate.compare import compare, holm, mcnemar, read_results, sign_flips, to_json


def task(scores: Any, *, name: str = "quiz", shots: int = 0, seed: int = 0, **changes: Any) -> dict[str, Any]:
    outcomes = [{"index": i, "score": float(s), "prompt_sha256": f"{i} {seed}"} for i, s in enumerate(scores)]
    return {
        "task": name,
        "shots": shots,
        "seed": seed,
        "metric": "accuracy",
        "chat": False,
        "definition_sha256": "d",
        "data_sha256": "e",
        "outcomes": outcomes,
        **changes,
    }


def text(nats: Any, *, name: str = "a.txt", **changes: Any) -> dict[str, Any]:
    size = len(nats)
    return {
        "name": name,
        "sha256": "f" * 64,
        "tokens": 100 * size,
        "scored_tokens": 100 * size,
        "unknown": 0,
        "context": 64,
        "stride": 32,
        "prefix": "first",
        "join": False,
        "parts": {"unit": "bytes", "size": 256, "nats": list(nats), "tokens": [100] * size, "bytes": [256] * size},
        **changes,
    }


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (9, 3), (10, 10), (40, 70), (600, 700)])
def test_mcnemar_is_a_sign_test_of_the_items_on_which_the_models_differ(only_a: int, only_b: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True, False] * 5)
    b = np.array([False] * only_a + [True] * only_b + [True, False] * 5)
    n, fewer = only_a + only_b, min(only_a, only_b)
    log_terms = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * sum(map(math.exp, log_terms))), rel=1e-6)


def test_sign_flips_are_the_share_of_sign_patterns_that_are_as_extreme() -> None:
    few = np.array([0.3, -0.1, 0.0, 0.8, 0.4, 0.2])
    patterns = [
        abs(sum(s * d for s, d in zip(signs, few, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    expected = sum(value >= abs(few.sum()) - 1e-9 for value in patterns) / len(patterns)
    assert sign_flips(few) == pytest.approx(expected)
    many = np.random.default_rng(0).normal(0.15, 1.0, 400)
    z = abs(many.sum()) / math.sqrt(float((many**2).sum()))  # the sum of random signs is normal
    assert sign_flips(many) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)
    assert sign_flips(np.zeros(5)) == 1.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize("kind", ["right or wrong", "scores", "texts"])
def test_equal_models_are_rarely_called_different(kind: str) -> None:
    """Of comparisons of equally good models, about one in twenty finds a difference, and one of truly different
    models is found; intervals contain the truth."""
    rng = np.random.default_rng(0)
    wrong = inside = 0
    for _ in range(200):
        easy = rng.uniform(0, 1, 80)
        if kind == "right or wrong":
            a, b = ({"tasks": [task(rng.uniform(0, 1, 80) < easy)]} for _ in range(2))
        elif kind == "scores":
            a, b = ({"tasks": [task(easy + rng.normal(0, 0.3, 80))]} for _ in range(2))
        else:
            a, b = ({"texts": [text(100 * easy + rng.normal(0, 9, 80))]} for _ in range(2))
        (found,) = compare({"a": a, "b": b})
        wrong += found.better is not None
        inside += found.low <= 0 <= found.high
    assert wrong <= 20
    assert inside >= 175


def test_what_differs_is_found_with_its_direction() -> None:
    rng = np.random.default_rng(0)
    easy = rng.uniform(0, 1, 300)
    weak, strong = rng.uniform(0, 1, 300) < 0.5 * easy, rng.uniform(0, 1, 300) < easy
    nats = rng.uniform(100, 300, 60)
    records: dict[str, dict[str, Any]] = {
        "weak": {"tasks": [task(weak)], "texts": [text(nats + rng.normal(6, 3, 60))]},
        "strong": {"tasks": [task(strong)], "texts": [text(nats)]},
    }
    on_task, on_text = compare(records)
    assert on_task.test == "McNemar"
    assert (on_task.value_a, on_task.value_b) == (weak.mean(), strong.mean())
    assert on_task.difference == pytest.approx(strong.mean() - weak.mean())
    assert (on_task.verdict(), on_text.verdict()) == ("strong is better", "strong is better")
    assert on_text.value_b == pytest.approx(nats.sum() / (60 * 256) / math.log(2))
    assert on_text.low < on_text.difference < on_text.high < 0  # paired: the text's own variation cancels
    assert {each["verdict"] for each in json.loads(json.dumps(to_json([on_task, on_text])))} == {"strong is better"}


def test_several_models_are_corrected_for() -> None:
    """A difference that is just significant between two models is not among four."""
    a = np.zeros(60)
    b = np.zeros(60)
    b[:7], a[7:8] = 1, 1  # 7 against 1: p = 0.07; 8 against 1: 0.039
    b[8:9] = 1
    others = {name: {"tasks": [task(np.roll(a, shift))]} for name, shift in (("c", 1), ("d", 2))}
    two = {"a": {"tasks": [task(a)]}, "b": {"tasks": [task(b)]}}
    (alone,) = compare(two)
    assert alone.p == alone.p_corrected == pytest.approx(2 * 10 / 2**9)
    assert alone.verdict() == "b is better"
    among = compare({**two, **others})
    assert len(among) == 6
    assert among[0].p == alone.p
    assert among[0].p_corrected > 0.05
    assert among[0].verdict() == "not distinguishable"


def test_draws_are_averaged_item_by_item() -> None:
    a = {"tasks": [task([1, 0, 1], shots=4, seed=0), task([0, 0, 1], shots=4, seed=1)]}
    b = {"tasks": [task([1, 1, 1], shots=4, seed=0), task([1, 0, 1], shots=4, seed=1)]}
    (found,) = compare({"a": a, "b": b})
    assert (found.measure, found.test) == ("quiz, 4 shots", "permutation")
    assert (found.value_a, found.value_b) == pytest.approx((0.5, 5 / 6))


def test_what_is_not_the_same_is_said_or_refused() -> None:
    a = {"tasks": [task([1, 0, 1, 1])], "texts": [text([90.0] * 9)]}
    fewer = {"tasks": [task([1, 0, 0])], "texts": [text([91.0] * 9, context=32, name="copy/a.txt")]}
    on_task, on_text = compare({"a": a, "b": fewer})
    assert (on_task.items, on_task.notes) == (3, ("compared on the 3 examples that both have, of 4 and 3",))
    assert on_text.notes == ("not the same context: 64 and 32",)  # the same text under another name
    chat = {"tasks": [task([1, 0, 1, 1], chat=True, seed=9)]}
    (found,) = compare({"a": a, "b": chat})
    assert found.notes[0] == "not the same chat template: False and True"
    assert "4 prompts are not the same" in found.notes[1]
    for other, message in (
        ({"tasks": [task([1, 0, 1, 1], definition_sha256="x")]}, "the definition of a and b are not the same"),
        ({"tasks": [task([1, 0, 1, 1], data_sha256="x")]}, "the data of a and b are not the same"),
        ({"texts": [text([9.0] * 8)]}, "the parts of a and b are not the same"),
        ({"tasks": [task([1], outcomes=[])]}, "no example in common"),
        ({"tasks": [{"task": "quiz"}]}, "the results of b are damaged"),
        ({"texts": [{}]}, "the results of b are damaged"),
        ({"texts": [text([math.nan] * 9)]}, "the results of b are damaged"),
    ):
        with pytest.raises(DataError, match=message):
            compare({"a": a, "b": other})
    few_shots = {"tasks": [task([1], shots=2)]}
    with pytest.raises(DataError, match="seeds"):
        compare({"a": few_shots, "b": {"tasks": [task([1], shots=2, seed=1)]}})
    with pytest.raises(UsageError, match="no task or text in common: a has quiz, a.txt, b has riddle"):
        compare({"a": a, "b": {"tasks": [task([1], name="riddle")]}})
    with pytest.raises(UsageError, match="needs two"):
        compare({"a": a})


def test_files_that_are_no_results(tmp_path: Path) -> None:
    for content, message in (("{", "is not JSON"), ("[]", "no results of gptsmith eval"), ("{}", "neither tasks nor")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=message):
            read_results(tmp_path / "a.json")
    with pytest.raises(DataError, match="cannot read"):
        read_results(tmp_path / "none.json")
