"""Runs that earlier versions wrote still resume, generate, load, report and are served.

`tests/fixtures/run_schema_N/` holds what a version wrote, and what it would have gone on to; `write_run_schema_N.py`
beside it says how it was made. Only the command line and the public API are used here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

import gptsmith

FIXTURES = Path(__file__).parents[1] / "fixtures"
RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["run_schema_1"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the runs, and of their text, to whose new place they are pointed."""
    old = Path(shutil.copytree(FIXTURES / request.param, tmp_path / "old", symlinks=True))
    for path in old.glob("*/run.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["data"]["spec"] = str(old / "words.txt")
        path.write_text(json.dumps(record, indent=2), encoding="utf-8")
    return old


def expectation(old: Path) -> dict[str, Any]:
    return dict(json.loads((old / "expected.json").read_text(encoding="utf-8")))


def exact(expected: dict[str, Any]) -> bool:
    """Whether this machine computes to the bit what the one did on which the runs were made."""
    processors = [line for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return (
        torch.backends.cpu.get_cpu_capability() == expected["cpu_capability"]
        and torch.__version__ == expected["machine"]["torch"]
        and torch.get_num_threads() == expected["threads"]
        and bool(processors)
        and processors[0].endswith(expected["machine"]["processor"])
    )


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_as_expected(run: Path, expected: dict[str, Any], *, to_the_bit: bool) -> None:
    """The metrics (but for times), samples and last weights of `run` are the expected ones."""
    kept = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm")
    metrics = [{k: row[k] for k in kept if k in row} for row in rows(run / "metrics.jsonl")]
    if to_the_bit:
        assert metrics == expected["metrics"]
        assert rows(run / "samples.jsonl") == expected["samples"]
        weights = (run / "last" / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == expected["weights_sha256"]
        return
    assert len(metrics) == len(expected["metrics"])
    for row, wanted in zip(metrics, expected["metrics"], strict=True):
        assert row == pytest.approx(wanted, abs=2e-3, rel=1e-2)
        for key in ("loss", "val_loss"):
            assert row.get(key) == pytest.approx(wanted.get(key), abs=2e-3)


@pytest.fixture
def one_thread() -> Any:
    """As many threads as the runs were made with: sums depend on how they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.report
def test_an_interrupted_run_resumes_to_the_same_end(old: Path, run_cli: RunCli, one_thread: None) -> None:
    expected = expectation(old)
    run = old / "interrupted"
    before = rows(run / "metrics.jsonl")
    code, _, errors = run_cli("train", "--resume", run)
    assert code == 0, errors
    assert "at step 35" in errors
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert rows(run / "metrics.jsonl")[: len(before)] == before
    to_the_bit = exact(expected)
    assert_as_expected(run, expected["interrupted"], to_the_bit=to_the_bit)
    assert (run / "report.html").stat().st_size > 10_000
    if to_the_bit:
        for name, options in expected["generate"].items():
            assert run_cli("generate", run, *options)[:2] == (0, expected["interrupted"]["texts"][name])


def test_an_older_checkpoint_takes_over_from_a_damaged_one(old: Path, run_cli: RunCli, one_thread: None) -> None:
    expected = expectation(old)
    run = old / "interrupted"
    os.truncate(run / "checkpoints" / "step-00000035" / "train" / "state.safetensors", 100)
    code, _, errors = run_cli("train", "--resume", run)
    assert code == 0, errors
    assert "at step 30" in errors
    assert_as_expected(run, expected["interrupted"], to_the_bit=exact(expected))


def test_a_finished_run_is_not_resumed(old: Path, run_cli: RunCli) -> None:
    code, _, errors = run_cli("train", "--resume", old / "finished")
    assert code == 2
    assert "already finished" in errors


@pytest.mark.parametrize("name", ["finished", "interrupted"])
def test_models_load_and_write(name: str, old: Path, run_cli: RunCli, one_thread: None) -> None:
    expected = expectation(old)
    model, tokenizer = gptsmith.load(old / name)
    ids = torch.tensor([tokenizer.encode("ba ba")])
    with torch.no_grad():
        assert model(ids).shape == (1, ids.shape[1], model.config.vocab_size)
    text = gptsmith.generate(model, tokenizer, "ba", max_tokens=20, temperature=0.8, seed=7)
    for which, options in expected["generate"].items():
        code, out, errors = run_cli("generate", old / name, *options)
        assert code == 0, errors
        assert out.startswith("ba")
        if name == "finished" and exact(expected):
            assert out == expected[name]["texts"][which]
            assert which != "seeded" or out.startswith(f"ba{text.removeprefix('ba')}")


@pytest.mark.parametrize("name", ["finished", "interrupted"])
def test_reports_are_written_again(name: str, old: Path, run_cli: RunCli) -> None:
    code, out, errors = run_cli("report", old / name)
    assert code == 0, errors
    assert out.strip() == str(old / name / "report.html")
    page = (old / name / "report.html").read_text(encoding="utf-8")
    last = [row["val_loss"] for row in rows(old / name / "metrics.jsonl") if "val_loss" in row][-1]
    assert f"{last:.4f}" in page


def test_the_settings_of_an_old_run_start_a_new_one(old: Path, run_cli: RunCli, one_thread: None) -> None:
    expected = expectation(old)
    settings, new = old / "interrupted" / "run.json", old / "new"
    code, _, errors = run_cli("train", old / "words.txt", "--config", settings, "--out", new)
    assert code == 0, errors
    found, wanted = rows(new / "metrics.jsonl"), expected["interrupted"]["metrics"]
    for key in ("step", "tokens", "lr"):
        assert [row.get(key) for row in found] == [row.get(key) for row in wanted]
    for key in ("loss", "val_loss"):  # from other initial weights
        assert [row[key] for row in found if key in row] == pytest.approx(
            [row[key] for row in wanted if key in row], abs=0.1
        )
    assert (new / "last" / "config.json").read_bytes() == (old / "interrupted" / "last" / "config.json").read_bytes()


def test_old_runs_are_served(old: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expectation(old)
    seen: dict[str, Any] = {}

    def ask(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        application: Any = server.config.app
        with TestClient(application, base_url="http://127.0.0.1") as client:
            seen["models"] = client.get("/v1/models").json()
            body = {"model": "finished", "prompt": "ba", "max_tokens": 60, "temperature": 0, "overflow": "shift"}
            seen["completion"] = client.post("/v1/completions", json=body).json()
            seen["runs"] = client.get("/api/runs").json()
            seen["run"] = client.get("/api/runs/interrupted").json()

    monkeypatch.setattr(uvicorn.Server, "run", ask)
    code, _, errors = run_cli("serve", old / "finished", "--runs", old, "--port", "0", "--device", "cpu")
    assert code == 0, errors
    assert [model["id"] for model in seen["models"]["data"]] == ["finished"]
    text = seen["completion"]["choices"][0]["text"]
    assert text
    if exact(expected):
        assert f"ba{text}" == expected["finished"]["texts"]["greedy"].removesuffix("\n")
    listed = {run["name"]: run for run in seen["runs"]["runs"]}
    assert listed["finished"]["status"] == "finished"
    assert (listed["interrupted"]["status"], listed["interrupted"]["steps"]) == ("interrupted", 60)
    metrics = rows(FIXTURES / "run_schema_1" / "interrupted" / "metrics.jsonl")
    assert [row["step"] for row in seen["run"]["metrics"]] == [row["step"] for row in metrics]
