"""Paired comparison of models that were measured on the same tasks and texts, from the results of `gptsmith eval`.

    compare([read_results("a.json"), read_results("b.json")])

Both models have seen the same items, so the difference of each item is what counts: its interval is a bootstrap over
items, and its p-value comes from McNemar's exact test for right and wrong answers, and from a permutation test (random
signs of the differences) for other scores and for texts. With several comparisons, p-values are corrected by Holm's
method. No torch.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptsmith.errors import DataError, UsageError, first_few
from gptsmith.evaluate.scores import Floats, resamples, with_interval

SIGNIFICANT = 0.05
PERMUTATIONS = 10_000
_LN2 = math.log(2)


@dataclass(frozen=True)
class Measured:
    """One model on one task or text: a value for each item.

    key: the task with its shots, or the text. identity: what must be the same for a comparison. numerators,
    denominators: of each item, whose sums give the value. items: their names. settings: what may differ, but is said.
    """

    key: str
    unit: str
    lower_is_better: bool
    identity: Mapping[str, Any]
    items: tuple[Any, ...]
    numerators: Floats
    denominators: Floats
    settings: Mapping[str, Any]

    @property
    def subject(self) -> str:
        """What two measures must share: the text, whatever its file is called, or the task."""
        return str(self.identity.get("text", self.key))


@dataclass(frozen=True)
class Comparison:
    """Two models on one measure. difference: b - a, with its 95% interval. p: two-sided.

    p_corrected: by Holm's method, over all comparisons. better: "a" or "b"; None if they are not distinguishable.
    items: how many were compared. notes: what is not the same for both.
    """

    measure: str
    unit: str
    a: str
    b: str
    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    test: str
    p: float
    p_corrected: float
    better: str | None
    items: int
    notes: tuple[str, ...] = ()

    def verdict(self) -> str:
        if self.better is None:
            return "not distinguishable"
        return f"{self.a if self.better == 'a' else self.b} is better"


def read_results(path: Path) -> dict[str, Any]:
    """Return the results that `gptsmith eval --json` wrote. Raises DataError for any other file."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    if not isinstance(record, dict) or not {"tasks", "texts"} & record.keys():
        raise DataError(f"{path} has no results of gptsmith eval --json: neither tasks nor texts.")
    return record


