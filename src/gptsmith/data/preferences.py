"""Preferences from rows in the forms that people have them in: pairs of answers, rated answers and rankings.

    for row, preference in read_preferences(Path("preferences.jsonl")):
        example = PreferenceRenderer(tokenizer).render(preference.chosen, preference.start)

| fields of a row | what it is |
|---|---|
| prompt, chosen, rejected | a pair: texts, messages, or both |
| chosen, rejected | a pair of whole conversations with the same beginning, as messages or as in Anthropic's hh-rlhf |
| conversations, messages, question or instruction; chosen, rejected | a pair: LLaMA-Factory's ranking, Orca, Alpaca |
| conversations, messages, question or instruction; chosen, rejected | a pair (LLaMA-Factory, Orca, Alpaca) |
| prompt, completions (or responses), ranks or scores | a ranking: all its pairs |
| any conversation, label or kto_tag | a rated answer (KTO) |

An optional margin, or score_chosen and score_rejected, says by how much an answer is better.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gptsmith.data.conversations import (
    Conversation,
    Counts,
    Example,
    Message,
    Renderer,
    RowError,
    as_conversation,
    as_messages,
    bad_row,
    finite_number,
    with_pictures,
)
from gptsmith.data.pictures import PictureReader
from gptsmith.data.prompts import PromptForm, as_text, prompt_of
from gptsmith.data.rows import Row, Split, read_rows
from gptsmith.errors import nearest
from gptsmith.tokenizer import Tokenizer

RATINGS = ("kto_tag", "label")
RANKED = ("completions", "responses", "answers")
_RANKS = ("ranks", "ranking", "rankings", "rank")
_SCORES = ("scores", "ratings", "rewards")
_SCORE_PAIRS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
_TEXTS = ("text", "response", "completion", "answer", "output")
_OF_ONE = (("score", "overall_score", "rating"), ("rank",))
UNDECIDED = {"tie": "a tie", "both_bad": "both answers are bad"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")

Answer: TypeAlias = str | tuple[Message, ...]


class UndecidedError(RowError):
    """A row without a preference, such as a tie. It is counted and left out, and is no mistake."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    form: how the row wrote them. start: the number of messages of the prompt; 0 for plain text. margin: by how much the
    chosen one is better, if the row says so.
    """

    form: str
    chosen: Conversation
    rejected: Conversation
    start: int = 0
    margin: float | None = None


@dataclass(frozen=True)
class Rated:
    """An answer that is good or bad. start: as for `Preference`."""

    form: str
    conversation: Conversation
    desirable: bool
    start: int = 0


# Forms ---------------------------------------------------------------------------------------------------------------


def as_preferences(values: Mapping[str, Any], *, score_margins: bool = False) -> list[Preference] | list[Rated]:
    """Return the preferences in a row: one pair, one rated answer, or all pairs of a ranking.

    score_margins: take the difference of two answers' scores as the margin of a pair, where the row has no margin.
    Raise RowError where there is none, UndecidedError for a tie.
    """
    row = _with_usual_names({name: value for name, value in values.items() if value is not None})
    row = with_pictures(row)
    choice = row.get("choice")
    if isinstance(choice, str) and choice in UNDECIDED:
        raise UndecidedError(UNDECIDED[choice])
    if "chosen" in row or "rejected" in row:
        return [_pair(row, score_margins)]
    for name in RANKED:
        if isinstance(row.get(name), list | tuple):
            return _ranking(row, name, score_margins)
    if is_rated(row):
        return [_rated(row)]
    raise RowError(_unknown_form(row))


def _with_usual_names(row: dict[str, Any]) -> dict[str, Any]:
    """Rename the fields of OpenAI's form: input, preferred_output, non_preferred_output."""
    asked = row.get("input")
    if "preferred_output" not in row or not isinstance(asked, Mapping):
        return row
    names = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
    return {**asked, **{names.get(name, name): value for name, value in row.items() if name != "input"}}


def is_preference(values: Mapping[str, Any]) -> bool:
    """Return whether the fields of a row are those of a preference, right or not."""
    row = _with_usual_names({name: value for name, value in values.items() if value is not None})
    ranked = any(isinstance(row.get(name), list | tuple) for name in RANKED) and (
        any(name in row for name in (*_RANKS, *_SCORES))
        or any(isinstance(each, Mapping) and set(each) & set(_OF_ONE[0] + _OF_ONE[1]) for each in _first_list(row))
    )
    return "chosen" in row or "rejected" in row or ranked or is_rated(row)


def _first_list(row: Mapping[str, Any]) -> Sequence[Any]:
    return next((row[name] for name in RANKED if isinstance(row.get(name), list | tuple)), ())


