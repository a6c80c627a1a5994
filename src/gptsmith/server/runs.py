"""Training runs for the page: which there are, what they say of themselves, and news of one as it is written.

A name in a request is looked up among the names of the directories that are there; no path is ever made from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import APIRouter
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from gptsmith.errors import GptsmithError
from gptsmith.run_directory import (
    best_validation,
    last_number,
    number,
    parse_rows,
    read_info,
    read_run,
    without_repeats,
)
from gptsmith.server.errors import ApiError

MOST_ROWS = 4_000  # of metrics in one answer; a chart has fewer pixels
MOST_SAMPLES = 60
SAMPLE_CHARACTERS = 6_000
POLL_SECONDS = 0.5

Row = dict[str, Any]


class RunsDirectory:
    """The runs in a directory: its children and their children that have a run.json; or the directory itself, if it is
    a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._summaries: dict[str, tuple[Any, Row]] = {}  # name -> (what its files looked like, the summary)

    def directories(self) -> dict[str, Path]:
        """name -> directory; of a run two levels down, the name is "parent/child"."""
        if (self.root / "run.json").is_file():
            return {self.root.resolve().name: self.root}
        found: dict[str, Path] = {}
        for child in _children(self.root):
            if (child / "run.json").is_file():
                found[child.name] = child
            else:
                for grandchild in _children(child):
                    if (grandchild / "run.json").is_file():
                        found[f"{child.name}/{grandchild.name}"] = grandchild
        return found

    def find(self, name: str) -> Path | None:
        return self.directories().get(name)

    def summaries(self) -> list[Row]:
        """What a list of runs shows of each, the newest first."""
        rows = [self._summary(name, directory) for name, directory in self.directories().items()]
        return sorted(rows, key=lambda row: str(row["started"] or ""), reverse=True)

    def _summary(self, name: str, directory: Path) -> Row:
        metrics = directory / "metrics.jsonl"
        signature = (_signature(directory / "run.json"), _signature(metrics))
        known = self._summaries.get(name)
        if known is None or known[0] != signature:
            known = self._summaries[name] = (signature, _summarize(name, directory))
        changed = max((each.mtime_ns for each in signature if each is not None), default=0)
        return {**known[1], "quiet": round(max(0.0, time.time() - changed / 1e9), 1)}


def _summarize(name: str, directory: Path) -> Row:
    try:
        run = read_run(directory)
    except GptsmithError as error:
        return {"name": name, "status": "unreadable", "error": str(error), "started": None}
    config, model, data = run.part("config"), run.part("model"), run.part("data")
    best = best_validation(run.metrics)
    row = {
        "name": name,
        "status": run.info.get("status"),
        "error": None,
        "started": run.info.get("started"),
        "ended": run.info.get("ended"),
        "parameters": run.info.get("parameters"),
        "data": Path(str(data.get("spec", ""))).name,
        "layers": model.get("num_hidden_layers"),
        "context": config.get("context"),
        "step": run.metrics[-1]["step"] if run.metrics else 0,
        "steps": config.get("steps"),
        "time": last_number(run.metrics, "time"),
        "loss": last_number(run.metrics, "loss"),
        "val_loss": None if best is None else best["val_loss"],
        "tokens_per_second": last_number(run.metrics, "tokens_per_second"),
    }
    return {key: finite(value) for key, value in row.items()}


