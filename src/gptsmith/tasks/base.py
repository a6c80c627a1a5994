"""What a task is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

Conversation: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages in the form that chat templates take: `[{"role": "user", "content": "2 + 2 ="}]`."""


class Task(Protocol):
    """Examples, and a score for the answer to each. Any class with these three methods is a task."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def example(self, i: int) -> Conversation:
        """Return the messages of example `i`, the last of which is to be answered. Always the same for the same `i`."""

    def score(self, i: int, answer: str) -> float:
        """Return how good an answer to example `i` is: 0 is wrong and 1 is right."""


@runtime_checkable
class AnsweredTask(Protocol):
    """A task that also tells the answers."""

    def answer(self, i: int) -> str | None:
        """Return a right answer to example `i`, None if it is not known."""
