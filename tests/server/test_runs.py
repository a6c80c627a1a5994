"""The API for training runs, with files in any state, and with hostile names."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.log import JsonLines
from gptsmith.server.runs import Follower, RunsDirectory, Tail, downsample, json_safe
from gptsmith.server.webapp import watch_app


def make_run(directory: Path, rows: int = 3, **info: Any) -> Path:
    directory.mkdir(parents=True)
    record = {"status": "running", "started": "2026-01-01T00:00:00+00:00", "parameters": 1000}
    record |= {"config": {"steps": 100, "batch_size": 2, "context": 8}, "data": {"spec": "/somewhere/text.txt"}}
    (directory / "run.json").write_text(json.dumps(record | info))
    for step in range(1, rows + 1):
        write(directory, step)
    return directory


def write(directory: Path, step: int, **values: Any) -> None:
    row = {"step": step, "time": step / 10, "loss": 3 / step, "lr": 0.1, "tokens_per_second": 100.0}
    JsonLines(directory / "metrics.jsonl").append(**(row | values))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    make_run(root / "one", started="2026-01-01T00:00:00+00:00")
    make_run(root / "two", rows=0, started="2026-01-02T00:00:00+00:00")
    make_run(root / "ladder" / "1m", started="2026-01-03T00:00:00+00:00")
    (root / "no-run").mkdir()
    (root / "a file").write_text("")
    (tmp_path / "secret").mkdir()
    make_run(tmp_path / "outside")
    return root


@pytest.fixture
def client(root: Path) -> TestClient:
    return TestClient(watch_app(root))


def test_the_list(client: TestClient, root: Path) -> None:
    runs = client.get("/api/runs").json()["runs"]
    assert [run["name"] for run in runs] == ["ladder/1m", "two", "one"]
    one = runs[2]
    assert (one["step"], one["steps"], one["loss"], one["val_loss"]) == (3, 100, 1.0, None)
    assert one["data"] == "text.txt"  # the name of the file, not its path
    assert 0 <= one["quiet"] < 60
    write(root / "one", 4, val_loss=2.5)
    (root / "two" / "run.json").write_text("{half")
    runs = {run["name"]: run for run in client.get("/api/runs").json()["runs"]}
    assert (runs["one"]["step"], runs["one"]["val_loss"]) == (4, 2.5)
    assert runs["two"]["status"] == "unreadable"
    assert "not valid JSON" in runs["two"]["error"]


def test_summary_shows_the_best_evaluation(client: TestClient, root: Path) -> None:
    run = make_run(root / "classifier", selection={"metric": "accuracy", "mode": "max"})
    for step, accuracy, val_loss in ((4, 0.5, 1.0), (5, 0.75, 2.0), (6, 0.25, 0.5)):
        write(run, step, accuracy=accuracy, val_loss=val_loss)
    make_run(root / "rewarded", selection={"metric": "reward", "mode": "max"})
    write(root / "rewarded", 4, reward=1.0)
    runs = {run["name"]: run for run in client.get("/api/runs").json()["runs"]}
    assert runs["classifier"]["val_loss"] == 2.0
    assert runs["rewarded"]["val_loss"] is None


def test_root_that_is_a_run(root: Path) -> None:
    client = TestClient(watch_app(root / "one"))
    assert [run["name"] for run in client.get("/api/runs").json()["runs"]] == ["one"]
    assert client.get("/api/runs/one").json()["rows"] == 3
    assert client.get("/api/runs/two").status_code == 404


def test_one_run(client: TestClient, root: Path) -> None:
    JsonLines(root / "ladder" / "1m" / "samples.jsonl").append(step=2, temperature=0.8, prompt="", text="one\u2028two")
    shown = client.get("/api/runs/ladder/1m").json()
    assert shown["record"]["config"]["steps"] == 100
    assert [row["step"] for row in shown["metrics"]] == [1, 2, 3]
    assert shown["samples"][0]["text"] == "one\u2028two"


TRAVERSALS = [
    "..", "../outside", "..%2Foutside", "%2e%2e/outside", "one/../../outside", "one/..", "./one", "/etc", "//etc/x",
    "..\\outside", "one%00", "no-run", "a file", "one/", "", "ladder", "ladder/1m/../../one", ".", "one/metrics.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_path_traversal(client: TestClient, root: Path, name: str) -> None:
    response = client.get(f"/api/runs/{name}")
    allowed = {"one", "two", "ladder/1m"}
    if response.status_code == 200:  # the client has normalized the URL
        assert response.json().get("name", "runs") in allowed | {"runs"}
    else:
        assert response.status_code in (404, 307)


@given(name=st.text(max_size=30))
@settings(max_examples=50)
def test_names_are_looked_up(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp() / "names"
    if not root.exists():
        make_run(root / "one")
    found = RunsDirectory(root).find(name)
    assert (found is not None) == (name == "one")


def test_nan_becomes_null(client: TestClient, root: Path) -> None:
    write(root / "one", 4, loss=math.nan, grad_norm=math.inf)
    response = client.get("/api/runs/one")
    assert "NaN" not in response.text
    assert "Infinity" not in response.text
    assert response.json()["metrics"][-1]["loss"] is None
    assert json_safe({"a": [math.inf, 1, "x", {"b": -math.inf}]}) == {"a": [None, 1, "x", {"b": None}]}


def test_unreadable_run_reports_the_error(client: TestClient, root: Path) -> None:
    (root / "one" / "run.json").write_text("[]")
    response = client.get("/api/runs/one")
    assert response.status_code == 409
    assert "does not describe a run" in response.json()["error"]["message"]


def test_lone_surrogates(client: TestClient, root: Path) -> None:
    (root / "one" / "samples.jsonl").write_text(
        '{"step": 1, "text": "a\\ud800b"}\n{"step": 2, "text": 5}\n{"step": 3}\n'
    )
    assert [sample["text"] for sample in client.get("/api/runs/one").json()["samples"]] == ["a?b"]


# News ---------------------------------------------------------------------------------------------------------------


def test_poll_returns_what_is_new(root: Path) -> None:
    run = root / "one"
    follower = Follower("one", run)
    ((event, snapshot),) = follower.poll()
    assert event == "snapshot"
    assert [row["step"] for row in snapshot["metrics"]] == [1, 2, 3]
    assert follower.poll() == []

    write(run, 4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    ((event, rows),) = follower.poll()
    assert (event, [row["step"] for row in rows]) == ("metrics", [4])
    assert follower.poll() == []  # an incomplete line is not an event
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ss": 0.5}\n')
    assert follower.poll() == [("metrics", [{"step": 5, "loss": 0.5}])]

    JsonLines(run / "samples.jsonl").append(step=5, text="Once")
    assert follower.poll() == [("samples", [{"step": 5, "text": "Once"}])]
    info = json.loads((run / "run.json").read_text()) | {"status": "finished"}
    (run / "run.json").write_text(json.dumps(info))
    assert follower.poll() == [("run", info)]


def test_resumed_run_sends_a_new_snapshot(root: Path) -> None:
    run = root / "one"
    follower = Follower("one", run)
    follower.poll()
    JsonLines(run / "metrics.jsonl").truncate_after(2)
    write(run, 3, loss=0.25)
    write(run, 4)
    ((event, snapshot),) = follower.poll()
    assert event == "snapshot"
    assert [(row["step"], row["loss"]) for row in snapshot["metrics"]] == [(1, 3), (2, 1.5), (3, 0.25), (4, 0.75)]
    write(run, 2, loss=9.0)  # appended without truncation: rows after step 2 are dropped
    ((event, snapshot),) = follower.poll()
    assert [(row["step"], row["loss"]) for row in snapshot["metrics"]] == [(1, 3), (2, 1.5), (2, 9.0)]


def test_truncated_and_deleted_files(root: Path) -> None:
    run = root / "one"
    follower = Follower("one", run)
    follower.poll()
    with (run / "metrics.jsonl").open("r+b") as file:
        file.truncate(10)
    ((event, snapshot),) = follower.poll()
    assert (event, snapshot["metrics"]) == ("snapshot", [])
    (run / "metrics.jsonl").unlink()
    for _ in range(2):
        assert all(event == "snapshot" for event, _ in follower.poll())
    write(run, 1)
    events = follower.poll()
    assert [row["step"] for _, data in events for row in (data["metrics"] if isinstance(data, dict) else data)] == [1]
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    assert follower.poll() == [("gone", {"name": "one"})]


@given(st.lists(st.one_of(st.integers(1, 60), st.just("rewrite"), st.just("read")), max_size=25))
@settings(max_examples=40, deadline=None)
def test_tail_reads_every_complete_line_once(tmp_path_factory: pytest.TempPathFactory, orders: list[int | str]) -> None:
    """However the bytes arrive, the rows read since the last restart are those of the file's complete lines."""
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    tail, rows, step, left = Tail(path), list[Any](), 0, b""
    for order in [*orders, "read"]:
        if order == "read":
            new, again = tail.read()
            rows = new if again else rows + new
            whole = path.read_bytes() if path.exists() else b""
            assert rows == [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
        elif order == "rewrite":
            other = path.with_suffix(".new")
            other.write_bytes(b'{"step": 0, "again": %d}\n' % step)
            os.replace(other, path)
            left = b""
        else:
            step += 1
            left += json.dumps({"step": step, "text": "é" * 9}, ensure_ascii=False).encode() + b"\n"
            with path.open("ab") as file:
                file.write(left[: int(order)])
            left = left[int(order) :]


def test_event_stream(root: Path) -> None:
    async def collect() -> list[tuple[str, Any]]:
        events: AsyncIterator[dict[str, str]] = Follower("one", root / "one").events(
            lambda: len(found) == 2, poll_seconds=0.01
        )
        async for event in events:
            found.append((event["event"], json.loads(event["data"])))
            write(root / "one", 4)
        return found

    found: list[tuple[str, Any]] = []
    asyncio.run(asyncio.wait_for(collect(), 20))
    assert [name for name, _ in found] == ["snapshot", "metrics"]
    assert found[1][1][0]["step"] == 4


def test_downsampling_keeps_extremes() -> None:
    rows: list[dict[str, Any]] = [{"step": i, "loss": 2.0 + (i % 7) / 10} for i in range(30_000)]
    spike, dip, evaluation = rows[12_345], rows[20_000], {"step": 15_000, "val_loss": 1.0}
    spike["loss"], dip["loss"], rows[25_000]["loss"] = 50.0, 0.1, math.nan
    rows.insert(15_000, evaluation)
    kept = downsample(rows, 1000)
    assert 500 < len(kept) < 1100
    assert kept[0] is rows[0]
    assert kept[-1] is rows[-1]
    for special in (spike, dip, evaluation):
        assert any(row is special for row in kept)
    assert any(math.isnan(row.get("loss", 0)) for row in kept)
    assert [row["step"] for row in kept] == sorted(row["step"] for row in kept)
    assert downsample(rows[:900], 1000) == rows[:900]


def test_an_alarm_of_an_evaluation_becomes_part_of_the_record(tmp_path: Path) -> None:
    directory = tmp_path / "ppo"
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({"status": "running", "config": {}}))
    follower = Follower("ppo", directory)
    assert "alarms" not in follower.snapshot()["record"]
    row = {"step": 20, "reward": [1.0], "gold": [0.5], "alarm": "gold fell"}
    (directory / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    ((event, record),) = follower.poll()
    assert (event, record["alarms"]) == ("run", [{"step": 20, "message": "gold fell"}])


def test_evaluations_of_any_metric_are_kept_where_rows_are_thinned() -> None:
    rows = [{"step": i, "loss": 1.0, "reward": i} for i in range(3000)]
    rows[1500] = {"step": 1500, "val_reward": 2.0}
    assert rows[1500] in downsample(rows, 100)
