"""Training runs for the web page: a list of them, one in full, and updates of one while it trains.

The run name in a request is looked up among the runs found on the disk; it never becomes part of a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastapi import APIRouter
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from gptsmith.errors import GptsmithError
from gptsmith.run_directory import (
    is_evaluation,
    last_number,
    number,
    parse_rows,
    read_run,
    run_directories,
    without_repeats,
)
from gptsmith.server.errors import ApiError, escape_surrogates
from gptsmith.server.sse import json_line

MAX_ROWS = 4_000  # metrics rows in one response: more than a chart has pixels
MAX_SAMPLES = 60
SAMPLE_CHARACTERS = 6_000
POLL_SECONDS = 0.5

Row = dict[str, Any]
Parse = Callable[[bytes], tuple[list[Row], int]]
"""Returns the rows in some lines, and the number of other lines."""


def _record(directory: Path) -> Row:
    """Return the contents of run.json with the options of the configuration as the command line has them."""
    run = read_run(directory)
    record = {name: value for name, value in run.info.items() if name != "schema"} | {"config": run.options}
    return record | ({"alarms": run.alarms} if run.alarms else {})


class RunsDirectory:
    """The runs in a directory, with cached summaries."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._summaries: dict[str, tuple[Any, Row]] = {}  # name -> (signatures of its files, summary)

    def find(self, name: str) -> Path | None:
        return self._directories().get(name)

    def _directories(self) -> dict[str, Path]:
        """Return the runs by name. A name that is not UTF-8 has escapes for its other bytes."""
        return {escape_surrogates(name): directory for name, directory in run_directories(self.root).items()}

    def summaries(self) -> list[Row]:
        """Return a summary of each run, the newest first."""
        rows = [self._summary(name, directory) for name, directory in self._directories().items()]
        return sorted(rows, key=lambda row: str(row["started"] or ""), reverse=True)

    def _summary(self, name: str, directory: Path) -> Row:
        metrics = directory / "metrics.jsonl"
        signature = (_signature(directory / "run.json"), _signature(metrics))
        cached = self._summaries.get(name)
        if cached is None or cached[0] != signature:
            cached = self._summaries[name] = (signature, _summarize(name, directory))
        changed = max((file.mtime_ns for file in signature if file is not None), default=0)
        return {**cached[1], "quiet": round(max(0.0, time.time() - changed / 1e9), 1)}  # seconds since the last write


def _summarize(name: str, directory: Path) -> Row:
    try:
        run = read_run(directory)
    except GptsmithError as error:
        return {"name": name, "status": "unreadable", "error": escape_surrogates(str(error)), "started": None}
    options, model, data = run.options, run.part("model"), run.part("data")
    best = run.best or {}
    row = {
        "name": name,
        "status": run.info.get("status"),
        "error": None,
        "started": run.info.get("started"),
        "ended": run.info.get("ended"),
        "parameters": run.info.get("parameters"),
        "data": _data_name(data.get("spec")),
        "layers": model.get("num_hidden_layers"),
        "context": options.get("context"),
        "step": run.metrics[-1]["step"] if run.metrics else 0,
        "steps": options.get("steps"),
        "time": last_number(run.metrics, "time"),
        "loss": last_number(run.metrics, "loss"),
        "val_loss": best.get("val_loss"),
        "metric": run.selection.metric,
        "best": best.get(run.selection.metric),
        "tokens_per_second": last_number(run.metrics, "tokens_per_second"),
    }
    safe: Row = json_safe(row)
    return safe


def _data_name(spec: Any) -> str:
    """Return the name of the first file of a run's text."""
    first = spec[0] if isinstance(spec, list) and spec else spec
    return Path(str(first)).name


class Signature(NamedTuple):
    """Identifies a version of a file: it changes when the file is replaced or modified."""

    inode: int
    size: int
    mtime_ns: int


