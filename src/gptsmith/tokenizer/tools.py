"""Tool calls: how a model's chat template writes them, a grammar that enforces this format, and a parser for it.

Every model family writes calls differently. Instead of a table of families, the format is derived from the template:
it renders a conversation with two calls; the text before, between and after names, arguments and ids is the format.
A template that does not write calls, or not as JSON, gets a generic form: the tools are described in a system message.

    call_format = template.tool_format
    constraint = Grammar(tokenizer, call_format.grammar(tools, "auto"))
    parser = ToolCallParser(call_format)
    text, calls = parser.push(text)                          # text outside of calls, and pieces of calls
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from gptsmith.errors import TokenizerError, UsageError
from gptsmith.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]
Render = Callable[..., str]  # messages, tools=..., add_generation_prompt=... -> text
Slot = Literal["name", "arguments", "id"]

_NAMES = ("first_name_7", "second_name_8")
_KEY, _VALUE = "some_key_9", "some_value_9"
_QUESTION = "a question 5"
_IDS = (("call_0123456789", "call_9876543210"), ("abcde0123", "edcba3210"))
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")
_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_SEPARATORS = ((", ", ": "), (",", ":"))  # that templates write between and inside the items of JSON


@dataclass(frozen=True)
class ToolCallFormat:
    """An answer with calls is: prefix, one or more (before CALL close) joined by `between`, suffix.

    CALL is `slots` with the texts in `middles` between them, for example NAME middle ARGUMENTS. several: whether an
    answer can contain more than one call. added: ids of the tokenizer's added tokens. arguments_as_text: whether the
    template takes the arguments of earlier calls as JSON text instead of objects. short_ids: whether it takes only ids
    of nine letters and digits. separators: white space of the JSON; None: any. generic: whether the template does not
    know tools, so that `with_generic_tools` describes them. in_text: ids of added tokens that may occur in the text of
    an answer, such as "<think>".
    """

    prefix: str
    before: str
    middles: tuple[str, ...]
    close: str
    between: str
    suffix: str
    several: bool
    added: Mapping[str, int]
    slots: tuple[Slot, ...] = ("name", "arguments")
    arguments_as_text: bool = False
    short_ids: bool = False
    separators: tuple[str, str] | None = _SEPARATORS[0]
    generic: bool = False
    in_text: tuple[int, ...] = ()

    @property
    def opening(self) -> str:
        """What comes before the first call."""
        return self.prefix + self.before

    @property
    def trigger(self) -> str:
        """The prefix that commits the model to a tool call: what opens a call, up to the first bracket or newline."""
        opening = self.opening.lstrip()
        for token in sorted(self.added, key=len, reverse=True):
            if opening.startswith(token):
                return token
        ends = [at for at in (opening.find(c, 1) for c in "{[\n") if at > 0]
        mark = opening[: min(ends, default=len(opening))].rstrip()
        return mark if len(mark) > 1 else opening

    @property
    def texts(self) -> str:
        """Everything but names, arguments and ids."""
        return "".join((self.prefix, self.before, *self.middles, self.close, self.between, self.suffix))

    def grammar(self, tools: Sequence[Mapping[str, Any]], mode: str, *, several: bool = True) -> str:
        """Return a Lark grammar of answers, for `engine.grammar.Grammar`. tools: functions, with name and parameters.

        mode: "auto" allows text, optionally followed by calls; "required" allows calls only.
        several: allow more than one call. Raise UsageError for parameters that are not those of an object.
        """
        calls = " | ".join(f"call_{i}" for i in range(len(tools)))
        more = f" ( {self._lark(self.between + self.before)} call )*" if several and self.several else ""
        rules = [f"call: ( {calls} ) {self._lark(self.close)}".rstrip()]
        for i, tool in enumerate(tools):
            schema = {**arguments_schema(tool), "x-guidance": self._style()}
            written = {
                "name": json.dumps(str(tool["name"])),
                "arguments": f"%json {json.dumps(schema)}",
                "id": f"/{_SHORT_ID.pattern}/",
            }
            parts = [written[self.slots[0]]]
            for middle, slot in zip(self.middles, self.slots[1:], strict=True):
                parts += [self._lark(middle), written[slot]]
            rules.append(f"call_{i}: {' '.join(part for part in parts if part)}")
        ending = f"call{more} {self._lark(self.suffix)}".rstrip()
        if mode != "auto":
            return "\n".join([f"start: {self._lark(self.opening)} {ending}", *rules])
        trigger, rest = self.trigger, self._lark(self.opening.lstrip()[len(self.trigger) :])
        mark = _regex(trigger)
        free = f"FREE: /(.|\\n)*/ & ~/(.|\\n)*{mark}(.|\\n)*/"
        before = f"( FREE <[{','.join(map(str, self.in_text))}]> )* " if self.in_text else ""
        if trigger in self.added:
            return "\n".join([f"start: {before}FREE ( {self._lark(trigger)} {rest} {ending} )?", free, *rules])
        marked = f"marked[lazy]: /(.|\\n)*{mark}/"
        return "\n".join([f"start: {before}( FREE | marked {rest} {ending} )", free, marked, *rules])

    def for_tokenizer(self, tokenizer: Tokenizer) -> ToolCallFormat:
        """Return the format with what a grammar has to know of the tokenizer."""
        own, special = self.texts, tokenizer.special_tokens()
        in_text = (id for text, id in self.added.items() if id not in special and text not in own)
        separators = None if tokenizer.spaces_words else self.separators
        return replace(self, in_text=tuple(sorted(in_text)), separators=separators)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return the messages with the calls in them as the template takes them."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> dict[str, Any]:
        values = dict(message)
        if self.short_ids and isinstance(values.get("tool_call_id"), str):
            values["tool_call_id"] = _short(values["tool_call_id"])
        if isinstance(values.get("tool_calls"), list | tuple):
            values["tool_calls"] = [self._call(call) for call in values["tool_calls"]]
        return values

    def _call(self, call: Any) -> Any:
        if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
            return call
        values = {**call, "function": dict(call["function"])}
        arguments = values["function"].get("arguments")
        if self.arguments_as_text and isinstance(arguments, Mapping):
            values["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not self.arguments_as_text and isinstance(arguments, str):
            values["function"]["arguments"] = _object(arguments)
        if self.short_ids:
            values["id"] = _short(str(values.get("id") or ""))
        return values

    def _style(self) -> dict[str, Any]:
        if self.separators is None:
            return {"whitespace_flexible": True}
        item, key = self.separators
        return {"whitespace_flexible": False, "item_separator": item, "key_separator": key}

    def _lark(self, text: str) -> str:
        """Return a text as Lark: added tokens by id, the rest as strings."""
        return " ".join(
            f"<[{self.added[part]}]>" if part in self.added else json.dumps(part) for part in _split(text, self.added)
        )


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a function's arguments, which are an object even if its parameters do not say so.

    Raise UsageError for parameters of another type.
    """
    schema = dict(function.get("parameters") or {})
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise UsageError(
            f"the parameters of {function.get('name')} are of type {json.dumps(kind)}: the arguments "
            'of a function are an object, so the type must be "object".'
        )
    return {**schema, "type": "object"}


