"""Conversations from rows in the forms that people have them in, and as token ids with a mask of what is trained on.

    conversation = as_conversation(row.values)               # messages, ShareGPT, Alpaca, prompt and completion, ...
    example = Renderer(tokenizer).render(conversation)       # ids, and which of them the assistant wrote

The ids are those that a served model sees for the same conversation, and the mask marks what it then has to generate,
its end-of-turn token included. Nothing is searched in the text: see `ChatTemplate.encode`.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptsmith.data.images import ImageError
from gptsmith.data.pictures import Picture, PictureReader
from gptsmith.data.rows import Row, Split, read_rows
from gptsmith.errors import DataError, TokenizerError, nearest
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate

Message = dict[str, Any]
TrainOn = Literal["all", "last"]

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "function_call": "function_call",
}
"""Names of roles in public data, and what they are for a chat template. A function_call is of the assistant."""

_PAIRS = (("question", "answer"), ("query", "response"), ("instruction", "response"), ("question", "response"))
_PREFERENCES = ("chosen", "rejected")
PICTURES = ("image", "image_url", "input_image")
"""The types of parts of messages that are pictures."""
PLACEHOLDER = "<image>"
_CAPTIONS = ("caption", "text")
_RATINGS = ("label", "kto_tag")


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, or a prompt and its completion as plain text.

    form: how the row wrote it: messages, sharegpt, alpaca, prompt-completion, question-answer. tools: for the template.
    """

    form: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is a prompt and a completion without a chat template."""
        return not self.messages

    @property
    def images(self) -> list[Any]:
        """The parts of messages that are pictures, in order."""
        return pictures_of(self.messages)


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the pictures in messages, in order, as `image_bytes` takes them."""
    lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part["image"] for content in lists for part in content if part["type"] == "image"]