def _signature(path: Path) -> Signature | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return Signature(status.st_ino, status.st_size, status.st_mtime_ns)


class Tail:
    """A growing file of JSON lines. Each `read` returns the rows of the complete lines that are new.

    parse: what reads them; by default, rows are objects with a step.
    """

    FINGERPRINT_BYTES = 64
    """Bytes before the offset that are compared, to notice that the file was replaced or rewritten."""

    def __init__(self, path: Path, parse: Parse = parse_rows) -> None:
        self.path, self.offset, self.unreadable = path, 0, 0
        self._parse = parse
        self._inode, self._fingerprint = 0, b""

    def read(self) -> tuple[list[Row], bool]:
        """Return the new rows, and whether reading restarted: the file is new, or was truncated or replaced, and the
        rows are all of its rows."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except OSError:
            restarted = self.offset > 0
            self.offset, self._fingerprint = 0, b""
            return [], restarted
        with file:
            restarted = not self._continues(file)
            if restarted:
                self.offset, self._fingerprint, self.unreadable = 0, b"", 0
            file.seek(self.offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]  # an incomplete last line is read the next time
        rows, unreadable = self._parse(data)
        self.offset += len(data)
        self._fingerprint = (self._fingerprint + data)[-self.FINGERPRINT_BYTES :]
        self.unreadable += unreadable
        return rows, restarted

    def _continues(self, file: BinaryIO) -> bool:
        """Return whether the file is the one read before, with nothing before the offset changed."""
        status = os.fstat(file.fileno())
        same = self._inode == status.st_ino and status.st_size >= self.offset
        self._inode = status.st_ino
        if not same:
            return self.offset == 0
        file.seek(self.offset - len(self._fingerprint))
        return file.read(len(self._fingerprint)) == self._fingerprint


class Follower:
    """Follow a run. Events: `snapshot` (everything; the first event, and again whenever earlier rows have changed),
    `metrics` and `samples` (new rows), `run` (a changed run.json), `gone` (the run was deleted or cannot be read)."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.metrics, self.samples = Tail(directory / "metrics.jsonl"), Tail(directory / "samples.jsonl")
        self._info_signature: tuple[Signature | None, ...] = ()
        self._last_step = -math.inf
        self._started = False

    def _signatures(self) -> tuple[Signature | None, ...]:
        """Return the versions of the files that the record is read from."""
        return tuple(_signature(self.directory / name) for name in ("run.json", "evaluations.jsonl"))

    def snapshot(self) -> Row:
        """Return everything about the run. Raise GptsmithError for a run that cannot be read."""
        self.metrics, self.samples = Tail(self.metrics.path), Tail(self.samples.path)
        self._info_signature = self._signatures()
        info = _record(self.directory)
        metrics, samples = without_repeats(self.metrics.read()[0]), without_repeats(self.samples.read()[0])
        self._started, self._last_step = True, metrics[-1]["step"] if metrics else -math.inf
        return {
            "name": self.name,
            "record": json_safe(info),
            "metrics": json_safe(downsample(metrics)),
            "rows": len(metrics),
            "samples": json_safe(_sample_rows(samples)),
            "unreadable_lines": self.metrics.unreadable + self.samples.unreadable,
        }

    def poll(self) -> list[tuple[str, Any]]:
        """Return the events since the last call, in order. Raise GptsmithError if the first snapshot fails."""
        if not self._started:
            return [("snapshot", self.snapshot())]
        if not self.directory.is_dir():
            return [("gone", {"name": self.name})]
        metrics, metrics_restarted = self.metrics.read()
        samples, samples_restarted = self.samples.read()
        went_back = bool(metrics) and metrics[0]["step"] < self._last_step
        if metrics_restarted or samples_restarted or went_back:
            with contextlib.suppress(GptsmithError):  # run.json may be missing for a moment: try again the next time
                return [("snapshot", self.snapshot())]
            self._started = False
            return []
        events: list[tuple[str, Any]] = []
        signature = self._signatures()
        if signature != self._info_signature:
            with contextlib.suppress(GptsmithError):
                events.append(("run", json_safe(_record(self.directory))))
                self._info_signature = signature
        if metrics:
            self._last_step = metrics[-1]["step"]
            events.append(("metrics", json_safe(metrics)))
        if samples:
            events.append(("samples", json_safe(_sample_rows(samples))))
        return events

    async def events(
        self, stopping: Callable[[], bool] = lambda: False, poll_seconds: float = POLL_SECONDS
    ) -> AsyncIterator[dict[str, str]]:
        """Yield server-sent events until the run is gone or the server is stopping."""
        while not stopping():
            try:
                events = await run_in_threadpool(self.poll)
            except GptsmithError as error:
                events = [("gone", {"name": self.name, "error": escape_surrogates(str(error))})]
            for event, data in events:
                yield {"event": event, "data": json_line(data)}
                if event == "gone":
                    return
            await asyncio.sleep(poll_seconds)


