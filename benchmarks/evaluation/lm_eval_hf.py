"""Scores and time against lm-evaluation-harness: python benchmarks/evaluation/lm_eval_hf.py scores|speed [--limit N]

scores  SmolLM2-135M on five tasks, zero-shot: the log-probability of each choice, and the choice for each example, here
        and with the harness's transformers backend
speed   the same requests, from text to scores: ARC-Challenge with 0 and 4 shots, MMLU with 5. The other side runs with
        the batch size that is faster for it; its grouping of continuations of one token is on, as by default.

Both sides run in one process, in float32, with as many threads. --save writes benchmarks/results/evaluation_PART.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import machine

if TYPE_CHECKING:
    from gptsmith.tasks.definition import Item

MODEL = "smollm2-135m"
TASKS = ("arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande")
CASES = (("arc_challenge", 0, 1), ("arc_challenge", 4, 1), ("mmlu_letters", 5, 4))  # task, shots, times --limit
BATCH_SIZES = (1, 8)


class Requests:
    """The texts that a task asks a model to score: pairs of context and continuation, by example."""

    def __init__(self, name: str, shots: int, limit: int) -> None:
        from gptsmith.evaluate.harness import pairs_of, prompt_text, split_items
        from gptsmith.tasks.definition import load_definition

        self.task = load_definition(name)
        split = split_items(self.task, shots)
        groups: dict[str, int] = defaultdict(int)
        self.items: list[Item] = []
        for item in split.graded:  # of groups such as subjects, the first ones: shots are shared within a group
            if len(self.items) < limit and (item.group in groups or len(groups) < 2) and groups[item.group] < limit / 2:
                self.items.append(item)
            groups[item.group] += 1
        if len(groups) == 1:
            self.items = split.graded[:limit]
        self.pairs = [
            pairs_of(self.task, item, prompt_text(self.task, item, split.shots(item.group, shots, 0, name)))
            for item in self.items
        ]

    @property
    def flat(self) -> list[tuple[str, str]]:
        return [pair for group in self.pairs for pair in group]

    def by_item(self, values: Sequence[float]) -> list[Sequence[float]]:
        rows, at = [], 0
        for group in self.pairs:
            rows.append(values[at : at + len(group)])
            at += len(group)
        return rows

    def answers(self, values: Sequence[float]) -> list[int]:
        """Return the choice of each item, by log-probability per character, or as it is after different contexts."""
        from gptsmith.evaluate.harness import best_choice

        kind = "raw" if self.task.continuation else "characters"
        rows = zip(self.items, self.by_item(values), strict=True)
        return [best_choice(kind, item.choices, row, [1] * len(row)) for item, row in rows]

    def accuracy(self, values: Sequence[float]) -> float:
        answers = self.answers(values)
        return sum(a == item.answer for a, item in zip(answers, self.items, strict=True)) / len(answers)


class Sides:
    """Both programs with the same weights."""

    def __init__(self, directory: Path) -> None:
        import transformers
        from lm_eval.models.huggingface import HFLM

        import gptsmith
        from gptsmith.formats.hf import save_model

        quiet: Any = transformers.logging.set_verbosity_error
        quiet()
        self.model, self.tokenizer = gptsmith.load(MODEL, quantize="none")
        save_model(self.model, directory)
        self.tokenizer.save(directory)
        self.harness: Any = HFLM(pretrained=str(directory), dtype="float32", device="cpu")

    def ours(self, requests: Requests) -> tuple[list[float], float, int]:
        """Return scores, seconds and how many tokens were computed."""
        from gptsmith.evaluate.scoring import Scorer, encode_pairs

        began = time.perf_counter()
        scorer = Scorer(self.model)
        scores = [score.total for score in scorer.score(encode_pairs(self.tokenizer, requests.flat))]
        return scores, time.perf_counter() - began, scorer.computed_tokens

    def theirs(self, requests: Requests, batch_size: int) -> tuple[list[float], float]:
        from lm_eval.api.instance import Instance

        self.harness.batch_size_per_gpu = batch_size
        made = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(requests.flat)]
        began = time.perf_counter()
        found = self.harness.loglikelihood(made, disable_tqdm=True)
        return [float(value) for value, _ in found], time.perf_counter() - began


def scores(sides: Sides, limit: int) -> dict[str, Any]:
    rows = {}
    for name in TASKS:
        requests = Requests(name, 0, limit)
        mine, _, _ = sides.ours(requests)
        others, _ = sides.theirs(requests, 8)
        same = sum(a == b for a, b in zip(requests.answers(mine), requests.answers(others), strict=True))
        rows[name] = {
            "examples": len(requests.items),
            "accuracy": round(requests.accuracy(mine), 4),
            "lm_eval accuracy": round(requests.accuracy(others), 4),
            "same choice": same,
            "largest difference, nats": float(f"{max(abs(a - b) for a, b in zip(mine, others, strict=True)):.2g}"),
        }
        print(name, rows[name], flush=True)
    return rows


def speed(sides: Sides, limit: int) -> dict[str, Any]:
    rows = {}
    for name, shots, times in CASES:
        requests = Requests(name, shots, times * limit)
        mine, seconds, tokens = sides.ours(requests)
        timed = {size: sides.theirs(requests, size) for size in BATCH_SIZES}
        size = min(timed, key=lambda size: timed[size][1])
        others, other_seconds = timed[size]
        rows[f"{name}, {shots} shots"] = {
            "examples": len(requests.items),
            "seconds": round(seconds, 2),
            "tokens computed": tokens,
            "lm_eval seconds": round(other_seconds, 2),
            "lm_eval batch size": size,
            "ratio": round(other_seconds / seconds, 2),
            "largest difference, nats": float(f"{max(abs(a - b) for a, b in zip(mine, others, strict=True)):.2g}"),
        }
        print(name, shots, rows[f"{name}, {shots} shots"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scores", "speed"))
    parser.add_argument("--limit", type=int, default=100, help="examples of each task")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        sides = Sides(Path(directory))
        measure = scores if arguments.part == "scores" else speed
        result = {"model": MODEL, "limit": arguments.limit, arguments.part: measure(sides, arguments.limit)}
    if arguments.save:
        print(machine.save(f"evaluation_{arguments.part}", result))


if __name__ == "__main__":
    main()