def _object(arguments: str) -> Any:
    """Return the arguments that a JSON text describes; the text itself if they are no object."""
    try:
        values = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return values if isinstance(values, dict) else arguments


def _short(id: str) -> str:
    """Return an id of nine letters and digits, the same for the same id."""
    return id if _SHORT_ID.fullmatch(id) else hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:9]


# The generic form -----------------------------------------------------------------------------------------------------

_OPEN, _CLOSE = "<tool_call>\n", "\n</tool_call>"
GENERIC = ToolCallFormat(
    "", _OPEN + '{"name": "', ('", "arguments": ',), "}" + _CLOSE, "\n", "", several=True, added={}, generic=True
)
_INSTRUCTIONS = """\
You can call functions. Here are their names, descriptions and parameters, one function a line:
<tools>
{tools}
</tools>
To call a function, write its name and arguments in this form, once for each call:
<tool_call>
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
</tool_call>
The results follow in <tool_response>. If no function is needed, answer with text."""


def with_generic_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, *, takes_system: bool
) -> list[dict[str, Any]]:
    """Return a conversation with tools as one without: calls and results become texts of assistant and user.

    tools: described in the first message, which is from the system if the template knows that role.
    """
    result: list[dict[str, Any]] = []
    for message in messages:
        values = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        content = _text(message.get("content"))
        is_result = message.get("role") == "tool"
        if is_result:
            values = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        elif calls := message.get("tool_calls"):
            parts = [content.rstrip("\n")] if content else []
            values["content"] = "\n".join([*parts, *(_written(call) for call in calls)])
        previous = result[-1] if result else {}
        if values.get("role") == previous.get("role") == "user" and (is_result or "is_result" in previous):
            previous["content"] = f"{_text(previous['content'])}\n{_text(values['content'])}"
        else:
            result.append({**values, "is_result": True} if is_result else values)
    for values in result:
        values.pop("is_result", None)
    if tools:
        described = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
        instructions = _INSTRUCTIONS.format(tools=described)
        role = "system" if takes_system else "user"
        if result and result[0].get("role") == role:
            own = _text(result[0]["content"])
            text = f"{own}\n\n{instructions}" if takes_system else f"{instructions}\n\n{own}"
            result[0] = {**result[0], "content": text}
        else:
            result.insert(0, {"role": role, "content": instructions})
    return result


