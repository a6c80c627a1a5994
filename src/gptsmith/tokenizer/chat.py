"""Conversations as token ids: the tokenizer's chat template (Jinja, as in transformers), rendered in a sandbox.

    template = ChatTemplate(tokenizer)
    ids = template.encode([{"role": "user", "content": "Hello"}])   # a prompt: ends where the assistant is to answer
    ids, mask = template.encode(conversation, return_mask=True)     # for training: mask marks the assistant's tokens

A template may write special tokens. Texts that are given to it (messages, tools, documents) never become one: a user
who types "<|im_end|>" gets the tokens of those ten characters. Templates that do not know tools get a generic form of
them (`tokenizer.tools`). A picture is a part of a content, {"type": "image"}, and becomes one placeholder token.

Where the tokenizer puts a beginning-of-sequence token before a text, a conversation whose template does not write it
gets it, too, as in llama.cpp. A tokenizer without a template gets a plain one that names the speaker of each turn, or
puts each turn on a line of its own where it lacks the letters of these names.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

from gptsmith.errors import TokenizerError, UsageError
from gptsmith.tokenizer.harmony import Harmony, with_thinking
from gptsmith.tokenizer.tokenizer import END_TOKENS, Tokenizer, hidden_tokens, own_ids, token_content
from gptsmith.tokenizer.tools import GENERIC, ToolCallFormat, detect_format, with_generic_tools

if TYPE_CHECKING:
    import jinja2
    import tokenizers

Message = Mapping[str, Any]
Encode = Callable[[Sequence[Message], bool], list[int]]  # messages, add_generation_prompt -> ids

PLAIN = """\
{% for message in messages %}\
{% if message['role'] == 'system' %}{{ message['content'] }}

