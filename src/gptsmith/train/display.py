"""Progress of training: one live line with ETA on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from gptsmith.log import duration, is_quiet, is_terminal, note

PLAIN_EVERY_SECONDS = 15.0


class Display:
    """Shows progress of `steps` steps on standard error. Use as a context manager."""

    def __init__(self, steps: int, first_step: int = 0) -> None:
        self.steps, self.first_step = steps, first_step
        self.measured_from: tuple[int, float] | None = None  # (step, time) of the first line, after compiling
        self.shown = 0.0
        self.metric = ""  # the latest evaluation
        self.bar: Any = None

    def __enter__(self) -> Display:
        if is_terminal() and not is_quiet():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.task = self.bar.add_task("", total=self.steps, completed=self.first_step, status="starting")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def print(self, text: str) -> None:
        """Print a lasting line above the live one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            note(text)

    def say(self, text: str) -> None:
        """Show what is being done right now, on the live line only."""
        if self.bar is not None:
            self.bar.update(self.task, status=text)

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        """Show a row of training metrics: loss or rewards, last evaluation, speed, time left."""
        status = "  ".join(f"{name} {row[name]:.3f}" for name in ("reward", "kl", "entropy", "length") if name in row)
        status = status or f"loss {row['loss']:.3f}"
        status += self.metric + f"  {row['tokens_per_second']:,.0f} tok/s"
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=step, total=self.steps, status=status)
        elif now - self.shown > PLAIN_EVERY_SECONDS or step == self.steps:
            self.shown = now
            left = ""
            if self.measured_from is not None:
                first, began = self.measured_from
                left = f"  {duration((now - began) / (step - first) * (self.steps - step))} left"
            note(f"step {step}/{self.steps}  {status}{left}")
        if self.measured_from is None:
            self.measured_from = (step, now)

    def evaluation(self, step: int, row: Mapping[str, Any], metric: str) -> None:
        """Show a row of an evaluation; metric: the one that chooses the best checkpoint."""
        name, short = ("val loss", "val") if metric == "val_loss" else (metric.replace("_", " "),) * 2
        self.metric = f"  {short} {row[metric]:.4f}"
        self.print(f"step {step}/{self.steps}  {name} {row[metric]:.4f}  ({duration(row['time'])})")

    def tasks(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the scores on tasks."""
        scores = (
            f"{row['task']}{f' ({shots} shots)' if (shots := row['shots']) else ''} {row['score']:.3f} "
            f"({row['low']:.3f} to {row['high']:.3f}{'' if (c := row['chance']) is None else f', chance {c:.3f}'})"
            for row in rows
        )
        self.print(f"step {step}/{self.steps}  {'  '.join(scores)}")

    def sample(self, text: str) -> None:
        """Show the beginning of a generated text."""
        width = 74
        lines = [line[:width] for line in text.strip("\n").splitlines()[:8]] or ["(nothing)"]
        self.print("\n".join(f"  | {line}" for line in lines))
