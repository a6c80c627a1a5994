"""One conversation, preference or prompt as a model sees it, with the tokens marked that are trained on.

print(show("chats.jsonl", tokenizer).text)
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gptsmith.data.conversations import (
    Counts,
    Example,
    Renderer,
    RowError,
    TrainOn,
    as_conversation,
    bad_row,
    read_conversations,
)
from gptsmith.data.pictures import PictureReader
from gptsmith.data.preferences import Preference, PreferenceRenderer, Rated, is_preference, read_preferences
from gptsmith.data.prompts import PromptForm, PromptRenderer, PromptRow, as_prompt, is_text_file
from gptsmith.data.rows import read_rows
from gptsmith.errors import UsageError
from gptsmith.tokenizer import Tokenizer

Kind = Literal["conversations", "preferences", "prompts"]


@dataclass(frozen=True)
class Shown:
    """where: the row. text: what the model sees, [brackets] around what is trained on. summary: about all rows."""

    where: str
    text: str
    summary: tuple[str, ...]


def kind_of(path: Path) -> Kind:
    """Return what the rows of a file or folder are, by the fields of the first one."""
    if is_text_file(path):
        return "prompts"
    for row in read_rows(path):
        if is_preference(row.values):
            return "preferences"
        try:
            as_conversation(row.values)
        except RowError:
            try:
                as_prompt(row.values)
            except RowError:
                return "conversations"
            return "prompts"
        break
    return "conversations"


def show(
    path: Path,
    tokenizer: Tokenizer,
    *,
    index: int = 0,
    train_on: TrainOn = "all",
    color: bool = False,
    picture_reader: PictureReader | None = None,
) -> Shown:
    """Return row `index` (from 0) of the conversations in a file or folder, rendered for a model's tokenizer.

    color: mark by colors of a terminal instead of brackets. picture_reader: of the model. Rows that cannot be
    used are counted. Raises UsageError where there is no such row.
    """
    renderer, counts = Renderer(tokenizer, train_on=train_on, picture_reader=picture_reader), Counts()
    lengths: list[int] = []
    trained = images = 0
    chosen: tuple[str, Example] | None = None
    for row, conversation in read_conversations(path, on_bad="skip", counts=counts):
        try:
            example = renderer.render(conversation, row.folder)
        except RowError as error:
            counts.forms[conversation.form] -= 1
            bad_row(error, row.where, "skip", counts)
            continue
        if len(lengths) == index:
            chosen = row.where, example
        lengths.append(len(example.ids))
        trained += sum(example.trained)
        images += len(example.images)
    if chosen is None:
        raise _no_such_row(path, "conversations", len(lengths), index, counts)
    where, example = chosen
    share = f"trained on: {trained:,} of {sum(lengths):,} tokens ({trained / sum(lengths):.0%})"
    if picture_reader is not None and images:
        share += f"; {images:,} pictures of {len(picture_reader.tokens):,} tokens each"
    summary = _summary("conversations", len(lengths), {"tokens": lengths}, counts, share)
    return Shown(where, marked(example, tokenizer, color=color, picture_reader=picture_reader), summary)


def show_preferences(
    path: Path,
    tokenizer: Tokenizer,
    *,
    index: int = 0,
    form: PromptForm = "auto",
    color: bool = False,
    picture_reader: PictureReader | None = None,
) -> Shown:
    """Return preference `index` (from 0) of a file or folder: a pair, one answer below the other, or a rated answer."""
    renderer, counts = PreferenceRenderer(tokenizer, form=form, picture_reader=picture_reader), Counts()
    lengths: dict[str, list[int]] = collections.defaultdict(list)
    shown: tuple[str, str] | None = None
    number, what = 0, "preferences"
    for row, preference in read_preferences(path, on_bad="skip", counts=counts):
        try:
            examples = _answers(preference, renderer, row.folder)
        except RowError as error:
            counts.forms[preference.form] -= 1
            bad_row(error, row.where, "skip", counts)
            continue
        what = "rated answers" if isinstance(preference, Rated) else "pairs of answers"
        if number == index:
            texts = (
                f"{name}:\n{marked(each, tokenizer, color=color, picture_reader=picture_reader)}"
                for name, each in examples.items()
            )
            shown = row.where, "\n".join(texts)
        for name, example in examples.items():
            lengths[name].append(sum(example.trained))
        number += 1
    if shown is None:
        raise _no_such_row(path, what, number, index, counts)
    by_name = {f"tokens of {name} answers": found for name, found in lengths.items()}
    return Shown(*shown, _summary(what, number, by_name, counts))


def _answers(preference: Preference | Rated, renderer: PreferenceRenderer, folder: Path) -> dict[str, Example]:
    if isinstance(preference, Rated):
        name = "good" if preference.desirable else "bad"
        return {name: renderer.render(preference.conversation, preference.start, folder)}
    return dict(zip(("chosen", "rejected"), renderer.pair(preference, folder), strict=True))


def show_prompts(
    rows: Iterable[tuple[str, PromptRow]],
    counts: Counts,
    tokenizer: Tokenizer,
    *,
    name: str,
    index: int = 0,
    form: PromptForm = "auto",
) -> Shown:
    """Return prompt `index` (from 0) of `rows`, as the model is to answer it, and its columns. name: of the data."""
    renderer = PromptRenderer(tokenizer, form=form)
    lengths: list[int] = []
    shown: tuple[str, str] | None = None
    for place, row in rows:
        try:
            _, ids = renderer.render(row)
        except RowError as error:
            counts.forms[row.form] -= 1
            bad_row(error, place, "skip", counts)
            continue
        if len(lengths) == index:
            columns = [f"{column}: {value}" for column, value in row.columns.items()]
            shown = place, "\n".join([tokenizer.decode(ids, skip_special_tokens=False), "", *columns]).rstrip("\n")
        lengths.append(len(ids))
    if shown is None:
        raise _no_such_row(name, "prompts", len(lengths), index, counts)
    return Shown(*shown, _summary("prompts", len(lengths), {"tokens": lengths}, counts))


def _no_such_row(path: object, what: str, number: int, index: int, counts: Counts) -> UsageError:
    skipped = f" Left out {counts.describe_skipped()}." if counts.skipped else ""
    return UsageError(f"{path} has {number:,} {what}; there is none with --index {index}.{skipped}")


def _summary(
    what: str, number: int, lengths: dict[str, list[int]], counts: Counts, more: str | None = None
) -> tuple[str, ...]:
    """Return lines about all rows. lengths: numbers of tokens, by what they are of."""
    forms = ", ".join(f"{form} {count:,}" for form, count in counts.forms.most_common() if count)
    lines = [f"{number:,} {what} ({forms})"]
    for name, found in lengths.items():
        median, most = int(np.median(found)), max(found)
        lines.append(f"{name}: median {median:,}, 95% up to {int(np.quantile(found, 0.95)):,}, longest {most:,}")
    if more is not None:
        lines.append(more)
    if counts.skipped:
        lines.append(f"cannot be used: {sum(counts.skipped.values()):,} rows: {counts.describe_skipped()}")
    return tuple(lines)


def marked(
    example: Example, tokenizer: Tokenizer, *, color: bool = False, picture_reader: PictureReader | None = None
) -> str:
    """Return the text of an example, with special tokens, and what is trained on in [brackets] or green.

    Of the tokens of a picture, the first one and their number are shown: <image>×36.
    """
    start, end = ("\x1b[32m", "\x1b[0m") if color else ("[", "]")
    image = None if picture_reader is None else picture_reader.token_id
    pieces = []
    for trained, ids in _runs(example, image):
        text = tokenizer.decode(ids[:1] if ids[0] == image else ids, skip_special_tokens=False)
        if ids[0] == image:
            text += f"×{len(ids)}"
        pieces.append(f"{start}{text}{end}" if trained else text)
    return "".join(pieces)


def _runs(example: Example, image: int | None) -> list[tuple[bool, list[int]]]:
    """Return the ids in runs of equal masks; those of a picture are runs of their own."""
    runs: list[tuple[bool, list[int]]] = []
    for id, trained in zip(example.ids, example.trained, strict=True):
        last = runs[-1] if runs else None
        if last is None or last[0] != trained or (last[1][-1] == image) != (id == image):
            runs.append((trained, []))
        runs[-1][1].append(id)
    return runs