def is_rated(row: Mapping[str, Any]) -> bool:
    return "kto_tag" in row or ("label" in row and "text" not in row)


def _unknown_form(row: Mapping[str, Any]) -> str:
    known = ("chosen", "rejected", "label", "kto_tag", "ranks", "scores", *RANKED)
    hint = next((found for name in row if (found := nearest(name, known))), "")
    return (
        f"the fields {', '.join(row) or '(none)'} are not those of a preference.{hint} Use prompt, chosen and "
        "rejected; prompt, completion and label (KTO); or prompt, completions and ranks or scores."
    )


def _pair(row: Mapping[str, Any], score_margins: bool) -> Preference:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise RowError(f"the row has no {name} answer.{_hint(name, row)}")
    form, prompt, tools, _ = prompt_of(row)
    if "choice" in row and row["choice"] in ("left", "right"):
        form = "comparison"
    chosen, rejected = (_answer(row[name], name) for name in ("chosen", "rejected"))
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        if not (_HH_TURN.match(chosen) and _HH_TURN.match(rejected)):
            raise RowError(
                "the row has no prompt. Add the field prompt, or write chosen and rejected as lists of messages."
            )
        form, chosen, rejected = "hh", _of_hh(chosen, "chosen"), _of_hh(rejected, "rejected")
    preference = _made(form or "conversations", prompt, chosen, rejected, ("chosen", "rejected"), tools)
    return replace(preference, margin=_margin(row, score_margins))


def _hint(name: str, row: Mapping[str, Any]) -> str:
    return next((f" Did you mean {name!r} by {other!r}?" for other in row if nearest(other, [name])), "")


def _answer(value: Any, name: str) -> Answer:
    """Return an answer: a text, or messages, the prompt perhaps included. Raise RowError for one that is empty."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"the {name} answer is empty.")
        return value
    if value in ([], ()):
        raise RowError(f"the {name} answer is empty.")
    messages = as_messages([value] if isinstance(value, Mapping) else value, name)
    last = messages[-1]
    if last["role"] == "assistant" and not last["content"].strip() and not last.get("tool_calls"):
        raise RowError(f"the {name} answer is empty.")
    return messages


def _of_hh(text: str, name: str) -> tuple[Message, ...]:
    """Return the messages of a conversation as Anthropic's hh-rlhf writes it: \\n\\nHuman: …\\n\\nAssistant: …"""
    pieces = _HH_TURN.split(text)
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": content.strip()}
        for who, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if not turns[-1]["content"]:
        raise RowError(f"the {name} answer is empty.")
    return tuple(turns)


def _made(
    form: str,
    prompt: str | tuple[Message, ...] | None,
    chosen: Answer,
    rejected: Answer,
    names: tuple[str, str],
    tools: tuple[dict[str, Any], ...],
) -> Preference:
    """Return the pair of two answers. names: what they are called in messages. Raise RowError."""
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        _check_different(chosen.strip(), rejected.strip(), names)
        one, other = (Conversation(form, prompt=prompt, completion=text) for text in (chosen, rejected))
        return Preference(form, one, other)
    asked = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if isinstance(prompt, str) and not prompt.strip():
        asked = None
    one_turns, other_turns = (
        _whole(asked, answer, name) for answer, name in zip((chosen, rejected), names, strict=True)
    )
    _check_different(one_turns, other_turns, names)
    start = _start(one_turns, other_turns, asked, names)
    return Preference(form, Conversation(form, one_turns, tools), Conversation(form, other_turns, tools), start)


def _check_different(chosen: object, rejected: object, names: tuple[str, str]) -> None:
    if chosen == rejected:
        raise RowError(f"the {names[0]} answer equals the {names[1]} one: there is nothing to prefer.")


def _whole(prompt: tuple[Message, ...] | None, answer: Answer, name: str) -> tuple[Message, ...]:
    """Return prompt and answer as one conversation. An answer in messages may be the whole conversation already."""
    turns: tuple[Message, ...] = ({"role": "assistant", "content": answer},) if isinstance(answer, str) else answer
    if turns[-1]["role"] != "assistant":
        raise RowError(f"the {name} answer does not end with a message of the assistant.")
    if prompt is None:
        if turns[0]["role"] == "assistant":
            raise RowError("the row has no prompt. Add the field prompt, or begin chosen and rejected with it.")
        return turns
    if turns[: len(prompt)] == prompt and len(turns) > len(prompt):
        return turns
    if turns[0]["role"] == "assistant":
        return (*prompt, *turns)
    asked = [message for message in turns if message["role"] != "system"][: len(prompt)]
    if asked != [message for message in prompt if message["role"] != "system"]:
        raise RowError(f"the {name} conversation does not begin with the prompt of the row.")
    return turns


