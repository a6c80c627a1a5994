"""The prompts of a run: rows, text files and tasks, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptsmith.errors import DataError, UsageError
from gptsmith.tasks import make_task
from gptsmith.tasks.rewards import task
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.train.config import PromptConfig, RunConfig
from gptsmith.train.prompts import PromptFiles, Prompts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["abcdefghijklmnopqrstuvwxyz 0123456789=+.:\nUAser"])


def prepare(spec: str | Path, tokenizer: Tokenizer, **options: Any) -> Prompts:
    config = RunConfig(method=PromptConfig()).replace(**options)
    return PromptFiles.open(str(spec), config).prepare(config, tokenizer)


def test_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) + "\n" for i in range(20)))
    data = prepare(path, tokenizer)
    assert (len(data.train), len(data.val)) == (18, 2)
    first = data.train[0]
    assert (first.prompt, first.columns, first.place) == ("0 + 1 =", {"answer": 1}, f"{path}, line 1")
    assert first.ids == tokenizer.encode_prompt("0 + 1 =")
    assert "20 prompts (prompt 20), 2 of them held out; up to 8 tokens; columns: answer" in data.summary()
    assert (
        data.fingerprint == prepare(path, tokenizer).fingerprint != prepare(path, tokenizer, val_fraction=0).fingerprint
    )


def test_text_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\n\ntwo\nthree\n")
    data = prepare(path, tokenizer)
    assert [prompt.prompt for prompt in [*data.train, *data.val]] == ["one", "two", "three"]
    chats = prepare(path, tokenizer, prompt_form="chat")
    assert chats.train[0].prompt == [{"role": "user", "content": "one"}]
    assert chats.train[0].ids == ChatTemplate(tokenizer).encode([{"role": "user", "content": "one"}])


def test_task(tokenizer: Tokenizer) -> None:
    spec = "task:arithmetic?digits=1&num_examples=40&seed=3"
    data = prepare(spec, tokenizer, prompt_form="text")
    own = make_task("arithmetic", digits=1, num_examples=40, seed=3)
    prompts = sorted([*data.train, *data.val], key=lambda prompt: prompt.columns["index"])
    assert len(prompts) == 40
    for i, prompt in enumerate(prompts):
        assert prompt.prompt == own.example(i)[0]["content"]
        assert prompt.columns["task"] == spec
        assert own.score(i, prompt.columns["answer"]) == 1.0
    assert not {tuple(p.ids) for p in data.train} & {tuple(p.ids) for p in data.val}  # one-digit sums repeat
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
    assert task([], columns["answer"], **columns) == [1.0] * 40
    assert sum(task([], ["19"] * 40, **columns)) == 0


def test_long_prompts_are_counted(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo\n" + "three" * 9 + "\nfour\n")
    data = prepare(path, tokenizer)
    kept = data.within(20, answer_tokens=10)
    assert [prompt.prompt for prompt in [*kept.train, *kept.val]] == ["one", "two", "four"]
    assert "1 prompts leave no room for an answer of 10 tokens in the context of 20 and are left out" in (
        capsys.readouterr().err
    )
    assert data.within(46) is data
    assert data.within(45) is not data
    with pytest.raises(DataError, match=r"1 prompts leave no room.*--too-long skip"):
        data.within(20, on_long="error")
    with pytest.raises(DataError, match="no prompt leaves room .* the shortest has 3 tokens"):
        data.within(10, answer_tokens=9)


def test_validation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = prepare("task:arithmetic?num_examples=5", tokenizer, val="task:arithmetic?num_examples=3&seed=1")
    assert (len(data.train), len(data.val)) == (5, 3)
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "validation.jsonl").write_text('{"text": "three"}\n')
    assert [prompt.prompt for prompt in prepare(tmp_path, tokenizer).val] == ["three"]


def test_places() -> None:
    config = RunConfig(method=PromptConfig())
    files = PromptFiles.open("task:arithmetic?digits=1", config)
    assert files.name == "arithmetic"
    assert files.places() == {"spec": "task:arithmetic?digits=1", "val": None}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task:arithmetik", "Did you mean 'arithmetic'"),
        ("task:arithmetic?digit=2", "has no option 'digit'. Did you mean 'digits'"),
        ("task:arithmetic?digits", "Write options as NAME=VALUE"),
        ("task:arithmetic?digits=1&digits=2", "is set twice"),
        ("task:arithmetic?digits=0", "at least one example and one digit"),
        ("task:arithmetic?digits=two", "digits must be an integer, not 'two'"),
        ("task:arithmetic?digits=1.5", "digits must be an integer, not '1.5'"),
        ("task:arithmetic?digits=true", "digits must be an integer, not 'true'"),
        ("nowhere.jsonl", "no such file"),
    ],
)
def test_what_is_not_there(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PromptFiles.open(spec, RunConfig(method=PromptConfig()))
