"""What a run directory says of itself, read forgivingly: a run may be young, cut short, or still writing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptsmith.errors import GptsmithError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run as it is on the disk."""

    directory: Path
    info: dict[str, Any]
    """run.json: `config`, `model`, `data`, `machine`, `status`, `started`, `ended`, `parameters`, where known."""
    metrics: list[dict[str, Any]]
    """In order of step, each step once (see `read_metrics`)."""
    samples: list[dict[str, Any]]
    unreadable_lines: int

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    def part(self, name: str) -> dict[str, Any]:
        """A section of run.json, empty where it is missing."""
        value = self.info.get(name)
        return value if isinstance(value, dict) else {}


def read_run(directory: Path) -> Run:
    """Read a run directory. Raises GptsmithError where `directory` is not one; metrics and samples may be missing."""
    directory = Path(directory)
    info = read_info(directory)
    metrics, bad_metrics = _read_lines(directory / "metrics.jsonl")
    samples, bad_samples = _read_lines(directory / "samples.jsonl")
    samples = [sample for sample in samples if isinstance(sample.get("text"), str)]
    return Run(directory, info, without_repeats(metrics), without_repeats(samples), bad_metrics + bad_samples)


def read_info(directory: Path) -> dict[str, Any]:
    """The contents of run.json. Raises GptsmithError as `read_run` does."""
    if not directory.exists():
        raise GptsmithError(f"there is no run directory {directory}. Give the directory that a training run wrote.")
    path = directory / "run.json"
    if not path.is_file():
        raise GptsmithError(
            f"{directory} is not a run directory: it has no run.json. Give the directory that a training run wrote."
        )
    try:
        info = json.loads(path.read_bytes())
    except ValueError as error:
        raise GptsmithError(f"{path} is not valid JSON ({error}). Restore it, or train again.") from None
    except OSError as error:
        raise GptsmithError(f"cannot read {path}: {error.strerror}.") from None
    if not isinstance(info, dict):
        raise GptsmithError(f"{path} does not describe a run: it holds no JSON object. Restore it, or train again.")
    return info


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in order of step: `step`, `time` (s), `loss` or `val_loss` (nats/token), `lr`, ...

    A run that was resumed did some steps twice; only the later account of them is kept.
    """
    return without_repeats(_read_lines(Path(directory) / "metrics.jsonl")[0])


def number(value: Any) -> float:
    """`value` as a float; NaN for what is no number (null, text, missing)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def last_number(rows: Iterable[Row], key: str) -> float:
    """The last finite value of `key`, or NaN."""
    values = [number(row.get(key)) for row in rows]
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def best_validation(rows: Iterable[Row]) -> Row | None:
    """The row with the smallest finite `val_loss`."""
    finite = [row for row in rows if math.isfinite(number(row.get("val_loss")))]
    return min(finite, key=lambda row: number(row["val_loss"]), default=None)


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    try:
        return parse_rows(path.read_bytes())
    except OSError:
        return [], 0


def parse_rows(lines: bytes) -> tuple[list[dict[str, Any]], int]:
    """Objects that name a step, and how many lines are unreadable (a last line may be only half written)."""
    rows, unreadable = [], 0
    for line in filter(bytes.strip, lines.split(b"\n")):
        try:
            row = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if isinstance(row, dict) and math.isfinite(number(row.get("step"))):
            rows.append(row)
        else:
            unreadable += 1
    return rows, unreadable


def without_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where the step goes back the run was resumed there: forget what came after that step the first time."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        kept.append(row)
    return kept
