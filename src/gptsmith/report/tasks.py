"""The section of a run that measured tasks during training: their scores over the steps, and the last ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gptsmith.report.curves import task_figure
from gptsmith.report.figures import to_svg
from gptsmith.report.html import escape, format_count
from gptsmith.run_directory import Run, number


def task_scores(run: Run) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Return for each task, with its number of shots, the steps and rows of its measurements."""
    found: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for row in run.metrics:
        measured = row.get("tasks")
        for each in measured if isinstance(measured, list) else ():
            if isinstance(each, Mapping) and math.isfinite(number(each.get("score"))):
                found.setdefault(task_label(each), []).append((number(row["step"]), each))
    return found


def task_label(row: Mapping[str, Any]) -> str:
    shots = number(row.get("shots"))
    return f"{row.get('task')}" + (f", {shots:.0f} shots" if shots > 0 else "")


def tasks_section(run: Run) -> str:
    """Return the section; "" for a run without such scores."""
    scores = task_scores(run)
    if not scores:
        return ""
    figures = "\n".join(
        f"<figure><figcaption>{escape(label)}</figcaption>\n"
        f"{to_svg(task_figure(rows), alt=_describe(label, rows), prefix=f'task{i}')}</figure>"
        for i, (label, rows) in enumerate(scores.items())
        if len(rows) > 1
    )
    lines = "\n".join(_line(label, *rows[-1]) for label, rows in scores.items())
    names = ("task", "score", "95% interval", "chance", "examples", "step")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"""<p class="lead">Mean score with its 95% interval. Where the interval includes chance, the model shows no
skill.</p>
<div class="multiples">
{figures}
</div>
<div class="scroll"><table class="numbers">
<thead><tr>{head}</tr></thead>
<tbody>
{lines}
</tbody></table></div>"""


def _line(label: str, step: float, row: Mapping[str, Any]) -> str:
    values = (
        f"{number(row['score']):.3f}",
        f"{number(row.get('low')):.3f} to {number(row.get('high')):.3f}",
        _chance(row),
        format_count(number(row.get("examples"))),
        format_count(step),
    )
    return f'<tr><th scope="row">{escape(label)}</th>' + "".join(f"<td>{value}</td>" for value in values) + "</tr>"


def _chance(row: Mapping[str, Any]) -> str:
    chance = number(row.get("chance"))
    return f"{chance:.3f}" if math.isfinite(chance) else "–"


def _describe(label: str, rows: list[tuple[float, Mapping[str, Any]]]) -> str:
    first, last = rows[0], rows[-1]
    return (
        f"Score on {label}: {number(first[1]['score']):.3f} at step {first[0]:.0f}, {number(last[1]['score']):.3f} at "
        f"step {last[0]:.0f}; chance {_chance(last[1])}."
    )
