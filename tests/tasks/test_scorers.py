"""Scores of generated answers, compared with the published implementations where they are installed."""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from gptsmith.errors import DataError, UsageError
from gptsmith.tasks import scorers
from gptsmith.tasks.definition import Item
from gptsmith.tasks.sandbox import Sandbox
from gptsmith.tasks.scorers import (
    chrf_score,
    extract_code,
    find_scorer,
    latex,
    pass_at_k,
    rouge_scores,
    same_latex,
)

TEXTS = [
    "The cat sat on the mat.",
    "the cat, the CAT and a dog: 3 of them!",
    "A completely different sentence about trains",
    "",
    "Das Übungsstück war schön, naïve café!",
    "cat",
    "a b c d e f g a b c d e f g",
    "  spaces\n\nand lines\t",
]


def _item(*answers: str, **record: Any) -> Item:
    return Item(0, "prompt", (), answers, record)


def _random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(["the", "cat", "sat", "on", "a", "mat"], k=rng.randint(1, 12))) for _ in range(count)]


def test_exact_match() -> None:
    score = find_scorer("exact_match")
    assert score(" Rome \n", _item("Rome")) == 1
    assert score("Paris", _item("Rome", "Paris")) == 1
    assert score("rome", _item("Rome")) == 0
    assert score("Rome", Item(0, "", ("Rome", "Paris"), 0, {})) == 1


def test_number() -> None:
    score = find_scorer("number")
    assert score("So 3 + 4 = 7. The answer is 7.", _item("7")) == 1
    assert score("It costs $1,000.00", _item("1000")) == 1
    assert score("#### 12\nThen 13", _item("12")) == 1
    assert score("7", _item("3 + 4 = 7\n#### 7")) == 1
    assert score("8", _item("7")) == 0
    assert score("no number", _item("7")) == 0


def test_regex() -> None:
    score = find_scorer({"regex": ".*answer is (.*?)\\.?$"})
    assert score("I think the answer is (A). No, the answer is (B).", _item("(B)")) == 1
    assert score("the answer is ] ) )", _item("] ) )")) == 1
    assert score("the answer is X.\nMore text", _item("X")) == 1
    assert score("(B)", _item("(B)")) == 0
    assert find_scorer({"regex": "[A-D]"})("B or C", _item("C")) == 1
    with pytest.raises(UsageError, match="regular expression"):
        find_scorer({"regex": "("})


def test_python(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(text, item): return len(text) / 10\ndef bad(text, item): return 'x'\n"
        "def broken(text, item): return 1 / 0\n"
    )
    assert find_scorer({"python": f"{path}:length"})("abc", _item()) == pytest.approx(0.3)
    with pytest.raises(DataError, match="returned 'x' for example 0"):
        find_scorer({"python": f"{path}:bad"})("abc", _item())
    with pytest.raises(DataError, match="fails on example 0: ZeroDivisionError"):
        find_scorer({"python": f"{path}:broken"})("abc", _item())
    with pytest.raises(UsageError, match="no function lenght"):
        find_scorer({"python": f"{path}:lenght"})


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("exact", "Did you mean 'exact_match'"),
        ({"number": "x"}, "takes no value"),
        ("regex", "needs a value"),
        ({"python": ""}, "needs a value"),
        ({"regex": "a", "number": "b"}, "one name"),
        ({"code": "{{ completion }}"}, "--allow-code-execution"),
    ],
)
def test_refusals(metric: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_scorer(metric)


def test_rouge_equals_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    texts = [*TEXTS, *_random_texts(12)]
    for text, reference in itertools.product(texts, texts):
        expected = scorer.score(reference, text)
        for name, value in rouge_scores(text, reference).items():
            assert value == pytest.approx(expected[name].fmeasure, abs=1e-12), (name, text, reference)


def test_chrf_equals_sacrebleu() -> None:
    metric = pytest.importorskip("sacrebleu").CHRF()
    texts = [*TEXTS, *_random_texts(12)]
    for text, reference in itertools.product(texts, filter(str.strip, texts)):
        expected = metric.sentence_score(text, [reference]).score / 100
        assert chrf_score(text, reference) == pytest.approx(expected, abs=1e-6), (text, reference)


def test_the_best_reference_counts() -> None:
    assert find_scorer("rouge")("the cat sat", _item("a dog", "the cat sat")) == 1
    assert find_scorer("chrf")("the cat sat", _item("a dog", "the cat sat")) == 1
    assert find_scorer("rouge")("the cat sat", _item("a dog")) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\frac{1}{2}", "\\dfrac12"),
        ("1/2", "\\frac{1}{2}"),
        ("-\\tfrac 3 4", "-3/4"),
        ("x = 5", "5"),
        ("5\\text{ cm}", "5"),
        ("5\\text{ cm}^2", "5"),
        ("30^\\circ", "30"),
        ("\\$1,000", "1000"),
        ("50\\%", "50"),
        (".5", "0.5"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("$\\{1, 2\\}$.", "\\{1,2\\}"),
        ("\\text{Evelyn}", "Evelyn"),
        ("2 \\text{ and } 3", "2,3"),
        ("1,\\!000", "1000"),
    ],
)
def test_latex_that_is_the_same(one: str, other: str) -> None:
    assert same_latex(one, other)


