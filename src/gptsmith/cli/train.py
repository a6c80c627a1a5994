"""`gptsmith train`: pretrain a model on a text, continue pretraining one, or resume a run."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptsmith.cli import COMMANDS
from gptsmith.cli.run_options import RunOptions, explicit_options, option_value, parse_run
from gptsmith.distributed.context import environment_world_size, join_processes
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.train.config import RunConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Train(RunOptions):
    """Train a GPT. The run directory gets checkpoints, metrics, samples and report.html."""

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[DATA ...]")] = ()
    """Files of text or rows (.jsonl, .json, .csv, .parquet, .arrow; also .gz, .zst), folders, or named corpora
    (`gptsmith data list`)."""
    out: Path | None = None
    """Run directory (default: runs/NAME, numbered if taken)."""
    resume: Path | None = None
    """Continue this run from its last checkpoint. DATA says where the text is now, if it has moved; --steps extends the
    run, if its learning rate has not begun to fall."""


def main(arguments: list[str]) -> int:
    if (command := _command_of(arguments)) != "train":  # a run of another method is resumed by its own command
        module = importlib.import_module(f"gptsmith.cli.{command}")
        return int(module.main(arguments))
    chosen, overrides = parse_run(Train, "train", arguments)
    if chosen.resume is None and not any(chosen.data):
        raise UsageError("No data given. Pass a text file, a folder or a named corpus: gptsmith train input.txt")
    if chosen.resume is not None and chosen.out is not None:
        raise UsageError("--resume takes the directory from the run; omit --out.")

    return train_or_resume(chosen, overrides, ["train", *arguments], began=BEGAN)


_parsing_only: ContextVar[list[Any] | None] = ContextVar("_parsing_only", default=None)


def parsed_only(command: str, arguments: list[str], processes: int) -> Any:
    """Return the options of a training command as it parses and checks them itself, without starting the run.

    processes: how many will share the run.
    """
    found: list[Any] = []
    token = _parsing_only.set(found)
    try:
        importlib.import_module(f"gptsmith.cli.{command}").main(arguments)
    finally:
        _parsing_only.reset(token)
    config: RunConfig = found[0].run
    config.replace(processes=processes).check_processes()
    return found[0]


def _command_of(arguments: list[str]) -> str:
    """Return the command whose run `--resume` continues."""
    directory = option_value(arguments, "--resume")
    if directory is None:
        return "train"
    from gptsmith.run_directory import read_info

    try:
        objective = str(read_info(Path(directory)).get("objective"))
    except GptsmithError:  # which the command itself explains
        return "train"
    return objective if objective in COMMANDS else "train"


def train_or_resume(
    chosen: Any, overrides: set[str], command: Sequence[str], *, began: float, objective: str | None = None
) -> int:
    """Start the run that the parsed options describe, or resume one, and print how it ended. Return the exit code.

    command: the command line, for the processes that share the run. objective: its name (default: pretraining, or that
    of the resumed run).
    """
    config: RunConfig = chosen.run
    if (parsed := _parsing_only.get()) is not None:
        parsed.append(chosen)
        return 0
    started = environment_world_size()
    if started is not None and config.parallel.processes != started:
        if "processes" in explicit_options(command):
            raise UsageError(
                f"--processes {config.parallel.processes}: torchrun has started {started}. Leave out --processes."
            )
        config = config.replace(processes=started)
    config.check_processes()
    if started is None and config.parallel.processes > 1:
        from gptsmith.distributed.launch import launch

        return launch(command, config.parallel.processes)

    from gptsmith.report import write_report
    from gptsmith.train.run import Extras, resume, start

    with join_processes(config.parallel.process_timeout) as ranks:
        if chosen.resume is not None:
            result = resume(chosen.resume, config, data=chosen.data or None, on_end=write_report, ranks=ranks)
        else:
            result = start(
                chosen.data,
                config,
                chosen.out,
                overrides=overrides,
                began=began,
                on_end=write_report,
                extras=Extras(objective=objective),
                ranks=ranks,
            )
        directory, interrupted = result.run.directory, result.outcome == "interrupted"
        if ranks.is_main:  # and now, before the end of another process can end this one
            stopped = f"Stopped; progress saved. Resume with: gptsmith train --resume {directory}"
            print(stopped if interrupted else _summary(directory), flush=True)
    return 128 + result.signal if interrupted else 0


def _summary(directory: Path) -> str:
    from gptsmith.log import duration
    from gptsmith.run_directory import read_run

    run = read_run(directory)
    lines = []
    if (best := run.best) is not None:
        metric = run.selection.metric
        when = f"at step {best['step']} ({duration(best['time'])})"
        name = (
            f"validation loss {best[metric]:.4f} nats/token" if metric == "val_loss" else f"{metric} {best[metric]:.4f}"
        )
        lines.append(f"best {name} {when}")
    lines += [
        f"model   {directory}/best",
        f"report  {directory}/report.html",
        f"try     gptsmith classify {directory} --predict FILE"
        if run.info.get("objective") == "classify"
        else f'try     gptsmith generate {directory} --prompt "..."',
    ]
    return "\n".join(lines)
