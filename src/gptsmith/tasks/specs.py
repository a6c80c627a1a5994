"""Tasks as they are named on the command line: `task:NAME` and `reasoning-gym:NAME`, with options after a `?`.

task = open_task("task:arithmetic?digits=3&seed=1")
"""

from __future__ import annotations

import functools
import inspect
import json
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from gptsmith.errors import UsageError, nearest
from gptsmith.tasks.base import AnsweredTask, Task
from gptsmith.tasks.reasoning_gym import ReasoningGym, options_of
from gptsmith.tasks.registry import TASKS

PREFIXES = ("task:", "reasoning-gym:")


def is_task(spec: str) -> bool:
    """Return whether a specification names a task, and not a file."""
    return spec.startswith(PREFIXES)


@functools.lru_cache(maxsize=16)
def open_task(spec: str) -> Task:
    """Return the task that a specification names. UsageError for an unknown task or option, or a bad value."""
    kind, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    options: dict[str, str] = {}
    for option in filter(None, query.split("&")):
        key, equals, value = option.partition("=")
        if not equals or not key or key in options:
            problem = "is set twice" if key in options else "is no option"
            raise UsageError(f"{spec}: {option!r} {problem}. Write options as NAME=VALUE, joined with &.")
        options[key] = urllib.parse.unquote(value)
    make: Callable[..., Task]
    if kind == "reasoning-gym":
        parameters, make = options_of(name), functools.partial(ReasoningGym, name)
    else:
        make = TASKS.find(name)
        parameters = {key: each.default for key, each in inspect.signature(make).parameters.items()}
    for key in options:
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise UsageError(f"{spec}: the task has no option {key!r}.{nearest(key, parameters)} Its options: {known}.")
    return make(**{key: _value(text, parameters[key], f"{spec}: {key}") for key, text in options.items()})


def _value(text: str, default: Any, where: str) -> Any:
    """Return a value of the type that the default has: of an option without one, whatever JSON says, or a text."""
    if isinstance(default, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    names = {bool: "true or false", int: "an integer", float: "a number"}
    kind = next((kind for kind in names if type(default) is kind), None)
    if kind is not None and type(value) is not kind and not (kind is float and type(value) is int):
        raise UsageError(f"{where} must be {names[kind]}, not {text!r}.")
    return value


def task_rows(spec: str) -> Iterator[tuple[tuple[dict[str, Any], ...], dict[str, Any]]]:
    """Yield the messages of each example, and its columns: `task`, `index`, and `answer` where the task knows it."""
    task = open_task(spec)
    for i in range(len(task)):
        columns: dict[str, Any] = {"task": spec, "index": i}
        answer = task.answer(i) if isinstance(task, AnsweredTask) else None
        if answer is not None:
            columns["answer"] = answer
        yield tuple(dict(message) for message in task.example(i)), columns