def _written(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _object(arguments)
    values = {"name": function.get("name"), "arguments": arguments or {}}
    return _OPEN + json.dumps(values, ensure_ascii=False) + _CLOSE


def _text(content: Any) -> str:
    if isinstance(content, list | tuple):  # parts of a message
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


# The format of a template ---------------------------------------------------------------------------------------------


def detect_format(render: Render, tokenizer: Tokenizer, end_ids: Sequence[int]) -> ToolCallFormat | None:
    """Return the format in which a template writes calls; None if it does not support tools, or writes calls in a way
    that `ToolCallFormat` cannot express.

    render: the template. end_ids: of the tokens that it writes after an answer.
    """
    added = {token["content"]: token["id"] for token in json.loads(tokenizer.to_json()).get("added_tokens") or []}
    names = {id: text for text, id in added.items()}
    ends = [names[id] for id in (*end_ids, *tokenizer.end_ids) if id in names]
    for count in (2, 1):
        for ids in _IDS:
            for arguments_as_text in (False, True):
                rendered = _Probe(count, ids[:count], arguments_as_text, added, ends).format(render)
                if rendered is not None:
                    return rendered
    return None


@dataclass(frozen=True)
class _Probe:
    """A conversation with so many calls, and what a template makes of it. ends: tokens that end an answer."""

    count: int
    ids: tuple[str, ...]
    arguments_as_text: bool
    added: Mapping[str, int]
    ends: Sequence[str]

    def format(self, render: Render) -> ToolCallFormat | None:
        text = self._answer(render)
        slots = [] if text is None else self._slots(text)
        if text is None or not slots:
            return None
        order = tuple(kind for _, _, kind in slots[0])
        inner = [tuple(text[end:start] for (_, end, _), (start, _, _) in pairwise(each)) for each in slots]
        if any(tuple(kind for _, _, kind in each) != order for each in slots) or len(set(inner)) > 1:
            return None
        gaps = [text[: slots[0][0][0]]]
        gaps += [text[one[-1][1] : other[0][0]] for one, other in pairwise(slots)]
        rest = text[slots[-1][-1][1] :]
        for end in self.ends:  # the end-of-turn token is not part of the call
            rest = rest.partition(end)[0]
        if any(word in "".join([*gaps, *inner[0], rest]) for word in (*self.ids, *_NAMES, _KEY)):
            return None
        start, stop, _ = next(slot for slot in slots[0] if slot[2] == "arguments")
        written, expected = text[start:stop], {_KEY: _VALUE, _KEY + "_2": 1}
        styles = [style for style in _SEPARATORS if written == json.dumps(expected, separators=style)]
        before, close, between, suffix = gaps[0].lstrip(), rest.rstrip(), "", ""
        if self.count > 1:
            before = _common_suffix(gaps[0], gaps[1], self.added).lstrip()
            close = _common_prefix(gaps[1][: len(gaps[1]) - len(before)], rest, self.added)
            between, suffix = gaps[1][len(close) : len(gaps[1]) - len(before)], rest[len(close) :].rstrip()
        prefix = gaps[0][: len(gaps[0]) - len(before)]
        if not suffix and not prefix.isspace():  # then it belongs to the text of the answer, but for a token
            prefix = next((token for token in self.added if prefix.endswith(token)), "")
        if not (prefix + before).strip() or (self.count > 1 and not before.strip() and not between.strip()):
            return None
        return ToolCallFormat(
            prefix,
            before,
            inner[0],
            close,
            between,
            suffix,
            several=self.count > 1,
            added=self.added,
            slots=order,
            arguments_as_text=self.arguments_as_text,
            short_ids=self.ids[0] in _IDS[1],
            separators=styles[0] if styles else None,
        )

    def _answer(self, render: Render) -> str | None:
        """Return what the template writes for an answer with calls, after the prompt for it."""
        schema = {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "a text"}, _KEY + "_2": {"type": "integer"}},
            "required": [_KEY],
        }
        tools = [
            {"type": "function", "function": {"name": name, "description": "a function", "parameters": schema}}
            for name in _NAMES
        ]
        values: Any = {_KEY: _VALUE, _KEY + "_2": 1}
        arguments = json.dumps(values) if self.arguments_as_text else values
        calls = [
            {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}
            for id, name in zip(self.ids, _NAMES, strict=False)
        ]
        question = [{"role": "user", "content": _QUESTION}]
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        results = [
            {"role": "tool", "name": name, "tool_call_id": id, "content": "a result"}
            for id, name in zip(self.ids, _NAMES, strict=False)
        ]
        try:
            prompt = render(question, tools=tools, add_generation_prompt=True)
            text = render([*question, answer], tools=tools, add_generation_prompt=False)
            if prompt == render(question, tools=None, add_generation_prompt=True):
                return None
            render([*question, answer, *results], tools=tools, add_generation_prompt=True)
        except TokenizerError:
            return None
        # Templates may describe tools only in the last message, so the texts are compared after the question.
        text, prompt = text.rpartition(_QUESTION)[2], prompt.rpartition(_QUESTION)[2]
        return text[len(_common_prefix(prompt, text, self.added)) :]

    def _slots(self, text: str) -> list[list[tuple[int, int, Slot]]]:
        """Return where the name, the arguments and the id of each call are, in order; [] if they are not all there."""
        result: list[list[tuple[int, int, Slot]]] = []
        at = 0
        for id, name in zip(self.ids, _NAMES, strict=False):
            named, found = text.find(name, at), self._arguments(text, at)
            if named < 0 or found is None:
                return []
            slots: list[tuple[int, int, Slot]] = [(named, named + len(name), "name"), (*found, "arguments")]
            if (place := text.find(id, at)) >= 0:
                slots.append((place, place + len(id), "id"))
            slots.sort()
            if any(end > start for (_, end, _), (start, _, _) in pairwise(slots)):
                return []
            result.append(slots)
            at = slots[-1][1]
        return result

    def _arguments(self, text: str, start: int) -> tuple[int, int] | None:
        """Return the range of the next arguments, if they are written as a JSON object."""
        key = text.find(_KEY, start)
        begin = text.rfind("{", start, key) if key >= 0 else -1
        if begin < 0:
            return None
        try:
            values, end = json.JSONDecoder().raw_decode(text, begin)
        except ValueError:
            return None
        in_braces = text[:begin].endswith("{")  # a notation of its own, into which the JSON was put as a text
        return (begin, end) if values == {_KEY: _VALUE, _KEY + "_2": 1} and not in_braces else None


