"""Figures as plain matplotlib `Figure`s: their theme, and writing them as PNG files or as SVG for an HTML page.

Neither pyplot nor a display is used.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptsmith.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

# Colors of the light theme. `to_svg` replaces each by the CSS variable of that name, so that a page can be dark, too.
SURFACE, PANEL, GRID, MUTED, INK = "#fdfefe", "#eef1f5", "#dfe4eb", "#586273", "#1b2230"
TRAIN, VALIDATION = "#1f6fb4", "#c4500c"  # blue and vermilion: distinguishable with color blindness
ALARM = "#b3261e"
THEME = {
    SURFACE: "surface",
    PANEL: "panel",
    GRID: "grid",
    MUTED: "muted",
    INK: "ink",
    TRAIN: "train",
    VALIDATION: "val",
    ALARM: "bad",
}


def save_png(figure: Figure, path: Path, *, dpi: float = 160) -> None:
    """Write `figure` to `path` on white, atomically. Raise GptsmithError if the file cannot be written."""
    buffer = BytesIO()
    with _missing_glyphs_allowed():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    with atomic_file(Path(path)) as file:
        file.write(buffer.getvalue())


def to_svg(figure: Figure, *, alt: str, prefix: str) -> str:
    """Return an `<svg>` element for an HTML page, with the page's CSS variables as colors and text as text.

    alt: text alternative. prefix: makes its ids unique in the page.
    """
    import matplotlib

    buffer = StringIO()
    with _missing_glyphs_allowed(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gptsmith"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib always writes a viewBox"
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"font(-family)?: ?([\d.]+px )?'DejaVu Sans'[^;\"]*", _font, body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", body)
    body = re.sub(r'xlink:href="data:image/png;base64,([^"]*)"', _join_base64, body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for color, name in THEME.items():
        body = body.replace(color, f"var(--{name})")
    return f'<svg {box.group()} role="img" aria-label="{html.escape(alt)}">{body.strip()}'


def _font(match: re.Match[str]) -> str:
    """Replace matplotlib's font by the page's, at the same size."""
    return f"font-size: {match[2].strip()}" if match[2] else "font-family: inherit"


def _join_base64(match: re.Match[str]) -> str:
    return 'href="data:image/png;base64,' + "".join(match[1].split()) + '"'


@contextmanager
def _missing_glyphs_allowed() -> Iterator[None]:
    """Suppress warnings about characters that matplotlib's font lacks. In an SVG they are shown with another font."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices below `count`, evenly spaced, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i) for i in np.linspace(0, count - 1, limit)})