def compare(records: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """Return the comparison of each pair of models on each measure that they share, in the order of the first model.

    records: results by the name of the model. Raises UsageError for fewer than two, and where two models have no
    measure in common; DataError where results of the same name are of other items, or lack fields.
    """
    if len(records) < 2:
        raise UsageError("a comparison needs two models.")
    measured = {}
    for name, record in records.items():
        try:
            measured[name] = {each.subject: each for each in measures(record)}
            if not all(np.isfinite(each.numerators).all() for each in measured[name].values()):
                raise ValueError("a score that is not a number")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the results of {name} are damaged or of another version ({error!r}).") from None
    found: list[tuple[str, Comparison]] = []
    for a, b in itertools.combinations(measured, 2):
        shared = [subject for subject in measured[a] if subject in measured[b]]
        if not shared:
            has = {name: first_few([each.key for each in measured[name].values()]) for name in (a, b)}
            raise UsageError(f"{a} and {b} have no task or text in common: {a} has {has[a]}, {b} has {has[b]}.")
        found += [(subject, _compare(a, measured[a][subject], b, measured[b][subject])) for subject in shared]
    corrected = holm([each.p for _, each in found])
    order = list(dict.fromkeys(subject for each in measured.values() for subject in each))
    result = []
    for (subject, each), p in sorted(zip(found, corrected, strict=True), key=lambda pair: order.index(pair[0][0])):
        better = None
        if p < SIGNIFICANT and each.difference:
            better = "b" if (each.difference < 0) == measured[each.a][subject].lower_is_better else "a"
        result.append(replace(each, p_corrected=p, better=better))
    return result


def to_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [asdict(each) | {"verdict": each.verdict()} for each in comparisons]


def measures(record: Mapping[str, Any]) -> list[Measured]:
    """Return what a record has measured."""
    return [*_task_measures(record), *_text_measures(record)]


def _task_measures(record: Mapping[str, Any]) -> list[Measured]:
    """Return a measure for each task and number of shots: the mean score of each item over the draws."""
    draws: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for result in record.get("tasks", ()):
        draws[result["task"], int(result["shots"])].append(result)
    found = []
    for (task, shots), results in draws.items():
        outcomes = [{outcome["index"]: outcome for outcome in result["outcomes"]} for result in results]
        items = [index for index in outcomes[0] if all(index in each for each in outcomes)]
        scores = [math.fsum(each[index]["score"] for each in outcomes) / len(outcomes) for index in items]
        prompts = {index: [each[index]["prompt_sha256"] for each in outcomes] for index in items}
        first = results[0]
        found.append(
            Measured(
                key=f"{task}, {shots} shots" if shots else task,
                unit=str(first.get("metric", "score")),
                lower_is_better=False,
                identity={
                    "definition": first.get("definition_sha256"),
                    "data": first.get("data_sha256"),
                    "seeds": sorted(result["seed"] for result in results) if shots else None,
                },
                items=tuple(items),
                numerators=np.array(scores, dtype=float),
                denominators=np.ones(len(items)),
                settings={"chat template": first.get("chat"), "prompts": prompts},
            )
        )
    return found


def _text_measures(record: Mapping[str, Any]) -> list[Measured]:
    """Return a measure for each text: bits per byte of its parts."""
    found = []
    names = [text["name"] for text in record.get("texts", ())]
    for text in record.get("texts", ()):
        parts = text["parts"]
        nats = np.array(parts["nats"], dtype=float)
        found.append(
            Measured(
                key=text["name"] if names.count(text["name"]) == 1 else f"{text['name']} ({text['sha256'][:8]})",
                unit="bits per byte",
                lower_is_better=True,
                identity={"text": text["sha256"], "parts": (parts["unit"], parts["size"], tuple(parts["bytes"]))},
                items=tuple(range(len(nats))),
                numerators=nats * text["tokens"] / text["scored_tokens"] / _LN2,
                denominators=np.array(parts["bytes"], dtype=float),
                settings={key: text[key] for key in ("context", "stride", "prefix", "join")}
                | {"unknown text": text["unknown"]},
            )
        )
    return found


def _compare(a: str, first: Measured, b: str, second: Measured) -> Comparison:
    for what, value in first.identity.items():
        if value != second.identity.get(what):
            raise DataError(
                f"{first.key}: the {what} of {a} and {b} are not the same. Measure both with the same version of "
                "gptsmith, the same files and the same options."
            )
    notes = []
    place = {item: i for i, item in enumerate(second.items)}
    shared = [(i, place[item]) for i, item in enumerate(first.items) if item in place]
    if not shared:
        raise DataError(f"{first.key}: {a} and {b} have no example in common.")
    if len(shared) < max(len(first.items), len(second.items)):
        notes.append(
            f"compared on the {len(shared):,} examples that both have, of {len(first.items):,} and "
            f"{len(second.items):,}"
        )
    for what, value in first.settings.items():
        other = second.settings.get(what)
        if what == "prompts":
            changed = sum(value[first.items[i]] != other[first.items[i]] for i, _ in shared) if other else 0
            if changed:
                notes.append(f"{changed:,} prompts are not the same: they have fewer shots in a shorter context")
        elif value != other:
            notes.append(f"not the same {what}: {value} and {other}")
    left, right = np.array([i for i, _ in shared]), np.array([j for _, j in shared])
    x, y, weights = first.numerators[left], second.numerators[right], first.denominators[left]
    difference = y - x
    if _is_binary(x) and _is_binary(y):
        test, p = "McNemar", mcnemar(x > 0.5, y > 0.5)
    else:
        test, p = "permutation", sign_flips(difference)
    drawn = resamples(len(difference))
    interval = with_interval(
        "difference", float(difference.sum() / weights.sum()), (drawn @ difference) / np.maximum(drawn @ weights, 1e-9)
    )
    return Comparison(
        first.key,
        first.unit,
        a,
        b,
        float(x.sum() / weights.sum()),
        float(y.sum() / weights.sum()),
        interval["difference"],
        interval["difference_low"],
        interval["difference_high"],
        test,
        p,
        p,
        None,
        len(shared),
        tuple(notes),
    )


def _is_binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def mcnemar(a: Any, b: Any) -> float:
    """Return the two-sided p-value of McNemar's exact test: do a and b err on different items equally often?

    a, b: (N,) bool, whether each is right.
    """
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    n, fewer = only_a + only_b, min(only_a, only_b)
    term, total = 1, 0
    for k in range(fewer + 1):  # binomial coefficients as integers, which are exact
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * (total / (1 << n) if n < 1000 else math.exp(math.log(total) - n * math.log(2))))


def sign_flips(differences: Floats, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Return the two-sided p-value of a permutation test: is the sum as far from 0 as with random signs?

    Up to 13 differences, all sign patterns are tried. Equal models have p = 1.
    """
    values = differences[differences != 0]
    if not len(values):
        return 1.0
    observed = abs(float(values.sum())) * (1 - 1e-12)
    if 2 ** len(values) <= permutations:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
        return float((np.abs(signs @ values) >= observed).mean())
    rng = np.random.default_rng(seed)
    extreme, at_once = 0, max(1, (1 << 20) // len(values))
    for start in range(0, permutations, at_once):
        rows = min(at_once, permutations - start)
        signs = rng.integers(0, 2, (rows, len(values)), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ values) >= observed).sum())
    return (extreme + 1) / (permutations + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for several tests (Holm 1979), in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected
