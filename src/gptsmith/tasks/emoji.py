"""Naming a picture: `What is this?`"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

from gptsmith.data.emoji import QUESTION, Part, emoji_rows
from gptsmith.errors import UsageError, nearest
from gptsmith.tasks.base import Conversation


class Emoji:
    """The names of emoji that the data set `emoji` does not show. Right is the name itself, letter by letter.

    part: "compositions", names with a skin tone that training shows with other tones; "unseen", things that it does not
    show; or "train", what it does show.
    """

    def __init__(self, part: Literal["compositions", "unseen", "train"] = "compositions") -> None:
        parts = get_args(Part)
        if part not in parts:
            raise UsageError(f"task emoji: unknown part {part!r}.{nearest(part, parts)} Parts: {', '.join(parts)}.")
        self.part: Part = part

    @functools.cached_property
    def _rows(self) -> list[dict[str, Any]]:  # fetched on first use
        return list(emoji_rows(self.part))

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, i: int) -> Conversation:
        picture = {"type": "image", "image": self._rows[i]["image"]}
        return [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]

    def answer(self, i: int) -> str:
        return str(self._rows[i]["answer"])

    def score(self, i: int, answer: str) -> float:
        return float(answer.strip() == self.answer(i))
