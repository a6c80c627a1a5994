"""Prompts: the forms that people have, their columns and token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptsmith.data.conversations import Counts, RowError
from gptsmith.data.prompts import PromptRenderer, PromptRow, as_prompt, read_prompts
from gptsmith.errors import DataError
from gptsmith.tokenizer import Tokenizer, train_bpe
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_chat_template

HI = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chat_template(train_bpe(["What is the weather? Hi user assistant system\n" * 9], 300))[0]


@pytest.mark.parametrize(
    ("values", "prompt", "columns"),
    [
        ({"prompt": "Hi", "answer": "4", "id": 7}, "Hi", {"answer": "4", "id": 7}),
        ({"text": "Hi"}, "Hi", {}),
        ({"prompt": "Hi", "text": "a column"}, "Hi", {"text": "a column"}),
        ({"prompt": [HI]}, (HI,), {}),
        ({"prompt": HI}, (HI,), {}),
        ({"messages": [HI]}, (HI,), {}),
        ({"messages": [HI, {"role": "assistant", "content": "Hello"}]}, (HI,), {"answer": "Hello"}),
        ({"messages": [HI, {"role": "assistant", "content": "Hello"}], "answer": "x"}, (HI,), {"answer": "x"}),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, (HI,), {}),
        ({"question": "Hi", "answer": "#### 4"}, (HI,), {"answer": "#### 4"}),
        ({"problem": "Hi", "solution": "4", "level": None}, (HI,), {"solution": "4", "level": None}),
        ({"instruction": "Hi", "input": "", "output": "x"}, (HI,), {"output": "x"}),
        ({"instruction": "Add", "input": "1 2"}, ({"role": "user", "content": "Add\n1 2"},), {}),
        ({"system": "Be brief.", "prompt": "Hi"}, ({"role": "system", "content": "Be brief."}, HI), {}),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi", {"chosen": "a", "rejected": "b"}),
    ],
)
def test_forms(values: dict[str, Any], prompt: Any, columns: dict[str, Any]) -> None:
    found = as_prompt(values)
    assert (found.prompt, found.columns) == (prompt, columns)


@pytest.mark.parametrize(
    ("message", "values"),
    [
        ("the prompt is empty", {"prompt": " "}),
        ("the prompt is empty", {"messages": [{"role": "user", "content": ""}]}),
        ("the list of messages is empty", {"prompt": []}),
        ("do not end with one of the user", {"messages": [{"role": "system", "content": "Be brief."}]}),
        ("Did you mean 'prompt'", {"promt": "Hi"}),
        ("the messages are not a list", {"prompt": 3}),
        ("unknown role", {"messages": [{"role": "usr", "content": "Hi"}]}),
        ("have no prompt", {}),
    ],
)
def test_rows_without_a_prompt(message: str, values: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=message):
        as_prompt(values)


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffROMEO:\r\n\n  Once upon \nÉté\n".encode())
    found = list(read_prompts(path))
    assert [row.prompt for _, row in found] == ["ROMEO:", "  Once upon ", "Été"]
    assert [place.rpartition(" ")[2] for place, _ in found] == ["1", "3", "4"]
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        list(read_prompts(path))
    other = tmp_path / "prompts.png"
    other.write_bytes(b"x")
    with pytest.raises(DataError, match="neither a text file with a prompt on each line"):
        list(read_prompts(other))


def test_bad_rows_are_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt": ""}\n{"question": "Hi"}\n')
    with pytest.raises(DataError, match=r"line 2: the prompt is empty.*--bad-rows skip"):
        list(read_prompts(path))
    counts = Counts()
    assert len(list(read_prompts(path, on_bad="skip", counts=counts))) == 2
    assert counts.forms == {"prompt": 1, "question": 1}
    assert sum(counts.skipped.values()) == 1


def test_ids_are_those_of_serving(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tokenizer)
    text, chat = PromptRow("", "Hi"), PromptRow("", (HI,))
    render = PromptRenderer(tokenizer).render
    assert render(text) == (text, tokenizer.encode_prompt("Hi"))
    assert render(chat) == (chat, template.encode([HI]))
    assert PromptRenderer(tokenizer, form="chat").render(text)[1] == template.encode([HI])
    assert PromptRenderer(tokenizer, form="text").render(chat)[1] == tokenizer.encode_prompt("Hi")
    with pytest.raises(RowError, match="only a prompt of one message"):
        PromptRenderer(tokenizer, form="text").render(PromptRow("", ({"role": "system", "content": "x"}, HI)))
