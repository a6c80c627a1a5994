"""Curves over training: losses, other metrics, scaling laws, and the learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptsmith.report.figures import ALARM, GRID, INK, MUTED, TRAIN, VALIDATION, Floats
from gptsmith.run_directory import Row, best_evaluation, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 900  # per curve, more than a screen can show


def loss_figure(
    metrics: Sequence[Row],
    *,
    x: str = "step",
    width: float = 8.4,
    height: float = 3.7,
    labels: bool = True,
    unit: str = "nats per token",
) -> Figure:
    """Training loss (raw and smoothed) and validation loss with its best point.

    metrics: rows of metrics.jsonl (`read_metrics`). x: "step" or "time". width, height: inches. unit: of the losses.
    labels: add a legend, a y axis label and a mark at the best point.
    """
    figure, axes = _curve_axes(width, height)
    scale, x_unit = _time_unit(metrics) if x == "time" else (1.0, "step")
    train_x, train = _column(metrics, x, "loss")
    val_x, val = _column(metrics, x, "val_loss")
    train_x, val_x = train_x * scale, val_x * scale
    smooth = _smooth(train)

    if len(train) >= 20:
        axes.plot(*_downsample(train_x, train), color=TRAIN, alpha=0.4, linewidth=0.8, label="training, as logged")
        axes.plot(*_downsample(train_x, smooth), color=TRAIN, linewidth=1.8, label="training, smoothed")
    elif len(train):
        axes.plot(train_x, train, color=TRAIN, linewidth=1.8, marker=".", label="training")
    if len(val):
        marker = "o" if len(val) <= 60 else None
        axes.plot(
            val_x, val, color=VALIDATION, linewidth=1.6, marker=marker, markersize=4.5, label="validation", zorder=3
        )
    _fit_losses(axes, smooth, val)
    axes.set_xlabel(x_unit, color=MUTED)
    if labels:
        _mark_best(axes, metrics, x, scale)
        _mark_divergence(axes, train_x, train)
        axes.set_ylabel(f"loss, {unit}", color=MUTED)
    if not len(train) and not len(val):
        _write_note(axes, "no losses were logged")
    elif not np.isfinite(train).any() and not np.isfinite(val).any():
        _write_note(axes, "no loss is a finite number")
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
    """One metric (`lr`, `grad_norm`, `tokens_per_second`, ...) against the step."""
    figure, axes = _curve_axes(width, height)
    x, y = _column(metrics, "step", key)
    axes.plot(*_downsample(x, y), color=TRAIN, linewidth=1.5, marker="." if len(y) < 3 else None)
    finite = y[np.isfinite(y)]
    if len(finite):  # an outlier must not flatten the rest
        low, high = (float(np.quantile(finite, part)) for part in (0.005, 0.995))
        axes.set_ylim(min(0.0, low * 1.12), max(0.0, high * 1.12) or (1.0 if low >= 0 else 0.0))
    else:
        _write_note(axes, "not logged")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}")
    axes.set_xlabel("step", color=MUTED)
    return figure


def task_figure(rows: Sequence[tuple[float, Mapping[str, Any]]], *, width: float = 4.4, height: float = 2.5) -> Figure:
    """The score of a task against the step, with its interval and the score of guessing. rows: (step, measurement)."""
    figure, axes = _curve_axes(width, height)
    steps = np.array([step for step, _ in rows])
    score, low, high = (np.array([number(row.get(key)) for _, row in rows]) for key in ("score", "low", "high"))
    axes.fill_between(steps, low, high, color=TRAIN, alpha=0.2, linewidth=0)
    axes.plot(steps, score, color=TRAIN, linewidth=1.6, marker="o", markersize=3.5)
    chance = number(rows[-1][1].get("chance"))
    if math.isfinite(chance):
        axes.axhline(chance, color=MUTED, linewidth=1.0, linestyle="--")
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("step", color=MUTED)
    return figure


def answers_figure(metrics: Sequence[Row], *, width: float = 8.4, height: float = 3.2) -> Figure:
    """Log-probabilities of chosen and rejected answers: smoothed in training, and as points on held-out data."""
    figure, axes = _curve_axes(width, height)
    for name, color in (("chosen", TRAIN), ("rejected", VALIDATION)):
        x, y = _column(metrics, "step", f"{name}_logprob")
        axes.plot(*_downsample(x, _smooth(y)), color=color, linewidth=1.8, label=f"{name}, training (smoothed)")
        x, y = _column(metrics, "step", f"val_{name}_logprob")
        if len(x):
            axes.plot(x, y, "o", color=color, markersize=4.5, label=f"{name}, held out")
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel("nats per answer", color=MUTED)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def alignment_figure(
    metrics: Sequence[Row],
    keys: Sequence[tuple[str, str]],
    ylabel: str,
    *,
    alarms: Sequence[float] = (),
    best: Row | None = None,
    width: float = 4.4,
    height: float = 2.6,
) -> Figure:
    """Metrics of training and of evaluations against the step.

    keys: each metric with its label in the legend; metrics of evaluations (`val_…`) are dots. alarms: steps to mark.
    best: the row of the best evaluation, which is marked if its metric is one of the keys' last.
    """
    figure, axes = _curve_axes(width, height)
    drawn = 0
    for key, label in keys:
        x, y = _column(metrics, "step", key)
        if not np.isfinite(y).any():
            continue
        drawn += 1
        if key.startswith("val_"):
            axes.plot(x, y, color=VALIDATION, linewidth=1.6, marker="o", markersize=4.5, label=label, zorder=3)
        elif len(y) >= 20 and width > 5:
            axes.plot(*_downsample(x, y), color=TRAIN, alpha=0.4, linewidth=0.8)
            axes.plot(*_downsample(x, _smooth(y)), color=TRAIN, linewidth=1.8, label=f"{label}, smoothed")
        else:
            axes.plot(*_downsample(x, y), color=TRAIN, linewidth=1.5, marker="." if len(y) < 20 else None, label=label)
    for i, step in enumerate(alarms):
        axes.axvline(step, color=ALARM, linestyle="--", linewidth=1.2, label=None if i else "alarm")
    if best is not None and math.isfinite(value := number(best.get(keys[-1][0]))):
        at = number(best["step"])
        axes.plot(
            [at], [value], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=VALIDATION, zorder=4
        )
    if not drawn:
        _write_note(axes, "not logged")
    elif drawn > 1 or alarms:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.4)
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel(ylabel, color=MUTED)
    return figure


def frontier_figure(metrics: Sequence[Row], *, width: float = 4.4, height: float = 2.6) -> Figure:
    """Rewards of evaluations against the square root of the divergence from the model at the start."""
    figure, axes = _curve_axes(width, height)
    for key, label, color in (("val_reward", "reward", TRAIN), ("val_gold", "gold", VALIDATION)):
        rows = [row for row in metrics if math.isfinite(number(row.get(key))) and number(row.get("val_kl")) >= 0]
        if rows:
            x, y = ([number(row[name]) for row in rows] for name in ("val_kl", key))
            axes.plot(np.sqrt(x), y, color=color, linewidth=1.4, marker="o", markersize=4, label=label)
    if any(math.isfinite(number(row.get("val_gold"))) for row in metrics):
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    axes.set_xlabel("√KL from the start, nats per answer", color=MUTED)
    axes.set_ylabel("reward", color=MUTED)
    return figure


def scaling_figure(
    flops: Sequence[float], losses: Sequence[float], laws: Sequence[Callable[[float], float]], *, ahead: float = 100
) -> Figure:
    """Validation loss against compute, both logarithmic: runs, and fitted laws up to `ahead` times the largest run."""
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
    """Training loss against a learning rate that rose from step to step, raw and smoothed. marks: labeled rates."""
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
    """Return `x` and `key` of the rows that have `key`, (N,) each. Values that are not finite become NaN (gaps)."""
    rows = [row for row in metrics if key in row and math.isfinite(number(row.get(x)))]
    values = np.array([number(row[key]) for row in rows], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return np.array([number(row[x]) for row in rows], dtype=np.float64), values


def _time_unit(metrics: Sequence[Row]) -> tuple[float, str]:
    """Return the factor from seconds to a suitable unit, and the axis label."""
    longest = max((time for row in metrics if math.isfinite(time := number(row.get("time")))), default=0.0)
    if longest < 180:
        return 1.0, "seconds of training"
    return (1 / 60, "minutes of training") if longest < 3 * 3600 else (1 / 3600, "hours of training")


def _smooth(values: Floats) -> Floats:
    """Average over a centered window of a fifteenth of the curve, narrower at the ends to keep the end points."""
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


def _downsample(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Reduce a curve to about MAX_POINTS points: the extremes of each bin, so that no spike is lost."""
    if len(y) <= MAX_POINTS:
        return x, y
    chosen = []
    for part in np.array_split(np.arange(len(y)), MAX_POINTS // 2):
        finite = part[np.isfinite(y[part])]
        chosen += (
            sorted({int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])})
            if len(finite)
            else [int(part[0])]
        )
    return x[chosen], y[chosen]


def _fit_losses(axes: Axes, train: Floats, val: Floats) -> None:
    """Limit the y axis to the later losses: the initial drop from ln(vocabulary) would flatten everything else."""
    settled = np.concatenate([train[len(train) // 25 :], val[1:] if len(val) > 2 else val])
    settled = settled[np.isfinite(settled)]
    if len(settled):
        low, high = float(settled.min()), float(settled.max())
        span = high - low or 0.2 * abs(high) or 1.0
        axes.set_ylim(low - 0.25 * span, high + 0.08 * span)  # the space below is for the label of the best loss


def _mark_best(axes: Axes, metrics: Sequence[Row], x: str, scale: float) -> None:
    best = best_evaluation(metrics)
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


def _write_note(axes: Axes, text: str) -> None:
    axes.set_yticks([])
    axes.set_xticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=11)
