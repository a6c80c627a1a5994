"""`gptsmith scale`: a ladder of budgets, and the law of scaling of the user's own data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptsmith.cli.train import base_and_given
from gptsmith.errors import UsageError
from gptsmith.log import note
from gptsmith.train.budget.parse import Budget
from gptsmith.train.config import TrainConfig


@dataclass(frozen=True)
class Scale:
    """Train a ladder of models, each the best for its budget; fit loss against compute, draw it and look ahead.

    OUT gets a run directory for each budget, scale.json and scale.png. Called again with the same OUT it goes on where
    it was stopped.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A text file, a folder, .jsonl[.gz|.zst], .parquet, or a named corpus (`gptsmith data list`)."""
    budgets: str = "30s,1m,2m,4m"
    """The ladder: at least two budgets of one kind, separated by commas (30s,1m · 1e12flop,1e13flop · 1Mtok,4Mtok)."""
    out: Path | None = None
    """Where the runs go (default: runs/scale-NAME)."""
    preset: str | None = None
    """Start from a named configuration; other options override it."""
    config: Path | None = None
    """Start from a file with the names of the options."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def main(arguments: list[str]) -> int:
    base, given = base_and_given(arguments)
    chosen = tyro.cli(Scale, prog="gptsmith scale", args=arguments, default=Scale(data="", run=base))
    budgets = [text.strip() for text in chosen.budgets.split(",") if text.strip()]
    kinds = {Budget.parse(text).kind for text in budgets}
    if len(budgets) < 2 or len(kinds) > 1 or len(set(budgets)) < len(budgets):
        raise UsageError(f"--budgets {chosen.budgets}: give at least two different budgets of one kind: 30s,1m,2m,4m")
    if chosen.run.budget is not None or "steps" in given:
        raise UsageError("the ladder sets budget and steps of each run itself; leave --budget and --steps away.")
    if not chosen.data:
        raise UsageError("scale on what? Give a text file, a folder or a named corpus: gptsmith scale input.txt")
    budgets.sort(key=lambda text: Budget.parse(text).amount)

    from gptsmith.data.sources import open_source
    from gptsmith.train.run import settle_tokenizer

    source = open_source(chosen.data, field=chosen.run.field)
    out = chosen.out or Path("runs") / f"scale-{source.name}"
    # All rungs read the same tokens, those for the largest budget: else their losses could not be compared.
    largest = settle_tokenizer(replace(chosen.run, budget=budgets[-1]), given, source)
    given = {*given, "tokenizer"}
    rungs = []
    for number, text in enumerate(budgets, 1):
        note(f"rung {number} of {len(budgets)}: {text}")
        rung, code = _rung(chosen, replace(largest, budget=text), given, out / text)
        if rung is None:
            print(f"stopped and saved. Go on with the same command: gptsmith scale … --out {out}")
            return code
        rungs.append(rung)
    print(_conclude(rungs, out))
    return 0


def _rung(chosen: Scale, config: TrainConfig, given: set[str], directory: Path) -> tuple[dict[str, Any] | None, int]:
    """Train one budget, or go on with it, or take it as it is; None and the exit code where it was interrupted."""
    import time

    from gptsmith.report import write_report
    from gptsmith.train.run import read_run, resume, start

    if (directory / "run.json").exists():
        run = read_run(directory)
        if run.record["data"]["spec"] != _spec(chosen):
            raise UsageError(f"{directory} is a run over other data. Choose another --out.")
        if run.record["status"] != "finished":
            ended = resume(directory, on_end=write_report)
            if ended.outcome == "interrupted":
                return None, 128 + ended.signal
    else:
        ended = start(chosen.data, config, directory, given=given, began=time.monotonic(), on_end=write_report)
        if ended.outcome == "interrupted":
            return None, 128 + ended.signal
    return _result(directory), 0


def _spec(chosen: Scale) -> str:
    from gptsmith.data.sources import open_source

    source = open_source(chosen.data, field=chosen.run.field)
    return chosen.data if source.path is None else str(source.path.resolve())


def _result(directory: Path) -> dict[str, Any]:
    from gptsmith.config import from_dict
    from gptsmith.log import JsonLines
    from gptsmith.model.config import ModelConfig
    from gptsmith.model.flops import flops_per_token
    from gptsmith.train.run import read_run

    run = read_run(directory)
    rows = [row for row in JsonLines(directory / "metrics.jsonl").read() if row.get("val_loss") is not None]
    if not rows:
        raise UsageError(
            f"{directory} has no validation loss; a ladder needs some held-out text (--val-fraction, --val)."
        )
    best = min(rows, key=lambda row: row["val_loss"])
    model = from_dict(ModelConfig, run.record["model"])
    return {
        "budget": run.config.budget,
        "run": directory.name,
        "parameters": run.record["parameters"],
        "tokens": best["tokens"],
        "flops": best["tokens"] * flops_per_token(model, run.config.context),
        "val_loss": best["val_loss"],
        "seconds": run.record["seconds"],
    }


def _conclude(rungs: list[dict[str, Any]], out: Path) -> str:
    """Fit, predict, draw, write; the table to print."""
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
    lines.append("a straight line drawn on: true only while there is new text to read")
    lines.append(f"picture {out / 'scale.png'}")
    return "\n".join(lines)
