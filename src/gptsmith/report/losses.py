"""The section with the curves of losses and other metrics."""

from __future__ import annotations

import math

from gptsmith.report.curves import loss_figure, metric_figure
from gptsmith.report.figures import evenly_spaced, to_svg
from gptsmith.report.html import format_count, format_duration, format_value, missing_note
from gptsmith.run_directory import Run, best_evaluation, number

MAX_TABLE_ROWS = 40


_METRICS = [  # key in metrics.jsonl, title, note
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Throughput", "tokens per second"),
]


def loss_section(run: Run) -> str:
    metrics = run.metrics
    if not any("loss" in row or "val_loss" in row for row in metrics):
        return missing_note("No loss had been logged when this was written.")
    alt = _describe_losses(run)
    vocabulary = number(run.part("model").get("vocab_size"))
    uniform = (
        f" Uniform guessing would score ln {format_count(vocabulary)} = {math.log(vocabulary):.2f}."
        if vocabulary >= 1
        else ""
    )
    wide = to_svg(loss_figure(metrics), alt=alt, prefix="loss")
    narrow = to_svg(loss_figure(metrics, width=4.6, height=3.8), alt=alt, prefix="loss-narrow")
    small = [
        (
            "Loss against time",
            "nats per token",
            loss_figure(metrics, x="time", width=4.4, height=2.5, labels=False),
            "The same losses against time.",
        )
    ]
    for key, title, about in _METRICS:
        if any(math.isfinite(number(row.get(key))) for row in metrics):
            values = [value for row in metrics if math.isfinite(value := number(row.get(key)))]
            words = f"{title} by step, from {values[0]:.4g} to {values[-1]:.4g}, at most {max(values):.4g}."
            small.append((title, about, metric_figure(metrics, key), words))
    figures = "\n".join(
        f"<figure><figcaption>{title}{f' <small>{about}</small>' if about else ''}</figcaption>\n"
        f"{to_svg(figure, alt=words, prefix=f'curve{i}')}</figure>"
        for i, (title, about, figure, words) in enumerate(small)
    )
    return f"""<p class="lead">How surprised the model is by the next token; lower is better. The validation text is
not part of the training text.{uniform}</p>
<figure>
<div class="wide">{wide}</div>
<div class="narrow">{narrow}</div>
</figure>
<div class="multiples">
{figures}
</div>
{_loss_table(run)}"""


def _describe_losses(run: Run) -> str:
    train = [value for row in run.metrics if math.isfinite(value := number(row.get("loss")))]
    best = best_evaluation(run.metrics)
    text = "Loss in nats per token by step."
    if train:
        text += f" Training loss goes from {train[0]:.3f} to {train[-1]:.3f}."
    if best:
        step = format_count(number(best["step"]))
        text += f" The best validation loss is {number(best['val_loss']):.4f}, at step {step}."
    return text


def _loss_table(run: Run) -> str:
    rows = [row for row in run.metrics if "val_loss" in row]
    if not rows:
        return ""
    picked = [rows[i] for i in evenly_spaced(len(rows), MAX_TABLE_ROWS)]
    cut = f", {len(picked)} of {len(rows)}" if len(picked) < len(rows) else ""
    lines = "\n".join(
        f'<tr><th scope="row">{format_count(number(row["step"]))}</th>'
        f"<td>{format_duration(number(row.get('time')))}</td><td>{format_value(number(row['val_loss']))}</td></tr>"
        for row in picked
    )
    return f"""<details><summary>Validation losses as a table{cut}</summary>
<table class="numbers">
<thead><tr><th scope="col">step</th><th scope="col">time</th><th scope="col">nats per token</th></tr></thead>
<tbody>
{lines}
</tbody></table></details>"""
