"""`gptsmith find-lr` through the real command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]
OPTIONS = [
    *("--model.hidden-size", "32", "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2"),
    *("--context", "32", "--batch-size", "8", "--device", "cpu", "--updates", "40"),
]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_learning_rates_and_a_picture(
    run_cli: Cli, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*OPTIONS, "--optim.name", optimizer, "--lowest", "1e-3", "--highest", "1e3"]
    code, out, _ = run_cli("find-lr", text_file, *options)
    assert code == 0
    lines = out.splitlines()
    assert lines[-1] == "picture     runs/find-lr-words.png"
    assert lines[-3].startswith("steepest")
    assert lines[-2].startswith("lowest / 10")
    assert all(("--optim.embedding-lr" in line) == (optimizer == "muon") for line in lines[-3:-1])
    assert "•" in out
    assert (tmp_path / "runs" / "find-lr-words.png").read_bytes().startswith(b"\x89PNG")

    code, out, _ = run_cli("find-lr", text_file, *options)  # nothing is written over
    assert code == 0
    assert out.splitlines()[-1] == "picture     runs/find-lr-words-2.png"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["find-lr-words-2.png", "find-lr-words.png"]


def test_wrong_options(run_cli: Cli, text_file: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.png"
    taken.write_text("mine")
    for arguments, message in (
        ([], "No data given"),
        ([text_file, "--out", taken], "exists. Choose another name."),
        ([text_file, "--depth", "3"], "choose the learning rate themselves"),
        ([text_file, *OPTIONS, "--updates", "3"], "at least 10 updates"),
    ):
        code, _, err = run_cli("find-lr", *arguments)
        assert code == 2, err
        assert message in err
    assert taken.read_text() == "mine"
