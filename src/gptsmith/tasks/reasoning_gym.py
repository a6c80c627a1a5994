"""The procedural tasks of the package reasoning-gym, which is an optional dependency."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from gptsmith.errors import UsageError, nearest
from gptsmith.tasks.answers import tagged_answer
from gptsmith.tasks.base import Conversation

DEFAULTS = {"size": 500, "seed": 0}


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a data set and their defaults.

    Raises UsageError where the package is not installed, and for an unknown name.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UsageError(
            f"reasoning-gym:{name} needs the package reasoning-gym, which is not installed. Install it: pip install "
            '"gptsmith[reasoning]"'
        ) from None
    if name not in DATASETS:
        raise UsageError(f"reasoning-gym has no data set {name!r}.{nearest(name, DATASETS)}")
    return {field.name: field.default for field in dataclasses.fields(DATASETS[name][1])} | DEFAULTS


class ReasoningGym:
    """A data set of reasoning-gym as a task.

    options: size (how many examples), seed, and those of the data set. An answer in <answer> tags is taken out of them
    before it is scored; otherwise the whole text is the answer. Some data sets give a part of a point for a bad answer.
    Raises UsageError as `options_of` does, and for options that the data set refuses.
    """

    def __init__(self, name: str, **options: Any) -> None:
        options_of(name)
        import reasoning_gym

        options = {**DEFAULTS, **options}
        if options["size"] < 1:
            raise UsageError(f"reasoning-gym:{name}: size must be at least 1, not {options['size']}.")
        try:
            self.data = reasoning_gym.create_dataset(name, **options)
        except Exception as error:  # its data sets refuse options in many ways
            raise UsageError(f"reasoning-gym:{name}: {str(error).rstrip('.')}.") from None

    def __len__(self) -> int:
        return len(self.data)

    def example(self, i: int) -> Conversation:
        return [{"role": "user", "content": self.data[i]["question"]}]

    def answer(self, i: int) -> str | None:
        answer = self.data[i]["answer"]
        return None if answer is None else str(answer)

    def score(self, i: int, answer: str) -> float:
        entry, found = self.data[i], tagged_answer(answer)
        with contextlib.suppress(Exception):  # some data sets fail on an answer that is not of their form: it is wrong
            return float(self.data.score_answer(answer.strip() if found is None else found, entry))
        return 0.0
