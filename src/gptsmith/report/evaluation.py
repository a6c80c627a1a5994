"""The results of an evaluation as a page, and k-shot curves as figures. Results are plain data: `Results.to_json()`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptsmith.errors import DataError
from gptsmith.evaluate.curves import Curve, curves_of
from gptsmith.report.curves import _curve_axes
from gptsmith.report.figures import GRID, INK, MUTED, TRAIN, VALIDATION, save_png, to_svg
from gptsmith.report.html import escape, format_size, html_page, missing_note
from gptsmith.report.samples import sample_html
from gptsmith.run_directory import Run
from gptsmith.storage import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

COLORS = (TRAIN, VALIDATION, "#1c7a48", "#8a4fb5", "#96590a", "#b3265e", "#4d6b8a", "#6b7a1c")
_MOST_CHARACTERS = 600
_MOST_SAMPLES = 6


def read_record(path: Path) -> dict[str, Any]:
    """Return the results that `gptsmith eval --json` wrote. Raises DataError for a file that is something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    if not isinstance(record, dict) or "model_sha256" not in record:
        raise DataError(f"{path} does not hold results of gptsmith eval --json.")
    return record


# Figures --------------------------------------------------------------------------------------------------------------


def shot_figure(curves: Sequence[Curve], *, width: float = 7.2, height: float = 4.2) -> Figure:
    """Mean scores against the number of shots, with 95% intervals, of one task and one or more models.

    The axis of shots is logarithmic in shots + 1. A dashed line is the score of guessing.
    """
    import numpy as np

    figure, axes = _curve_axes(width, height)
    shots = sorted({k for curve in curves for k in curve.shots})
    for i, curve in enumerate(curves):
        x = np.log2(np.asarray(curve.shots) + 1.0)
        low, high = curve.intervals()
        color = COLORS[i % len(COLORS)]
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(x, curve.means, color=color, linewidth=1.8, marker="o", markersize=4.5, label=curve.model)
    if (chance := curves[0].chance) is not None:
        axes.axhline(chance, color=MUTED, linewidth=1, linestyle="--", label="guessing")
    axes.set_xticks([float(np.log2(k + 1)) for k in shots], [str(k) for k in shots])
    axes.set_ylim(0, None)
    axes.set_xlabel("solved examples in the context", color=MUTED)
    axes.set_ylabel(curves[0].metric.replace("_", " "), color=MUTED)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def interval_figure(rows: Sequence[tuple[str, float, float, float, float | None]], label: str) -> Figure:
    """Values with their intervals, a row each: name, value, low, high, and the score of guessing or None."""
    figure, axes = _curve_axes(7.2, 0.9 + 0.34 * len(rows))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for y, (_, value, low, high, chance) in enumerate(rows):
        axes.plot([low, high], [y, y], color=TRAIN, linewidth=2.4, alpha=0.45, solid_capstyle="round")
        axes.plot([value], [y], "o", color=TRAIN, markersize=6)
        if chance is not None:
            axes.plot([chance], [y], "|", color=VALIDATION, markersize=13, markeredgewidth=1.8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(label, color=MUTED)
    return figure


def save_shot_figures(records: Sequence[Record], directory: Path) -> list[Path]:
    """Write a PNG per task that was measured with several numbers of shots, models overlaid; return the paths."""
    paths = []
    for task, curves in _overlaid(records).items():
        path = directory / f"{_file_name(task)}.png"
        save_png(shot_figure(curves), path)
        paths.append(path)
    return paths


def _overlaid(records: Sequence[Record]) -> dict[str, list[Curve]]:
    """Return the curves of each task of the first record, with those of the other records."""
    tasks: dict[str, list[Curve]] = {}
    for i, record in enumerate(records):
        for curve in curves_of(record):
            if len(curve.shots) > 1 and (i == 0 or curve.task in tasks):
                tasks.setdefault(curve.task, []).append(curve)
    return tasks


def _file_name(task: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(task).stem if c) or "task"


# Page -----------------------------------------------------------------------------------------------------------------

RECORD_FILE = "evaluation.json"


def report_evaluation(model: str, record: Record, others: Sequence[Record] = ()) -> Path:
    """Write evaluation.html and evaluation.json into the directory of a model, or here if it is not one.

    The report of a run is written again, with the results. Returns the path of the page.
    """
    place = Path(model)
    directory = place if place.is_dir() else Path()
    write_text(directory / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    path = write_evaluation(directory / "evaluation.html", record, others)
    if (place / "run.json").exists():
        from gptsmith.report.page import write_report

        write_report(place)
    return path


def evaluation_sections(run: Run) -> list[tuple[str, str, str]]:
    """Return the sections of a run's report about its evaluation, if it has been evaluated."""
    path = run.directory / RECORD_FILE
    if not path.exists():
        return []
    try:
        record = read_record(path)
        return _result_sections([record])
    except (DataError, KeyError, TypeError, ValueError):
        return [("tasks", "Tasks", missing_note(f"{RECORD_FILE} is not readable."))]


def _result_sections(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    sections = [
        ("texts", "Bits per byte", _texts_section(records[0])),
        ("shots", "Learning from the context", _shots_section(records)),
        ("tasks", "Tasks", _tasks_section(records[0])),
    ]
    return [section for section in sections if section[2]]


def write_evaluation(path: Path, record: Record, others: Sequence[Record] = ()) -> Path:
    """Write the page about a model and return its path.

    record: its results, with `texts`, `tasks` and `samples` as far as measured, and `missing`: why something was not.
    others: the results of other models, whose k-shot curves are drawn with it.
    """
    sections = [
        *_result_sections([record, *others]),
        ("samples", "Samples", _samples_section(record)),
        ("missing", "Not measured", _missing_section(record)),
        ("settings", "How it was measured", _settings_section(record)),
    ]
    sections = [section for section in sections if section[2]]
    name = str(record.get("model", "model"))
    version = str(record.get("gptsmith", ""))
    page = html_page(
        title=f"{name} · gptsmith evaluation",
        eyebrow="gptsmith evaluation",
        heading=escape(name),
        lead=_lead(record),
        sections=sections,
        footer=f"Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} · gptsmith {escape(version)}",
        version=version,
    )
    write_text(path, page.encode("utf-8", "replace").decode())
    return path


def _lead(record: Record) -> str:
    size = record.get("parameters")
    parts = [f"A GPT of {format_size(size)} parameters" if isinstance(size, int) else "A GPT"]
    if isinstance(record.get("context"), int):
        parts.append(f"with a context of {record['context']:,} tokens")
    chosen = [row for row in record.get("summary", ()) if row["chance"] is not None]
    above = {row["task"] for row in chosen if row["low"] > row["chance"]}
    names = {row["task"] for row in chosen}
    text = " ".join(parts) + "."
    if names:
        text += f" It is better than guessing on {len(above)} of {len(names)} tasks with choices."
    return text


def _texts_section(record: Record) -> str:
    texts = record.get("texts") or []
    if not texts:
        return ""
    rows, lines = [], []
    for text in texts:
        value = float(text["bits_per_byte"])
        low, high = text.get("bits_per_byte_low"), text.get("bits_per_byte_high")
        rows.append((str(text["name"]), value, value if low is None else low, value if high is None else high, None))
        interval = "too short" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        lines.append((text["name"], f"{text['bytes']:,}", f"{value:.3f}", interval, f"{text['perplexity']:,.2f}"))
    alt = "; ".join(f"{name}: {value:.3f} bits per byte" for name, value, *_ in rows)
    return (
        '<p class="lead">How many bits the model needs for a byte of a text: lower is better. Models with '
        "different tokenizers can be compared. Bars are 95% intervals.</p>\n"
        f"<figure>{to_svg(interval_figure(rows, 'bits per byte'), alt=alt, prefix='texts')}</figure>\n"
        + _table(("text", "bytes", "bits per byte", "95% interval", "perplexity"), lines)
    )


def _shots_section(records: Sequence[Record]) -> str:
    figures = []
    for i, (task, curves) in enumerate(_overlaid(records).items()):
        words = []
        for curve in curves:
            points = ", ".join(f"{mean:.2f} with {k}" for k, mean in zip(curve.shots, curve.means, strict=True))
            words.append(f"{curve.model}: {points}")
        slope = curves[0].slope()
        svg = to_svg(shot_figure(curves, width=4.6, height=3.4), alt="; ".join(words), prefix=f"shots{i}")
        note = "{slope:+.3f} each time the shots double ({slope_low:+.3f} to {slope_high:+.3f})".format(**slope)
        figures.append(f"<figure><figcaption>{escape(task)} <small>{note}</small></figcaption>{svg}</figure>")
    if not figures:
        return ""
    return (
        '<p class="lead">Scores against the number of solved examples in the prompt. The examples are never those that '
        "are graded. Bands are 95% intervals over examples and draws.</p>\n"
        f'<div class="multiples">{"".join(figures)}</div>'
    )


def _tasks_section(record: Record) -> str:
    summary = record.get("summary") or []
    if not summary:
        return ""
    rows = [(f"{r['task']}, {r['shots']} shots", r["score"], r["low"], r["high"], r["chance"]) for r in summary]
    lines = []
    for r in summary:
        chance = "–" if r["chance"] is None else f"{r['chance']:.3f}"
        interval = f"{r['low']:.3f} to {r['high']:.3f}"
        lines.append((r["task"], r["shots"], r["metric"], f"{r['score']:.3f}", interval, chance, f"{r['examples']:,}"))
    alt = "; ".join(f"{name}: {value:.3f}" for name, value, *_ in rows)
    return (
        '<p class="lead">Mean scores with 95% intervals; the upright marks are the score of guessing. A score whose '
        "interval includes that of guessing shows nothing.</p>\n"
        f"<figure>{to_svg(interval_figure(rows, 'score'), alt=alt, prefix='tasks')}</figure>\n"
        + _table(("task", "shots", "metric", "score", "95% interval", "guessing", "examples"), lines)
        + _examples(record)
    )


def _examples(record: Record) -> str:
    """Return the end of the first prompt of each task, with the model's answer and the right one."""
    shown: dict[str, str] = {}
    for result in record.get("tasks", ()):
        prompt, outcome = result.get("first_prompt"), result["outcomes"][0]
        if not isinstance(prompt, str):
            continue
        end = prompt[-_MOST_CHARACTERS:]
        cut = "… " if len(prompt) > len(end) else ""
        verdict = f"score {outcome['score']:g}"
        right = f"; right: {escape(outcome['right'][:200])}" if outcome.get("right") else ""
        shown[str(result["task"])] = (
            f"<h3>{escape(result['task'])}, {result['shots']} shots</h3>\n"
            f'<pre tabindex="0">\n{cut}{escape(end)} <b>{escape(outcome["answer"][:_MOST_CHARACTERS])}</b></pre>'
            f'<p class="note">{verdict}{right}</p>'
        )
    return (
        f"<details><summary>The first question of each task</summary>{''.join(shown.values())}</details>"
        if shown
        else ""
    )


def _samples_section(record: Record) -> str:
    samples = (record.get("samples") or [])[:_MOST_SAMPLES]
    if not samples:
        return ""
    cards = "".join(
        f"<div><h3>Temperature {sample['temperature']:g}</h3>\n{sample_html(sample, 1500)}</div>" for sample in samples
    )
    return f'<p class="lead">Texts that the model writes; prompts are in bold.</p>\n<div class="samples">{cards}</div>'


def _missing_section(record: Record) -> str:
    missing = record.get("missing") or {}
    return _table(("what", "why"), list(missing.items())) if missing else ""


def _settings_section(record: Record) -> str:
    keys = ("gptsmith", "torch", "python", "dtype", "bits", "device", "model_sha256", "tokenizer_sha256")
    rows = [(key.replace("_", " "), record[key]) for key in keys if record.get(key) not in (None, "")]
    seeds = sorted({result["seed"] for result in record.get("tasks", ())})
    if seeds:
        rows.append(("seeds of the draws", ", ".join(map(str, seeds))))
    body = "".join(f"<tr><th>{escape(key)}</th><td><code>{escape(value)}</code></td></tr>" for key, value in rows)
    return f"<table>{body}</table>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="numbers"><tr>{top}</tr>{body}</table></div>'
