"""The figures of a report. Each is a plain matplotlib `Figure`; neither pyplot nor a display is touched.

Axis letters: L layers · H heads · T tokens.
"""

from __future__ import annotations

import html
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptsmith.run_directory import Row, best_validation, number
from gptsmith.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

# Colours of the light theme. `to_svg` turns each into the CSS variable of that name, so that a page can be dark too.
SURFACE, PANEL, GRID, MUTED, INK = "#fdfefe", "#eef1f5", "#dfe4eb", "#586273", "#1b2230"
TRAIN, VALIDATION = "#1f6fb4", "#c4500c"  # blue and vermilion: told apart by the colour-blind too
THEME = {
    SURFACE: "surface",
    PANEL: "panel",
    GRID: "grid",
    MUTED: "muted",
    INK: "ink",
    TRAIN: "train",
    VALIDATION: "val",
}

MAX_LAYERS, MAX_HEADS = 6, 8  # what one picture of attention can hold
MAX_MASK_TOKENS = 16
POINTS = 900  # more than a screen shows of one curve


# Curves -------------------------------------------------------------------------------------------------------------


def loss_figure(
    metrics: Sequence[Row], *, x: str = "step", width: float = 8.4, height: float = 3.7, labels: bool = True
) -> Figure:
    """Training loss (raw and smoothed) and validation loss with its best point, in nats per token.

    metrics: rows of metrics.jsonl (`read_metrics`). x: "step" or "time". width, height: inches.
    labels: with a legend, a y axis label and the best point marked, or bare.
    """
    figure, axes = _curve_axes(width, height)
    scale, unit = _time_unit(metrics) if x == "time" else (1.0, "step")
    train_x, train = _column(metrics, x, "loss")
    val_x, val = _column(metrics, x, "val_loss")
    train_x, val_x = train_x * scale, val_x * scale
    smooth = _smooth(train)

    if len(train) >= 20:
        axes.plot(*_thin(train_x, train), color=TRAIN, alpha=0.4, linewidth=0.8, label="training, as logged")
        axes.plot(*_thin(train_x, smooth), color=TRAIN, linewidth=1.8, label="training, smoothed")
    elif len(train):
        axes.plot(train_x, train, color=TRAIN, linewidth=1.8, marker=".", label="training")
    if len(val):
        marker = "o" if len(val) <= 60 else None
        axes.plot(
            val_x, val, color=VALIDATION, linewidth=1.6, marker=marker, markersize=4.5, label="validation", zorder=3
        )
    _fit_losses(axes, smooth, val)
    axes.set_xlabel(unit, color=MUTED)
    if labels:
        _mark_best(axes, metrics, x, scale)
        _mark_divergence(axes, train_x, train)
        axes.set_ylabel("loss, nats per token", color=MUTED)
    if not len(train) and not len(val):
        _say(axes, "no losses were logged")
    elif not np.isfinite(train).any() and not np.isfinite(val).any():
        _say(axes, "no loss is a finite number")
    elif labels:
        figure.legend(
            loc="outside upper left",
            ncols=3,
            frameon=False,
            fontsize=9.5 if width > 5 else 8.5,
            labelcolor=INK,
            handlelength=1.4,
            columnspacing=1.4,
        )
    return figure


def metric_figure(metrics: Sequence[Row], key: str, *, width: float = 4.4, height: float = 2.5) -> Figure:
    """One quantity of metrics.jsonl (`lr`, `grad_norm`, `tokens_per_second`, ...) against the step."""
    figure, axes = _curve_axes(width, height)
    x, y = _column(metrics, "step", key)
    axes.plot(*_thin(x, y), color=TRAIN, linewidth=1.5, marker="." if len(y) < 3 else None)
    finite = y[np.isfinite(y)]
    if len(finite):  # one wild value must not flatten the rest
        axes.set_ylim(0, float(np.quantile(finite, 0.995)) * 1.12 or 1.0)
    else:
        _say(axes, "not logged")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}")
    axes.set_xlabel("step", color=MUTED)
    return figure


