"""`gptsmith eval`: measure a model on tasks and texts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptsmith.cli.eval_texts import TextEvaluation, measure_texts, open_texts
from gptsmith.cli.parser import parse
from gptsmith.errors import UsageError
from gptsmith.log import note
from gptsmith.storage import write_text

if TYPE_CHECKING:
    from gptsmith.evaluate.contamination import Corpus
    from gptsmith.evaluate.harness import Results


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure of a model, and how."""

    tasks: Annotated[str | None, tyro.conf.arg(metavar="NAME,…")] = None
    """Tasks, separated by commas: names, or .yaml files of your own."""
    shots: Annotated[str | None, tyro.conf.arg(metavar="K,…")] = None
    """How many solved examples a prompt has, separated by commas: 0,1,4,16 (default: as many as the task says)."""
    draws: int = 1
    """How often shots are drawn, with seeds that follow --seed."""
    seed: int = 0
    """Seed of the first draw of shots."""
    limit: int | None = None
    """Use only so many examples of each task (default: all)."""
    controls: bool = False
    """Also score the choices with the question removed."""
    contamination: bool = False
    """Also look for the examples in the training text of MODEL, a run, and score those that occur in it apart."""
    training_data: tuple[str, ...] = field(default=())
    """Training text to look for the examples in, besides that of a run: a file, a folder, rows, a named corpus."""
    chat: Literal["task", "on", "off"] = "task"
    """Whether prompts are written by the model's chat template. task: as the task says."""
    samples: int = 1
    """How many answers are generated to each example; several give pass@k."""
    temperature: float | None = None
    """Sampling temperature of generated answers (default: 0 for one answer, 0.8 for several)."""
    allow_code_execution: bool = False
    """Run programs that the model writes, in a sandbox, for tasks such as humaneval."""
    allow_unprotected: bool = False
    """Run these programs even where the sandbox leaves something open on this machine."""
    text: Annotated[TextEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=TextEvaluation)
    """texts"""
    json: Path | None = None
    """Write scores, outcomes, prompts, versions, hashes and seeds to this file."""
    resume: bool = True
    """Use the outcomes of an earlier evaluation with the same model, task and settings."""
    quantize: Literal["auto", "none", "int8", "int4"] = "auto"
    """int8, int4: quantize the weights to 8 or 4 bits while loading. auto: as stored. none: full precision."""
    adapter: Path | None = None
    """LoRA adapter: a run that trained one, or a directory in PEFT format."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass(frozen=True, kw_only=True)
class Eval(EvalOptions):
    """Measure a model on tasks, zero-shot and with solved examples in the prompt, and its loss, perplexity and bits per
    byte on texts. `gptsmith tasks` lists the tasks."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run (its best checkpoint), a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    report: bool = False
    """Write a page about the model, evaluation.html, into its directory, or here if it is not a directory. Without
    --tasks and --data: measure texts of several domains and a choice of tasks."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write a picture of each task into this folder: the score against the number of shots."""
    beside: tuple[Path, ...] = ()
    """Results of other models (files of --json), whose curves are drawn in the same pictures."""


def main(arguments: list[str]) -> int:
    chosen = parse(Eval, "gptsmith eval", arguments)
    check(chosen)
    if not has_measures(chosen) and not chosen.report:
        raise UsageError("nothing to measure: give --tasks, --data or --report. `gptsmith tasks` lists the tasks.")
    others = _other_records(chosen)
    record = measure(chosen.model, chosen, for_report=chosen.report)
    if chosen.json is not None:
        write_record(chosen.json, record)
    if chosen.plot is not None:
        from gptsmith.report.evaluation import save_shot_figures

        for path in save_shot_figures([record, *others], chosen.plot):
            note(f"Wrote {path}")
    if chosen.report:
        from gptsmith.report.evaluation import report_evaluation

        note(f"Wrote {report_evaluation(chosen.model, record, others)}")
    return 0


def _other_records(chosen: Eval) -> list[dict[str, Any]]:
    """Return the results of --beside, and raise UsageError for options of pictures that do not go together."""
    if chosen.beside and chosen.plot is None and not chosen.report:
        raise UsageError("--beside has no effect without --plot or --report: leave it out.")
    if chosen.plot is not None:
        if not task_names(chosen) or len(_shots(chosen) or ()) < 2:
            raise UsageError("--plot draws curves: give --tasks and at least two numbers of --shots, such as 0,1,4,16.")
        if chosen.plot.exists() and not chosen.plot.is_dir():
            raise UsageError(f"--plot {chosen.plot}: this is a file, and a folder is needed.")
    if not chosen.beside:
        return []
    from gptsmith.report.evaluation import read_record

    return [read_record(path) for path in chosen.beside]


