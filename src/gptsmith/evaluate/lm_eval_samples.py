"""Comparison, item by item, with what lm-evaluation-harness writes with `--log_samples`. The harness is not needed.

comparison = compare_samples(read_results("ours.json"), read_samples("samples_piqa_2026-01-01T00-00-00.jsonl"))
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptsmith.data.rows import read_rows
from gptsmith.errors import DataError, UsageError, first_few

TOLERANCE = 1e-3  # nats, up to which two log-probabilities count as equal
_FILE_NAME = re.compile(r"samples_(?P<task>.+?)(_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl")
_METRICS = ("acc_norm", "acc_bytes", "acc", "exact_match")


@dataclass(frozen=True)
class Sample:
    """One answer of the harness. prompt: the text before the answer. logprobs: of each choice, in nats, () for a
    generated answer. answer: the generated text. scores: by the metric's name."""

    index: int
    prompt: str
    logprobs: tuple[float, ...]
    answer: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Samples:
    """The answers to a task, in one file."""

    task: str
    items: tuple[Sample, ...]


@dataclass(frozen=True)
class ItemDifference:
    """An item that is not the same. what: how it differs, in words."""

    index: int
    what: str


@dataclass(frozen=True)
class SampleComparison:
    """Our outcomes beside the harness's.

    items: how many are in both. same_prompts: how many of them have the same text before the answer.
    largest_difference: between log-probabilities, in nats; None where none can be compared. differences: the items of
    which log-probabilities differ by more than TOLERANCE, or scores, or generated texts. ours, theirs: the mean scores.
    """

    task: str
    shots: int
    items: int
    only_ours: int
    only_theirs: int
    same_prompts: int
    largest_difference: float | None
    differences: tuple[ItemDifference, ...]
    metric: str
    ours: float
    theirs: float | None

    def verdict(self) -> str:
        if self.differences:
            return f"{len(self.differences):,} items differ"
        return "equal item by item"


def read_samples(path: Path) -> Samples:
    """Return the samples in a file. Raises DataError, naming the line, for other files."""
    path = Path(path)
    named = _FILE_NAME.fullmatch(path.name)
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    items = []
    for row in read_rows(path):
        try:
            items.append(_sample(row.values))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{row.where}: not a sample of lm_eval --log_samples ({type(error).__name__}: {error})."
            ) from None
    if not items:
        raise DataError(f"{path} has no samples.")
    return Samples(named["task"] if named else path.stem, tuple(items))


def _sample(values: Mapping[str, Any]) -> Sample:
    arguments = values["arguments"]
    first = arguments["gen_args_0"]["arg_0"] if isinstance(arguments, Mapping) else arguments[0][0]
    responses = [response[0] for response in values["resps"]]
    scored = [isinstance(response, list | tuple) for response in responses]
    return Sample(
        index=int(values["doc_id"]),
        prompt=str(first),
        logprobs=tuple(float(response[0]) for response in responses) if all(scored) else (),
        answer="" if all(scored) else str(responses[0]),
        scores={name: float(values[name]) for name in _METRICS if isinstance(values.get(name), int | float)},
    )


def compare_samples(record: Mapping[str, Any], samples: Samples) -> SampleComparison:
    """Return the comparison of results of `gptsmith eval --json` with samples of the harness.

    Items are the same if they have the same prompt, else if they have the same number. The results are those of the
    task of the same name, or the only task; of several numbers of shots and draws, those with the most equal prompts.
    Raises UsageError if there is no such task, DataError for results that are damaged.
    """
    results = record.get("tasks") or []
    chosen = [result for result in results if result.get("task") == samples.task]
    if not chosen and len({result.get("task") for result in results}) == 1:
        chosen = list(results)
    if not chosen:
        has = first_few(sorted({str(result.get("task")) for result in results})) or "none"
        raise UsageError(f"the results have no task {samples.task!r}, of which the samples are; they have {has}.")
    try:
        return max((_compare(result, samples) for result in chosen), key=lambda each: (each.same_prompts, each.items))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the results of {samples.task} are damaged or of another version ({error!r}).") from None


def _compare(result: Mapping[str, Any], samples: Samples) -> SampleComparison:
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples.items:
        by_prompt.setdefault(_sha256(sample.prompt), []).append(sample)
    by_index = {sample.index: sample for sample in samples.items}
    pairs: list[tuple[Mapping[str, Any], Sample, bool]] = []
    for outcome in result["outcomes"]:
        same = by_prompt.get(outcome["prompt_sha256"], [])
        found = next((each for each in same if each.index == outcome["index"]), same[0] if len(same) == 1 else None)
        partner = found or by_index.get(outcome["index"])
        if partner is not None:
            pairs.append((outcome, partner, found is not None))
    metric = _metric(result, samples)
    largest: float | None = None
    differences = []
    for outcome, sample, _ in pairs:
        distance = _distance(outcome, sample)
        if distance is not None:
            largest = distance if largest is None else max(largest, distance)
        if what := _difference(outcome, sample, distance, metric):
            differences.append(ItemDifference(int(outcome["index"]), what))
    scores = [sample.scores[metric] for _, sample, _ in pairs] if metric else []
    return SampleComparison(
        task=str(result["task"]),
        shots=int(result["shots"]),
        items=len(pairs),
        only_ours=len(result["outcomes"]) - len(pairs),
        only_theirs=len(samples.items) - len({sample.index for _, sample, _ in pairs}),
        same_prompts=sum(same for *_, same in pairs),
        largest_difference=largest,
        differences=tuple(differences),
        metric=metric,
        ours=_mean([float(outcome["score"]) for outcome, *_ in pairs]),
        theirs=_mean(scores) if scores else None,
    )


def _metric(result: Mapping[str, Any], samples: Samples) -> str:
    """Return the harness's metric that is ours, "" if there is none."""
    names = {"raw": "acc", "characters": "acc_norm", "bytes": "acc_bytes"}
    normalization = result.get("normalization")
    if normalization is not None:
        wanted = [names.get(str(normalization), "")]
    else:
        wanted = ["acc"] if result.get("kind") == "cloze" else ["exact_match"]
    return next((name for name in wanted if all(name in sample.scores for sample in samples.items)), "")


def _distance(outcome: Mapping[str, Any], sample: Sample) -> float | None:
    own: Sequence[float] = outcome.get("logprobs") or ()
    if not own or len(own) != len(sample.logprobs):
        return None
    return max(abs(float(a) - b) for a, b in zip(own, sample.logprobs, strict=True))


def _difference(outcome: Mapping[str, Any], sample: Sample, distance: float | None, metric: str) -> str:
    """Return how an item differs, "" if it does not."""
    found = []
    own: Sequence[float] = outcome.get("logprobs") or ()
    if distance is not None and not distance <= TOLERANCE:
        place = max(range(len(own)), key=lambda i: abs(own[i] - sample.logprobs[i]))
        found.append(f"choice {place} has the log-probability {own[place]:.4f} and {sample.logprobs[place]:.4f}")
    elif len(own) != len(sample.logprobs):
        found.append(f"{len(own)} and {len(sample.logprobs)} choices are scored")
    elif not own and outcome["answer"].strip() != sample.answer.strip():
        found.append(f"the answers are {outcome['answer'].strip()!r:.60} and {sample.answer.strip()!r:.60}")
    if metric and float(outcome["score"]) != sample.scores[metric]:
        found.append(f"the scores are {float(outcome['score']):g} and {sample.scores[metric]:g} ({metric})")
    return "; ".join(found)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
