"""Pictures of attention: the causal mask, and the weights of a model's heads.

Axis letters: L layers · H heads · T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptsmith.report.figures import GRID, INK, MUTED, PANEL, SURFACE, Floats, evenly_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LAYERS, MAX_HEADS = 6, 8  # what one figure can hold
MAX_MASK_TOKENS = 16


def printable_label(token: str, limit: int = 10) -> str:
    """Return a token as a label: whitespace and control characters as symbols, at most `limit` characters."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    text = "".join(signs.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in token)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def causal_mask_figure(tokens: Sequence[str]) -> Figure:
    """The causal mask: row i shows the tokens that token i attends to, which are the text up to and including it.

    tokens: T strings; the first MAX_MASK_TOKENS are drawn.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = [printable_label(token, 4) for token in tokens][:MAX_MASK_TOKENS]
    T = len(labels)
    past, itself = (colormaps["viridis"](value) for value in (0.38, 0.85))
    side = 0.36 * T
    figure = Figure(figsize=(max(side, 2.2) + 2.2, side + 1.7), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor=PANEL)
    mask = np.ma.masked_less(np.tril(np.ones((T, T))) + np.eye(T), 1)  # 1 past, 2 itself, masked: the future
    edges = np.arange(T + 1) - 0.5
    axes.pcolormesh(edges, edges, mask, cmap=ListedColormap([past, itself]), vmin=1, vmax=2, rasterized=False)
    axes.hlines(edges[1:-1], -0.5, T - 0.5, color=SURFACE, linewidth=1.5)
    axes.vlines(edges[1:-1], -0.5, T - 0.5, color=SURFACE, linewidth=1.5)
    for row in range(T):
        for column in range(row + 1):
            color = "#101820" if column == row else "#ffffff"
            axes.text(column, row, labels[column], color=color, ha="center", va="center", fontsize=9, parse_math=False)
    axes.set(xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5), aspect="equal")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    _token_ticks(axes, labels, size=10)
    axes.set_xlabel("… attends to these", color=MUTED, fontsize=10, labelpad=7)
    axes.set_ylabel("each token …", color=MUTED, fontsize=10, labelpad=7)
    for row, following in enumerate(labels[1:]):
        axes.text(T - 0.3, row, f"→ {following}", color=MUTED, va="center", fontsize=10, parse_math=False)
    _frame(axes)
    figure.legend(
        handles=[
            Patch(color=itself, label="itself"),
            Patch(color=past, label="the past"),
            Patch(facecolor=PANEL, edgecolor=GRID, label="the future: masked"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.0,
        columnspacing=1.2,
    )
    return figure


def attention_figure(weights: Sequence[Any], tokens: Sequence[str]) -> Figure:
    """Every head's attention over one text, with a row per layer and a column per head.

    weights: L arrays or tensors, (H, T, T) or (1, H, T, T), whose rows sum to 1 (see `model.inspect`).
    tokens: T strings. At most MAX_LAYERS × MAX_HEADS are drawn, chosen by `evenly_spaced`. The future is blank.
    """
    from matplotlib.figure import Figure

    maps = [_array(layer) for layer in weights]
    layers, heads = evenly_spaced(len(maps), MAX_LAYERS), evenly_spaced(len(maps[0]), MAX_HEADS)
    labels = [printable_label(token, 6) for token in tokens]
    panel, gap = max(1.1, min(2.6, 8.0 / len(heads))), 0.12
    label_size = min(9.0, 0.92 * panel * 72 / len(labels))
    margin = 0.42 + max(map(len, labels)) * label_size * 0.65 / 72
    left, right, top, bottom = margin, 0.75, 0.35, margin - 0.15
    width = left + len(heads) * (panel + gap) + right
    height = top + len(layers) * (panel + gap) + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    image = None
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            x, y = left + column * (panel + gap), height - top - row * (panel + gap) - panel
            axes = figure.add_axes((x / width, y / height, panel / width, panel / height), facecolor=PANEL)
            image = _heat_map(axes, maps[layer][head])
            last_row, first_column = row == len(layers) - 1, column == 0
            _token_ticks(axes, labels, size=label_size, x=last_row, y=first_column)
            if row == 0:
                axes.set_title(f"head {head + 1}", fontsize=10, color=INK, pad=5)
            if first_column:
                axes.text(0.16 / width, (y + panel / 2) / height, f"layer {layer + 1}", transform=figure.transFigure,
                          rotation=90, ha="center", va="center", color=INK, fontsize=10)  # fmt: skip
    bar_height = min(2.6, len(layers) * panel)
    bar = figure.add_axes(
        ((width - right + 0.1) / width, (height - top - bar_height) / height, 0.13 / width, bar_height / height)
    )
    _color_bar(figure, image, bar)
    return figure


def head_figure(weights: Sequence[Any], tokens: Sequence[str], layer: int, head: int) -> Figure:
    """One head's attention, larger. Arguments as in `attention_figure`; layer and head count from 0."""
    from matplotlib.figure import Figure

    labels = [printable_label(token) for token in tokens]
    figure = Figure(figsize=(6.4, 5.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor=PANEL)
    image = _heat_map(axes, _array(weights[layer])[head])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    _token_ticks(axes, labels, size=min(10.0, 280 / len(labels)))
    axes.set_xlabel("attends to", color=MUTED, fontsize=10)
    axes.set_ylabel("token", color=MUTED, fontsize=10)
    _color_bar(figure, image, axes.inset_axes((1.03, 0.5, 0.03, 0.5)))
    return figure


def sharpest_head(weights: Sequence[Any]) -> tuple[int, int]:
    """Return the (layer, head) that attends most to a single earlier token.

    The token itself, its neighbor and the first token do not count: most heads attend to those, whatever the text.
    """
    scores = []
    for layer, heads in enumerate(map(_array, weights)):
        T = heads.shape[-1]
        old = np.tril(np.ones((T, T), dtype=bool), -2)
        old[:, 0] = False
        peaks = np.where(old, heads, 0.0).max(axis=-1).mean(axis=-1)  # (H,)
        scores += [(float(peak), -layer, -head) for head, peak in enumerate(peaks)]
    _, layer, head = max(scores)
    return -layer, -head


def _array(layer: Any) -> Floats:
    """Convert an array or tensor, which can have a batch axis of 1, to (H, T, T) float64."""
    if hasattr(layer, "detach"):
        layer = layer.detach().float().cpu().numpy()
    array = np.asarray(layer, dtype=np.float64)
    return array[0] if array.ndim == 4 else array


def _heat_map(axes: Axes, weights: Floats) -> Any:
    from matplotlib.colors import PowerNorm

    future = np.triu(np.ones_like(weights, dtype=bool), 1)
    picture = np.ma.masked_array(weights, future | ~np.isfinite(weights))
    _frame(axes)
    # The color is the square root of the weight, because most weights are far below the few large ones.
    return axes.imshow(picture, cmap="viridis", norm=PowerNorm(0.5, 0, 1), interpolation="none")


def _color_bar(figure: Figure, image: Any, axes: Axes) -> None:
    bar = figure.colorbar(image, cax=axes, ticks=[0, 0.05, 0.2, 0.5, 1], format="%g")
    bar.outline.set_visible(False)
    axes.tick_params(colors=MUTED, length=0, labelsize=8.5)
    axes.set_title("weight", fontsize=8.5, color=MUTED, loc="left", pad=5)


def _token_ticks(axes: Axes, labels: Sequence[str], *, size: float, x: bool = True, y: bool = True) -> None:
    upright = all(len(label) <= 2 for label in labels)
    style: dict[str, Any] = {"fontsize": size, "parse_math": False, "color": INK}
    axes.set_xticks(range(len(labels)) if x else [], labels if x else [], rotation=0 if upright else 90, **style)
    axes.set_yticks(range(len(labels)) if y else [], labels if y else [], **style)
    axes.tick_params(length=0, pad=2)


def _frame(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
