"""`gptsmith train`: from text to a model, and on from where it stopped."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from gptsmith.config import from_dict
from gptsmith.errors import UsageError
from gptsmith.presets import describe_presets, preset
from gptsmith.train.budget.recipe import settled
from gptsmith.train.config import TrainConfig

BEGAN = time.monotonic()  # this module is loaded as the command starts: its budget of time runs from here


@dataclass(frozen=True)
class Train:
    """Train a GPT. The run directory gets checkpoints, metrics, samples and report.html."""

    data: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="DATA")] = None
    """A text file, a folder, .jsonl[.gz|.zst], .parquet, or a named corpus (`gptsmith data list`)."""
    out: Path | None = None
    """The run directory (default: runs/NAME, numbered if taken)."""
    resume: Path | None = None
    """Continue this run from its last checkpoint."""
    preset: str | None = None
    """Start from a named configuration (see below); other options override it."""
    config: Path | None = None
    """Start from a file: a run's run.json, or JSON/YAML with the same names as the options."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def main(arguments: list[str]) -> int:
    base, given = base_and_given(arguments)
    chosen = tyro.cli(
        Train,
        prog="gptsmith train",
        args=arguments,
        default=Train(run=base),
        description=f"{Train.__doc__}\n\npresets:\n{describe_presets()}",
    )
    if chosen.resume is None and not chosen.data:
        raise UsageError("train on what? Give a text file, a folder or a named corpus: gptsmith train input.txt")
    if chosen.resume is not None and (chosen.data is not None or chosen.out is not None):
        raise UsageError("--resume takes data and place from the run itself; leave the text and --out away.")

    from gptsmith.report import write_report
    from gptsmith.train.run import resume, start

    if chosen.resume is not None:
        ended = resume(chosen.resume, chosen.run, on_end=write_report)
    else:
        ended = start(str(chosen.data), chosen.run, chosen.out, given=given, began=BEGAN, on_end=write_report)
    directory = ended.run.directory
    if ended.outcome == "interrupted":
        print(f"stopped and saved. Go on with: gptsmith train --resume {directory}")
        return 128 + ended.signal
    print(_summary(directory))
    return 0


def base_and_given(arguments: list[str]) -> tuple[TrainConfig, set[str]]:
    """The configuration that options override - a run's own, a preset's, a file's, or the default - and the names of
    what is settled, which a budget does not choose: all of a preset or file, and every option on the command line."""
    names = [argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")]
    given = {re.sub(r"(^|\.)no_", r"\1", name) for name in names}  # --model.no-tie-word-embeddings
    base, whole = _base(arguments)
    return base, given | (settled(base) if whole else set())


def _base(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The base, and whether somebody has chosen it as a whole."""
    resume, name, file = (_value(arguments, option) for option in ("--resume", "--preset", "--config"))
    if sum(value is not None for value in (resume, name, file)) > 1:
        raise UsageError("--resume, --preset and --config each give a whole configuration; use one of them.")
    if resume is not None:
        from gptsmith.train.run import read_run

        return read_run(Path(resume)).config, True
    if name is not None:
        return preset(name), True
    if file is not None:
        return _read_config(Path(file)), True
    return TrainConfig(), False


def _value(arguments: list[str], option: str) -> str | None:
    """The value of an option, by the parser's rules: the last one counts."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(option + "="):
            value = argument.removeprefix(option + "=")
    return value


def _read_config(path: Path) -> TrainConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config {path} is not UTF-8 text.") from None
    try:
        if path.suffix in (".yaml", ".yml"):
            try:
                import yaml
            except ImportError:
                raise UsageError(f"--config {path}: reading YAML needs `pip install pyyaml`; or use JSON.") from None
            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--config {path} is not valid JSON: {error}.") from None
    except Exception as error:  # yaml has its own
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    if isinstance(values, dict) and "config" in values and "version" in values:  # a run.json
        values = values["config"]
    try:
        return from_dict(TrainConfig, values, default=TrainConfig())
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None


def _summary(directory: Path) -> str:
    from gptsmith.log import JsonLines, duration

    rows = [row for row in JsonLines(directory / "metrics.jsonl").read() if row.get("val_loss") is not None]
    lines = []
    if rows:
        best = min(rows, key=lambda row: row["val_loss"])
        when = f"at step {best['step']} ({duration(best['time'])})"
        lines.append(f"best validation loss {best['val_loss']:.4f} nats/token {when}")
    lines += [
        f"model   {directory}/best",
        f"report  {directory}/report.html",
        f'try     gptsmith generate {directory} --prompt "..."',
    ]
    return "\n".join(lines)