def downsample(rows: Sequence[Mapping[str, Any]], limit: int = MAX_ROWS) -> list[Mapping[str, Any]]:
    """Return at most about `limit` rows: from each interval of training steps those with the lowest and the highest
    loss, so that spikes stay visible; all evaluations, the first row and the last."""
    if len(rows) <= limit:
        return list(rows)
    training = [i for i, row in enumerate(rows) if not is_evaluation(row)]
    length = math.ceil(2 * len(training) / limit)
    kept = {0, len(rows) - 1, *(i for i, row in enumerate(rows) if is_evaluation(row))}
    for start in range(0, len(training), length):
        interval = training[start : start + length]
        losses = [(number(rows[i].get("loss")), i) for i in interval]
        kept.update(i for value, i in losses if not math.isfinite(value))
        finite_losses = [pair for pair in losses if math.isfinite(pair[0])]
        if finite_losses:
            kept.update((min(finite_losses)[1], max(finite_losses)[1]))
    return [rows[i] for i in sorted(kept)]


def json_safe(value: Any) -> Any:
    """Replace NaN and infinities by None, and escape lone surrogates: JSON in UTF-8 has none of them."""
    if isinstance(value, str):
        return escape_surrogates(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {escape_surrogates(str(key)): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def _sample_rows(samples: Sequence[Row]) -> list[Row]:
    texts = [sample for sample in samples if isinstance(sample.get("text"), str)]
    return [
        {**sample, "text": _replace_surrogates(sample["text"][:SAMPLE_CHARACTERS])} for sample in texts[-MAX_SAMPLES:]
    ]


def _replace_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # lone surrogates, which UTF-8 cannot encode


def runs_routes(root: Path, stopping: Callable[[], bool]) -> APIRouter:
    """Return routes for the runs in `root`, a directory of runs or one run."""
    router = APIRouter(tags=["web page"])
    runs = RunsDirectory(root)

    def find(name: str) -> Path:
        directory = runs.find(name)
        if directory is None:
            raise ApiError(404, f"The run {name!r} does not exist.")
        return directory

    @router.get("/api/runs")
    def list_runs() -> dict[str, Any]:
        """List the training runs, the newest first."""
        return {"runs": runs.summaries()}

    @router.get("/api/runs/{name:path}/events")
    async def run_events(name: str) -> EventSourceResponse:
        """Stream a run as server-sent events: a snapshot, then metrics, samples and run as they change, and gone."""
        directory = await run_in_threadpool(find, name)
        return EventSourceResponse(Follower(name, directory).events(stopping))

    @router.get("/api/runs/{name:path}")
    def show_run(name: str) -> dict[str, Any]:
        """Return the configuration, metrics and samples of a run."""
        try:
            return Follower(name, find(name)).snapshot()
        except GptsmithError as error:
            raise ApiError(409, str(error)) from None

    return router