class Signature(NamedTuple):
    """What tells that a file is another one, or has other contents."""

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
    """A file of JSON lines that grows; each `read` gives the rows of the whole lines that are new."""

    REMEMBERED = 64  # bytes before the place, to see that the file is still the one that was read

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.unreadable = path, 0, 0
        self._inode, self._before = 0, b""

    def read(self) -> tuple[list[Row], bool]:
        """New rows, and whether they are all rows from the beginning: the file is new, was cut short or replaced."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except OSError:
            again = self.place > 0
            self.place, self._before = 0, b""
            return [], again
        with file:
            again = not self._continues(file)
            if again:
                self.place, self._before, self.unreadable = 0, b"", 0
            file.seek(self.place)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]  # a line half written waits for the rest of it
        rows, unreadable = parse_rows(data)
        self.place += len(data)
        self._before = (self._before + data)[-self.REMEMBERED :]
        self.unreadable += unreadable
        return rows, again

    def _continues(self, file: Any) -> bool:
        status = os.fstat(file.fileno())
        same = self._inode == status.st_ino and status.st_size >= self.place
        self._inode = status.st_ino
        if not same:
            return self.place == 0
        file.seek(self.place - len(self._before))
        return bool(file.read(len(self._before)) == self._before)


class Follower:
    """What is new in a run since one last looked. Events: `snapshot` (all there is, to begin with and whenever the past
    has changed), `metrics` and `samples` (rows), `run` (another run.json), `gone`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.metrics, self.samples = Tail(directory / "metrics.jsonl"), Tail(directory / "samples.jsonl")
        self._record: Signature | None = None
        self._last_step = -math.inf
        self._begun = False

    def snapshot(self) -> Row:
        """All there is. Raises GptsmithError for a run that cannot be read."""
        self.metrics, self.samples = Tail(self.metrics.path), Tail(self.samples.path)
        self._record = _signature(self.directory / "run.json")
        info = read_info(self.directory)
        metrics, samples = without_repeats(self.metrics.read()[0]), without_repeats(self.samples.read()[0])
        self._begun, self._last_step = True, metrics[-1]["step"] if metrics else -math.inf
        return {
            "name": self.name,
            "record": finite(info),
            "metrics": finite(thin(metrics)),
            "rows": len(metrics),
            "samples": finite(_shown(samples)),
            "unreadable_lines": self.metrics.unreadable + self.samples.unreadable,
        }

    def news(self) -> list[tuple[str, Any]]:
        """Events, in order. Raises GptsmithError where a first snapshot cannot be had."""
        if not self._begun:
            return [("snapshot", self.snapshot())]
        if not self.directory.is_dir():
            return [("gone", {"name": self.name})]
        metrics, again = self.metrics.read()
        samples, samples_again = self.samples.read()
        went_back = bool(metrics) and metrics[0]["step"] < self._last_step
        if again or samples_again or went_back:
            with contextlib.suppress(GptsmithError):  # run.json may be gone for a moment: next time
                return [("snapshot", self.snapshot())]
            self._begun = False
            return []
        events: list[tuple[str, Any]] = []
        signature = _signature(self.directory / "run.json")
        if signature != self._record:
            with contextlib.suppress(GptsmithError):
                events.append(("run", finite(read_info(self.directory))))
                self._record = signature
        if metrics:
            self._last_step = metrics[-1]["step"]
            events.append(("metrics", finite(metrics)))
        if samples:
            events.append(("samples", finite(_shown(samples))))
        return events

    async def events(
        self, stopping: Callable[[], bool] = lambda: False, poll_seconds: float = POLL_SECONDS
    ) -> AsyncIterator[dict[str, str]]:
        """Server-sent events, until the run is gone, the server is stopping or nobody listens."""
        while not stopping():
            try:
                news = await run_in_threadpool(self.news)
            except GptsmithError as error:
                news = [("gone", {"name": self.name, "error": str(error)})]
            for event, data in news:
                yield {"event": event, "data": json.dumps(data, ensure_ascii=False)}
                if event == "gone":
                    return
            await asyncio.sleep(poll_seconds)


def thin(rows: Sequence[Mapping[str, Any]], most: int = MOST_ROWS) -> list[Mapping[str, Any]]:
    """At most about `most` rows: of each stretch of training those with the lowest and the highest loss, so that a
    spike stays to be seen; all evaluations, the first row and the last."""
    if len(rows) <= most:
        return list(rows)
    training = [i for i, row in enumerate(rows) if "val_loss" not in row]
    length = math.ceil(2 * len(training) / most)
    kept = {0, len(rows) - 1, *(i for i, row in enumerate(rows) if "val_loss" in row)}
    for start in range(0, len(training), length):
        stretch = training[start : start + length]
        losses = [(number(rows[i].get("loss")), i) for i in stretch]
        kept.update(i for value, i in losses if not math.isfinite(value))
        finite_losses = [pair for pair in losses if math.isfinite(pair[0])]
        if finite_losses:
            kept.update((min(finite_losses)[1], max(finite_losses)[1]))
    return [rows[i] for i in sorted(kept)]


def finite(value: Any) -> Any:
    """`value` with null for what is no number: JSON, as browsers read it, has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def _shown(samples: Sequence[Row]) -> list[Row]:
    texts = [sample for sample in samples if isinstance(sample.get("text"), str)]
    return [{**sample, "text": _whole(sample["text"][:SAMPLE_CHARACTERS])} for sample in texts[-MOST_SAMPLES:]]


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(child for child in directory.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError:
        return []


def runs_routes(root: Path, stopping: Callable[[], bool]) -> APIRouter:
    """Routes over the runs in `root`, a directory of runs or one run."""
    router = APIRouter(tags=["web page"])
    runs = RunsDirectory(root)

    def find(name: str) -> Path:
        directory = runs.find(name)
        if directory is None:
            raise ApiError(404, f"there is no run {name!r}.")
        return directory

    @router.get("/api/runs")
    def list_runs() -> dict[str, Any]:
        """The runs that there are, the newest first."""
        return {"runs": runs.summaries()}

    @router.get("/api/runs/{name:path}/events")
    async def run_events(name: str) -> EventSourceResponse:
        """All of a run, and then what is new in it, as server-sent events: snapshot, metrics, samples, run, gone."""
        directory = await run_in_threadpool(find, name)
        return EventSourceResponse(Follower(name, directory).events(stopping))

    @router.get("/api/runs/{name:path}")
    def show_run(name: str) -> dict[str, Any]:
        """Configuration, metrics and samples of a run."""
        try:
            return Follower(name, find(name)).snapshot()
        except GptsmithError as error:
            raise ApiError(409, str(error)) from None

    return router