def _start(
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    prompt: tuple[Message, ...] | None,
    names: tuple[str, str],
) -> int:
    """Return the number of messages of the prompt. Raise RowError if the prompts differ."""
    pairs = zip(chosen, rejected, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    start = common
    if prompt is not None and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        start = len(prompt)
    for name, turns in zip(names, (chosen, rejected), strict=True):
        if common == len(turns) or turns[common]["role"] != "assistant":
            raise RowError(f"the prompts of {names[0]} and {names[1]} differ in message {common + 1}.")
        if any(message["role"] not in ("assistant", "tool") for message in turns[start:]):
            raise RowError(
                f"the prompts of {names[0]} and {names[1]} differ: after message {common + 1}, where the answers "
                f"begin, the {name} one continues with other messages. A pair is two answers to one prompt."
            )
    if start == 0:
        raise RowError("the conversations begin with the assistant, so there is no prompt.")
    if chosen[start - 1]["role"] == "assistant":
        raise RowError("the prompt ends with a message of the assistant, so there is nothing to answer.")
    return start


def _margin(row: Mapping[str, Any], score_margins: bool) -> float | None:
    if "margin" in row:
        return finite_number(row["margin"], "margin")
    for names in _SCORE_PAIRS if score_margins else ():
        if all(name in row for name in names):
            chosen, rejected = (finite_number(row[name], name) for name in names)
            if chosen < rejected:
                raise RowError(f"{names[0]} is below {names[1]}, but the answer was chosen.")
            return chosen - rejected
    return None


# Ratings -------------------------------------------------------------------------------------------------------------


def _rated(row: Mapping[str, Any]) -> Rated:
    name = next(name for name in RATINGS if name in row)
    desirable = _truth(row[name], name)
    conversation = as_conversation({key: value for key, value in row.items() if key not in RATINGS})
    form = f"{conversation.form} rated"
    if conversation.is_text:
        return Rated(form, conversation, desirable)
    roles = [message["role"] for message in conversation.messages]
    if roles[-1] != "assistant":
        raise RowError("the conversation does not end with an answer of the assistant, which could be rated.")
    return Rated(form, conversation, desirable, len(roles) - 1)


def _truth(value: Any, name: str) -> bool:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    found = known.get(str(value).strip().lower())
    if found is None:
        raise RowError(f"{name} is {value!r}; it says whether the answer is good: true or false.")
    return found


# Rankings ------------------------------------------------------------------------------------------------------------


def _ranking(row: Mapping[str, Any], field: str, score_margins: bool) -> list[Preference]:
    """Return all pairs of answers, of which one is ranked higher."""
    form, prompt, tools, _ = prompt_of(row)
    if prompt is None:
        raise RowError(f"the row has {field}, but no prompt.")
    answers = [_ranked_answer(value, f"{field}[{i}]") for i, value in enumerate(row[field])]
    ranks = _numbers(row, _RANKS, field, _OF_ONE[1])
    scores = _numbers(row, _SCORES, field, _OF_ONE[0])
    if len(answers) < 2:
        raise RowError(f"{field} has {len(answers)} answers; a ranking needs at least 2.")
    if ranks is None and scores is None:
        raise RowError(f"{field} are not ranked. Add ranks (1 is the best) or scores (higher is better).")
    order = [-rank for rank in ranks] if ranks is not None else scores
    assert order is not None
    pairs = []
    for i, j in itertools.permutations(range(len(answers)), 2):
        if order[i] <= order[j]:
            continue
        names = (f"{field}[{i}]", f"{field}[{j}]")
        pair = _made(form or "prompt", prompt, answers[i], answers[j], names, tools)
        margin = None
        if score_margins and scores is not None:
            margin = scores[i] - scores[j]
            if margin < 0:
                raise RowError(f"the ranks and scores of {names[0]} and {names[1]} contradict each other.")
        pairs.append(replace(pair, form=f"ranking of {field}", margin=margin))
    if not pairs:
        raise UndecidedError(UNDECIDED["tie"])
    return pairs


def _ranked_answer(value: Any, name: str) -> Answer:
    if isinstance(value, Mapping) and "role" not in value and "from" not in value:
        text = next((value[key] for key in _TEXTS if isinstance(value.get(key), str)), None)
        if text is None:
            raise RowError(f"{name} has no text. Write it as text, response or completion.")
        value = text
    return _answer(value, name)


def _numbers(row: Mapping[str, Any], names: Sequence[str], field: str, of_one: Sequence[str]) -> list[float] | None:
    """Return the numbers of the answers: a list of the row, or a field of each answer."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list | tuple):
            if len(value) != len(row[field]):
                raise RowError(f"{name} has {len(value)} entries, but {field} has {len(row[field])}.")
            return [finite_number(each, f"{name}[{i}]") for i, each in enumerate(value)]
    answers = [value if isinstance(value, Mapping) else {} for value in row[field]]
    for name in of_one:
        if any(name in answer for answer in answers):
            return [finite_number(answer.get(name), f"{field}[{i}], {name}") for i, answer in enumerate(answers)]
    return None


# Token ids -----------------------------------------------------------------------------------------------------------


class PreferenceRenderer:
    """Turns prompts with an answer into token ids as a served model sees them; the mask marks the answer alone.

    form: "chat" makes a plain text prompt a message of the user, "text" makes a prompt of one message plain text.
    Raises TokenizerError for a chat template that is not valid.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, form: PromptForm = "auto", picture_reader: PictureReader | None = None
    ) -> None:
        self.last = Renderer(tokenizer, train_on="last", picture_reader=picture_reader)
        self.all = Renderer(tokenizer, train_on="all", picture_reader=picture_reader)
        self.form = form

    def render(self, conversation: Conversation, start: int, base: Path | None = None) -> Example:
        """Return the ids and the mask, which marks the turns of the assistant from message `start` on, with the tokens
        that end them. base: the folder that paths of pictures are relative to. Raise RowError where that is not
        possible.
        """
        conversation, start = _in_form(conversation, start, self.form)
        answers = [message for message in conversation.messages[start:] if message["role"] == "assistant"]
        if len(answers) < 2:
            return self.last.render(conversation, base)
        example = self.all.render(conversation, base)
        length = len(self.all.prompt(replace(conversation, messages=conversation.messages[: start + 1])))
        return Example(example.ids, [False] * length + example.trained[length:], example.images)

    def pair(self, preference: Preference, base: Path | None = None) -> tuple[Example, Example]:
        """Return the chosen and the rejected example. Raise RowError if they have the same tokens."""
        chosen = self.render(preference.chosen, preference.start, base)
        rejected = self.render(preference.rejected, preference.start, base)
        if chosen.ids == rejected.ids:
            raise RowError("the chosen answer has the same tokens as the rejected one: there is nothing to prefer.")
        return chosen, rejected


