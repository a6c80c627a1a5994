"""The section of a run with a task head: its confusion matrix and its most confident mistakes."""

from __future__ import annotations

from typing import Any

from gptsmith.report.html import escape, format_value
from gptsmith.run_directory import Run, parse_rows


def predictions_section(run: Run) -> str:
    """Return the section for the best evaluation, else the last; "" for a run without such details."""
    try:
        rows, _ = parse_rows((run.directory / "evaluations.jsonl").read_bytes())
    except OSError:
        return ""
    rows = [row for row in rows if isinstance(row.get("mistakes"), list)]
    if not rows:
        return ""
    best = run.best
    row = next((row for row in reversed(rows) if best is not None and row["step"] == best["step"]), rows[-1])
    text = f'<p class="lead">On held-out data, at step {format_value(row["step"])}.</p>'
    if isinstance(row.get("confusion"), list) and isinstance(row.get("labels"), list):
        text += _confusion(row["labels"], row["confusion"])
    return text + _mistakes(row["mistakes"])


def _confusion(labels: list[Any], confusion: list[Any]) -> str:
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(format_value(number))}</td>" for number in numbers)
        + "</tr>"
        for label, numbers in zip(labels, confusion, strict=False)
    )
    caption = "Confusion matrix: rows are labels, columns what the model says"
    return (
        f'<div class="scroll"><table>\n<caption>{caption}</caption>\n<thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _mistakes(mistakes: list[Any]) -> str:
    columns = [name for name in ("label", "predicted", "confidence", "text") if any(name in row for row in mistakes)]
    if not columns:
        return "<p>No mistake.</p>"
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    lines = "\n".join(
        "<tr>" + "".join(f"<td>{escape(format_value(row.get(name)))}</td>" for name in columns) + "</tr>"
        for row in mistakes
    )
    return (
        f'<div class="scroll"><table>\n<caption>Most confident mistakes</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )
