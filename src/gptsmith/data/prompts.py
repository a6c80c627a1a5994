"""Prompts from rows and text files: what a model is to answer, and the columns that its answers are scored with.

    for place, row in read_prompts(Path("questions.jsonl")):
        ids = PromptRenderer(tokenizer).ids(row)

A row has its prompt in `prompt` (a text or messages), `messages`, `conversations`, `question`, `query`, `problem`,
`instruction` (Alpaca) or `text`. All other fields are columns. In a text file every line is a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from gptsmith.data.conversations import (
    Counts,
    Message,
    Renderer,
    RowError,
    alpaca_turns,
    as_messages,
    bad_row,
    pictures_of,
    tools_of,
    with_pictures,
)
from gptsmith.data.files import byte_lines, content_blocks, suffixes
from gptsmith.data.rows import FORMATS, Split, is_table, read_rows
from gptsmith.errors import DataError, TokenizerError, nearest
from gptsmith.tokenizer import Tokenizer

PromptForm: TypeAlias = Literal["auto", "chat", "text"]

TEXT_FILES = (".txt", ".md", ".text")
_QUESTIONS = ("question", "query", "problem")
_CHATS = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
_KNOWN = ("prompt", *_CHATS, *_QUESTIONS, "instruction", "text")


@dataclass(frozen=True)
class PromptRow:
    """A prompt as it was written. columns: the other fields of its row."""

    form: str
    prompt: str | tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)

    def in_form(self, form: PromptForm) -> PromptRow:
        """Return it as chat or as plain text. Raise RowError where that is not possible."""
        if form == "chat" and isinstance(self.prompt, str):
            return PromptRow(self.form, ({"role": "user", "content": self.prompt},), self.tools, self.columns)
        if form == "text" and not isinstance(self.prompt, str):
            return PromptRow(self.form, as_text(self.prompt, self.tools), (), self.columns)
        return self


class Asked(NamedTuple):
    """The prompt of a row, None without one. fields: those that it was made from."""

    form: str
    prompt: str | tuple[Message, ...] | None
    tools: tuple[dict[str, Any], ...]
    fields: tuple[str, ...]


def prompt_of(row: Mapping[str, Any]) -> Asked:
    """Return the prompt in a row without null values. Raise RowError for one that is not well formed."""
    system = row.get("system") or row.get("system_prompt")
    given = ("system", "system_prompt", "tools", "functions")
    name = next((name for name in ("prompt", *_CHATS, "instruction", *_QUESTIONS) if name in row), None)
    if name is None:
        return Asked("", None, tools_of(row), ())
    value = row[name]
    fields = (name, *(each for each in given if each in row))
    form = _CHATS.get(name, "prompt" if name == "prompt" else "question")
    messages: tuple[Message, ...]
    if name == "instruction":
        form, fields = "alpaca", (*fields, *(each for each in ("input", "history") if each in row))
        messages = as_messages([{"role": role, "content": text} for role, text in alpaca_turns(row)], name)
    elif name in _CHATS or not isinstance(value, str):
        messages = as_messages([value] if isinstance(value, Mapping) else value, name)
    elif name == "prompt" and not system and not tools_of(row):
        return Asked(form, value, (), fields)
    else:
        messages = ({"role": "user", "content": value},)
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return Asked(form, messages, tools_of(row), fields)


def as_text(messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """Return the text of a prompt of one message. Raise RowError for any other."""
    if len(messages) != 1 or messages[0]["role"] != "user" or tools:
        raise RowError("only a prompt of one message of the user can be plain text (--prompt-form text).")
    if pictures_of(messages):
        raise RowError("a prompt with a picture cannot be plain text (--prompt-form text).")
    return str(messages[0]["content"])


def as_prompt(values: Mapping[str, Any]) -> PromptRow:
    """Return the prompt in a row. Raise RowError where there is none, or where it is empty.

    A conversation that ends with an answer is a prompt without it; the answer becomes the column `answer`, if there is
    no such field.
    """
    row = with_pictures({name: value for name, value in values.items() if value is not None})
    form, prompt, tools, fields = prompt_of(row)
    if prompt is None and isinstance(row.get("text"), str):
        form, prompt, fields = "text", row["text"], ("text",)
    if prompt is None:
        hint = next((found for name in row if (found := nearest(name, _KNOWN))), "")
        raise RowError(
            f"the fields {', '.join(row) or '(none)'} have no prompt.{hint} Use prompt, messages, question, problem, "
            "instruction or text."
        )
    columns = {name: value for name, value in values.items() if name not in fields}
    if not isinstance(prompt, str):
        if prompt[-1]["role"] == "assistant":
            columns.setdefault("answer", prompt[-1]["content"])
            prompt = prompt[:-1]
        if not prompt or prompt[-1]["role"] not in ("user", "tool"):
            raise RowError("the messages do not end with one of the user, which could be answered.")
    if not isinstance(prompt, str) and pictures_of(prompt):
        raise RowError("the prompt has a picture; prompts of rewards are texts alone.")
    if not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip():
        raise RowError("the prompt is empty.")
    return PromptRow(form, prompt, tools, columns)


class PromptRenderer:
    """Turns prompts into token ids as a served model sees them: by the chat template, or as plain text to continue.

    form: "chat" makes a plain text a message of the user, "text" makes a prompt of one message plain text.
    Raises TokenizerError for a chat template that is not valid.
    """

    def __init__(self, tokenizer: Tokenizer, *, form: PromptForm = "auto") -> None:
        self.renderer, self.form = Renderer(tokenizer), form

    def render(self, row: PromptRow) -> tuple[PromptRow, list[int]]:
        """Return the prompt in the form that was asked for, and its ids. Raise RowError where that is not possible."""
        row = row.in_form(self.form)
        try:
            if isinstance(row.prompt, str):
                return row, self.renderer.tokenizer.encode_prompt(row.prompt)
            return row, self.renderer.asked(row.prompt, row.tools)
        except TokenizerError as error:
            raise RowError(str(error)) from None


def is_text_file(path: Path) -> bool:
    """Return whether a file has one prompt per line."""
    return path.is_file() and suffixes(path)[0] in TEXT_FILES


def read_prompts(
    path: Path,
    *,
    on_bad: Literal["error", "skip"] = "error",
    counts: Counts | None = None,
    advance: Callable[[int], None] | None = None,
    split: Split = "train",
) -> Iterator[tuple[str, PromptRow]]:
    """Yield the prompts of a file, or of a split of a folder of rows, each with its place.

    on_bad: stop at the first bad row with a DataError that names it, or leave it out and count it in `counts`.
    """
    counts = Counts() if counts is None else counts
    if path.is_file() and not is_table(path):
        if not is_text_file(path):
            raise DataError(
                f"{path} is neither a text file with a prompt on each line ({', '.join(TEXT_FILES)}) nor a table "
                f"({', '.join(FORMATS)})."
            )
        for where, line in _lines(path, advance):
            counts.forms["line"] += 1
            yield where, PromptRow("line", line)
        return
    for row in read_rows(path, advance, split=split):
        try:
            prompt = as_prompt(row.values)
        except RowError as error:
            bad_row(error, row.where, on_bad, counts)
            continue
        counts.forms[prompt.form] += 1
        yield row.where, prompt


def _lines(path: Path, advance: Callable[[int], None] | None) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text file that are not blank, without line ends."""
    for number, line in enumerate(byte_lines(content_blocks(path, advance), path), 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 text (byte {error.start} of the line).") from None
        if text.strip():
            yield where, text
