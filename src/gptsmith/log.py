"""What a run says: lines for the terminal, progress bars, and metrics as JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from gptsmith.storage import atomic_file, explain_os_errors


def note(text: str) -> None:
    """One line to the person at the terminal (standard error: standard output is for results)."""
    with contextlib.suppress(BrokenPipeError):  # nobody reads it any more: no reason to stop the work
        print(text, file=sys.stderr, flush=True)


class Progress(Protocol):
    def advance(self, amount: float) -> None: ...


class _Bar:
    """A rich bar that appears only once the work has lasted a second."""

    def __init__(self, total: float | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done, self.started, self.shown = 0.0, time.monotonic(), 0.0
        self.interactive = is_terminal()
        self.rich: Any = None

    def advance(self, amount: float) -> None:
        self.done += amount
        now = time.monotonic()
        if self.rich is not None:
            self.rich.update(self.task, completed=self.done)
        elif now - self.started < 1.0:
            return
        elif self.interactive:
            self._start()
        elif now - max(self.shown, self.started) > 10.0:  # a log file: a line every ten seconds
            self.shown = now
            left = ""
            if self.total and self.done:
                left = f", {duration((now - self.started) * (self.total / self.done - 1))} left"
            share = f"{self.done:,.0f}" if not self.total else f"{100 * self.done / self.total:.0f}%"
            note(f"{self.description}: {share}{left}")

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
        if self.unit == "B":
            columns.append(DownloadColumn())
        columns.append(TimeRemainingColumn())
        self.rich = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.rich.add_task(self.description, total=self.total, completed=self.done)
        self.rich.start()

    def close(self) -> None:
        if self.rich is not None:
            self.rich.stop()


@contextlib.contextmanager
def progress(total: float | None, description: str, unit: str = "it") -> Iterator[Progress]:
    """A progress bar with time remaining, for work that may last over two seconds.

    total: in `unit`s ("B" shows sizes), or None if unknown. Yields an object with `advance(amount)`.
    """
    bar = _Bar(total, description, unit)
    try:
        yield bar
    finally:
        bar.close()


def duration(seconds: float) -> str:
    """`42 s`, `3 min 07 s`, `5 h 12 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


class JsonLines:
    """An append-only file of one JSON object a line, each line written at once.

    A last line cut short by a crash is dropped when the file is read or opened again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **values: Any) -> None:
        line = json.dumps(values, ensure_ascii=False, allow_nan=True) + "\n"
        with explain_os_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; an unreadable one (a write cut short) is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_bytes().split(b"\n"):  # not splitlines: U+2028 in a text does not end its line
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def truncate_after(self, step: int) -> None:
        """Forget lines of steps after `step`: a resumed run writes them again."""
        rows = [row for row in self.read() if row.get("step", 0) <= step]
        with atomic_file(self.path, "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
