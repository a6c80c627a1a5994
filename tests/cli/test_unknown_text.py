"""Training an existing model on text that its tokenizer does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

OPTIONS = ["--steps", "2", "--batch-size", "2", "--context", "16", "--sample-tokens", "0", "--device", "cpu"]

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(request: pytest.FixtureRequest, text_file: Path, tmp_path: Path, run_cli: RunCli, tiny: list[str]) -> Path:
    """A trained model with a character tokenizer, made with the options of the parameter."""
    out = tmp_path / "model"
    code, _, err = run_cli("train", text_file, "--out", out, *tiny, "--steps", "2", *request.param)
    assert code == 0, err
    return out


def init(model: Path, text: Path, out: Path, *options: str) -> list[object]:
    return [
        "train",
        text,
        "--init",
        model,
        "--out",
        out,
        *["--steps", "2", "--batch-size", "2", "--context", "16"],
        *options,
    ]


@pytest.mark.parametrize("model", [[]], indirect=True)
def test_characters_without_a_token_are_named(model: Path, words: str, tmp_path: Path, run_cli: RunCli) -> None:
    text = tmp_path / "other.txt"
    text.write_text(words + "漢字漢")
    code, _, err = run_cli(*init(model, text, tmp_path / "run"))
    assert code == 1
    assert "the character '漢' (U+6F22)" in err
    assert f"3 of {len(words) + 3:,} characters" in err
    assert "'漢' (U+6F22) 2 times, '字' (U+5B57) once" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", [["--unknown"]], indirect=True)
def test_many_unknown_tokens_must_be_allowed(model: Path, words: str, tmp_path: Path, run_cli: RunCli) -> None:
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    few.write_text(words + "漢")
    many.write_text(words + "漢" * len(words))
    code, _, err = run_cli(*init(model, few, tmp_path / "few"))
    assert code == 0, err
    assert f"1 of {len(words) + 1:,} tokens" in err
    code, _, err = run_cli(*init(model, many, tmp_path / "many"))
    assert code == 1
    assert "(50%) are unknown to the tokenizer" in err
    assert "with --unknown" in err
    code, _, err = run_cli(*init(model, many, tmp_path / "many", "--unknown"))
    assert code == 0, err
    assert "(50%) are unknown to the tokenizer" in err