def without_sources(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return messages as chat templates take them, in which a picture is only a place."""
    return [
        dict(message)
        if not isinstance(message.get("content"), list)
        else {**message, "content": [{k: v for k, v in part.items() if k != "image"} for part in message["content"]]}
        for message in messages
    ]


REASONS_SHOWN = 3


class RowError(DataError):
    """A row that cannot be trained on. The message does not say where it is."""


def finite_number(value: Any, name: str) -> float:
    """Return a field as a number, also from a text. Raise RowError, with its name, if it is not a finite one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{name} is not a finite number: {value!r}.")
    return number


# Forms ---------------------------------------------------------------------------------------------------------------


def as_conversation(values: Mapping[str, Any]) -> Conversation:
    """Return the conversation in a row, whose form is recognized by its fields. Raise RowError where there is none."""
    row = with_pictures({name: value for name, value in values.items() if value is not None and value != ""})
    values = {**values, **row}
    if any(name in row for name in _PREFERENCES):
        raise RowError("the row has chosen and rejected answers, which are for preference training, not fine-tuning.")
    if any(isinstance(row.get(name), bool) for name in _RATINGS):
        raise RowError("the row says whether its answer is good (KTO), which is for preference training.")
    if "messages" in row:
        return _of_messages("messages", row["messages"], row)
    if "conversations" in row or "conversation" in row:
        return _of_messages("sharegpt", row.get("conversations", row.get("conversation")), row)
    if "instruction" in row and "output" in values:
        return _of_alpaca(row)
    if "prompt" in row and "completion" in values:
        return _of_completion(row)
    for asked, answered in _PAIRS:
        if asked in row and answered in values:
            return _of_turns("question-answer", [("user", row[asked]), ("assistant", row.get(answered, ""))], row)
    raise RowError(_unknown_form(row))


def _unknown_form(row: Mapping[str, Any]) -> str:
    known = ("messages", "conversations", "instruction", "output", "prompt", "completion", "question", "answer")
    hint = next((found for name in row if (found := nearest(name, known))), "")
    if "text" in row:
        hint = " Plain text is for continued pretraining: gptsmith train DATA --init MODEL."
    return (
        f"the fields {', '.join(row) or '(none)'} are not those of a conversation.{hint} Use messages, conversations "
        "(ShareGPT), instruction and output (Alpaca), prompt and completion, question and answer, or image and caption."
    )


def _of_messages(form: str, value: Any, row: Mapping[str, Any]) -> Conversation:
    turns: list[Message] = []
    if isinstance(row.get("system"), str) and form == "sharegpt":
        turns.append({"role": "system", "content": row["system"]})
    return _checked(Conversation(form, tuple(_joined([*turns, *as_messages(value, form)])), tools_of(row)))


def as_messages(value: Any, what: str) -> tuple[Message, ...]:
    """Return messages as chat templates take them, from a list or its JSON. Raise RowError, which names `what`."""
    if isinstance(value, str):
        value = _from_json(value, what)
    if not isinstance(value, list | tuple) or not value:
        raise RowError("the list of messages is empty." if value in ([], ()) else "the messages are not a list.")
    return tuple(_joined([_message(message, f"message {number}") for number, message in enumerate(value, 1)]))


def _message(value: Any, where: str) -> Message:
    """Return a message with a role of chat templates, the content as one text, and arguments as objects."""
    if not isinstance(value, Mapping):
        raise RowError(f"{where} is not an object.")
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        known = ", ".join(ROLES)
        raise RowError(f"{where} has the unknown role {role!r}.{nearest(str(role), ROLES)} Known roles: {known}.")
    name = ROLES[role.lower()]
    for field in ("weight", "train"):
        if value.get(field) not in (None, 1, 1.0, True):
            raise RowError(f"{where}: {field} is not supported. Use --train-on last to train on the last turn only.")
    calls = value.get("tool_calls")
    if name == "function_call":
        name, calls, content = "assistant", _calls_from_text(content, where), None
    message: Message = {"role": name, "content": _content_of(content, where)}
    if name == "assistant" and not isinstance(message["content"], str):
        raise RowError(f"{where} is the assistant's and has a picture: models here write text alone.")
    if calls:
        message["tool_calls"] = _calls(calls, where)
    for field in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if value.get(field) is not None:
            message[field] = value[field]
    return message


def _content_of(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Return the content of a message: a text, or its parts if there are pictures among them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts: list[dict[str, Any]] = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in ("text", "input_text") and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind in PICTURES:
                parts.append({"type": "image", "image": part})
            else:
                raise RowError(f"{where} has a part of type {kind!r}; only texts and pictures can be trained on.")
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        return parts
    if isinstance(content, Mapping | int | float):  # the result of a tool
        return json.dumps(content, ensure_ascii=False)
    raise RowError(f"{where}: its content is not a text.")


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _from_json(value, f"{where}, tool_calls")
    calls = []
    for call in value if isinstance(value, list | tuple) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: a tool call needs a name and arguments.")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _from_json(arguments or "{}", f"{where}, the arguments of {function['name']}")
        if not isinstance(arguments, Mapping):
            raise RowError(f"{where}: the arguments of {function['name']} are not an object.")
        made: dict[str, Any] = {
            "type": "function",
            "function": {"name": function["name"], "arguments": dict(arguments)},
        }
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        calls.append(made)
    return calls


def _calls_from_text(content: Any, where: str) -> Any:
    """Return the calls of a message with the role function_call, whose text is JSON: {"name": …, "arguments": …}."""
    return _from_json(content, where) if isinstance(content, str) else content


def _joined(turns: Sequence[Message]) -> list[Message]:
    """Join the calls of an assistant's message that is only calls to the message before, if that is the assistant's."""
    joined: list[Message] = []
    for turn in turns:
        last = joined[-1] if joined else None
        if (
            last is not None
            and turn["role"] == last["role"] == "assistant"
            and turn.get("tool_calls")
            and not turn["content"]
        ):
            joined[-1] = {**last, "tool_calls": [*last.get("tool_calls", []), *turn["tool_calls"]]}
        else:
            joined.append(turn)
    return joined


def tools_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row, in the form of chat templates."""
    value = row.get("tools", row.get("functions"))
    if isinstance(value, str):
        value = _from_json(value, "tools") if value.strip() else []
    if value in (None, []):
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("tools is not a list of objects.")
    return tuple(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in value)


def _of_alpaca(row: Mapping[str, Any]) -> Conversation:
    return _of_turns("alpaca", [*alpaca_turns(row), ("assistant", row.get("output", ""))], row)


def alpaca_turns(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return roles and texts of everything that an answer in Alpaca's form replies to."""
    asked = str(row["instruction"]) + (f"\n{row['input']}" if row.get("input") else "")
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RowError("history is not a list of pairs of texts.")
    turns: list[tuple[str, Any]] = []
    for question, answer in history:
        turns += [("user", question), ("assistant", answer)]
    return [*turns, ("user", asked)]


def _of_turns(form: str, turns: Sequence[tuple[str, Any]], row: Mapping[str, Any]) -> Conversation:
    if isinstance(row.get("system"), str):
        turns = [("system", row["system"]), *turns]
    messages = tuple(
        _message({"role": role, "content": text}, f"message {i}") for i, (role, text) in enumerate(turns, 1)
    )
    return _checked(Conversation(form, messages, tools_of(row)))


def _of_completion(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = row["prompt"], row.get("completion", "")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise RowError("the completion is empty: there is nothing to learn from.")
        return Conversation("prompt-completion", prompt=prompt, completion=completion)
    parts: list[Any] = []
    for part, role in ((prompt, "user"), (completion, "assistant")):
        parts += (
            [{"role": role, "content": part}] if isinstance(part, str) else part if isinstance(part, list) else [part]
        )
    return _of_messages("prompt-completion", parts, row)


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what}: not valid JSON ({error}).") from None


def _checked(conversation: Conversation) -> Conversation:
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    if not answers:
        raise RowError("the conversation has no turn of the assistant: there is nothing to learn from.")
    if any(not message["content"].strip() and not message.get("tool_calls") for message in answers):
        raise RowError("an answer of the assistant is empty.")
    return conversation


# Pictures ------------------------------------------------------------------------------------------------------------


def with_pictures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in which the pictures of its field `images` (or `image`) are parts of its messages.

    They take the places of parts {"type": "image"} without a picture, or of `<image>` in the messages' texts, in order.
    Without any such place they come before the first text of the user. A picture with a caption (or text) alone
    becomes a question without words and its answer. Raise RowError where the numbers do not fit.
    """
    name = next((name for name in ("images", "image") if row.get(name) not in (None, [], "")), None)
    if name is None:
        return dict(row)
    images = list(row[name]) if isinstance(row[name], list | tuple) else [row[name]]
    rest = {key: value for key, value in row.items() if key not in ("images", "image")}
    parts = [{"type": "image", "image": each} for each in images]
    lists = (
        "messages",
        "conversations",
        "conversation",
        *(["prompt"] if not isinstance(rest.get("prompt"), str) else []),
    )
    field = next((key for key in lists if key in rest), None)
    if field is not None:
        messages = rest[field]
        if isinstance(messages, str):
            messages = _from_json(messages, field)
        if not isinstance(messages, list | tuple) or not all(isinstance(each, Mapping) for each in messages):
            return rest  # which is refused below, for that reason
        return {**rest, field: _filled(messages, parts)}
    if "instruction" in rest:
        asked = str(rest.pop("instruction")) + (f"\n{rest['input']}" if rest.get("input") else "")
        if rest.pop("history", None):
            raise RowError("pictures and a history do not go together. Use messages.")
        rest.pop("input", None)
        rest |= {"question": asked, "answer": rest.pop("output", "")}
    asked_in = next((key for key in ("prompt", *(pair[0] for pair in _PAIRS)) if key in rest), None)
    caption = next((key for key in _CAPTIONS if isinstance(rest.get(key), str)), None)
    if asked_in is None and caption is not None:
        return {"messages": [_user(parts), {"role": "assistant", "content": rest[caption]}]}
    if asked_in is None or not isinstance(rest[asked_in], str):
        raise RowError(f"the row has {name}, and neither messages, a question, a prompt nor a caption.")
    question = _filled([{"role": "user", "content": rest[asked_in]}], parts)
    if asked_in == "prompt":
        if isinstance(rest.get("completion"), str):
            rest["completion"] = [{"role": "assistant", "content": rest["completion"]}]
        return {**rest, "prompt": question}
    return {**rest, asked_in: question[0]["content"]}


def _user(parts: list[dict[str, Any]]) -> Message:
    return {"role": "user", "content": parts}


def _filled(messages: Sequence[Mapping[str, Any]], parts: Sequence[dict[str, Any]]) -> list[Message]:
    """Return messages in which pictures have taken the places that are meant for them."""
    left, places, elsewhere = list(parts), 0, 0
    filled: list[Message] = []
    for message in messages:
        key = "content" if "content" in message else "value"
        content = message.get(key)
        role = ROLES.get(str(message.get("role", message.get("from"))).lower())
        if role == "assistant":
            filled.append(dict(message))
            continue
        pieces: list[dict[str, Any]] = []
        if isinstance(content, str):
            texts = content.split(PLACEHOLDER)
            for number, text in enumerate(texts):
                pieces += [{"type": "image"}] if number else []
                pieces += [{"type": "text", "text": text}] if text else []
        elif isinstance(content, list | tuple):
            pieces = [dict(part) for part in content if isinstance(part, Mapping)]
        for i, piece in enumerate(pieces):
            if piece.get("type") not in PICTURES:
                continue
            if any(piece.get(key) is not None for key in ("image", "image_url", "url", "path")):
                elsewhere += 1
                continue
            places += 1
            if left:
                pieces[i] = left.pop(0)
        filled.append({**message, key: pieces} if pieces else dict(message))
    if places == 0 and elsewhere == 0:
        first = next((i for i, m in enumerate(filled) if ROLES.get(str(m.get("role", m.get("from")))) == "user"), None)
        if first is None:
            raise RowError("the row has pictures, and no message of the user that they could be in.")
        key = "content" if "content" in filled[first] else "value"
        own = filled[first].get(key)
        filled[first] = {**filled[first], key: [*parts, *(own if isinstance(own, list) else [])]}
    elif places != len(parts):
        raise RowError(f"the row has {places} places for pictures ({PLACEHOLDER}) and {len(parts)} pictures.")
    return filled


# Token ids -----------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """Token ids, which of them are trained on, and the pictures that image tokens stand for, in order."""

    ids: list[int]
    trained: list[bool]
    images: tuple[Picture, ...] = ()


class Renderer:
    """Turns conversations into token ids as a served model sees them.

    train_on: every turn of the assistant, or the last one. picture_reader: None if the model reads no
    pictures. Raises TokenizerError for a chat template that is not valid.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, train_on: TrainOn = "all", picture_reader: PictureReader | None = None
    ) -> None:
        self.tokenizer, self.train_on, self.picture_reader = tokenizer, train_on, picture_reader
        self.template = ChatTemplate(tokenizer)

    def render(self, conversation: Conversation, base: Path | None = None) -> Example:
        """Return the ids of a conversation, the mask and the pictures. Raise RowError where it has no trained token.

        base: the folder that paths of pictures are relative to.
        """
        images: tuple[Picture, ...] = ()
        if conversation.images:
            self._check_picture_reader()
        try:
            ids, mask = self._text(conversation) if conversation.is_text else self._chat(conversation)
        except TokenizerError as error:
            raise RowError(str(error)) from None
        if sources := conversation.images:
            picture_reader = self._reader_for(ids, len(sources))
            ids, mask = picture_reader.expand(ids), picture_reader.expand_along(ids, mask)
            try:
                images = tuple(picture_reader.read(source, base) for source in sources)
            except ImageError as error:
                raise RowError(str(error)) from None
        if not any(mask):
            raise RowError("no token of it would be trained on.")
        return Example(ids, mask, images)

    def _reader_for(self, ids: Sequence[int], count: int) -> PictureReader:
        """Return the reader of the model. Raise RowError unless the template has written `count` image tokens."""
        picture_reader = self._check_picture_reader()
        written = list(ids).count(picture_reader.token_id)
        if written != count:
            raise RowError(f"the model's chat template writes {written} image tokens for {count} pictures.")
        return picture_reader

    def _check_picture_reader(self) -> PictureReader:
        if self.picture_reader is None:
            raise RowError("it has a picture, and this model reads none: add a vision tower with gptsmith vision init.")
        return self.picture_reader

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids of everything before the last answer: what a served model answers."""
        if conversation.is_text:
            return self.tokenizer.encode_prompt(conversation.prompt)
        messages = list(conversation.messages)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return self.asked(messages[:last], conversation.tools)

    def asked(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Return the ids of messages that are to be answered, and the beginning of the answer."""
        count = len(pictures_of(messages))
        if count:
            self._check_picture_reader()
        ids: list[int] = self.template.encode(without_sources(messages), **_variables(tools))
        if count:
            ids = self._reader_for(ids, count).expand(ids)
        return ids

    def _chat(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        return self.template.encode(
            without_sources(conversation.messages),
            return_mask=True,
            train_on=self.train_on,
            **_variables(conversation.tools),
        )

    def _text(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Encode prompt and completion apart, as a prompt and its continuation are, so that no token spans both."""
        prompt = self.tokenizer.encode_prompt(conversation.prompt)
        completion = self.tokenizer.encode(conversation.completion)
        if self.tokenizer.eos_id is not None:
            completion = [*completion, self.tokenizer.eos_id]
        return [*prompt, *completion], [False] * len(prompt) + [True] * len(completion)


def _variables(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the variables of the template. Tools are written as the server writes them."""
    return {"generic_tools": True, **({"tools": [dict(tool) for tool in tools]} if tools else {})}


class Counts:
    """What was read: rows by form, and rows that were left out by reason."""

    def __init__(self) -> None:
        self.forms: collections.Counter[str] = collections.Counter()
        self.skipped: collections.Counter[str] = collections.Counter()
        self.first_skipped: dict[str, str] = {}

    def skip(self, reason: str, where: str) -> None:
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, where)

    def describe_skipped(self) -> str:
        """Return the most frequent reasons, each with its number and its first row."""
        shown = [
            f"{number:,}: {reason.rstrip('.')} (first: {self.first_skipped[reason]})"
            for reason, number in self.skipped.most_common(REASONS_SHOWN)
        ]
        more = len(self.skipped) - len(shown)
        return "; ".join([*shown, *([f"{more:,} more reasons"] if more else [])])


def read_conversations(
    path: Path,
    *,
    on_bad: Literal["error", "skip"] = "error",
    counts: Counts | None = None,
    advance: Callable[[int], None] | None = None,
    split: Split = "train",
) -> Iterator[tuple[Row, Conversation]]:
    """Yield the conversations of a file, or of a split of a folder of rows.

    on_bad: stop at the first bad row with a DataError that names it, or leave it out and count it in `counts`.
    """
    counts = Counts() if counts is None else counts
    for row in read_rows(path, advance, split=split):
        try:
            conversation = as_conversation(row.values)
        except RowError as error:
            bad_row(error, row.where, on_bad, counts)
            continue
        counts.forms[conversation.form] += 1
        yield row, conversation


def bad_row(error: RowError, where: str, on_bad: str, counts: Counts) -> None:
    """Count a row that cannot be used, or raise DataError with where it is."""
    if on_bad == "skip":
        counts.skip(str(error), where)
        return
    raise DataError(f"{where}: {error} Fix the row, or leave such rows out with --bad-rows skip.") from None
