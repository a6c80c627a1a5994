"""The section with the curves of losses and other metrics."""

from __future__ import annotations

import math

from gptsmith.report.curves import answers_figure, loss_figure, metric_figure
from gptsmith.report.figures import evenly_spaced, to_svg
from gptsmith.report.html import format_count, format_duration, format_value, missing_note
from gptsmith.run_directory import Run, best_evaluation, number

MAX_TABLE_ROWS = 40


_METRICS = [  # key in metrics.jsonl, title, note
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Throughput", "tokens per second"),
    ("reward_accuracy", "Reward accuracy", "share of preferences that the rewards agree with"),
    ("reward_margin", "Reward margin", "chosen less rejected"),
]


def loss_unit(run: Run) -> str:
    """Return what the losses of a run are measured in."""
    if run.info.get("objective") != "dpo":
        return "nats per token"
    return "per answer" if run.options.get("loss") == "kto" else "per pair"


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
    unit = loss_unit(run)
    lead = f"How surprised the model is by the next token; lower is better.{uniform}"
    if unit != "nats per token":
        lead = "How far the model is from preferring what the data prefer; lower is better."
    wide = to_svg(loss_figure(metrics, unit=unit), alt=alt, prefix="loss")
    narrow = to_svg(loss_figure(metrics, width=4.6, height=3.8, unit=unit), alt=alt, prefix="loss-narrow")
    small = [
        (
            "Loss against time",
            unit,
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
    return f"""<p class="lead">{lead} The validation data are not part of the training data.</p>
<figure>
<div class="wide">{wide}</div>
<div class="narrow">{narrow}</div>
</figure>
<div class="multiples">
{figures}
</div>
{_answers(run)}{_loss_table(run)}"""


def _answers(run: Run) -> str:
    """Return the log-probabilities of chosen and rejected answers, and what they say; empty where there are none."""
    ends = []
    for name in ("chosen_logprob", "rejected_logprob"):
        values = [value for row in run.metrics if math.isfinite(value := number(row.get(name)))]
        if not values:
            return ""
        ends.append((values[0], values[-1]))
    words = " and ".join(
        f"{name} from {first:.1f} to {last:.1f}"
        for name, (first, last) in zip(("chosen", "rejected"), ends, strict=True)
    )
    both = "Both fell, as is common. " if all(last < first for first, last in ends) else ""
    why = (
        f"{both}The loss asks for a difference only, and making rejected answers less likely faster than chosen ones "
        "is one way to it: what both lose goes to answers that are not in the data. To keep chosen answers likely, add "
        "the loss of fine-tuning on them: --sft-weight 0.1."
    )
    figure = to_svg(answers_figure(run.metrics), alt=f"Log-probabilities by step: {words}.", prefix="answers")
    return f"""<figure><figcaption>Log-probability of the answers <small>nats per answer: {words}</small></figcaption>
{figure}</figure>
<p class="note">{why}</p>
"""


def _describe_losses(run: Run) -> str:
    train = [value for row in run.metrics if math.isfinite(value := number(row.get("loss")))]
    best = best_evaluation(run.metrics)
    text = f"Loss, {loss_unit(run)}, by step."
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
<thead><tr><th scope="col">step</th><th scope="col">time</th><th scope="col">{loss_unit(run)}</th></tr></thead>
<tbody>
{lines}
</tbody></table></details>"""
