"""The one reader of run directories: run.json, metrics.jsonl and samples.jsonl, and which checkpoint is the best.

    run = read_run(Path("runs/bard"))
    run.status, run.config["loop"]["steps"], run.best, run.metrics[-1]

Reading is forgiving, since a run may be young, cut short, or still being written. A run.json of an older schema is
migrated in memory; the file changes when its run goes on.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptsmith.errors import CheckpointError
from gptsmith.storage import write_text

SCHEMA = 2

Row = Mapping[str, Any]


class Selection(NamedTuple):
    """Which evaluation, and so which checkpoint, is the best: that with the lowest or the highest value of a metric."""

    metric: str
    mode: Literal["min", "max"]


PREFIXES = {"model": "model", "adapter": "lora", "optim": "optim", "eval": "eval", "vision": "vision"}
"""The parts of a configuration whose options have a prefix on the command line (`--lora.rank`)."""

PLAIN_TEXT_METRIC = "text_bits_per_byte"
"""The loss on a fixed plain text, by which forgetting is measured; see `evaluate.forgetting`."""

DEFAULT_SELECTION = Selection("val_loss", "min")


@dataclass(frozen=True)
class Run:
    """A run as it is on the disk. `Path(run)` is its directory, and `gptsmith.load(run)` its best model."""

    directory: Path
    info: dict[str, Any]
    """The contents of run.json: `status`, `config`, `model`, `data`, `machine`, `started`, `ended`, `parameters`, …"""

    def __fspath__(self) -> str:
        return str(self.directory)

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def status(self) -> str:
        """`running`, `finished`, `interrupted`, `diverged` or `failed`."""
        return str(self.info.get("status"))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration by parts: `run.config["loop"]["steps"]`."""
        return self.part("config")

    @property
    def options(self) -> dict[str, Any]:
        """The configuration as the command line has it: `options["steps"]`, `options["model"]["hidden_size"]`,
        `options["lora"]["rank"]`."""
        flat: dict[str, Any] = {}
        for name, part in self.config.items():
            named = name in PREFIXES or not isinstance(part, dict)
            flat.update({PREFIXES.get(name, name): part} if named else part)
        return flat

    def part(self, name: str) -> dict[str, Any]:
        """Return a section of run.json, empty where it is missing."""
        value = self.info.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def selection(self) -> Selection:
        return selection_of(self.info)

    @functools.cached_property
    def _metrics(self) -> tuple[list[dict[str, Any]], int]:
        return _read_lines(self.directory / "metrics.jsonl")

    @functools.cached_property
    def _samples(self) -> tuple[list[dict[str, Any]], int]:
        return _read_lines(self.directory / "samples.jsonl")

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl in order of step, each step once: `step`, `time` (s), `loss`, `lr`, …"""
        return without_repeats(self._metrics[0])

    @functools.cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl: `step`, `temperature`, `prompt`, `text`, `final`."""
        return without_repeats([sample for sample in self._samples[0] if isinstance(sample.get("text"), str)])

    @functools.cached_property
    def alarms(self) -> list[dict[str, Any]]:
        """What evaluations warned of, in order of step: `step`, `message`; see `train.rollout.checks`."""
        return read_alarms(self.directory, self.info)

    @property
    def unreadable_lines(self) -> int:
        return self._metrics[1] + self._samples[1]

    @property
    def best(self) -> Row | None:
        """The row of the best evaluation."""
        return best_evaluation(self.metrics, self.selection)

    def update(self, **values: Any) -> None:
        """Change entries of run.json, on the disk as well."""
        self.info.update(values)
        write_text(self.directory / "run.json", json.dumps(self.info, indent=2) + "\n")


def read_run(directory: Path) -> Run:
    """Read a run directory. CheckpointError where `directory` is not one; metrics and samples may be missing."""
    return Run(Path(directory), read_info(Path(directory)))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl in order of step, each step once."""
    return without_repeats(_read_lines(Path(directory) / "metrics.jsonl")[0])


def read_alarms(directory: Path, info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what evaluations warned of: `step` and `message`, from evaluations.jsonl and `alarms` in run.json."""
    recorded = info.get("alarms")
    known = [row for row in recorded if _has_step(row)] if isinstance(recorded, list) else []
    rows = [
        *({**row, "alarm": row.get("message")} for row in known),
        *_read_lines(Path(directory) / "evaluations.jsonl")[0],
    ]
    found = {row["step"]: row["alarm"] for row in rows if isinstance(row.get("alarm"), str)}
    return [{"step": step, "message": message} for step, message in sorted(found.items())]


def is_evaluation(row: Row) -> bool:
    """Return whether a row of metrics is that of an evaluation: rows of training have a loss and no metric of one."""
    return any(key.startswith("val_") for key in row)


def find_runs(root: str | Path = "runs") -> list[Run]:
    """Return the runs in a directory and in its folders, oldest first; those that cannot be read are left out."""
    found = []
    for path in run_directories(Path(root)).values():
        try:
            found.append(read_run(path))
        except CheckpointError:
            continue
    return sorted(found, key=lambda run: str(run.info.get("started") or ""))


