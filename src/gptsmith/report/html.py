"""Text and numbers for the HTML of a report."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from gptsmith.report.attention_maps import printable_label


def escape(value: Any) -> str:
    """Return `value` as HTML text, with a symbol for each control character that HTML does not allow."""
    text = str(value)
    if not text.isprintable():
        text = text.translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421})
    return html.escape(text)


def format_value(value: Any) -> str:
    """Format a JSON value for a table cell."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "not a finite number"
    if isinstance(value, list):
        return ", ".join(map(format_value, value)) or "–"
    text = str(value)
    return text if text.strip() and text.isprintable() else printable_label(text, 200)


def format_count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def format_size(value: float) -> str:
    """Format with a unit prefix: 1234567 -> 1.23 M."""
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def format_duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def missing_note(text: str) -> str:
    """Return a paragraph that says what is missing and why."""
    return f'\n<p class="missing">{escape(text)}</p>'


def html_page(
    *,
    title: str,
    eyebrow: str,
    heading: str,
    lead: str,
    sections: Sequence[tuple[str, str, str]],
    footer: str,
    version: str,
) -> str:
    """Return a page that loads nothing. title, eyebrow, version: texts. heading, lead, footer: HTML.

    sections: the id, the title and the HTML of each.
    """
    links = "".join(f'<li><a href="#{id}">{escape(name)}</a></li>' for id, name, _ in sections)
    body = "\n".join(
        f'<section id="{id}" aria-labelledby="{id}-title">\n'
        f'<h2 id="{id}-title">{escape(name)}</h2>\n{content}\n</section>'
        for id, name, content in sections
    )
    css = files("gptsmith.report").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="gptsmith {escape(version)}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<header>
<p class="eyebrow">{escape(eyebrow)}</p>
<h1>{heading}</h1>
<p class="summary">{lead}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer>
<p>{footer}</p>
</footer>
</body>
</html>
"""
