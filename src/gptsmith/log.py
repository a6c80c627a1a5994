"""Output of commands and runs: messages on the terminal, progress bars, and metrics as JSON lines."""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from gptsmith.storage import atomic_file, explain_os_errors, fsync_directory

_QUIET: contextvars.ContextVar[bool] = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Print no notes and show no progress meanwhile, in this thread."""
    token = _QUIET.set(on)
    try:
        yield
    finally:
        _QUIET.reset(token)


def is_quiet() -> bool:
    return _QUIET.get()


def note(text: str) -> None:
    """Print one line for the user on standard error. (Standard output is for results.)"""
    if is_quiet():
        return
    with contextlib.suppress(BrokenPipeError):  # the reader has exited, which is no reason to stop
        print(text, file=sys.stderr, flush=True)


class Aside:
    """A text on standard error that is written as it is generated, beside the result: a model's reasoning.

    It begins with `label` in parentheses and is dim on a terminal.
    """

    def __init__(self, label: str) -> None:
        self._label, self._is_open = label, False

    def write(self, text: str) -> None:
        if not self._is_open:
            text = text.lstrip()
            if not text:
                return
            self._is_open, text = True, f"({self._label}) {text}"
        self._print(f"\x1b[2m{text}\x1b[22m" if text and is_terminal() else text)

    def end(self) -> None:
        """End the line, if there is any text."""
        if self._is_open:
            self._is_open = False
            self._print("\n")

    def _print(self, text: str) -> None:
        if not is_quiet():
            with contextlib.suppress(BrokenPipeError):
                print(text, end="", file=sys.stderr, flush=True)


class Progress(Protocol):
    def advance(self, amount: float) -> None: ...


class _Bar:
    """A progress bar that appears after a second of work; in a log file, a line every ten seconds."""

    def __init__(self, total: float | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done, self.started, self.shown = 0.0, time.monotonic(), 0.0
        self.interactive = is_terminal() and not is_quiet()
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
        elif now - max(self.shown, self.started) > 10.0:  # not a terminal
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
    """Show a progress bar with the remaining time, for work that can take longer than two seconds.

    total: in units of `unit` ("B" shows sizes), or None if unknown. Yields an object with `advance(amount)`.
    """
    bar = _Bar(total, description, unit)
    try:
        yield bar
    finally:
        bar.close()


def duration(seconds: float) -> str:
    """Format a duration: `42 s`, `3 min 07 s`, `5 h 12 min`."""
    rounded = max(0, round(seconds))
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded // 60 % 60:02d} min"


class JsonLines:
    """An append-only file with one JSON object per line.

    Each line is flushed when it is appended. A last line that a crash cut short is skipped when the file is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **values: Any) -> None:
        self.append_all([values])

    def append_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n" for row in rows]
        with explain_os_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(lines)

    def append_durably(self, values: Mapping[str, Any]) -> None:
        """Append a row that is on the disk when this returns. Missing parent directories are created.

        Several threads and processes can append at once. A row that cannot be written whole, as on a full disk, leaves
        the file as it was; what a crash left of one is cut off before the next. Raises GptsmithError as
        `storage.explain_os_errors` does.
        """
        line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with explain_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            with open(self.path, "a+b", buffering=0) as file:
                with contextlib.suppress(ImportError):  # Windows has no fcntl
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
                size = file.seek(0, os.SEEK_END)
                fragment = _last_fragment(file, size)
                if _is_object(fragment):  # whole, but for its line end
                    line = b"\n" + line
                else:
                    size -= len(fragment)
                    file.truncate(size)
                try:
                    written = 0
                    while written < len(line):
                        written += file.write(line[written:])
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(size)
                    raise
            if is_new:
                fsync_directory(self.path.parent)

    def read(self) -> list[dict[str, Any]]:
        """Return the rows. Unreadable lines, such as one cut short by a crash, are skipped."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_bytes().split(b"\n"):  # not splitlines: U+2028 in a string does not end a line
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def truncate_after(self, step: int) -> None:
        """Delete the rows of steps after `step`, which a resumed run writes again."""
        rows = [row for row in self.read() if row.get("step", 0) <= step]
        with atomic_file(self.path, "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _last_fragment(file: FileIO, size: int) -> bytes:
    """Return what follows the last line end of a file of `size` bytes."""
    start, tail = size, b""
    while start and b"\n" not in tail:
        length = min(start, 1 << 16)
        start -= length
        file.seek(start)
        tail = file.read(length) + tail
    return tail[tail.rfind(b"\n") + 1 :]


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def is_terminal() -> bool:
    """Return whether standard error is a terminal that can redraw lines."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
