"""The section with the contents of run.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptsmith.report.html import escape, format_value, missing_note
from gptsmith.run_directory import Run


def configuration_section(run: Run) -> str:
    parts = [
        ("training", run.options),
        ("model, as built", run.part("model")),
        ("data", run.part("data")),
        ("machine", run.part("machine")),
        ("outcome", {key: value for key, value in run.info.items() if key != "schema" and not isinstance(value, dict)}),
    ]
    groups = [group for name, values in parts for group in _grouped(name, values)]
    tables = "\n".join(_table(name, rows) for name, rows in groups if rows)
    everything = escape(json.dumps(run.info, indent=2, ensure_ascii=False))
    if not tables:
        tables = missing_note("run.json does not contain a configuration.")
    return f"""<div class="groups">
{tables}
</div>
<details><summary>Everything in run.json</summary>
<pre tabindex="0">
{everything}</pre></details>"""


def _grouped(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Yield one table of the plain values, then one per nested mapping, with deeper keys joined by dots."""
    yield name, [(key, value) for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{name}: {key}", list(_flatten(value))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(name: str, rows: Sequence[tuple[str, Any]]) -> str:
    lines = "\n".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(format_value(value))}</td></tr>' for key, value in rows
    )
    return f"<table>\n<caption>{escape(name.replace('_', ' '))}</caption>\n<tbody>\n{lines}\n</tbody></table>"