@pytest.mark.parametrize(
    ("one", "other"), [("\\frac{1}{2}", "\\frac{2}{1}"), ("12", "1/2"), ("(1,2)", "(2,1)"), ("", ""), ("x^2", "x_2")]
)
def test_latex_that_differs(one: str, other: str) -> None:
    assert not same_latex(one, other)


def test_answers_of_math() -> None:
    right = _item("Thus, $x = \\boxed{\\frac{1}{2}}.$")
    assert latex("We get 0.25, so \\boxed{\\frac12}", right) == 1
    assert latex("\nThe answer is $\\frac{1}{2}$.", right) == 1
    assert latex("The final answer is: $\\boxed{1/2}$. I hope", right) == 1
    assert latex("The answer is 2", right) == 0
    assert latex("1/2", right) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_code() -> None:
    template = "{{ prompt }}{{ completion }}\n{{ test }}\ncheck({{ entry_point }})\n"
    score = find_scorer({"code": template}, allow_code_execution=True)
    item = _item(
        prompt="def double(x):\n",
        entry_point="double",
        test="def check(candidate):\n    assert candidate(2) == 4",
    )
    assert score("    return 2 * x", item) == 1
    assert score("    return x", item) == 0
    assert score("    return (", item) == 0
    assert (
        score("Sure!\n```python\ndef double(x):\n    return x + x\n```", item) == 0
    )  # the prompt's function has no body
    item.record["prompt"] += '    """Return twice x."""\n'
    assert score("Sure!\n```python\ndef double(x):\n    return x + x\n```", item) == 1
    with pytest.raises(UsageError, match="not Jinja"):
        find_scorer({"code": "{{ completion"}, allow_code_execution=True)
    with pytest.raises(DataError, match="'entry' is undefined"):
        find_scorer({"code": "{{ entry }}"}, allow_code_execution=True)("x", item)


def test_an_incomplete_sandbox_is_used_only_by_those_who_insist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def incomplete(*, insist: bool = False) -> Sandbox:
        if not insist:
            raise UsageError("code cannot be contained")
        return Sandbox((), open="the network")

    monkeypatch.setattr(scorers, "find_sandbox", incomplete)
    with pytest.raises(UsageError, match="cannot be contained"):
        find_scorer({"code": "{{ completion }}"}, allow_code_execution=True)
    score = find_scorer({"code": "{{ completion }}"}, allow_code_execution="unprotected")
    assert "It leaves open: the network." in capsys.readouterr().err
    if sys.platform == "linux":
        assert score("assert True", _item()) == 1


def test_extract_code() -> None:
    assert extract_code("Sure:\n```python\nx = 1\n```\nDone\n```\ny\n```") == "x = 1"
    assert extract_code("    return 1\n") == "    return 1\n"
    assert extract_code("```\nx = 1") == "x = 1"


def test_pass_at_k() -> None:
    assert pass_at_k(10, 0, 5) == 0
    assert pass_at_k(10, 10, 1) == 1
    assert pass_at_k(10, 6, 5) == 1
    for samples, passed, k in [(5, 2, 1), (5, 2, 3), (8, 1, 4), (6, 3, 2)]:
        draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(200, 3, 1) == pytest.approx(3 / 200)
    assert math.isfinite(pass_at_k(10_000, 1, 5_000))
    with pytest.raises(UsageError, match="pass@3 of 2"):
        pass_at_k(2, 1, 3)
