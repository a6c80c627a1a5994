"""Conversations as token ids: the tokenizer's chat template (Jinja, as in transformers), rendered in a sandbox.

    template = ChatTemplate(tokenizer)
    ids = template.encode([{"role": "user", "content": "Hello"}])   # a prompt: ends where the assistant is to answer
    ids, mask = template.encode(conversation, return_mask=True)     # for training: mask marks the assistant's tokens

A template may write special tokens. The text of a message never becomes one: a user who types "<|im_end|>" gets the
tokens of those ten characters. Where the tokenizer puts a beginning-of-sequence token before a text, a conversation
whose template does not write it gets it, too, as in llama.cpp. A tokenizer without a template gets a plain one that
names the speaker of each turn.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from gptsmith.errors import TokenizerError, UsageError
from gptsmith.tokenizer.tokenizer import END_TOKENS, Tokenizer, token_content

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


class ChatTemplate:
    """The chat template of a tokenizer.

    name: whose template it is, for error messages. plain: whether the tokenizer has no template, so that the one of
    this package is used. stop: texts that end an answer (only the plain template has any).
    Raises TokenizerError if the template is not valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, *, name: str | None = None) -> None:
        config = tokenizer.config()
        source = config.get("chat_template")
        if isinstance(source, list):  # several templates, each with a name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        self.tokenizer = tokenizer
        self.name = name
        self.plain = not isinstance(source, str) or not source.strip()
        self.source: str = PLAIN if self.plain else str(source)
        self.stop = ("\nUser:",) if self.plain else ()
        self._named_tokens = {
            role: token_content(config.get(role)) for role in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self._special = {text: id for id, text in tokenizer.special_tokens().items()}
        self._special_ids = frozenset(self._special.values())
        self._end_of_turn_ids = {self._special[token] for token in END_TOKENS if token in self._special}
        self._end_of_turn_ids.update(tokenizer.end_ids)
        self._template = _compile(self.source)
        self._pipeline: tokenizers.Tokenizer | None = None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the conversation as text. variables: further variables of the template (`tools`, `documents`, ...).

        Raises TokenizerError if the template refuses the conversation, for example because roles do not alternate.
        """
        import jinja2

        try:
            return self._template.render(
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
            characters = json.dumps([messages, variables], ensure_ascii=False, default=str)
            unused = (chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in characters)
            marker, end_mark = next(unused), next(unused)
            escaped = [_escaped(message, self._special, marker) for message in messages]
            variables = {name: _escaped(value, self._special, marker) for name, value in variables.items()}
        except RecursionError:
            raise TokenizerError("the conversation is nested too deeply.") from None
        if continue_final_message:
            text = self._render_open(escaped, end_mark, **variables)
        else:
            text = self.render(escaped, add_generation_prompt=add_generation_prompt, **variables)
        # Tokenizers of kind "other" may treat the beginning of a text differently, so they get it whole.
        whole = marker not in text and self.tokenizer.kind == "other"

        def encode_text(text: str) -> list[int]:
            ids = self._encode_whole(text) if whole else self._encode_parts(text, marker)
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

    def _render_open(self, messages: Sequence[Message], end_mark: str, **variables: Any) -> str:
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
        """Return the id of the special token that the template writes after an answer, or () if there is none."""
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

    def _encode_parts(self, text: str, marker: str) -> list[int]:
        """Encode the text between special tokens part by part, without the marker."""
        ids: list[int] = []
        for part in _split(text, self._special):
            ids += [self._special[part]] if part in self._special else self.tokenizer.encode(part.replace(marker, ""))
        return ids

    def _encode_whole(self, text: str) -> list[int]:
        if self._pipeline is None:
            from tokenizers import Tokenizer as Pipeline

            self._pipeline = Pipeline.from_str(self.tokenizer.to_json())
            self._pipeline.no_padding()
            self._pipeline.no_truncation()
        ids: list[int] = self._pipeline.encode(text, add_special_tokens=False).ids
        return ids


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

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

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


def _escaped(value: Any, special: Mapping[str, int], marker: str) -> Any:
    """Return `value` with the marker inside everything in its texts that looks like a special token."""
    if isinstance(value, str):
        for token in special:
            if token in value:
                value = value.replace(token, token[:1] + marker + token[1:])
        return value
    if isinstance(value, Mapping):
        return {key: _escaped(each, special, marker) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(each, special, marker) for each in value]
    return value


def _split(text: str, special: Mapping[str, int]) -> list[str]:
    """Cut the text at special tokens, which become parts of their own. Leave out empty parts."""
    if not special:
        return [text] if text else []
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return [part for part in re.split(f"({pattern})", text) if part]
