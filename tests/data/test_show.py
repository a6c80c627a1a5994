"""`gptsmith data show`: one conversation, preference or prompt as a model sees it."""

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
    (tmp_path / "notes.csv.zip").write_text("text")
    code, _, err = run_cli("data", "show", tmp_path / "notes.csv.zip", "--model", model)
    assert code == 1
    assert "is not a table" in err


def test_show_a_pair(model: Path, tmp_path: Path, run_cli: Any) -> None:
    chat = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "No"}
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, [chat, {**chat, "choice": "tie"}, {**chat, "chosen": "No"}])))
    code, out, err = run_cli("data", "show", data, "--model", model)
    assert code == 0, err
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert out.startswith(f"{data}, line 1:\nchosen:\n{prompt}[Hello<|im_end|>]\n\nrejected:\n{prompt}[No<|im_end|>]\n")
    assert "1 pairs of answers (prompt 1)\ntokens of chosen answers: median 6" in out
    assert "cannot be used: 2 rows" in out
    code, out, _ = run_cli("data", "show", data, "--model", model, "--prompt-form", "text")
    assert "chosen:\nHi[Hello<|endoftext|>]\nrejected:\nHi[No<|endoftext|>]\n" in out
    code, _, err = run_cli("data", "show", data, "--model", model, "--index", 1)
    assert (code, "has 1 pairs of answers; there is none with --index 1" in err) == (2, True)
    for options in (("--train-on", "last"), ("--kind", "conversations", "--prompt-form", "chat")):
        assert run_cli("data", "show", data, "--model", model, *options)[0] == 2


def test_show_a_rated_answer(model: Path, tmp_path: Path, run_cli: Any) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "2 + 2 =", "completion": " 5", "label": False}))
    code, out, err = run_cli("data", "show", data, "--model", model)
    assert code == 0, err
    assert out.startswith(f"{data}, line 1:\nbad:\n2 + 2 =[ 5<|endoftext|>]\n")
    assert "1 rated answers (prompt-completion rated 1)" in out


def test_show_a_prompt(model: Path, tmp_path: Path, run_cli: Any) -> None:
    code, out, err = run_cli("data", "show", "task:arithmetic?digits=1", "--model", model, "--index", 2)
    assert code == 0, err
    first, *lines = out.splitlines()
    assert first == "task:arithmetic?digits=1, number 2:"
    assert lines[0].startswith("User: ")
    assert lines[1] == "Assistant:"  # as it is served: a model without a template gets none here
    assert "task: task:arithmetic?digits=1" in out
    assert "1,000 prompts (task 1,000)" in out
    (tmp_path / "prompts.txt").write_text("ROMEO:\n\nJULIET:\n")
    code, out, _ = run_cli("data", "show", tmp_path / "prompts.txt", "--model", model, "--index", 1)
    assert out.startswith(f"{tmp_path / 'prompts.txt'}, line 3:\nJULIET:\n")
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}')
    _, out, _ = run_cli("data", "show", tmp_path / "rows.jsonl", "--model", model, "--kind", "prompts")
    assert "answer: b\n" in out
    (tmp_path / "rows.jsonl").write_text('{"problem": "a", "solution": "b"}')
    assert "1 prompts (question 1)" in run_cli("data", "show", tmp_path / "rows.jsonl", "--model", model)[1]
