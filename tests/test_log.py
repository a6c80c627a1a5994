"""Metrics as JSON lines, progress bars, and messages on the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith import log
from gptsmith.log import Aside, JsonLines, duration, note, progress, quiet


@pytest.fixture
def lines(tmp_path: Path) -> JsonLines:
    return JsonLines(tmp_path / "metrics.jsonl")


def test_what_is_appended_is_read(lines: JsonLines) -> None:
    assert lines.read() == []
    lines.append(step=1, loss=2.5)
    lines.append(step=2, text="ü\n\u2028\u0085")
    assert lines.read() == [{"step": 1, "loss": 2.5}, {"step": 2, "text": "ü\n\u2028\u0085"}]
    assert lines.path.read_bytes().count(b"\n") == 2


@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=20), max_size=5))
def test_any_text_round_trips(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Including characters that str.splitlines treats as line breaks."""
    lines = JsonLines(tmp_path_factory.mktemp("lines") / "samples.jsonl")
    for step, text in enumerate(texts):
        lines.append(step=step, text=text)
    assert [row["text"] for row in lines.read()] == texts
    lines.truncate_after(1)
    assert [row["text"] for row in lines.read()] == texts[:2]


def test_each_line_is_flushed(lines: JsonLines) -> None:
    """Another process can read it while this one continues."""
    lines.append(step=1)
    assert JsonLines(lines.path).read() == [{"step": 1}]


def test_a_truncated_line_is_skipped(lines: JsonLines) -> None:
    """Even if it is cut within a multi-byte character."""
    lines.append(step=1, text="first")
    lines.append(step=2, text="zweite: äöü")
    whole = lines.path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole) - 1):
        lines.path.write_bytes(whole[:length])
        assert lines.read() == [{"step": 1, "text": "first"}]
    lines.truncate_after(5)
    assert lines.path.read_bytes() == whole[:first]
    lines.append(step=2)
    assert [row["step"] for row in lines.read()] == [1, 2]


def test_truncate_after_deletes_only_later_steps(lines: JsonLines) -> None:
    for step in (1, 2, 3, 4):
        lines.append(step=step, loss=0.1 * step)
    lines.append(step=2, val_loss=1.0)
    lines.truncate_after(2)
    assert [row["step"] for row in lines.read()] == [1, 2, 2]
    assert lines.read()[1]["loss"] == 0.2  # floats come back bit for bit
    assert [path.name for path in lines.path.parent.iterdir()] == [lines.path.name]


def test_nan_round_trips(lines: JsonLines) -> None:
    lines.append(step=1, loss=float("nan"))
    assert str(lines.read()[0]["loss"]) == "nan"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (187, "3 min 07 s"),
        (3599.9, "1 h 00 min"),
        (18720, "5 h 12 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_notes_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    note("hello")
    assert capfd.readouterr() == ("", "hello\n")


def test_an_aside_is_one_line_after_its_label(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = Aside("thinking")
    for text in (" ", "\nIt ", "", "is so."):
        aside.write(text)
    aside.end()
    aside.end()
    assert capfd.readouterr() == ("", "(thinking) It is so.\n")
    with quiet():
        aside.write("nothing")
        aside.end()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("gptsmith.log.is_terminal", lambda: True)
    aside.write("dim")
    aside.write("")
    aside.end()
    assert capfd.readouterr().err == "\x1b[2m(thinking) dim\x1b[22m\n"


def test_a_closed_pipe_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    note("hello")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gptsmith.log.time.monotonic", clock)
    return clock


def test_short_work_shows_no_progress(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress(10, "counting") as bar:
        for _ in range(10):
            clock.now += 0.09
            bar.advance(1)
    assert capfd.readouterr() == ("", "")


def test_a_log_file_gets_a_line_every_ten_seconds(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress(100, "counting") as bar:
        for _ in range(100):
            clock.now += 1.0
            bar.advance(1)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "counting: 11%, 1 min 29 s left"
    assert 7 <= len(lines) <= 10


def test_progress_of_unknown_length_and_before_the_first_advance(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with progress(None, "reading") as bar:
        clock.now += 11
        bar.advance(12345)
    with progress(100, "waiting") as bar:
        clock.now += 11
        bar.advance(0)
    assert capfd.readouterr().err.splitlines() == ["reading: 12,345", "waiting: 0%"]


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "is_terminal", lambda: True)
    with progress(100, "counting", unit="B") as bar:
        state: Any = bar
        bar.advance(1)
        at_once = state.rich
        clock.now += 2
        bar.advance(1)
        bar.advance(1)
        assert at_once is None
        assert state.rich.tasks[0].completed == 3
    assert state.rich.live.is_started is False


def test_lines_are_plain_json(lines: JsonLines) -> None:
    lines.append(step=1, loss=1e-7)
    assert json.loads(lines.path.read_text()) == {"step": 1, "loss": 1e-7}