def run_directories(root: Path) -> dict[str, Path]:
    """Return name -> directory of the runs in `root`: children and grandchildren ("parent/child"), or itself."""
    if (root / "run.json").is_file():
        return {root.resolve().name: root}
    found: dict[str, Path] = {}
    for child in _children(root):
        if (child / "run.json").is_file():
            found[child.name] = child
        else:
            for grandchild in _children(child):
                if (grandchild / "run.json").is_file():
                    found[f"{child.name}/{grandchild.name}"] = grandchild
    return found


def _children(directory: Path) -> Iterator[Path]:
    try:
        yield from sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return


def read_info(directory: Path) -> dict[str, Any]:
    """Return the contents of run.json in the present schema. Raises CheckpointError as `read_run` does."""
    directory = Path(directory)
    path = directory / "run.json"
    if not directory.exists():
        raise CheckpointError(f"there is no run directory {directory}. Give the directory that a training run wrote.")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a run directory: it has no run.json. Give the directory that a training run wrote."
        )
    try:
        info = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged: it is not valid JSON ({error}). Restore it, or train again."
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from None
    if not isinstance(info, dict):
        raise CheckpointError(f"{path} is damaged: it does not describe a run. Restore it, or train again.")
    return migrated(info, str(path))


# The part of the configuration that each option of schema 1 belongs to since.
_PARTS_OF_SCHEMA_1 = {
    "auto": ("budget", "depth"),
    "data": ("val", "val_fraction", "field"),
    "init": ("tokenizer", "vocab_size", "unknown"),
    "method": ("mask_documents", "eval_tokens"),
    "loop": (
        *("context", "dropout", "steps", "batch_size", "micro_batch_size", "eval_every", "save_every", "log_every"),
        *("keep_checkpoints", "sample_tokens", "sample_prompt", "seed", "device", "precision", "compile"),
    ),
}


def migrated(info: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the contents of a run.json in the present schema. CheckpointError for a schema that is not known.

    Schema 1, without the key, had a flat configuration: `config.steps`, now `config.loop.steps`.
    """
    schema = info.get("schema", 1)
    if schema == SCHEMA:
        return dict(info)
    if schema != 1:
        raise CheckpointError(
            f"{where} has schema {schema!r}; this version of gptsmith reads 1 to {SCHEMA}. "
            "Use the version that wrote it, or a newer one."
        )
    config = info.get("config")
    if isinstance(config, dict):
        part_of = {option: part for part, options in _PARTS_OF_SCHEMA_1.items() for option in options}
        nested: dict[str, Any] = {}
        for name, value in config.items():
            if name in ("model", "optim"):
                nested[name] = value
            else:  # an unknown name is kept where it will be reported
                nested.setdefault(part_of.get(name, "loop"), {})[name] = value
        config = nested
    choice = info.get("choice")
    record = {name: value for name, value in info.items() if name != "choice"}
    if isinstance(choice, dict):
        record["plan"] = {
            "reasons": choice.get("reasons", []),
            "eval_seconds": choice.get("pause", 0.0),
            "teardown_seconds": choice.get("ending", 0.0),
        }
    return {"schema": SCHEMA, **record, **({"config": config} if isinstance(config, dict) else {})}


# The best evaluation -------------------------------------------------------------------------------------------------


def selection_of(info: Mapping[str, Any]) -> Selection:
    """Return the metric that a run's best checkpoint is chosen by, from the contents of its run.json."""
    value = info.get("selection")
    if isinstance(value, dict) and isinstance(value.get("metric"), str) and value.get("mode") in ("min", "max"):
        return Selection(value["metric"], value["mode"])
    return DEFAULT_SELECTION


def evaluations(rows: Iterable[Row], selection: Selection = DEFAULT_SELECTION) -> list[Row]:
    """Return the rows of evaluations with a finite metric. (No training row has a metric of that name.)"""
    return [row for row in rows if math.isfinite(number(row.get(selection.metric)))]


def evaluation_at(rows: Iterable[Row], step: int, selection: Selection = DEFAULT_SELECTION) -> Row | None:
    """Return the row of the evaluation at `step`, whatever its value, or None."""
    found = [row for row in rows if row.get("step") == step and selection.metric in row]
    return found[-1] if found else None


def best_evaluation(rows: Iterable[Row], selection: Selection = DEFAULT_SELECTION) -> Row | None:
    """Return the row of the best evaluation after the start, the earliest of equals; None where there is none."""
    sign = 1 if selection.mode == "min" else -1
    found = [row for row in evaluations(rows, selection) if row.get("step")]
    return min(found, key=lambda row: (sign * number(row[selection.metric]), row["step"]), default=None)


# Rows ----------------------------------------------------------------------------------------------------------------


def number(value: Any) -> float:
    """Return `value` as a float; NaN for what is not a number (null, text, missing)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def last_number(rows: Iterable[Row], key: str) -> float:
    """Return the last finite value of `key`, or NaN."""
    values = [number(row.get(key)) for row in rows]
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    try:
        return parse_rows(path.read_bytes())
    except OSError:
        return [], 0


def parse_rows(lines: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the objects that have a step, and the number of unreadable lines (the last may be half written)."""
    rows, unreadable = [], 0
    for line in filter(bytes.strip, lines.split(b"\n")):
        try:
            row = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if _has_step(row):
            rows.append(row)
        else:
            unreadable += 1
    return rows, unreadable


def _has_step(row: Any) -> bool:
    return isinstance(row, dict) and math.isfinite(number(row.get("step")))


def without_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where the step goes back the run was resumed: leave out what came after that step the first time."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        kept.append(row)
    return kept
