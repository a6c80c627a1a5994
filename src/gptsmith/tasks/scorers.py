"""Scores of generated answers: 1.0 is right, 0.0 is wrong, and overlaps with a reference are in between.

score = find_scorer("number")
score(" 3 + 4 = 7. The answer is 7", item)             # item.answer is ("7",)

A scorer is a function `(text, item) -> float`. Where an item has several answers, the one that fits best counts.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from gptsmith.errors import DataError, UsageError, nearest
from gptsmith.log import note
from gptsmith.tasks.answers import boxed_answer, find_answer, same_answer
from gptsmith.tasks.definition import Item, compile_template, load_function
from gptsmith.tasks.sandbox import find_sandbox

ItemScorer = Callable[[str, Item], float]
"""Takes a generated answer and its item; returns 1 for right, 0 for wrong, or something in between."""


AllowCode = bool | Literal["unprotected"]
"""Whether programs that a model writes may run: in a sandbox, or even where it leaves something open."""


def find_scorer(metric: str | Mapping[str, Any], *, allow_code_execution: AllowCode = False) -> ItemScorer:
    """Return the scorer that a task's `metric` names: a name, or a name with a value such as `{regex: "is (.*)"}`.

    Raises UsageError for an unknown metric, a value that does not fit it, a function that cannot be imported, and for
    `code` without `allow_code_execution` or where programs cannot be contained (unless it is "unprotected").
    """
    name, value = (metric, None) if isinstance(metric, str) else next(iter(metric.items()), ("", None))
    if not isinstance(metric, str) and len(metric) != 1:
        raise UsageError(f"a metric is a name, or one name with a value, not {dict(metric)!r}.")
    if name in _PLAIN:
        if value is not None:
            raise UsageError(f"the metric {name} takes no value, so it cannot have {value!r}.")
        return _PLAIN[name]
    if name not in _WITH_VALUE:
        names = (*_PLAIN, *_WITH_VALUE)
        raise UsageError(f"unknown metric {name!r}.{nearest(name, names)} Metrics: {', '.join(names)}.")
    if not isinstance(value, str) or not value:
        raise UsageError(f"the metric {name} needs a value: {{{name}: {_WITH_VALUE[name]}}}.")
    if name == "regex":
        return _regex(value)
    if name == "python":
        return _python(value)
    return _code(value, allow_code_execution)


# Answers --------------------------------------------------------------------------------------------------------------


def accepted(item: Item) -> tuple[str, ...]:
    """Return the accepted answers of an item."""
    return item.answer if isinstance(item.answer, tuple) else (item.answer_text,)


def exact_match(text: str, item: Item) -> float:
    """Return 1.0 if the text is an answer, without regard to spaces around it."""
    return float(any(text.strip() == answer.strip() for answer in accepted(item)))


def number(text: str, item: Item) -> float:
    """Return 1.0 if the number in the text is that of an answer; 1,000 equals 1000.0.

    In both, the number is what is marked as the answer (by <answer> tags, \\boxed{…} or ####), or the last one.
    """
    found = find_answer(text)
    if found is None:
        return 0.0
    return float(any(same_answer(found, find_answer(answer) or answer) for answer in accepted(item)))


def _regex(pattern: str) -> ItemScorer:
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise UsageError(f"the metric's regular expression {pattern!r} is wrong: {error}.") from None

    def regex(text: str, item: Item) -> float:
        """Return 1.0 if what the last match captures in its first group (or all of it) is an answer."""
        matches = list(compiled.finditer(text))
        if not matches:
            return 0.0
        found = matches[-1][1 if compiled.groups else 0]
        return float(found is not None and any(found.strip() == answer.strip() for answer in accepted(item)))

    return regex


def _python(spec: str) -> ItemScorer:
    function = load_function(spec)

    def python(text: str, item: Item) -> float:
        try:
            score = function(text, item)
        except Exception as error:  # whatever the user's function raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"the scorer {spec} fails on example {item.index}: {reason}.") from error
        if not isinstance(score, bool | int | float) or not math.isfinite(score):
            raise DataError(f"the scorer {spec} returned {score!r} for example {item.index}, not a number.")
        return float(score)

    return python


# LaTeX ----------------------------------------------------------------------------------------------------------------


def latex(text: str, item: Item) -> float:
    """Return 1.0 if the text's answer is the right one in MATH: equal LaTeX, apart from how it is set.

    The answer is what follows the last `answer is` in its line, or what is in the last \\boxed{…}. The right one is in
    the last box of the item's answer, a worked solution.
    """
    found = _after_answer_is(text) or _boxed(text)
    if found is None:
        return 0.0
    return float(any(same_latex(found, _boxed(answer) or answer) for answer in accepted(item)))


def _after_answer_is(text: str) -> str | None:
    line = text.rpartition("answer is")[2] if "answer is" in text else ""
    line = line.strip().removeprefix(":").strip().split("\n", 1)[0].strip()
    return boxed_answer(line) or line or None


def _boxed(text: str) -> str | None:
    boxed = boxed_answer(text.replace("\\fbox{", "\\boxed{"))
    if boxed is None and (found := re.search(r".*\\boxed\s+([^\s$.,]+)", text, re.DOTALL)):
        return found[1]
    return boxed


def same_latex(one: str, other: str) -> bool:
    """Return whether two answers are the same in LaTeX, apart from spaces, units, and the form of fractions."""
    first, second = _plain_latex(one), _plain_latex(other)
    return bool(first) and (first == second or same_answer(first, second))


def _plain_latex(text: str) -> str:
    """Bring an answer into one form."""
    text = text.strip().rstrip(".").strip().strip("$").strip()
    for old, new in (
        ("\\left", ""),
        ("\\right", ""),
        ("\\!", ""),
        ("\\,", ""),
        ("\\ ", ""),
        ("\\;", ""),
        ("\\:", ""),
        ("\\$", ""),
        ("$", ""),
        ("\\%", ""),
        ("%", ""),
        ("\\tfrac", "\\frac"),
        ("\\dfrac", "\\frac"),
        ("\\cfrac", "\\frac"),
        ("^\\circ", ""),
        ("^{\\circ}", ""),
        ("\\displaystyle", ""),
    ):
        text = text.replace(old, new)
    text = re.sub(r"\\(?:text|mbox)\{\s*(?:and|or)\s*\}", ",", text)
    unit = re.sub(r"(?<=[\w}\)])\s*\\(?:text|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?$", "", text)  # a unit after the number
    text = re.sub(r"\\(?:text|mbox|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", unit)
    if re.fullmatch(r"[A-Za-z]{1,2}\s*=[^=]*", text):  # x = 3
        text = text.split("=", 1)[1]
    text = re.sub(r"\\sqrt\s*([^\s{\[])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*([^\s{\\])\s*([^\s{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([^\s{\\])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*([^\s{\\])", r"\1{\2}", text)
    text = "".join(text.split())
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"(^|[^\d])\.(\d)", r"\g<1>0.\2", text)


# Overlap with a reference ---------------------------------------------------------------------------------------------


def rouge(text: str, item: Item) -> float:
    """Return the mean of the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, as in GPT-2's table of summaries; without stemming."""
    return max((math.fsum(rouge_scores(text, answer).values()) / 3 for answer in accepted(item)), default=0.0)


def rouge_scores(text: str, reference: str) -> dict[str, float]:
    """Return F1 from 0 to 1 of rouge1, rouge2 (common words and pairs) and rougeL (the longest common subsequence)."""
    words, others = _words(text), _words(reference)
    return {
        "rouge1": _overlap(Counter(words), Counter(others)),
        "rouge2": _overlap(Counter(itertools.pairwise(words)), Counter(itertools.pairwise(others))),
        "rougeL": _f1(_common_subsequence(words, others), len(words), len(others)),
    }


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _overlap(one: Counter[Any], other: Counter[Any]) -> float:
    return _f1((one & other).total(), one.total(), other.total())


def _f1(common: int, one: int, other: int) -> float:
    return 2 * common / (one + other) if common else 0.0


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for i, each in enumerate(other, 1):
            before, row[i] = row[i], before + 1 if word == each else max(row[i], row[i - 1])
    return row[-1]


def chrf(text: str, item: Item) -> float:
    """Return chrF of a text against its best reference, from 0 to 1 (Popović 2015): F2 of character n-grams."""
    return max((chrf_score(text, answer) for answer in accepted(item)), default=0.0)


def chrf_score(text: str, reference: str, *, order: int = 6, beta: float = 2.0) -> float:
    """Return chrF from 0 to 1: the F score of the mean precision and recall of n-grams of 1 to `order` characters.

    Spaces are left out. Lengths of which one of the texts has no n-grams do not count.
    """
    one, other = "".join(text.split()), "".join(reference.split())
    precision = recall = 0.0
    orders = 0
    for n in range(1, order + 1):
        ours, theirs = (Counter(each[i : i + n] for i in range(len(each) - n + 1)) for each in (one, other))
        if ours and theirs:
            common = (ours & theirs).total()
            precision += common / ours.total()
            recall += common / theirs.total()
            orders += 1
    if not orders or precision + recall == 0:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


# Code -----------------------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def extract_code(text: str) -> str:
    """Return the first block between ``` fences, or the text as it is if there is none."""
    found = _FENCE.search(text)
    return text if found is None else found[1]


def _code(template: str, allowed: AllowCode) -> ItemScorer:
    import jinja2

    if not allowed:
        raise UsageError(
            "this task runs code that the model writes. If you accept that, add --allow-code-execution: it runs in a "
            "sandbox without network, home and environment."
        )
    sandbox = find_sandbox(insist=allowed == "unprotected")
    if sandbox.open:
        note(f"The sandbox for the model's programs is incomplete on this machine. It leaves open: {sandbox.open}.")
    try:
        render = compile_template(template)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"the template of the metric code is not Jinja: {error.message}: {template!r}.") from None

    def code(text: str, item: Item) -> float:
        """Return 1.0 if the program reaches its end."""
        try:
            program = render(**{**item.record, "completion": extract_code(text)})
        except Exception as error:  # filters and methods raise whatever they like
            reason = " ".join(str(error).split())
            raise DataError(f"example {item.index}: the template of the metric code fails: {reason}.") from None
        return float(sandbox.run(program).passed)

    return code


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: the chance that one of k programs passes, given that `passed` of
    `samples` did (Chen et al. 2021, 2107.03374, equation 1). Raises UsageError unless 1 ≤ k ≤ samples."""
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise UsageError(f"pass@{k} of {samples} samples, {passed} of which passed, is undefined: k is 1 to {samples}.")
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - passed + 1, samples + 1))


_PLAIN: dict[str, ItemScorer] = {
    "exact_match": exact_match,
    "number": number,
    "rouge": rouge,
    "chrf": chrf,
}
_WITH_VALUE = {"regex": '"answer is (.*)"', "python": "file.py:function", "code": "a template of the program"}
