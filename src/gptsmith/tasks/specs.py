"""Tasks as they are named on the command line: `task:NAME` and `reasoning-gym:NAME`, with options after a `?`.

task = open_task("task:arithmetic?digits=3&seed=1")
"""

from __future__ import annotations

import functools
import inspect
import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

from gptsmith.errors import UsageError, nearest
from gptsmith.tasks.base import AnsweredTask, Task
from gptsmith.tasks.reasoning_gym import ReasoningGym
from gptsmith.tasks.registry import TASKS

PREFIXES = ("task:", "reasoning-gym:")


def is_task(spec: str) -> bool:
    """Return whether a specification names a task, and not a file."""
    return spec.startswith(PREFIXES)


@functools.lru_cache(maxsize=16)
def open_task(spec: str) -> Task:
    """Return the task that a specification names. UsageError for an unknown task or option, or a bad value.

    Values are numbers, true, false, JSON, or texts.
    """
    kind, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    options: dict[str, Any] = {}
    for option in filter(None, query.split("&")):
        key, equals, value = option.partition("=")
        if not equals or not key or key in options:
            problem = "is set twice" if key in options else "is no option"
            raise UsageError(f"{spec}: {option!r} {problem}. Write options as NAME=VALUE, joined with &.")
        options[key] = _value(urllib.parse.unquote(value))
    make = functools.partial(ReasoningGym, name) if kind == "reasoning-gym" else TASKS.find(name)
    parameters = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in options:
        if key not in parameters and not takes_any:
            known = ", ".join(parameters) or "none"
            raise UsageError(f"{spec}: the task has no option {key!r}.{nearest(key, parameters)} Its options: {known}.")
    try:
        return make(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{spec}: {error}") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def task_rows(spec: str) -> Iterator[tuple[tuple[dict[str, Any], ...], dict[str, Any]]]:
    """Yield the messages of each example, and its columns: `task`, `index`, and `answer` where the task knows it."""
    task = open_task(spec)
    for i in range(len(task)):
        columns: dict[str, Any] = {"task": spec, "index": i}
        if isinstance(task, AnsweredTask):
            columns["answer"] = task.answer(i)
        yield tuple(dict(message) for message in task.example(i)), columns
