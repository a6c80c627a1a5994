"""The procedural tasks of the package reasoning-gym, which is an optional dependency."""

from __future__ import annotations

from typing import Any

from gptsmith.errors import UsageError, nearest
from gptsmith.tasks.answers import tagged_answer
from gptsmith.tasks.base import Conversation


class ReasoningGym:
    """A data set of reasoning-gym as a task.

    size, seed: how many examples, and which. options: those of the data set. An answer in <answer> tags is taken out of
    them before it is scored; otherwise the whole text is the answer.
    Raises UsageError where the package is not installed, and for an unknown name or option.
    """

    def __init__(self, name: str, *, size: int = 500, seed: int = 0, **options: Any) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise UsageError(
                f"reasoning-gym:{name} needs the package reasoning-gym, which is not installed. Install it: pip "
                'install "gptsmith[reasoning]"'
            ) from None
        if name not in DATASETS:
            raise UsageError(f"reasoning-gym has no data set {name!r}.{nearest(name, DATASETS)}")
        if size < 1:
            raise UsageError(f"reasoning-gym:{name}: size must be at least 1, not {size}.")
        try:
            self.data = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
        except (TypeError, ValueError, AssertionError) as error:
            raise UsageError(f"reasoning-gym:{name}: {error}.") from None

    def __len__(self) -> int:
        return len(self.data)

    def example(self, i: int) -> Conversation:
        return [{"role": "user", "content": self.data[i]["question"]}]

    def answer(self, i: int) -> str:
        return str(self.data[i]["answer"])

    def score(self, i: int, answer: str) -> float:
        found = tagged_answer(answer)
        return float(self.data.score_answer(answer.strip() if found is None else found, self.data[i]))