def _split(text: str, tokens: Mapping[str, int]) -> list[str]:
    """Cut a text into added tokens and what is between them."""
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)
    return [part for part in re.split(f"({pattern})", text) if part] if pattern and text else [text] if text else []


def _common_prefix(one: str, other: str, tokens: Mapping[str, int]) -> str:
    """Return the common beginning of two texts that cuts no added token of the second."""
    pairs = zip(one, other, strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    at = 0
    for part in _split(other, tokens):
        if at < length < at + len(part) and part in tokens:
            return other[:at]
        at += len(part)
    return other[:length]


def _common_suffix(one: str, other: str, tokens: Mapping[str, int]) -> str:
    """Return the common end of two texts that cuts no added token of either."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    for text in (one, other):
        at = len(text)
        for part in reversed(_split(text, tokens)):
            at -= len(part)
            if at < len(text) - length < at + len(part) and part in tokens:
                length = len(text) - at - len(part)
    return one[len(one) - length :]


def _regex(text: str) -> str:
    return "".join("\\n" if c == "\n" else "\\" + c if c in r".^$*+?()[]{}|\/-&~" else c for c in text)


# Reading calls --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolCallDelta:
    """New text of a call: first its name, with the call's id; then its arguments, a JSON object in pieces."""

    index: int
    id: str = ""
    name: str | None = None
    arguments: str = ""


@dataclass
class _Call:
    """A call that is being read. step: of `ToolCallParser._steps`. started: whether its name has been returned."""

    scanner: JsonObjectScanner
    step: int = 0
    name: str = ""
    id: str = ""
    arguments: str = ""
    started: bool = False


class ToolCallParser:
    """Split an answer, as it arrives, into text and calls. calls: how many have started."""

    def __init__(self, call_format: ToolCallFormat) -> None:
        self._format = call_format
        self._steps: list[tuple[Slot | Literal["text"], str]] = [
            (call_format.slots[0], "")
        ]  # what a call consists of: slots, and texts between them
        for middle, slot in zip(call_format.middles, call_format.slots[1:], strict=True):
            self._steps += [("text", middle), (slot, "")]
        self._held = ""  # received, but not yet assigned to text or a call
        self._state: Literal["text", "call", "after"] = "text"
        self._call = _Call(JsonObjectScanner())
        self.calls = 0
        self.reasoning = ""  # these formats do not tell it from text

    @property
    def in_call(self) -> bool:
        """Whether a call has begun and is not complete, as when a stop text cuts its arguments."""
        return self._state == "call"

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Return the new text outside of calls, and the new pieces of calls."""
        f, outside, deltas = self._format, "", list[ToolCallDelta]()
        self._held += text
        while True:
            if self._state == "text":
                before, found, rest = self._held.partition(f.trigger)
                if not found:
                    keep = overlap(self._held, f.trigger)
                    outside += self._held[: len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep :]
                    break
                outside += before
                opening = f.opening.lstrip()
                if len(found + rest) < len(opening):
                    self._held = found + rest
                    break
                self._begin(rest[len(opening) - len(found) :])
            elif self._state == "call":
                complete = self._read_step()
                deltas += self._news()
                if not complete:
                    break
                self._call.step += 1
                if self._call.step == len(self._steps):
                    deltas += self._news(last=True)
                    self._state = "after"
            else:
                next_call = f.close + f.between + f.before
                if not f.several or not self._held.startswith(next_call):
                    break
                self._begin(self._held[len(next_call) :])
        return outside, deltas

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """Return the text that was held back because a call might have followed, and the pieces of a call that was cut
        off before its id."""
        text, self._held = (self._held if self._state == "text" else ""), ""
        return text, self._news(last=True) if self._state == "call" else []

    def _begin(self, rest: str) -> None:
        self._held, self._state, self._call = rest, "call", _Call(JsonObjectScanner())

    def _read_step(self) -> bool:
        """Read a part of a call as far as it has arrived; return whether it is complete."""
        kind, text = self._steps[self._call.step]
        if kind == "arguments":
            end = self._call.scanner.push(self._held)
            self._call.arguments += self._held[:end]
            self._held = self._held[end:]
            return self._call.scanner.complete
        if kind == "text":
            if len(self._held) < len(text):
                return False
            self._held = self._held[len(text) :]
            return True
        following = self._steps[self._call.step + 1][1] if self._call.step + 1 < len(self._steps) else ""
        match = _NAME.match(self._held)
        end = self._held.find(following) if following else match.end() if match else -1
        if end < 0 or end == len(self._held):
            return False
        setattr(self._call, kind, self._held[:end])
        self._held = self._held[end:]
        return True

    def _news(self, *, last: bool = False) -> list[ToolCallDelta]:
        """Return what has become known of the call: nothing before its name, and its id if it has one. last: no more
        will become known."""
        call, deltas = self._call, list[ToolCallDelta]()
        if not call.started:
            if not call.name or not (call.id or last or "id" not in self._format.slots):
                return []
            call.started = True
            deltas.append(ToolCallDelta(self.calls, id=call.id or f"call_{uuid.uuid4().hex[:24]}", name=call.name))
            self.calls += 1
        if call.arguments:
            deltas.append(ToolCallDelta(self.calls - 1, arguments=call.arguments))
            call.arguments = ""
        return deltas


class JsonObjectScanner:
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


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
