"""Layout of help texts. Imports nothing heavy, so that `gptsmith --help` is instant."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MIN_WIDTH = 20
"""Columns. A narrower terminal breaks the lines itself."""
TWO_COLUMNS = 60
"""Columns from which on descriptions stand beside the names. Below, they stand under them."""

NO_BREAK = "\N{NO-BREAK SPACE}"
"""In a text, a space at which no line is broken."""


class Section(NamedTuple):
    """A titled list of names with their descriptions."""

    title: str
    rows: Sequence[tuple[str, str]]
    name_width: int = 24
    """Columns for names. The description of a longer name begins on the next line."""


def format_help(usage: str, description: str, sections: Iterable[Section], width: int | None = None) -> str:
    """Return a help text. Blank lines in the description separate paragraphs.

    width: in columns; by default that of the terminal, or of the environment variable COLUMNS.
    """
    width = max(MIN_WIDTH, shutil.get_terminal_size().columns if width is None else width)
    blocks = [_fill(usage, width, "usage: ", indent=7)]
    blocks += [_fill(paragraph, width) for paragraph in description.split("\n\n")]
    blocks += [_format_section(section, width) for section in sections if section.rows]
    return "\n\n".join(blocks)


def _format_section(section: Section, width: int) -> str:
    longest = max(len(name) for name, _ in section.rows)
    indent = 4 + min(longest, section.name_width) if width >= TWO_COLUMNS else 6
    lines = [_fill(f"{section.title}:", width)]
    for name, text in section.rows:
        if text and width >= TWO_COLUMNS and len(name) <= section.name_width:
            lines.append(_fill(text, width, f"  {name}".ljust(indent), indent))
        else:
            lines.append(_fill(name, width, "  ", indent=4))
            lines += [_fill(text, width, " " * indent, indent)] if text else []
    return "\n".join(lines)


def _fill(text: str, width: int, start: str = "", indent: int = 0) -> str:
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=start,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,  # option names stay whole
    )
    # textwrap leaves a space before a long word of which nothing fits on the line
    return "\n".join(line.rstrip() for line in lines).replace(NO_BREAK, " ")
