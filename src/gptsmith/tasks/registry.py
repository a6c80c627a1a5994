"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptsmith.registry import Registry
from gptsmith.tasks.arithmetic import Arithmetic
from gptsmith.tasks.base import Task
from gptsmith.tasks.count_letters import CountLetters
from gptsmith.tasks.emoji import Emoji
from gptsmith.tasks.sort_letters import SortLetters
from gptsmith.tasks.spell_backwards import SpellBackwards

TaskFactory = Callable[..., Task]

TASKS: Registry[TaskFactory] = Registry(
    "task",
    {
        "arithmetic": Arithmetic,
        "count-letters": CountLetters,
        "emoji": Emoji,
        "sort-letters": SortLetters,
        "spell-backwards": SpellBackwards,
    },
)


def register_task(name: str, make: TaskFactory) -> None:
    """Make a task known as `name`. make: returns the task; a class will do. It may take options by keyword."""
    TASKS.register(name, make)


def make_task(name: str, **options: Any) -> Task:
    """Return the task known as `name`. UsageError, with the nearest name, where there is none."""
    return TASKS.find(name)(**options)
