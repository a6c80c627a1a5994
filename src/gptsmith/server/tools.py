"""Calls of tools: how a model's chat template writes them, a grammar that makes them so, and reading them back.

Every family of models writes calls in a way of its own. It is not looked up in a table here: a conversation with two
calls is written by the template, and what stands before, between and after their names and arguments is the form.

    form = form_of(template)                      # None: this template knows no tools
    constraint = Grammar(tokenizer, form.grammar(tools, "auto"))
    reader = Reader(form); reader.push(text)      # -> text, names, pieces of arguments
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer.chat import ChatTemplate

_NAMES = ("first_name_7", "second_name_8")
_KEY, _VALUE = "some_key_9", "some_value_9"
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Form:
    """prefix, (before NAME middle ARGUMENTS close), with `between` from one to the next, suffix.

    several: more than one call may be in an answer. added: the tokens that are no pieces of ordinary text, with ids.
    """

    prefix: str
    before: str
    middle: str
    close: str
    between: str
    suffix: str
    several: bool
    added: Mapping[str, int]

    @property
    def trigger(self) -> str:
        """What a text cannot go on from but with a call: the mark before calls, up to the first brace or line end."""
        begin = self.prefix + self.before
        for token in self.added:
            if begin.startswith(token):
                return token
        ends = [at for at in (begin.find(c, 1) for c in "{[\n") if at > 0]
        mark = begin[: min(ends, default=len(begin))].rstrip()
        return mark if len(mark) > 1 else begin

    def grammar(self, tools: Sequence[Mapping[str, Any]], mode: str, *, several: bool = True) -> str:
        """The language of answers, for `engine.grammar.Grammar`. tools: functions with name and parameters.

        mode: "auto" is text, and then perhaps calls; "required" is calls. several: one after another.
        """
        calls = " | ".join(f"call_{i}" for i in range(len(tools)))
        more = f" ( {self._lark(self.between + self.before)} call )*" if several and self.several else ""
        rules = [f"call: ( {calls} ) {self._lark(self.close)}".rstrip()]
        for i, tool in enumerate(tools):
            schema = {**(tool.get("parameters") or {"type": "object"}), "x-guidance": _STYLE}
            rules.append(f"call_{i}: {self._lark(str(tool['name']) + self.middle)} %json {json.dumps(schema)}")
        begin = self.prefix + self.before
        ending = f"call{more} {self._lark(self.suffix)}".rstrip()
        if mode != "auto":
            return "\n".join([f"start: {self._lark(begin)} {ending}", *rules])
        trigger, rest = self.trigger, self._lark(begin[len(self.trigger) :])
        mark = _regex(trigger)
        free = f"FREE: /(.|\\n)*/ & ~/(.|\\n)*{mark}(.|\\n)*/"
        if trigger in self.added:
            return "\n".join([f"start: FREE ( {self._lark(trigger)} {rest} {ending} )?", free, *rules])
        marked = f"marked[lazy]: /(.|\\n)*{mark}/"
        return "\n".join([f"start: FREE | marked {rest} {ending}", free, marked, *rules])

    def _lark(self, text: str) -> str:
        """A text as Lark has it: added tokens by number, the rest as strings."""
        parts = []
        while text:
            at, token = min(((text.find(t), t) for t in self.added if t in text), default=(len(text), ""))
            if at:
                parts.append(json.dumps(text[:at]))
            if token:
                parts.append(f"<[{self.added[token]}]>")
            text = text[at + len(token) :]
        return " ".join(parts)


def form_of(template: ChatTemplate) -> Form | None:
    """The form in which a template writes calls; None if it knows no tools, or writes them in no form like `Form`."""
    if template.plain or "tools" not in template.source:
        return None
    return _form(template, 2) or _form(template, 1)


def _form(template: ChatTemplate, count: int) -> Form | None:
    names = _NAMES[:count]
    tools = [{"type": "function", "function": {"name": n, "description": n, "parameters": {}}} for n in _NAMES]
    ask = [{"role": "user", "content": "a question"}]
    calls = [
        {"type": "function", "id": f"call{i:05d}", "function": {"name": name, "arguments": {_KEY: _VALUE}}}
        for i, name in enumerate(names)
    ]
    try:
        prompt = template.render(ask, tools=tools)
        text = template.render(
            [*ask, {"role": "assistant", "content": "", "tool_calls": calls}], tools=tools, add_generation_prompt=False
        )
        if prompt == template.render(ask):
            return None
    except TokenizerError:
        return None
    text = text[len(_common(prompt, text)) :]
    added = {token["content"]: token["id"] for token in json.loads(template.tokenizer.to_json())["added_tokens"]}
    gaps, middles = [], []
    for name in names:
        gap, found, text = text.partition(name)
        middle, brace, _ = text.partition("{")
        arguments = json.dumps({_KEY: _VALUE})
        if not found or not brace or not text[len(middle) :].startswith(arguments):
            return None
        gaps.append(gap)
        middles.append(middle)
        text = text[len(middle) + len(arguments) :]
    for id in template.end_ids():  # what ends the answer is no part of the call
        text = text.partition(template.tokenizer.special_tokens()[id])[0]
    if len(set(middles)) > 1 or any(str(call["id"]) in "".join([*gaps, text]) for call in calls):
        return None
    if count == 1:
        return Form("", gaps[0], middles[0], text.rstrip(), "", "", False, added)
    before = _common(gaps[0][::-1], gaps[1][::-1])[::-1]
    close = _common(gaps[1][: len(gaps[1]) - len(before)], text)
    between, suffix = gaps[1][len(close) : len(gaps[1]) - len(before)], text[len(close) :].rstrip()
    prefix = gaps[0][: len(gaps[0]) - len(before)] if suffix else ""  # without an end, it belongs to the answer's text
    if not before.strip():
        return None
    return Form(prefix, before, middles[0], close, between, suffix, True, added)


def _common(one: str, other: str) -> str:
    """What both begin with."""
    shared = zip(one, other, strict=False)
    return one[: next((i for i, (a, b) in enumerate(shared) if a != b), min(len(one), len(other)))]


def _regex(text: str) -> str:
    return "".join("\\n" if c == "\n" else "\\" + c if c in r".^$*+?()[]{}|\/-&~" else c for c in text)


@dataclass(frozen=True)
class CallPiece:
    """News of a call: its name, once; then its arguments, a JSON object in pieces."""

    index: int
    name: str | None
    arguments: str


class Reader:
    """An answer, as it comes, taken apart into text and calls. calls: how many have begun."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._held = ""
        self._state = "text"
        self._scan = _Object()
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """The text outside of calls, and what is new of calls."""
        form, outside, pieces = self._form, "", []
        self._held += text
        while True:
            if self._state == "text":
                before, found, rest = self._held.partition(form.trigger)
                if not found:
                    keep = _overlap(self._held, form.trigger)
                    outside += self._held[: len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep :]
                    break
                outside += before
                begin = form.prefix + form.before
                if len(found + rest) < len(begin):
                    self._held = found + rest
                    break
                self._held, self._state = rest[len(begin) - len(found) :], "name"
            elif self._state == "name":
                name, found, rest = self._held.partition(form.middle)
                if not found:
                    break
                pieces.append(CallPiece(self.calls, name, ""))
                self._held, self._state, self._scan = rest, "arguments", _Object()
                self.calls += 1
            elif self._state == "arguments":
                end = self._scan.push(self._held)
                arguments, self._held = self._held[:end], self._held[end:]
                if arguments:
                    pieces.append(CallPiece(self.calls - 1, None, arguments))
                if not self._scan.complete:
                    break
                self._state = "after"
            else:
                again = form.close + form.between + form.before
                if not form.several or len(self._held) < len(again):
                    break
                if not self._held.startswith(again):
                    break
                self._held, self._state = self._held[len(again) :], "name"
        return outside, pieces

    def finish(self) -> str:
        """Text that was held back, as it might have been the beginning of a call."""
        text, self._held = (self._held if self._state == "text" else ""), ""
        return text


class _Object:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.depth, self.quoted, self.escaped, self.complete = 0, False, False, False

    def push(self, text: str) -> int:
        """How much of `text` belongs to the object."""
        for i, c in enumerate(text):
            if self.quoted:
                if self.escaped:
                    self.escaped = False
                elif c == "\\":
                    self.escaped = True
                elif c == '"':
                    self.quoted = False
            elif c == '"':
                self.quoted = True
            elif c == "{":
                self.depth += 1
            elif c == "}":
                self.depth -= 1
                if self.depth == 0:
                    self.complete = True
                    return i + 1
        return len(text)


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters of `text` are the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
