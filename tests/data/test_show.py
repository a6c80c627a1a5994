"""`gptsmith data show`: one conversation as a model sees it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest

from gptsmith.checkpoint import save_checkpoint
from gptsmith.tokenizer import train_char
from tests.factories import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = train_char([string.printable.replace("\r", "")])
    save_checkpoint(tmp_path / "model", tiny_model("llama", vocab_size=tokenizer.vocab_size), tokenizer)
    return tmp_path / "model"


def test_show(model: Path, tmp_path: Path, run_cli: Any) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": ""}, {"question": "d", "answer": "e f"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run_cli("data", "show", data, "--model", model, "--index", 1)
    assert code == 0, err
    assert out.startswith(f"{data}, line 3:\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n[e f<|im_end|>]\n")
    assert "2 conversations (question-answer 2)" in out
    assert "cannot be used: 1 rows: 1: an answer of the assistant is empty (first: " in out
    code, _, err = run_cli("data", "show", data, "--model", model, "--index", 2)
    assert code == 2
    assert "has 2 conversations; there is none with --index 2. Left out 1: an answer" in err
    assert run_cli("data", "show", data, "--model", model, "--index", -1)[0] == 2


def test_show_a_table_that_is_none(model: Path, tmp_path: Path, run_cli: Any) -> None:
    (tmp_path / "notes.txt").write_text("text")
    code, _, err = run_cli("data", "show", tmp_path / "notes.txt", "--model", model)
    assert code == 1
    assert "is not a table" in err
