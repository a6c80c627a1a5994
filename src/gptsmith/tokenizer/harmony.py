"""Harmony, the chat format of gpt-oss: an answer is several messages, each in a channel, with a recipient if it calls.

    <|channel|>analysis<|message|>Two and two …<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>

The channel `analysis` is reasoning, `final` the answer. `commentary` to `functions.NAME` is a call of a function, whose
arguments are the message, and without a recipient text for the user that comes before calls.

    harmony = template.harmony                       # None: the template has another format
    parser = HarmonyParser()
    text, reasoning, calls = split(parser, piece, last=False)
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gptsmith.tokenizer.tokenizer import Tokenizer
from gptsmith.tokenizer.tools import JsonObjectScanner, ToolCallDelta, ToolCallParser, arguments_schema, overlap

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")  # of a message, of an answer that calls, of an answer
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
FINAL = f"{CHANNEL}final{MESSAGE}"
"""What comes between the generation prompt and the text of an answer."""
_GENERATION_PROMPT = f"{START}assistant"
_TO = "to="
_RECIPIENT = re.compile(_TO + r"(\S+)")
_FUNCTIONS = "functions."


@dataclass(frozen=True)
class Harmony:
    """The format as a tokenizer has it. marks: ids of the tokens of `MARKS` that it has; CONSTRAIN can be missing."""

    marks: Mapping[str, int]

    @classmethod
    def of(cls, prompt: str, answered: str, special: Mapping[str, int]) -> Harmony | None:
        """Return the format of a template that writes it; None for another.

        prompt: a conversation with the beginning of an answer. answered: a conversation with an answer. special: the
            tokenizer's special tokens.
        """
        if not (prompt.endswith(_GENERATION_PROMPT) and f"{_GENERATION_PROMPT}{FINAL}" in answered):
            return None
        marks = {text: special[text] for text in MARKS if text in special}
        return cls(marks) if {START, CHANNEL, MESSAGE, ENDS[0]} <= set(marks) else None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens at which an answer ends; after <|end|> it goes on with another message."""
        return tuple(self.marks[text] for text in ENDS[1:] if text in self.marks)

    def final_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of `FINAL`, with which an answer goes straight to its text."""
        return [self.marks[CHANNEL], *tokenizer.encode("final"), self.marks[MESSAGE]]

    def grammar(self, tools: Sequence[Mapping[str, Any]], mode: str) -> str:
        """Return a Lark grammar of answers, as `ToolCallFormat.grammar` does: thoughts, then a call or the final text.

        mode: "auto" allows a final text in place of a call, "required" does not.
        """
        start, channel, message, end = (self._lark(mark) for mark in (START, CHANNEL, MESSAGE, ENDS[0]))
        thought = f'{channel} ( "analysis" | "commentary" ) {message} FREE {end} {start} "assistant"'
        last = "call" if mode == "required" else f'( {channel} "final" {message} FREE | call )'
        calls = " | ".join(f"call_{i}" for i in range(len(tools)))
        rules = [f"start: ( {thought} )* {last}", f"call: {calls}", "FREE: /(.|\\n)*/"]
        json_mark = f'( " json" | " " {self._lark(CONSTRAIN)} "json" )?' if CONSTRAIN in self.marks else '" json"?'
        for i, tool in enumerate(tools):
            schema = {**arguments_schema(tool), "x-guidance": {"whitespace_flexible": True}}
            to = json.dumps(f" to={_FUNCTIONS}{tool['name']}")
            headers = f'( {channel} "commentary" {to} | {to} {channel} "commentary" )'
            rules.append(f"call_{i}: {headers} {json_mark} {message} %json {json.dumps(schema)}")
        return "\n".join(rules)

    def _lark(self, mark: str) -> str:
        return f"<[{self.marks[mark]}]>"


def with_thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return an assistant's message with its `reasoning_content` under the name that harmony's template reads.

    The template writes the reasoning before a call, and none together with a text before a call.
    """
    values = dict(message)
    reasoning = values.pop("reasoning_content", None)
    if reasoning and not (values.get("tool_calls") and values.get("content")):
        values.setdefault("thinking", reasoning)
    return values