{% else %}{{ 'User' if message['role'] == 'user' else 'Assistant' }}: {{ message['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
LINES = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
_PLAIN_FORMS = (  # template, what it writes, and the text that ends an answer: the first that the tokenizer can write
    (PLAIN, "User: \nAssistant: \n", "\nUser:"),
    (PLAIN.replace("User", "user").replace("Assistant", "assistant"), "user: \nassistant: \n", "\nuser:"),
    (LINES, "\n", "\n"),
)
# Tokens that are not marked as special, but are control tokens by their spelling: "<tool_call>", "[INST]".
_CONTROL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_FIRST_CODE, _LAST_CODE = 0xF0000, 0xFFFFD  # characters of no meaning, which stand for control tokens


class ChatTemplate:
    """The chat template of a tokenizer.

    name: whose template it is, for error messages. plain: whether the tokenizer has no template, so that the one of
    this package is used. stop: texts that end an answer (only the plain template has any). names_speakers: whether the
    plain template writes who speaks; one whose names the tokenizer cannot write puts each turn on a line of its own.
    image_token: what stands for a picture.
    Raises TokenizerError if the template is not valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, *, name: str | None = None) -> None:
        config = tokenizer.config()
        source, tool_source = _sources(config.get("chat_template"))
        self.tokenizer = tokenizer
        self.name = name
        self.plain = not source.strip()
        self.source, self.stop = source, tuple[str, ...]()
        self._cannot_chat = ""
        if self.plain:
            self.source, self.stop, self._cannot_chat = _plain_form(tokenizer)
        self.names_speakers = self.source != LINES
        self._named_tokens = {
            role: token_content(config.get(role)) for role in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.image_token = token_content(config.get("image_token")) or "<image>"
        self._special = {text: id for id, text in tokenizer.special_tokens().items()}
        self._special_ids = frozenset(self._special.values())
        self._added = {text: id for text, id in tokenizer.added_tokens().items() if text}
        self._control = {text: id for text, id in self._added.items() if _CONTROL.fullmatch(text)} | self._special
        self._end_of_turn_ids = {self._special[token] for token in END_TOKENS if token in self._special}
        self._end_of_turn_ids.update(tokenizer.end_ids)
        self._template = _compile(self.source)
        self._tool_template = self._template if tool_source is None else _compile(tool_source)
        self._sources = f"{self.source}{tool_source}"
        self._pipeline: tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]] | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        generic_tools: bool = False,
        **variables: Any,
    ) -> str:
        """Return the conversation as text. variables: further variables of the template (`tools`, `documents`, ...).

        generic_tools: write tools in the generic form not only if the template does not know tools, but also if it
        writes calls in a way that `tool_format` cannot express, so that answers have the format of `tool_format`.
        Raises TokenizerError if the template refuses the conversation, for example because roles do not alternate.
        """
        tools = variables.get("tools")
        if self.harmony is not None:
            messages = [with_thinking(message) for message in messages]
        if not tools and not any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
            return self._write(messages, self._template, add_generation_prompt, variables)
        if self.tool_format.generic and (generic_tools or not self._describes_tools):
            if tools and not self._can_write_tools:
                raise TokenizerError(
                    "this model cannot be given tools: its tokenizer lacks characters of the form in which calls are "
                    f"written ({GENERIC.texts!r})."
                )
            messages = [self._with_placeholders(message) for message in messages]
            messages = with_generic_tools(messages, tools, takes_system=self._takes_system)
            variables = {**variables, "tools": None}
            return self._write(messages, self._template, add_generation_prompt, variables)
        if not self.tool_format.generic:
            messages = self.tool_format.messages(messages)
        try:
            return self._write(messages, self._tool_template, add_generation_prompt, variables)
        except TokenizerError:
            if not tools:
                raise
            described = [_with_parameters(tool) for tool in tools]
            if described == list(tools):
                raise
            return self._write(messages, self._tool_template, add_generation_prompt, {**variables, "tools": described})

    @functools.cached_property
    def tool_format(self) -> ToolCallFormat:
        """How calls of tools are written: by the template, or generically where it does not know tools."""

        def write(messages: Sequence[Message], *, tools: Any, add_generation_prompt: bool) -> str:
            template = self._tool_template if tools else self._template
            return self._write(messages, template, add_generation_prompt, {"tools": tools})

        own = None if self.plain else detect_format(write, self.tokenizer, self.end_ids())
        return (own or replace(GENERIC, added=self._added)).for_tokenizer(self.tokenizer)

    @functools.cached_property
    def harmony(self) -> Harmony | None:
        """The format of answers in channels, if the template writes it."""
        question, answer = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
        if self.plain:
            return None
        try:
            prompt = self._write([question], self._template, True, {})
            answered = self._write([question, answer], self._template, False, {})
        except TokenizerError:
            return None
        return Harmony.of(prompt, answered, self._special)

    @functools.cached_property
    def _describes_tools(self) -> bool:
        """Whether the template itself writes which tools there are."""
        question = [{"role": "user", "content": "a question"}]
        tool = _with_parameters({"type": "function", "function": {"name": "a_function", "description": "what it does"}})
        try:
            return "a_function" in self._write(question, self._tool_template, True, {"tools": [tool]})
        except TokenizerError:
            return False

    @functools.cached_property
    def _can_write_tools(self) -> bool:
        return _can_write(self.tokenizer, GENERIC.texts)

    @functools.cached_property
    def _takes_system(self) -> bool:
        """Whether the template writes messages of the system."""
        text = "some text of the system"
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "a question"}]
        try:
            return text in self._write(messages, self._template, True, {})
        except TokenizerError:
            return False

    def _write(
        self,
        messages: Sequence[Message],
        template: jinja2.Template,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        if self._cannot_chat:
            raise TokenizerError(self._cannot_chat)
        if any(_has_images(message) for message in messages) and not self._takes_images:
            messages = [self._with_placeholders(message) for message in messages]
        if self._takes_parts:
            messages = [_in_parts(message) for message in messages]
        return self._fill_in(messages, template, add_generation_prompt, variables)

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes contents only as lists of parts, as those of models that see images do."""
        text = "some text of the user"

        def writes(message: Message) -> bool:
            try:
                return text in self._fill_in([message], self._template, True, {})
            except TokenizerError:
                return False

        message = {"role": "user", "content": text}
        return not writes(message) and writes(_in_parts(message))

    @functools.cached_property
    def _takes_images(self) -> bool:
        """Whether the template writes the placeholder of a picture among the parts of a content."""
        text = "some text of the user"
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        try:
            written = self._fill_in([message], self._template, True, {})
        except TokenizerError:
            return False
        return text in written and written.count(self.image_token) == 1

    def _with_placeholders(self, message: Message) -> dict[str, Any]:
        """Return a message whose content is a text, with the placeholder in place of each picture."""
        content = message.get("content")
        if not _has_images(message) or not isinstance(content, list):
            return dict(message)
        if self.image_token not in self._special:
            raise TokenizerError("this model reads text only: its tokenizer has no token that stands for a picture.")
        parts = (self.image_token if part.get("type") == "image" else part.get("text", "") for part in content)
        return {**message, "content": "".join(parts)}

    def _fill_in(
        self,
        messages: Sequence[Message],
        template: jinja2.Template,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        import jinja2

        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None, **self._named_tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise TokenizerError(f"the chat template cannot write this conversation: {error}.") from None

    @overload
    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        return_mask: Literal[False] = False,
        **variables: Any,
    ) -> list[int]: ...

    @overload
    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        return_mask: Literal[True],
        train_on: Literal["all", "last"] = "all",
        **variables: Any,
    ) -> tuple[list[int], list[bool]]: ...

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        return_mask: bool = False,
        train_on: Literal["all", "last"] = "all",
        **variables: Any,
    ) -> list[int] | tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and with `return_mask` also which of them the assistant wrote.

        add_generation_prompt: end with the beginning of an answer; by default, unless a mask is asked for.
        continue_final_message: end inside the last message instead, after its text, so that a model continues it.
        train_on: mark every turn of the assistant, or only the last one.
        variables: further variables of the template (`tools`, `documents`, ...).

        The mask is computed from the ids alone, so templates need no `{% generation %}` tags. It marks what a model
        has to generate when it is served the messages before the turn: everything after the generation prompt, up to
        and including the end-of-turn token. Ids and prompts are the same in training and serving.

        Raises TokenizerError as `render` and `Tokenizer.encode` do; with `return_mask` also if the prompt for a turn
        is not a prefix of the conversation's ids, as with templates that remove earlier thinking, or if the turn has
        no message before it.
        """
        if train_on not in ("all", "last"):
            raise UsageError(f"train_on must be 'all' or 'last', not {train_on!r}.")
        if continue_final_message and (add_generation_prompt or return_mask):
            raise UsageError("continue_final_message cannot be combined with add_generation_prompt or return_mask.")
        if add_generation_prompt is None:
            add_generation_prompt = not return_mask and not continue_final_message
        try:
            given = json.dumps([messages, variables, self._sources], ensure_ascii=False, default=str)
            marks = _Marks.absent_from(given)
            escaped = [self._escaped_message(message, marks) for message in messages]
            variables = _escaped(variables, self._special, marks, self._control)
        except RecursionError:
            raise TokenizerError("the conversation is nested too deeply.") from None
        if continue_final_message:
            text = self._render_open(escaped, marks.end, variables)
        else:
            text = self.render(escaped, add_generation_prompt=add_generation_prompt, **variables)

        def encode_text(text: str) -> list[int]:
            whole = self.tokenizer.kind == "other" and not _has_codes(text)
            ids = self._encode_whole(text, marks) if whole else self._encode_parts(text, marks)
            prefix = list(self.tokenizer.prefix_ids)
            return ids if ids[: len(prefix)] == prefix else prefix + ids

        ids = encode_text(text)
        if not return_mask:
            return ids

        def encode_prefix(messages: Sequence[Message], prompt: bool) -> list[int]:
            return encode_text(self.render(messages, add_generation_prompt=prompt, **variables))

        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        mask = [False] * len(ids)
        for index in turns if train_on == "all" else turns[-1:]:
            start, end = self._turn(index, ids, escaped, encode_prefix)
            mask[start:end] = [True] * (end - start)
        return ids, mask

    def render_open(self, messages: Sequence[Message], **variables: Any) -> str:
        """Return the conversation as text up to the end of the last message's text, so that a model continues it.

        Raises TokenizerError as `render` does, and if the template leaves the text out.
        """
        marks = _Marks.absent_from(json.dumps([messages, variables, self._sources], ensure_ascii=False, default=str))
        return self._render_open(messages, marks.end, variables)

    def _render_open(self, messages: Sequence[Message], end_mark: str, variables: Mapping[str, Any]) -> str:
        """Return the conversation as text up to the end of the last message's text, as transformers does.

        end_mark: a character that the conversation lacks. Raises TokenizerError if the template leaves the text out.
        """
        content = messages[-1].get("content") if messages else None
        if not isinstance(content, str):
            raise TokenizerError("the last message has no text to continue.")
        marked = [*messages[:-1], {**messages[-1], "content": f"{content}{end_mark} "}]
        text = self.render(marked, add_generation_prompt=False, **variables)
        at = text.rfind(end_mark)
        if at < 0 or content.strip() not in text:
            raise TokenizerError("the last message cannot be continued: the chat template does not write all its text.")
        trimmed = text[at + 1 : at + 2] != " "  # the template removes white space around texts
        return text[:at].rstrip() if trimmed else text[:at]

    def end_ids(self) -> tuple[int, ...]:
        """Return the id of the special token that the template writes after an answer, or () if there is none; of a
        template in harmony, those after an answer and after a call."""
        if self.harmony is not None and self.harmony.end_ids:
            return self.harmony.end_ids
        answer = "an answer"
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        try:
            text = self.render(messages, add_generation_prompt=False)
        except TokenizerError:
            return ()
        after = text.rpartition(answer)[2].lstrip()
        longest_first = sorted(self._special, key=len, reverse=True)
        return tuple(self._special[token] for token in longest_first if after.startswith(token))[:1]

    # where the assistant's turns are

    def _turn(self, index: int, ids: list[int], messages: Sequence[Message], encode: Encode) -> tuple[int, int]:
        """Return the range of `ids`, those of all `messages`, that message `index` (of the assistant) takes up."""
        if index == 0:
            raise TokenizerError(
                "message 1 is from the assistant, so there is no prompt that it answers. Remove it, or put a system "
                "or user message before it."
            )
        prompt, through = encode(messages[:index], True), encode(messages[: index + 1], False)
        start = len(prompt)
        if _num_common(prompt, through) < start:
            raise self._unstable(index, prompt, through)
        end = max((at for at in range(start, len(through)) if through[at] in self._special_ids), default=-1) + 1
        if not end or not self._is_blank(through[end:]):
            end = len(through)
            self._check_ending(index, through, messages, encode)
        common = _num_common(through, ids)
        if common >= end:
            return start, end
        if common < start or not self._is_blank(through[common:end]):
            raise self._unstable(index, through, ids)
        # White space at the end of the turn is tokenized differently when messages follow: find it by its text.
        turn, end = self._text(through[start:end]), common
        while end < len(ids) and turn.startswith(self._text(ids[start : end + 1])):
            end += 1
        return start, end

    def _check_ending(self, index: int, through: list[int], messages: Sequence[Message], encode: Encode) -> None:
        """Raise TokenizerError if the end-of-turn token of message `index` is only written with the next message."""
        try:
            longer = encode([*messages[: index + 1], {"role": "user", "content": "x"}], False)
        except TokenizerError:
            return  # no user message can follow here
        following = next((id for id in longer[len(through) :] if not self._is_blank([id])), None)
        if following in self._end_of_turn_ids:
            raise self._unstable(index, through, longer)

    def _unstable(self, index: int, prefix: list[int], ids: list[int]) -> TokenizerError:
        """The error for a turn whose tokens differ between a prefix of the conversation and all of it."""
        common = _num_common(prefix, ids)
        before, now = (self._text(part[common : common + 12]) for part in (prefix, ids))
        of = f" of {self.name}" if self.name else ""
        if self._text(ids).startswith(self._text(prefix)) and common < len(prefix):
            return TokenizerError(
                f"message {index + 1} cannot be trained on: the tokenizer{of} joins its beginning with the end of the "
                f"prompt ({before!r} becomes {now!r}), so a served model would see other tokens. Remove white space at "
                "the beginning of the message, or use a chat template with a special token or one line break before "
                "it."
            )
        return TokenizerError(
            f"the chat template{of} cannot be used to train on message {index + 1}: it writes the beginning of a "
            f"conversation differently when more follows ({before!r} becomes {now!r}), so the assistant's tokens are "
            "not the ones that a served model generates. Use a template that always writes a message the same way. If "
            "only earlier turns change (their thinking is removed, for example), train on the last turn only."
        )

    def _is_blank(self, ids: list[int]) -> bool:
        return not self._text(ids).strip()

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    # text to ids

    def _escaped_message(self, message: Message, marks: _Marks) -> Any:
        """Return a message whose texts hold no special token.

        Control tokens that are not marked as special may be written by the model and its developer ("<think>"), but not
        by users and tools.
        """
        trusted = message.get("role") in ("assistant", "system", "developer")
        return {
            key: _escaped(value, self._special, marks, {} if trusted and key != "tool_calls" else self._control)
            for key, value in message.items()
        }

    def _encode_parts(self, text: str, marks: _Marks) -> list[int]:
        """Encode the text between special tokens part by part, without the marks."""
        ids: list[int] = []
        parts = _split(text, self._special)
        for at, part in enumerate(parts):
            if part in self._special:
                ids.append(self._special[part])
                continue
            if at and self._strips(parts[at - 1], "rstrip"):
                part = part.lstrip()
            if at + 1 < len(parts) and self._strips(parts[at + 1], "lstrip"):
                part = part.rstrip()
            for piece in marks.pieces(part):
                ids += self.tokenizer.encode(piece)
        return ids

    def _strips(self, token: str, side: str) -> bool:
        """Return whether a special token swallows the white space on a side of it."""
        return bool(getattr(self.tokenizer.added_token(self._special[token]), side))

    def _encode_whole(self, text: str, marks: _Marks) -> list[int]:
        """Encode a text by a tokenizer that may treat its beginning differently, and so has to get it whole.

        Control tokens that the template has written are replaced by characters that only a copy of the tokenizer knows,
        which does not know their spellings.
        """
        if self._pipeline is None:
            self._pipeline = _coded(self.tokenizer, self._control)
        pipeline, codes, original = self._pipeline
        coded = "".join(
            codes[part] if part in self._control else "".join(marks.pieces(part))
            for part in _split(text, self._control)
        )
        try:
            ids: list[int] = pipeline.encode(coded, add_special_tokens=False).ids
        except Exception:  # `tokenizers` raises bare Exceptions; the tokenizer itself says which text it is
            return self._encode_parts(text, marks)
        return [original.get(id, id) for id in ids]


def _sources(configured: object) -> tuple[str, str | None]:
    """Return the default template of a configuration and the one for tools, if that is another."""
    named: dict[str, str] = {}
    if isinstance(configured, Mapping):
        named = {name: text for name, text in configured.items() if isinstance(text, str)}
    elif isinstance(configured, list):  # several templates, each with a name
        entries = [entry for entry in configured if isinstance(entry, Mapping)]
        named = {
            str(entry.get("name")): entry["template"] for entry in entries if isinstance(entry.get("template"), str)
        }
    elif isinstance(configured, str):
        named = {"default": configured}
    default = named.get("default", next(iter(named.values()), ""))
    return default, named.get("tool_use")


def _plain_form(tokenizer: Tokenizer) -> tuple[str, tuple[str, ...], str]:
    """Return the plain template that the tokenizer can write, what ends an answer, and why there is none."""
    for source, written, stop in _PLAIN_FORMS:
        if _can_write(tokenizer, written):
            # A tokenizer that changes texts (lower case, spaces) writes the end of an answer in its own way.
            own = tokenizer.decode(tokenizer.encode(stop))
            return source, (stop, *({own} - {stop, ""})), ""
    problem = (
        "this model has no chat template, and its tokenizer can write neither names of speakers nor a line break to "
        "tell the turns of a conversation apart. Use it to continue texts instead."
    )
    return PLAIN, (), problem


def _can_write(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether the tokenizer has tokens for all of a text."""
    try:
        return bool(tokenizer.encode(text)) and not tokenizer.count_unknown(text)
    except TokenizerError:
        return False


def _has_images(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(part.get("type") == "image" for part in content)


def _in_parts(message: Message) -> dict[str, Any]:
    """Return a message whose text is a part of its content."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def _with_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool with the parameters of a function without any, which some templates need."""
    function = dict(tool.get("function") or {})
    function["parameters"] = {"type": "object", "properties": {}, **(function.get("parameters") or {})}
    return {**tool, "function": function}


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of ids at the beginning that both have in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _compile(source: str) -> jinja2.Template:
    """Compile the template in a sandbox like that of transformers, in which it cannot change or reach anything."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` … `{% endgeneration %}`, which mark what the assistant says: rendered as their content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TokenizerError(f"the tokenizer's chat template is not valid Jinja: {error}.") from None


@dataclass(frozen=True)
class _Marks:
    """Three characters that a text does not have: one inside special tokens that are to be text, one inside other
    control tokens, at which the text is cut, since tokenizers find these tokens in texts, and one for its end."""

    inside: str
    cut: str
    end: str

    @classmethod
    def absent_from(cls, characters: str) -> _Marks:
        free = (chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in characters and _escape(chr(c)) not in characters)
        return cls(next(free), next(free), next(free))

    def pieces(self, text: str) -> list[str]:
        """Return the text without the marks, cut where it has to be. Templates may write marks as JSON escapes."""
        text = text.replace(self.inside, "").replace(_escape(self.inside), "").replace(_escape(self.cut), self.cut)
        return [piece for piece in text.split(self.cut) if piece]


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _escaped(value: Any, special: Mapping[str, int], marks: _Marks, control: Mapping[str, int]) -> Any:
    """Return `value` with marks inside everything in its texts that looks like a special or control token."""
    if isinstance(value, str):
        for token in special:
            if token in value:
                value = value.replace(token, token[:1] + marks.inside + token[1:])
        for token in control:
            if token in value:
                value = value.replace(token, token[:1] + marks.cut + token[1:])
        return value
    if isinstance(value, Mapping):
        return {_escaped(k, special, marks, control): _escaped(v, special, marks, control) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(each, special, marks, control) for each in value]
    return value


def _has_codes(text: str) -> bool:
    return any(_FIRST_CODE <= ord(character) <= _LAST_CODE for character in text)


def _coded(
    tokenizer: Tokenizer, control: Mapping[str, int]
) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
    """Return a copy of the tokenizer in which characters stand for control tokens, the character of each token, and the
    tokenizer's own id for each id of an added token that differs in the copy."""
    from tokenizers import AddedToken

    pipeline = hidden_tokens(json.loads(tokenizer.to_json()), control)
    codes = {token: chr(_FIRST_CODE + number) for number, token in enumerate(control)}
    pipeline.add_special_tokens(
        [
            AddedToken(codes[token], lstrip=own.lstrip, rstrip=own.rstrip, normalized=False)
            for token, own in ((token, tokenizer.added_token(id)) for token, id in control.items())
        ]
    )
    pipeline.encode_special_tokens = False
    ids = {codes.get(token, token): id for token, id in tokenizer.added_tokens().items()}
    return pipeline, codes, own_ids(pipeline, ids)


def _split(text: str, special: Mapping[str, int]) -> list[str]:
    """Cut the text at special tokens, which become parts of their own. Leave out empty parts."""
    if not special:
        return [text] if text else []
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return [part for part in re.split(f"({pattern})", text) if part]
