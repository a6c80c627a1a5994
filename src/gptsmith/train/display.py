"""What a person sees while a model trains: one live line with ETA on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from gptsmith.log import duration, is_terminal, note

PLAIN_EVERY_SECONDS = 15.0


class Display:
    """Shows progress of `steps` steps on standard error. Use as a context manager."""

    def __init__(self, steps: int, first_step: int = 0) -> None:
        self.steps, self.first_step = steps, first_step
        self.measured_from: tuple[int, float] | None = (
            None  # speed is that since the first line: compiling comes before
        )
        self.shown = 0.0
        self.val_loss: float | None = None
        self.bar: Any = None

    def __enter__(self) -> Display:
        if is_terminal():
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
        """A lasting line, above the live one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            note(text)

    def say(self, text: str) -> None:
        """What is going on right now, on the live line only."""
        if self.bar is not None:
            self.bar.update(self.task, status=text)

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        """After a log line: loss, last validation loss, speed, time left."""
        status = f"loss {row['loss']:.3f}"
        if self.val_loss is not None:
            status += f"  val {self.val_loss:.4f}"
        status += f"  {row['tokens_per_second']:,.0f} tok/s"
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

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self.val_loss = values["val_loss"]
        self.print(f"step {step}/{self.steps}  val loss {self.val_loss:.4f}  ({duration(values['time'])})")

    def sample(self, text: str) -> None:
        """A preview of what the model writes now."""
        width = 74
        lines = [line[:width] for line in text.strip("\n").splitlines()[:8]] or ["(nothing)"]
        self.print("\n".join(f"  | {line}" for line in lines))