def _in_form(conversation: Conversation, start: int, form: PromptForm) -> tuple[Conversation, int]:
    """Return a conversation and the number of messages of its prompt as chat or as plain text. Raise RowError."""
    messages = conversation.messages
    if form == "chat" and conversation.is_text:
        asked = {"role": "user", "content": conversation.prompt}
        answer = {"role": "assistant", "content": conversation.completion}
        return Conversation(conversation.form, (asked, answer)), 1
    if form == "text" and messages:
        prompt = as_text(messages[:start], conversation.tools)
        if len(messages) != start + 1 or messages[start].get("tool_calls"):
            raise RowError("an answer of several messages, or with calls, cannot be plain text.")
        return Conversation(conversation.form, prompt=prompt, completion=messages[start]["content"]), 0
    return conversation, start


def read_preferences(
    path: Path,
    *,
    on_bad: Literal["error", "skip"] = "error",
    counts: Counts | None = None,
    advance: Callable[[int], None] | None = None,
    split: Split = "train",
    score_margins: bool = False,
) -> Iterator[tuple[Row, Preference | Rated]]:
    """Yield the preferences of a file, or of a split of a folder of rows; all are pairs, or all are rated answers.

    on_bad: stop at the first bad row with a DataError that names it, or leave it out and count it in `counts`.
    Ties are left out and counted in any case. score_margins: as for `as_preferences`.
    """
    counts = Counts() if counts is None else counts
    first: tuple[type, str] | None = None
    for row in read_rows(path, advance, split=split):
        try:
            found = as_preferences(row.values, score_margins=score_margins)
            kind = type(found[0])
            if first is None:
                first = kind, row.where
            elif kind is not first[0]:
                names = {Preference: "pairs of answers", Rated: "rated answers"}
                raise RowError(f"{names[kind]} are mixed with {names[first[0]]} (first: {first[1]}).")
        except UndecidedError as error:
            counts.skip(str(error), row.where)
            continue
        except RowError as error:
            bad_row(error, row.where, on_bad, counts)
            continue
        for preference in found:
            counts.forms[preference.form] += 1
            yield row, preference
