"""One conversation as a model sees it, with the tokens marked that are trained on.

print(show("chats.jsonl", tokenizer))
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptsmith.data.conversations import Counts, Example, Renderer, RowError, TrainOn, bad_row, read_conversations
from gptsmith.errors import UsageError
from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shown:
    """where: the row. example: its ids and mask. text: the same, [brackets] around what is trained on. summary: lines
    about all rows."""

    where: str
    example: Example
    text: str
    summary: tuple[str, ...]


def show(path: Path, tokenizer: Tokenizer, *, index: int = 0, train_on: TrainOn = "all", color: bool = False) -> Shown:
    """Return row `index` (from 0) of the conversations in a file or folder, rendered for a model's tokenizer.

    color: mark by colors of a terminal instead of brackets. Rows that cannot be used are counted. Raises UsageError
    where there is no such row.
    """
    renderer, counts = Renderer(tokenizer, train_on=train_on), Counts()
    lengths: list[int] = []
    trained = 0
    chosen: tuple[str, Example] | None = None
    for row, conversation in read_conversations(path, on_bad="skip", counts=counts):
        try:
            example = renderer.render(conversation)
        except RowError as error:
            counts.forms[conversation.form] -= 1
            bad_row(error, row.where, "skip", counts)
            continue
        if len(lengths) == index:
            chosen = row.where, example
        lengths.append(len(example.ids))
        trained += sum(example.trained)
    if chosen is None:
        skipped = f" Left out {counts.describe_skipped()}." if counts.skipped else ""
        raise UsageError(f"{path} has {len(lengths):,} conversations; there is none with --index {index}.{skipped}")
    where, example = chosen
    return Shown(where, example, marked(example, tokenizer, color=color), tuple(_summary(lengths, trained, counts)))


def _summary(lengths: list[int], trained: int, counts: Counts) -> list[str]:
    forms = ", ".join(f"{form} {number:,}" for form, number in counts.forms.most_common() if number)
    median, most = int(np.median(lengths)), max(lengths)
    lines = [
        f"{len(lengths):,} conversations ({forms})",
        f"tokens: median {median:,}, 95% up to {int(np.quantile(lengths, 0.95)):,}, longest {most:,}",
        f"trained on: {trained:,} of {sum(lengths):,} tokens ({trained / sum(lengths):.0%})",
    ]
    if counts.skipped:
        lines.append(f"cannot be used: {sum(counts.skipped.values()):,} rows: {counts.describe_skipped()}")
    return lines


def marked(example: Example, tokenizer: Tokenizer, *, color: bool = False) -> str:
    """Return the text of an example, with special tokens, and what is trained on in [brackets] or green."""
    start, end = ("\x1b[32m", "\x1b[0m") if color else ("[", "]")
    pieces = []
    for trained, ids in _runs(example):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        pieces.append(f"{start}{text}{end}" if trained else text)
    return "".join(pieces)


def _runs(example: Example) -> list[tuple[bool, list[int]]]:
    """Return the ids in runs of equal masks."""
    runs: collections.deque[tuple[bool, list[int]]] = collections.deque()
    for id, trained in zip(*example, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(id)
    return list(runs)
