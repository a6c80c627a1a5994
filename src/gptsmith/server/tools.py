"""Tool calls: how a model's chat template writes them, a grammar that enforces this format, and a parser for it.

Every model family writes calls differently. Instead of a table of families, the format is derived from the template:
it renders a conversation with two calls; the text before, between and after names and arguments is the format.

    call_format = detect_format(template)                    # None: the template does not support tools
    constraint = Grammar(tokenizer, call_format.grammar(tools, "auto"))
    parser = ToolCallParser(call_format)
    text, calls = parser.push(text)                          # text outside of calls, and pieces of calls
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer.chat import ChatTemplate

_NAMES = ("first_name_7", "second_name_8")
_KEY, _VALUE = "some_key_9", "some_value_9"
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ToolCallFormat:
    """An answer with calls is: prefix, one or more (before NAME middle ARGUMENTS close) joined by `between`, suffix.

    several: whether an answer can contain more than one call. added: ids of the tokenizer's added tokens.
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
        """The prefix that commits the model to a tool call: what opens a call, up to the first bracket or newline."""
        opening = self.prefix + self.before
        for token in self.added:
            if opening.startswith(token):
                return token
        ends = [at for at in (opening.find(c, 1) for c in "{[\n") if at > 0]
        mark = opening[: min(ends, default=len(opening))].rstrip()
        return mark if len(mark) > 1 else opening

    def grammar(self, tools: Sequence[Mapping[str, Any]], mode: str, *, several: bool = True) -> str:
        """Return a Lark grammar of answers, for `engine.grammar.Grammar`. tools: functions, with name and parameters.

        mode: "auto" allows text, optionally followed by calls; "required" allows calls only.
        several: allow more than one call.
        """
        calls = " | ".join(f"call_{i}" for i in range(len(tools)))
        more = f" ( {self._lark(self.between + self.before)} call )*" if several and self.several else ""
        rules = [f"call: ( {calls} ) {self._lark(self.close)}".rstrip()]
        for i, tool in enumerate(tools):
            schema = {**(tool.get("parameters") or {"type": "object"}), "x-guidance": _STYLE}
            rules.append(f"call_{i}: {self._lark(str(tool['name']) + self.middle)} %json {json.dumps(schema)}")
        opening = self.prefix + self.before
        ending = f"call{more} {self._lark(self.suffix)}".rstrip()
        if mode != "auto":
            return "\n".join([f"start: {self._lark(opening)} {ending}", *rules])
        trigger, rest = self.trigger, self._lark(opening[len(self.trigger) :])
        mark = _regex(trigger)
        free = f"FREE: /(.|\\n)*/ & ~/(.|\\n)*{mark}(.|\\n)*/"
        if trigger in self.added:
            return "\n".join([f"start: FREE ( {self._lark(trigger)} {rest} {ending} )?", free, *rules])
        marked = f"marked[lazy]: /(.|\\n)*{mark}/"
        return "\n".join([f"start: FREE | marked {rest} {ending}", free, marked, *rules])

    def _lark(self, text: str) -> str:
        """Return a text as Lark: added tokens by id, the rest as strings."""
        parts = []
        while text:
            at, token = min(((text.find(t), t) for t in self.added if t in text), default=(len(text), ""))
            if at:
                parts.append(json.dumps(text[:at]))
            if token:
                parts.append(f"<[{self.added[token]}]>")
            text = text[at + len(token) :]
        return " ".join(parts)


def detect_format(template: ChatTemplate) -> ToolCallFormat | None:
    """Return the format in which a template writes calls; None if it does not support tools, or writes calls in a way
    that `ToolCallFormat` cannot express."""
    if template.plain or "tools" not in template.source:
        return None
    return _detect(template, 2) or _detect(template, 1)


