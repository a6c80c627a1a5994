"""`gptsmith tasks`: list the tasks for `gptsmith eval`."""

from __future__ import annotations

from dataclasses import dataclass

from gptsmith.cli.parser import parse


@dataclass(frozen=True)
class Tasks:
    """List the tasks for `gptsmith eval`: name, number of examples, kind, license and description."""


def main(arguments: list[str]) -> int:
    parse(Tasks, "gptsmith tasks", arguments)
    from gptsmith.tasks.definition import definition_names, load_definition
    from gptsmith.tasks.registry import TASKS

    rows = [("name", "examples", "kind", "license", "description")]
    for name in definition_names():
        task = load_definition(name)
        size = "" if task.size is None else f"{task.size:,}"
        rows.append((name, size, task.kind, task.license, task.description))
    for name, make in TASKS.items():
        rows.append((name, "", "generation", "", (make.__doc__ or "").strip().split("\n")[0]))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [
            cell.rjust(w) if i == 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        print("  ".join([*cells, row[4]]).rstrip())
    return 0