def scaling_figure(
    flops: Sequence[float], losses: Sequence[float], laws: Sequence[Callable[[float], float]], *, ahead: float = 100
) -> Figure:
    """Validation loss against compute, both logarithmic: the runs, and laws drawn on to `ahead` times the largest."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter, NullLocator, ScalarFormatter

    figure, axes = _curve_axes(7.2, 4.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(LogFormatterSciNotation())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    line = np.geomspace(min(flops), ahead * max(flops), 200)
    curves = [[law(float(c)) for c in line] for law in laws]
    for curve, style in zip(curves, ("-", "--"), strict=False):
        axes.plot(line, curve, color=TRAIN, linewidth=1.6, linestyle=style)
    axes.plot(flops, losses, "o", color=VALIDATION, markersize=6, zorder=3)
    low, high = min(min(curve) for curve in curves), max(losses)
    axes.set_yticks([round(tick, 2) for tick in np.geomspace(low, high, 6)])
    axes.set_xlabel("training compute, FLOP", color=MUTED)
    axes.set_ylabel("validation loss, nats per token", color=MUTED)
    return figure


def learning_rate_figure(rates: Floats, losses: Floats, smoothed: Floats, marks: Mapping[str, float]) -> Figure:
    """Training loss against a rate that rose from update to update, raw and smoothed. marks: rates to name."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    figure, axes = _curve_axes(7.2, 4.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(LogFormatterSciNotation())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.plot(rates, losses, color=TRAIN, alpha=0.4, linewidth=0.8)
    axes.plot(rates, smoothed, color=TRAIN, linewidth=1.8)
    low, high = float(losses.min()), float(smoothed.max())
    axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    for height, (name, rate) in zip((0.97, 0.9), marks.items(), strict=False):
        axes.axvline(rate, color=VALIDATION, linewidth=1.2, linestyle="--")
        axes.text(
            rate,
            height,
            f" {name}: {rate:.2g}",
            color=VALIDATION,
            fontsize=9,
            transform=axes.get_xaxis_transform(),
            va="top",
        )
    axes.set_xlabel("learning rate", color=MUTED)
    axes.set_ylabel("training loss, nats per token", color=MUTED)
    return figure


def _curve_axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if width > 5 else 4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6 if height > 3 else 4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == int(value) else f"{value:g}")
    return figure, axes


def _column(metrics: Sequence[Row], x: str, key: str) -> tuple[Floats, Floats]:
    """The rows that have `key`, as two arrays (N,); a value that is no finite number is NaN, and leaves a gap."""
    rows = [row for row in metrics if key in row and math.isfinite(number(row.get(x)))]
    values = np.array([number(row[key]) for row in rows], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return np.array([number(row[x]) for row in rows], dtype=np.float64), values


def _time_unit(metrics: Sequence[Row]) -> tuple[float, str]:
    """What to multiply seconds by, and the axis label."""
    longest = max((time for row in metrics if math.isfinite(time := number(row.get("time")))), default=0.0)
    if longest < 180:
        return 1.0, "seconds of training"
    return (1 / 60, "minutes of training") if longest < 3 * 3600 else (1 / 3600, "hours of training")


def _smooth(values: Floats) -> Floats:
    """The mean over a centred window of a fifteenth of the curve, narrower at its ends so that those stay true."""
    half = len(values) // 30
    if half < 1:
        return values
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), half)
    low, high = index - reach, index + reach + 1
    count = counts[high] - counts[low]
    mean = (sums[high] - sums[low]) / np.maximum(count, 1)
    return np.where(known & (count > 0), mean, np.nan)


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most about POINTS points: the extremes of each bin in turn, so that no spike is lost."""
    if len(y) <= POINTS:
        return x, y
    chosen = []
    for part in np.array_split(np.arange(len(y)), POINTS // 2):
        finite = part[np.isfinite(y[part])]
        chosen += (
            sorted({int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])})
            if len(finite)
            else [int(part[0])]
        )
    return x[chosen], y[chosen]


def _fit_losses(axes: Axes, train: Floats, val: Floats) -> None:
    """Show the long slope: the first fall from ln(vocabulary) would flatten everything after it."""
    settled = np.concatenate([train[len(train) // 25 :], val[1:] if len(val) > 2 else val])
    settled = settled[np.isfinite(settled)]
    if len(settled):
        low, high = float(settled.min()), float(settled.max())
        span = high - low or 0.2 * abs(high) or 1.0
        axes.set_ylim(low - 0.25 * span, high + 0.08 * span)  # below: room for a word on the best loss


def _mark_best(axes: Axes, metrics: Sequence[Row], x: str, scale: float) -> None:
    best = best_validation(metrics)
    if best is None or not math.isfinite(number(best.get(x))):
        return
    at, loss = number(best[x]) * scale, number(best["val_loss"])
    left, right = axes.get_xlim()
    late = at > left + 0.5 * (right - left)
    axes.plot([at], [loss], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=VALIDATION, zorder=4)
    axes.annotate(
        f"best {loss:.4f} at step {number(best['step']):,.0f}",
        (at, loss),
        xytext=(at, 0.05),
        textcoords=("data", "axes fraction"),
        ha="right" if late else "left",
        color=INK,
        fontsize=10,
        fontweight="bold",
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkB": 6},
    )


def _mark_divergence(axes: Axes, x: Floats, train: Floats) -> None:
    broken = np.flatnonzero(~np.isfinite(train))
    if len(broken):
        at = float(x[broken[0]])
        left, right = axes.get_xlim()
        late = at > left + 0.5 * (right - left)
        axes.axvline(at, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            "loss is not a finite number",
            (at, 0.94),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if late else 5, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            color=MUTED,
            fontsize=9.5,
        )


def _say(axes: Axes, text: str) -> None:
    axes.set_yticks([])
    axes.set_xticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=11)


# Attention ----------------------------------------------------------------------------------------------------------


def visible(token: str, limit: int = 10) -> str:
    """A token as a label: blanks and control characters drawn as signs, at most `limit` characters."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    text = "".join(signs.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in token)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def causal_mask_figure(tokens: Sequence[str]) -> Figure:
    """Who may look at whom: row i holds the tokens that token i attends to, spelling out the text up to itself.

    tokens: T strings, of which the first MAX_MASK_TOKENS are drawn.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = [visible(token, 4) for token in tokens][:MAX_MASK_TOKENS]
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
            colour = "#101820" if column == row else "#ffffff"
            axes.text(column, row, labels[column], color=colour, ha="center", va="center", fontsize=9, parse_math=False)
    axes.set(xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5), aspect="equal")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    _token_ticks(axes, labels, size=10)
    axes.set_xlabel("… may attend to these", color=MUTED, fontsize=10, labelpad=7)
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


def shown(count: int, limit: int) -> list[int]:
    """Which of `count` layers or heads are drawn where `limit` fit: evenly spread, the first and the last included."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i) for i in np.linspace(0, count - 1, limit)})