def _detect(template: ChatTemplate, count: int) -> ToolCallFormat | None:
    names = _NAMES[:count]
    tools = [{"type": "function", "function": {"name": n, "description": n, "parameters": {}}} for n in _NAMES]
    question = [{"role": "user", "content": "a question"}]
    calls = [
        {"type": "function", "id": f"call{i:05d}", "function": {"name": name, "arguments": {_KEY: _VALUE}}}
        for i, name in enumerate(names)
    ]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    try:
        prompt = template.render(question, tools=tools)
        text = template.render([*question, answer], tools=tools, add_generation_prompt=False)
        if prompt == template.render(question):
            return None
    except TokenizerError:
        return None
    text = text[len(_common_prefix(prompt, text)) :]
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
    for id in template.end_ids():  # the end-of-turn token is not part of the call
        text = text.partition(template.tokenizer.special_tokens()[id])[0]
    if len(set(middles)) > 1 or any(str(call["id"]) in "".join([*gaps, text]) for call in calls):
        return None
    if count == 1:
        return ToolCallFormat("", gaps[0], middles[0], text.rstrip(), "", "", False, added)
    before = _common_prefix(gaps[0][::-1], gaps[1][::-1])[::-1]
    close = _common_prefix(gaps[1][: len(gaps[1]) - len(before)], text)
    between, suffix = gaps[1][len(close) : len(gaps[1]) - len(before)], text[len(close) :].rstrip()
    prefix = gaps[0][: len(gaps[0]) - len(before)] if suffix else ""  # without a suffix it belongs to the answer's text
    if not before.strip():
        return None
    return ToolCallFormat(prefix, before, middles[0], close, between, suffix, True, added)


def _common_prefix(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    return one[: next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def _regex(text: str) -> str:
    return "".join("\\n" if c == "\n" else "\\" + c if c in r".^$*+?()[]{}|\/-&~" else c for c in text)


@dataclass(frozen=True)
class ToolCallDelta:
    """New text of a call: first its name, with the call's id; then its arguments, a JSON object in pieces."""

    index: int
    id: str = ""
    name: str | None = None
    arguments: str = ""


class ToolCallParser:
    """Split an answer, as it arrives, into text and calls. calls: how many have started."""

    def __init__(self, call_format: ToolCallFormat) -> None:
        self._format = call_format
        self._held = ""  # received, but not yet assigned to text or a call
        self._state = "text"
        self._scanner = _JsonObjectScanner()
        self.calls = 0

    @property
    def in_call(self) -> bool:
        """Whether a call has begun and is not complete, as when a stop text cuts its arguments."""
        return self._state in ("name", "arguments")

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Return the new text outside of calls, and the new pieces of calls."""
        f, outside, deltas = self._format, "", []
        self._held += text
        while True:
            if self._state == "text":
                before, found, rest = self._held.partition(f.trigger)
                if not found:
                    keep = _overlap(self._held, f.trigger)
                    outside += self._held[: len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep :]
                    break
                outside += before
                opening = f.prefix + f.before
                if len(found + rest) < len(opening):
                    self._held = found + rest
                    break
                self._held, self._state = rest[len(opening) - len(found) :], "name"
            elif self._state == "name":
                name, found, rest = self._held.partition(f.middle)
                if not found:
                    break
                deltas.append(ToolCallDelta(self.calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name))
                self._held, self._state, self._scanner = rest, "arguments", _JsonObjectScanner()
                self.calls += 1
            elif self._state == "arguments":
                end = self._scanner.push(self._held)
                arguments, self._held = self._held[:end], self._held[end:]
                if arguments:
                    deltas.append(ToolCallDelta(self.calls - 1, arguments=arguments))
                if not self._scanner.complete:
                    break
                self._state = "after"
            else:
                next_call = f.close + f.between + f.before
                if not f.several or not self._held.startswith(next_call):
                    break
                self._held, self._state = self._held[len(next_call) :], "name"
        return outside, deltas

    def finish(self) -> str:
        """Return the text that was held back because a call might have followed."""
        text, self._held = (self._held if self._state == "text" else ""), ""
        return text


class _JsonObjectScanner:
    """Find the end of a JSON object that arrives in pieces."""

    def __init__(self) -> None:
        self.depth, self.quoted, self.escaped, self.complete = 0, False, False, False

    def push(self, text: str) -> int:
        """Return how many characters of `text` belong to the object."""
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
    """Return the length of the longest suffix of `text` that is a proper prefix of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
