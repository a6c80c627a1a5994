"""`--budget`, `--depth` and `gptsmith scale`, through the real command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptsmith.log import JsonLines

Cli = Callable[..., tuple[int, str, str]]
TRAIN = (sys.executable, "-m", "gptsmith", "train")
QUICK = ("--sample-tokens", "0", "--compile", "off", "--device", "cpu")


def record(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "run.json").read_text()))


def test_a_token_budget_reports_its_choices(run_cli: Cli, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, _, err = run_cli("train", text_file, "--budget", "30ktok", "--out", out, "--context", "32", *QUICK)
    assert code == 0, err
    assert "30,000 tokens" in err or "3e+04 tokens" in err
    assert "depth 2, width 128, context 32" in err
    rows = JsonLines(out / "metrics.jsonl").read()
    assert rows[-1]["tokens"] == pytest.approx(30_000, rel=0.02)
    assert rows[-1]["val_loss"] < 3.0
    config = record(out)["config"]
    assert isinstance(config, dict)
    assert (config["auto"]["budget"], config["loop"]["context"]) == ("30ktok", 32)
    assert len(record(out)["plan"]["reasons"]) == 3  # type: ignore[index]


def test_the_configuration_of_a_budget_can_be_reused(run_cli: Cli, text_file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_cli("train", text_file, "--budget", "10ktok", "--out", first, *QUICK)[0] == 0
    assert run_cli("train", text_file, "--config", first / "run.json", "--out", second)[0] == 0
    losses = [
        [row["loss"] for row in JsonLines(run / "metrics.jsonl").read() if "loss" in row] for run in (first, second)
    ]
    assert losses[0] == losses[1]


def test_a_large_alphabet_gets_a_bpe_tokenizer(run_cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text(" ".join(chr(0x4E00 + i % 400) for i in range(20_000)))
    code, _, err = run_cli("train", path, "--budget", "20ktok", "--out", tmp_path / "run", "--context", "32", *QUICK)
    assert code == 0, err
    assert "more than 256 different characters" in err
    assert record(tmp_path / "run")["config"]["init"]["tokenizer"] == "bpe"  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "soon"), "is not a budget.*5m, 2h"),
        (("--budget", "1s"), "too short to learn anything.*Give at least"),
        (("--budget", "10tok"), "Give more"),
        (("--budget", "5m", "--steps", "10"), "both set the length"),
        (("--depth", "0"), "depth must be at least 1"),
        (("--budgett", "5m"), "budget"),
    ],
)
def test_wrong_options_leave_no_files(
    options: tuple[str, ...], message: str, run_cli: Cli, text_file: Path, tmp_path: Path
) -> None:
    code, out, err = run_cli("train", text_file, "--out", tmp_path / "run", *QUICK, *options)
    assert code == 2
    assert re.search(message, out + err, re.DOTALL)
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_scale_fits_draws_and_continues(run_cli: Cli, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "ladder"
    command = ("scale", text_file, "--out", out, "--budgets", "16ktok,4ktok,8ktok", *QUICK, "--context", "32")
    code, printed, err = run_cli(*command)
    assert code == 0, err
    assert err.index("run 1 of 3: 4ktok") < err.index("run 3 of 3: 16ktok")
    assert "at 10× the largest" in printed
    result = json.loads((out / "scale.json").read_text())
    losses = [rung["val_loss"] for rung in result["rungs"]]
    assert losses == sorted(losses, reverse=True)
    assert [rung["tokens"] for rung in result["rungs"]] == pytest.approx([4000, 8000, 16000], rel=0.05)
    assert result["predictions"][0]["val_loss"][0] < losses[-1]
    assert (out / "scale.png").read_bytes().startswith(b"\x89PNG")
    before = (out / "4ktok" / "metrics.jsonl").stat().st_mtime_ns
    code, again, _ = run_cli(*command)
    assert (code, again) == (0, printed)
    assert (out / "4ktok" / "metrics.jsonl").stat().st_mtime_ns == before


def test_scale_uses_one_tokenizer_for_all_budgets(
    run_cli: Cli, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_budget = {4000.0: ("bpe", 300), 8000.0: ("bpe", 400)}
    monkeypatch.setattr("gptsmith.train.text.tokenizer_for", lambda _, __, budget, ___: by_budget[budget.amount])
    command = ("scale", text_file, "--out", tmp_path / "ladder", "--budgets", "4ktok,8ktok", *QUICK, "--context", "32")
    code, _, err = run_cli(*command)
    assert code == 0, err
    sizes = [record(tmp_path / "ladder" / rung)["config"]["init"]["vocab_size"] for rung in ("4ktok", "8ktok")]  # type: ignore[index]
    assert sizes == [400, 400]


@pytest.mark.parametrize("budgets", ["1m", "1m,1e12flop", "1m,1m", "x,y", ""])
def test_scale_needs_two_budgets_of_one_kind(budgets: str, run_cli: Cli, text_file: Path) -> None:
    code, _, err = run_cli("scale", text_file, f"--budgets={budgets}")
    assert code == 2
    assert "budget" in err


@pytest.mark.slow
def test_a_time_budget_is_met(text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptsmith", "train", str(text_file), "--budget", "40s"]
    command += ["--out", str(tmp_path / "run")]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    assert time.monotonic() - began == pytest.approx(40, rel=0.1)


@pytest.mark.slow
def test_a_time_budget_is_met_on_a_machine_that_slows_down(text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptsmith", "train", str(text_file), "--budget", "60s"]
    command += ["--out", str(tmp_path / "run")]
    began = time.monotonic()
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(25)
    hog = "while True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", hog]) for _ in range(2)]
    try:
        assert run.wait() == 0
    finally:
        for process in hogs:
            process.kill()
            process.wait()
    assert time.monotonic() - began == pytest.approx(60, rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")
def test_a_resumed_run_meets_its_time_budget(text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptsmith", "train"]
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command, str(text_file), "--budget", "40s", "--out", str(run)], stderr=subprocess.DEVNULL
    )
    time.sleep(20)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    began = time.monotonic()
    subprocess.run([*TRAIN, "--resume", str(run)], check=True, capture_output=True)
    assert 10 < time.monotonic() - began < 40
    assert record(run)["status"] == "finished"