def attention_figure(weights: Sequence[Any], tokens: Sequence[str]) -> Figure:
    """Every head's attention over one text: a row for each layer, a column for each head.

    weights: L arrays or tensors, (H, T, T) or (1, H, T, T), as `model(ids, weights=...)` collects them; rows sum to 1.
    tokens: T strings. Draws at most MAX_LAYERS × MAX_HEADS, chosen by `shown`. The future is blank.
    """
    from matplotlib.figure import Figure

    maps = [_array(layer) for layer in weights]
    layers, heads = shown(len(maps), MAX_LAYERS), shown(len(maps[0]), MAX_HEADS)
    labels = [visible(token, 6) for token in tokens]
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
    _colour_bar(figure, image, bar)
    return figure


def head_figure(weights: Sequence[Any], tokens: Sequence[str], layer: int, head: int) -> Figure:
    """One head's attention, larger. Arguments as in `attention_figure`; layer and head count from 0."""
    from matplotlib.figure import Figure

    labels = [visible(token) for token in tokens]
    figure = Figure(figsize=(6.4, 5.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor=PANEL)
    image = _heat_map(axes, _array(weights[layer])[head])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    _token_ticks(axes, labels, size=min(10.0, 280 / len(labels)))
    axes.set_xlabel("attends to", color=MUTED, fontsize=10)
    axes.set_ylabel("token", color=MUTED, fontsize=10)
    _colour_bar(figure, image, axes.inset_axes((1.03, 0.5, 0.03, 0.5)))
    return figure


def sharpest_head(weights: Sequence[Any]) -> tuple[int, int]:
    """(layer, head) that most looks at single tokens of the past: not itself, its neighbour, or the first token.

    Those three are where heads look by habit; a head that singles out another has something to tell.
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
    """(H, T, T) float64 of an array or tensor that may have a batch axis of 1."""
    if hasattr(layer, "detach"):
        layer = layer.detach().float().cpu().numpy()
    array = np.asarray(layer, dtype=np.float64)
    return array[0] if array.ndim == 4 else array


def _heat_map(axes: Axes, weights: Floats) -> Any:
    from matplotlib.colors import PowerNorm

    future = np.triu(np.ones_like(weights, dtype=bool), 1)
    picture = np.ma.masked_array(weights, future | ~np.isfinite(weights))
    _frame(axes)
    # The square root of a weight as its colour: most weights are far below the few large ones.
    return axes.imshow(picture, cmap="viridis", norm=PowerNorm(0.5, 0, 1), interpolation="none")


def _colour_bar(figure: Figure, image: Any, axes: Axes) -> None:
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


# Writing ------------------------------------------------------------------------------------------------------------


def save_png(figure: Figure, path: Path, *, dpi: float = 160) -> None:
    """Write `figure` to `path` on a white ground, atomically. Raises GptsmithError where it cannot be written."""
    buffer = BytesIO()
    with _missing_glyphs_allowed():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    with atomic_file(Path(path)) as file:
        file.write(buffer.getvalue())


def to_svg(figure: Figure, *, alt: str, prefix: str) -> str:
    """An `<svg>` element to stand in an HTML page, its colours the page's CSS variables and its text real text.

    alt: what the picture shows, for those who cannot see it. prefix: makes its ids unique in the page.
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
    for colour, name in THEME.items():
        body = body.replace(colour, f"var(--{name})")
    return f'<svg {box.group()} role="img" aria-label="{html.escape(alt)}">{body.strip()}'


def _font(match: re.Match[str]) -> str:
    """The page's own typeface, at the size that matplotlib wrote."""
    return f"font-size: {match[2].strip()}" if match[2] else "font-family: inherit"


def _join_base64(match: re.Match[str]) -> str:
    return 'href="data:image/png;base64,' + "".join(match[1].split()) + '"'


@contextmanager
def _missing_glyphs_allowed() -> Iterator[None]:
    """A label in a script that matplotlib's font lacks is a box in a PNG, and itself in an SVG: no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