class HarmonyParser:
    """Split an answer, as it arrives, into reasoning, text and calls, the same for all ways to cut it into pieces.

    in_text: whether the prompt ends inside the text of an answer; otherwise it ends before the header of a message.
    reasoning: what the last `push` or `finish` has added to the reasoning. calls: how many have started. Messages of
    the same kind are separated by an empty line. A text without a header is one for the user.
    """

    def __init__(self, *, in_text: bool = False) -> None:
        self.reasoning, self.calls = "", 0
        self._state: Literal["before", "header", "body"] = "body" if in_text else "before"
        self._header, self._channel = "", -1  # text of the header, and where in it the channel begins
        self._kind: Literal["text", "reasoning", "call"] = "text"
        self._scanner = JsonObjectScanner()
        self._written = {"text": False, "reasoning": False}
        self._separator = ""
        self._held = ""  # received; perhaps the beginning of a mark
        self._text, self._deltas = "", list[ToolCallDelta]()

    @property
    def in_call(self) -> bool:
        """Whether a call has begun and its arguments are not complete."""
        return self._kind == "call" and not self._scanner.complete

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Return the new text outside of calls, and the new pieces of calls."""
        self.reasoning, self._text, self._deltas = "", "", []
        text = self._held + text
        keep = max(overlap(text, mark) for mark in MARKS)
        self._held, text = text[len(text) - keep :], text[: len(text) - keep]
        for piece in re.split(f"({'|'.join(map(re.escape, MARKS))})", text):
            if piece in MARKS:
                self._mark(piece)
            else:
                self._read(piece)
        return self._text, self._deltas

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """Return what was held back because a mark or a header might have followed."""
        self.reasoning, self._text, self._deltas = "", "", []
        self._read(self._held)
        self._held = ""
        self._no_header()
        return self._text, self._deltas

    def _mark(self, mark: str) -> None:
        if mark == START:
            self._no_header()
            self._state, self._header, self._channel = "header", "", -1
        elif mark == CHANNEL:
            if self._state == "body":  # a message without <|start|>
                self._header = ""
            self._state, self._header = "header", self._header + " "
            self._channel = len(self._header)
        elif mark == MESSAGE and self._state != "body":
            self._begin_body()
        elif mark in ENDS:
            self._no_header()
            self._state, self._header, self._channel = "before", "", -1
        elif self._state == "header":  # <|constrain|>
            self._header += " "

    def _read(self, text: str) -> None:
        """Take text without marks."""
        if self._state == "before":
            self._header += text
            written = self._header.lstrip()
            if not (_TO.startswith(written[: len(_TO)]) if len(written) < len(_TO) else written.startswith(_TO)):
                self._no_header()
        elif self._state == "header":
            self._header += text
        elif self._kind == "call":
            if not self._scanner.complete and (end := self._scanner.push(text)):
                self._deltas.append(ToolCallDelta(self.calls - 1, arguments=text[:end]))
        elif text:
            text, self._separator = self._separator + text, ""
            self._written[self._kind] = True
            if self._kind == "text":
                self._text += text
            else:
                self.reasoning += text

    def _no_header(self) -> None:
        """What has been read at the place of a header is none: it is text, but for white space alone."""
        if self._state == "before" and self._header.strip():
            text = self._header
            self._header, self._channel = "", -1
            self._begin_body()
            self._read(text)

    def _begin_body(self) -> None:
        recipient = _RECIPIENT.search(self._header)
        channel = self._header[self._channel :].split()[:1] if self._channel >= 0 else []
        name = recipient[1].removeprefix(_FUNCTIONS) if recipient and recipient[1].startswith(_FUNCTIONS) else ""
        self._state = "body"
        if name:
            self._kind, self._scanner = "call", JsonObjectScanner()
            self._deltas.append(ToolCallDelta(self.calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name))
            self.calls += 1
        else:
            self._kind = "reasoning" if recipient or channel not in ([], ["final"], ["commentary"]) else "text"
            self._separator = "\n\n" if self._written[self._kind] else ""


class AnswerPiece(NamedTuple):
    """What a piece of an answer adds to it."""

    text: str
    reasoning: str
    calls: list[ToolCallDelta]


def split(parser: HarmonyParser | ToolCallParser, piece: str, *, last: bool) -> AnswerPiece:
    """Return what the next piece of an answer adds to it. last: no more follows."""
    text, calls = parser.push(piece)
    reasoning = parser.reasoning
    if last:
        rest, more = parser.finish()
        text, reasoning, calls = text + rest, reasoning + parser.reasoning, calls + more
    return AnswerPiece(text, reasoning, calls)
