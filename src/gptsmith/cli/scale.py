"""`gptsmith scale`: train a series of budgets and fit the scaling law of the data."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptsmith.cli.run_options import RunOptions, parse_run, refuse_processes
from gptsmith.errors import UsageError
from gptsmith.log import note
from gptsmith.train.budget.parse import Budget
from gptsmith.train.config import RunConfig


@dataclass(frozen=True)
class Scale(RunOptions):
    """Train a series of models, each the best for its budget; fit loss against compute and extrapolate.

    OUT gets a run directory for each budget, scale.json and scale.png. An interrupted series continues when the command
    is run again with the same OUT.
    """

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA ...")] = ()
    """Files of text or rows (.jsonl, .json, .csv, .parquet, .arrow; also .gz, .zst), folders, or named corpora
    (`gptsmith data list`)."""
    budgets: str = "30s,1m,2m,4m"
    """At least two budgets of one kind, separated by commas, such as 30s,1m or 1e12flop,1e13flop or 1Mtok,4Mtok."""
    out: Path | None = None
    """Directory of the runs (default: runs/scale-NAME)."""


def main(arguments: list[str]) -> int:
    chosen, overrides = parse_run(Scale, "scale", arguments)
    refuse_processes(chosen.run, "scale")
    budgets = [text.strip() for text in chosen.budgets.split(",") if text.strip()]
    kinds = {Budget.parse(text).kind for text in budgets}
    if len(budgets) < 2 or len(kinds) > 1 or len(set(budgets)) < len(budgets):
        raise UsageError(f"--budgets {chosen.budgets}: give at least two different budgets of one kind: 30s,1m,2m,4m")
    config = chosen.run
    if config.auto.budget is not None or "steps" in overrides:
        raise UsageError("scale sets the budget and the steps of each run; leave out --budget and --steps.")
    if config.init.init is not None:
        raise UsageError("scale trains new models of several sizes; leave out --init.")
    if not any(chosen.data):
        raise UsageError("No data given. Pass a text file, a folder or a named corpus: gptsmith scale input.txt")
    budgets.sort(key=lambda text: Budget.parse(text).amount)

    from gptsmith.data.sources import open_source
    from gptsmith.train.text import choose_tokenizer

    source = open_source(chosen.data, field=config.data.field)
    out = chosen.out or Path("runs") / f"scale-{source.name}"
    # All runs use the tokenizer for the largest budget: losses per token are comparable only over the same tokens.
    largest = choose_tokenizer(config.replace(budget=budgets[-1]), overrides, source)
    overrides = {*overrides, "tokenizer"}
    results = []
    for number, text in enumerate(budgets, 1):
        note(f"run {number} of {len(budgets)}: {text}")
        result, code = _train(chosen, largest.replace(budget=text), overrides, out / text)
        if result is None:
            print(f"Stopped; progress saved. Resume with the same command: gptsmith scale … --out {out}")
            return code
        results.append(result)
    print(_conclude(results, out))
    return 0


def _train(chosen: Scale, config: RunConfig, overrides: set[str], directory: Path) -> tuple[dict[str, Any] | None, int]:
    """Train one budget, resume it, or reuse a finished run. Return its result, or None and the exit code."""
    from gptsmith.report import write_report
    from gptsmith.run_directory import read_run
    from gptsmith.train.run import resume, start

    if (directory / "run.json").exists():
        run = read_run(directory)
        if run.part("data").get("spec") != _spec(chosen):
            raise UsageError(f"{directory} is a run on other data. Choose another --out.")
        if run.status != "finished":
            result = resume(directory, on_end=write_report)
            if result.outcome == "interrupted":
                return None, 128 + result.signal
    else:
        began = time.monotonic()
        result = start(chosen.data, config, directory, overrides=overrides, began=began, on_end=write_report)
        if result.outcome == "interrupted":
            return None, 128 + result.signal
    return _result(directory), 0


def _spec(chosen: Scale) -> str | list[str]:
    from gptsmith.data.sources import open_source

    places = open_source(chosen.data, field=chosen.run.data.field).places
    return places[0] if len(places) == 1 else places


def _result(directory: Path) -> dict[str, Any]:
    from gptsmith.config import from_dict
    from gptsmith.model.config import ModelConfig
    from gptsmith.model.flops import flops_per_token
    from gptsmith.run_directory import read_run

    run = read_run(directory)
    best = run.best
    if best is None:
        raise UsageError(f"{directory} has no validation loss. Hold out some text with --val-fraction or --val.")
    model = from_dict(ModelConfig, run.info["model"])
    return {
        "budget": run.options["budget"],
        "run": directory.name,
        "parameters": run.info["parameters"],
        "tokens": best["tokens"],
        "flops": best["tokens"] * flops_per_token(model, run.options["context"]),
        "val_loss": best["val_loss"],
        "seconds": run.info["seconds"],
    }


def _conclude(rungs: list[dict[str, Any]], out: Path) -> str:
    """Fit the scaling law, write scale.json and scale.png, and return the table to print."""
    from gptsmith.report.curves import scaling_figure
    from gptsmith.report.figures import save_png
    from gptsmith.storage import write_text
    from gptsmith.train.budget.scaling import fit, fit_with_floor

    flops, losses = [rung["flops"] for rung in rungs], [rung["val_loss"] for rung in rungs]
    laws = [fit(flops, losses)]
    if len(rungs) > 2:
        laws.append(fit_with_floor(flops, losses))
    predictions = [
        {"times": times, "flops": times * max(flops), "val_loss": sorted(law(times * max(flops)) for law in laws)}
        for times in (10, 100)
    ]
    write_text(
        out / "scale.json",
        json.dumps({"rungs": rungs, "laws": [vars(law) for law in laws], "predictions": predictions}, indent=2) + "\n",
    )
    save_png(scaling_figure(flops, losses, laws), out / "scale.png")
    lines = [f"{'budget':>9}  {'parameters':>10}  {'tokens':>11}  {'FLOP':>8}  val loss"]
    lines += [
        f"{rung['budget']:>9}  {rung['parameters']:>10,}  {rung['tokens']:>11,}  {rung['flops']:>8.2g}  "
        f"{rung['val_loss']:.4f}"
        for rung in rungs
    ]
    lines += [
        f"loss = {law.floor:.3f} + {law.scale:.3g} · FLOP^-{law.exponent:.4f}, to within {law.error:.4f} nats"
        for law in laws
    ]
    for prediction in predictions:
        low, high = prediction["val_loss"][0], prediction["val_loss"][-1]
        expected = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
        lines.append(f"at {prediction['times']}× the largest ({prediction['flops']:.2g} FLOP): {expected} expected")
    lines.append("These extrapolations hold only while there is new text to train on.")
    lines.append(f"picture {out / 'scale.png'}")
    return "\n".join(lines)
