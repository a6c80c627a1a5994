"""`gptsmith compare`: compare models on the same tasks and texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gptsmith.cli.eval import EvalOptions, check, has_measures, measure, write_record
from gptsmith.cli.eval_texts import open_texts, print_table
from gptsmith.cli.parser import parse
from gptsmith.errors import UsageError

if TYPE_CHECKING:
    from gptsmith.evaluate.compare import Comparison
    from gptsmith.evaluate.lm_eval_samples import SampleComparison

SHOWN_DIFFERENCES = 10  # of each task; --json has all


@dataclass(frozen=True, kw_only=True)
class Compare(EvalOptions):
    """Compare models on the same tasks and texts: paired differences with 95% intervals, and whether they are
    distinguishable.

    A model can also be a file that `gptsmith eval --json` wrote, which needs no measuring. With files that `lm_eval
    --log_samples` wrote, the results of one model are compared with these, item by item.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL...")]
    """Two or more. Each is a run (its best checkpoint), a model directory, a .gguf file, ORG/NAME on the hub,
    smollm2-135m, a .json file of results, or a samples_TASK_DATE.jsonl file of lm_eval."""


def main(arguments: list[str]) -> int:
    chosen = parse(Compare, "gptsmith compare", arguments)
    if len(chosen.models) < 2:
        raise UsageError("a comparison needs two models, or two files of results.")
    if twice := next((name for name in chosen.models if chosen.models.count(name) > 1), None):
        raise UsageError(f"{twice} is given twice.")
    check(chosen)
    samples = [name for name in chosen.models if name.endswith(".jsonl")]
    if samples and len(chosen.models) - len(samples) != 1:
        raise UsageError("with samples of lm_eval, give one model or one .json file of results.")
    saved = [name for name in chosen.models if name.endswith(".json") and not Path(name).is_dir()]
    if len(saved) + len(samples) < len(chosen.models) and not has_measures(chosen):
        raise UsageError("nothing to measure: give --tasks or --data.")
    if len(saved) + len(samples) == len(chosen.models) and has_measures(chosen):
        raise UsageError("--tasks, --data and --induction have no effect on files of results: leave them out.")

    from gptsmith.evaluate.compare import compare, read_results, to_json
    from gptsmith.evaluate.lm_eval_samples import compare_samples, read_samples
    from gptsmith.loading import resolve_model

    read = [read_samples(Path(name)) for name in samples]
    records: dict[str, Mapping[str, Any]] = {name: read_results(Path(name)) for name in saved}
    measured = [name for name in chosen.models if name not in (*saved, *samples)]
    if measured:
        open_texts(chosen.text)
    for name in measured:
        resolve_model(name)  # all must be there before the first is measured
    for name in measured:
        print(f"{name}:")
        records[name] = measure(name, chosen)
        print()
    if samples:
        ((model, record),) = records.items()
        found = [compare_samples(record, each) for each in read]
        show_samples(found)
        if chosen.json is not None:
            compared = [asdict(each) | {"verdict": each.verdict()} for each in found]
            write_record(chosen.json, {"samples": compared, "models": {} if model in saved else {model: record}})
        return 0
    comparisons = compare({name: records[name] for name in chosen.models})
    show(comparisons)
    if chosen.json is not None:
        models = {name: record for name, record in records.items() if name not in saved}
        write_record(chosen.json, {"comparisons": to_json(comparisons), "models": models})
    return 0


def show(comparisons: list[Comparison]) -> None:
    several = len(comparisons) > 1
    head = ["measure", "model a", "model b", "a", "b", "b - a", "95% interval", "corrected p" if several else "p", ""]
    rows = [
        [
            f"{each.measure} ({each.unit})",
            each.a,
            each.b,
            f"{each.value_a:.4f}",
            f"{each.value_b:.4f}",
            f"{each.difference:+.4f}",
            f"{each.low:+.4f} to {each.high:+.4f}",
            f"{each.p_corrected:.4f}",
            each.verdict(),
        ]
        for each in comparisons
    ]
    print_table([head, *rows])
    for each in comparisons:
        for text in each.notes:
            print(f"{each.measure}, {each.a} and {each.b}: {text}.")
    if several:
        print(f"p-values are corrected for {len(comparisons)} comparisons (Holm).")


def show_samples(comparisons: list[SampleComparison]) -> None:
    head = ["task", "items", "same prompts", "largest difference", "metric", "ours", "lm_eval", ""]
    rows = [
        [
            f"{each.task}, {each.shots} shots" if each.shots else each.task,
            f"{each.items:,}",
            f"{each.same_prompts:,}",
            "-" if each.largest_difference is None else f"{each.largest_difference:.2g} nats",
            each.metric or "-",
            f"{each.ours:.4f}",
            "-" if each.theirs is None else f"{each.theirs:.4f}",
            each.verdict(),
        ]
        for each in comparisons
    ]
    print_table([head, *rows])
    for each in comparisons:
        for count, where in ((each.only_ours, "ours"), (each.only_theirs, "those of lm_eval")):
            if count:
                print(f"{each.task}: {count:,} items are only in {where}.")
        for item in each.differences[:SHOWN_DIFFERENCES]:
            print(f"{each.task}, item {item.index}: {item.what}.")
        if len(each.differences) > SHOWN_DIFFERENCES:
            print(f"{each.task}: and {len(each.differences) - SHOWN_DIFFERENCES:,} more.")