def has_measures(chosen: EvalOptions) -> bool:
    return bool(task_names(chosen) or chosen.text.data or chosen.text.induction)


def task_names(chosen: EvalOptions) -> list[str]:
    return [name.strip() for name in (chosen.tasks or "").split(",") if name.strip()]


def check(chosen: EvalOptions) -> None:
    """Raise UsageError for options that are wrong, before anything is loaded."""
    names = task_names(chosen)
    _shots(chosen)
    if chosen.draws < 1:
        raise UsageError(f"--draws must be at least 1, not {chosen.draws}.")
    defaults = EvalOptions()
    for option in ("shots", "draws", "limit", "controls", "contamination", "training_data", "samples", "temperature"):
        if not names and getattr(chosen, option) != getattr(defaults, option):
            raise UsageError(f"--{option.replace('_', '-')} has no effect without --tasks: leave it out.")
    if chosen.allow_unprotected and not chosen.allow_code_execution:
        raise UsageError("--allow-unprotected has no effect without --allow-code-execution: add that, or leave it out.")
    if chosen.json is not None:
        refuse_unwritable(chosen.json)


def measure(model_name: str, chosen: EvalOptions, *, for_report: bool = False) -> dict[str, Any]:
    """Load a model, measure it, print the tables, and return the results as plain data.

    for_report: add samples, and measure a choice of texts and tasks if none is given.
    """
    from gptsmith.evaluate.harness import resolve_task, run_tasks
    from gptsmith.evaluate.provenance import environment
    from gptsmith.loading import load_model, resolve_adapter
    from gptsmith.runtime import cache_directory, choose_device

    names = task_names(chosen)
    for name in names:
        resolve_task(name)  # raises before the model is loaded
    sources = open_texts(chosen.text)
    corpora = _corpora(model_name, chosen)
    adapter = None if chosen.adapter is None else resolve_adapter(chosen.adapter)
    model, tokenizer = load_model(
        model_name, device=choose_device(chosen.device), quantize=chosen.quantize, adapter=adapter
    )
    record: dict[str, Any]
    log = cache_directory() / "evaluations" if chosen.resume else None
    seeds = range(chosen.seed, chosen.seed + chosen.draws)
    if for_report and not has_measures(chosen):
        from gptsmith.cli.eval_report import overview, write_samples

        record = overview(model, tokenizer, seeds=seeds, name=model_name, log=log)
        return record | {"samples": write_samples(model, tokenizer, seed=chosen.seed)}
    if names:
        results = run_tasks(
            model,
            tokenizer,
            names,
            shots=_shots(chosen),
            seeds=seeds,
            limit=chosen.limit,
            controls=chosen.controls,
            chat={"task": None, "on": True, "off": False}[chosen.chat],
            log=log,
            name=model_name,
            samples=chosen.samples,
            temperature=chosen.temperature,
            allow_code_execution="unprotected" if chosen.allow_unprotected else chosen.allow_code_execution,
        )
        record = results.to_json()
        print(results.table())
        if corpora:
            record["contamination"] = _check_contamination(results, names, corpora)
    else:
        record = environment(model, tokenizer, model_name)
    record |= measure_texts(model, tokenizer, sources, chosen.text)
    if for_report:
        from gptsmith.cli.eval_report import write_samples

        record["samples"] = write_samples(model, tokenizer, seed=chosen.seed)
    return record


def _corpora(model_name: str, chosen: EvalOptions) -> list[Corpus]:
    """Return the training text to look for examples in."""
    from gptsmith.evaluate.contamination import corpora_of, corpus_of_data

    found = corpora_of(model_name) if chosen.contamination else []
    return found + [corpus_of_data(text) for text in chosen.training_data]


def _check_contamination(results: Results, names: list[str], corpora: list[Corpus]) -> list[dict[str, Any]]:
    from gptsmith.evaluate.contamination import check_results

    record = []
    for (task, shots), checked in check_results(results, names, corpora).items():
        print(f"{task}, {shots} shots: {checked.describe()}.")
        record.append({"task": task, "shots": shots, **checked.to_json()})
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def refuse_unwritable(path: Path) -> None:
    """Raise UsageError, before the work, for a file that cannot be written."""
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--json {path}: {'this is a folder' if path.is_dir() else 'its folder does not exist'}.")


def _shots(chosen: EvalOptions) -> tuple[int, ...] | None:
    return None if chosen.shots is None else tuple(_number(each) for each in chosen.shots.split(","))


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--shots takes numbers, separated by commas, not {text!r}: --shots 0,1,4,16") from None
