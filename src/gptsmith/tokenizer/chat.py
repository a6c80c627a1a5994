"""Conversations as tokens: the tokenizer's chat template (Jinja, as Hugging Face has them), in a sandbox.

    template = ChatTemplate(tokenizer)
    ids = template.encode([{"role": "user", "content": "Hello"}])        # ends where the assistant is to speak

What a template writes may be special tokens; what a message says is always text: a user who types "<|im_end|>" has
typed ten characters. A tokenizer without a template gets a plain one (`plain`), with names before what is said.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2
    import tokenizers

Message = Mapping[str, Any]

PLAIN = """\
{% for message in messages %}\
{% if message['role'] == 'system' %}{{ message['content'] }}

{% else %}{{ 'User' if message['role'] == 'user' else 'Assistant' }}: {{ message['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""


class ChatTemplate:
    """How a tokenizer writes conversations. Raises TokenizerError for a template that is no Jinja.

    plain: the tokenizer has none, and this is this package's. stop: texts that end an answer (of the plain one).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        config = tokenizer.config()
        source = config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        self.tokenizer = tokenizer
        self.plain = not isinstance(source, str) or not source.strip()
        self.source: str = PLAIN if self.plain else str(source)
        self.stop = ("\nUser:",) if self.plain else ()
        self._tokens = {
            role: _content(config.get(role)) for role in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self._template = _compile(self.source)
        self._pipeline: tokenizers.Tokenizer | None = None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text. variables: more for the template (`tools`, `documents`, ...).

        Raises TokenizerError where the template refuses: roles that do not alternate, for example.
        """
        import jinja2

        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None, **self._tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise TokenizerError(f"the chat template cannot write this conversation: {error}.") from None

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """The conversation as ids. Raises TokenizerError as `render` and `Tokenizer.encode` do."""
        special = {text: id for id, text in self.tokenizer.special_tokens().items()}
        mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in json.dumps(messages, ensure_ascii=False))
        defused = [_defused(message, special, mark) for message in messages]
        text = self.render(defused, add_generation_prompt=add_generation_prompt, **variables)
        if mark not in text and self.tokenizer.kind == "other":
            return self._whole(text)  # such tokenizers may treat the beginning of a text in their own way
        ids: list[int] = []
        for part in _split(text, special):
            ids += [special[part]] if part in special else self.tokenizer.encode(part.replace(mark, ""))
        return ids

    def end_ids(self) -> tuple[int, ...]:
        """The special token that the template puts after an answer, if it does; it is where answers end."""
        answer = "an answer"
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        try:
            text = self.render(messages, add_generation_prompt=False)
        except TokenizerError:
            return ()
        after = text.rpartition(answer)[2].lstrip()
        special = {text: id for id, text in self.tokenizer.special_tokens().items()}
        return tuple(special[token] for token in sorted(special, key=len, reverse=True) if after.startswith(token))[:1]

    def _whole(self, text: str) -> list[int]:
        if self._pipeline is None:
            from tokenizers import Tokenizer as Pipeline

            self._pipeline = Pipeline.from_str(self.tokenizer.to_json())
            self._pipeline.no_padding()
            self._pipeline.no_truncation()
        ids: list[int] = self._pipeline.encode(text, add_special_tokens=False).ids
        return ids


def _content(token: object) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _compile(source: str) -> jinja2.Template:
    """The template in an environment like transformers', in which it can neither change nor reach anything."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: what the assistant says, marked for training; here it is what it holds."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TokenizerError(f"the tokenizer's chat template is damaged: {error}.") from None


def _defused(value: Any, special: Mapping[str, int], mark: str) -> Any:
    """`value` with a mark inside all that looks like a special token in its texts."""
    if isinstance(value, str):
        for token in special:
            if token in value:
                value = value.replace(token, token[:1] + mark + token[1:])
        return value
    if isinstance(value, Mapping):
        return {key: _defused(each, special, mark) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_defused(each, special, mark) for each in value]
    return value


def _split(text: str, special: Mapping[str, int]) -> list[str]:
    """The text cut at special tokens, which are parts of their own; empty parts are left out."""
    import re

    if not special:
        return [text] if text else []
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return [part for part in re.split(f"({pattern})", text) if part]
