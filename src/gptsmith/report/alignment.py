"""The section of the report about rewards, for runs that learn from them, and what else such runs measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gptsmith.report.curves import alignment_figure, frontier_figure
from gptsmith.report.figures import evenly_spaced, to_svg
from gptsmith.report.html import escape, format_count, format_duration, format_value
from gptsmith.report.samples import MAX_PREVIEW_CHARACTERS, sample_html
from gptsmith.run_directory import Row, Run, is_evaluation, last_number, number

MAX_TABLE_ROWS = 40
MAX_STEPS = 8  # of one prompt's answers

_METRICS = [  # key in metrics.jsonl, title, unit
    ("kl", "Divergence from the start", "KL, nats per answer"),
    ("entropy", "Entropy", "nats per token"),
    ("length", "Length", "tokens per answer"),
    ("ended", "Answers that ended", "share"),
    ("dead_groups", "Dead groups", "share"),
    ("reward_std", "Spread of rewards", "standard deviation"),
    ("clipped", "Clipped tokens", "share"),
    ("gap", "Sampler against trainer", "largest |Δ log p|, nats"),
    ("value_loss", "Value loss", "squared reward"),
    ("kl_weight", "KL coefficient", "reward per nat"),
    ("text_loss", "Loss on text", "nats per token"),
    ("lr", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm", "norm, before clipping"),
    ("tokens_per_second", "Throughput", "tokens per second"),
]


def is_alignment(run: Run) -> bool:
    """Return whether a run learns from rewards."""
    return any("reward" in row or "val_reward" in row for row in run.metrics)


def alignment_tiles(run: Run) -> list[tuple[str, str, float, str]]:
    """Return tiles of results: label, text, value, note."""
    rewards = [value for row in run.metrics if math.isfinite(value := number(row.get("reward")))]
    last, first = (rewards[-1], rewards[0]) if rewards else (math.nan, math.nan)
    kl = last_number(run.metrics, "val_kl")
    if math.isnan(kl):
        kl = last_number(run.metrics, "kl")
    return [
        ("Reward", f"{last:.4g}", last, f"of the last answers in training; {first:.4g} at first"),
        ("Divergence", f"{kl:.3g}", kl, "KL from the start, nats per answer"),
    ]


def reward_section(run: Run) -> str:
    metrics, alarms = run.metrics, [number(alarm["step"]) for alarm in run.alarms]
    figures = [("Reward", [("reward", "training"), ("val_reward", "held-out prompts")], "reward")]
    if _has(metrics, "val_gold"):
        figures.append(("Gold", [("val_gold", "gold")], "gold reward"))
    wide = []
    for i, (title, keys, ylabel) in enumerate(figures):
        words = "; ".join(_words(metrics, key, label) for key, label in keys if _has(metrics, key))
        svgs = [
            to_svg(
                alignment_figure(metrics, keys, ylabel, alarms=alarms, best=run.best, width=width, height=3.4),
                alt=f"{title} by step: {words}.",
                prefix=f"reward{i}-{name}",
            )
            for name, width in (("wide", 8.4), ("narrow", 4.6))
        ]
        wide.append(
            f'<figure><figcaption>{title}</figcaption><div class="wide">{svgs[0]}</div>'
            f'<div class="narrow">{svgs[1]}</div></figure>'
        )
    return f"""<p class="lead">{_lead(run)}</p>
{"".join(wide)}
<div class="multiples">
{_small_figures(metrics, alarms)}
</div>
{_answers_over_time(run)}
{_table(run)}"""


def _lead(run: Run) -> str:
    text = "What the answers to the prompts are worth; higher is better. Held-out prompts are not trained on."
    metric = run.selection.metric
    if _has(run.metrics, "val_gold"):
        text += " Gold is a reward that is measured but not trained on: where it falls while the reward rises, the "
        text += "model exploits the reward."
    if run.best is not None:
        text += (
            f" The best checkpoint is that with the highest {escape(metric)}: {number(run.best[metric]):.4g} at step "
            f"{format_count(number(run.best['step']))}."
        )
    return text


def _has(metrics: Sequence[Row], key: str) -> bool:
    return any(math.isfinite(number(row.get(key))) for row in metrics)


def _words(metrics: Sequence[Row], key: str, label: str) -> str:
    values = [value for row in metrics if math.isfinite(value := number(row.get(key)))]
    return f"{label} from {values[0]:.4g} to {values[-1]:.4g}, at most {max(values):.4g}"


def _small_figures(metrics: Sequence[Row], alarms: Sequence[float]) -> str:
    parts = dict.fromkeys(key for row in metrics for key in row if key.startswith("reward/"))
    named = [*_METRICS, *((key, f"Reward {key.removeprefix('reward/')}", "reward") for key in parts)]
    shown = []
    if sum(_has([row], "val_kl") for row in metrics) > 1:
        words = "Rewards of held-out prompts against the square root of the divergence."
        shown.append(("Reward against divergence", words, frontier_figure(metrics)))
    for key, title, unit in named:
        keys = [(name, label) for name, label in ((key, "training"), (f"val_{key}", "held-out")) if _has(metrics, name)]
        if keys:
            words = f"{title} by step: {'; '.join(_words(metrics, name, label) for name, label in keys)}."
            shown.append((title, words, alignment_figure(metrics, keys, unit, alarms=alarms)))
    return "\n".join(
        f"<figure><figcaption>{escape(title)}</figcaption>\n{to_svg(figure, alt=words, prefix=f'small{i}')}</figure>"
        for i, (title, words, figure) in enumerate(shown)
    )


def _answers_over_time(run: Run) -> str:
    """Return the answers to the prompt that was answered most often, in order of step."""
    by_prompt: dict[str, list[Row]] = {}
    for sample in run.samples:
        by_prompt.setdefault(str(sample.get("prompt")), []).append(sample)
    samples = max(by_prompt.values(), key=len, default=[])
    if len(samples) < 2:
        return ""
    items = "\n".join(
        f"<li><h3>Step {format_count(number(samples[i]['step']))}</h3>"
        f"{sample_html(samples[i], MAX_PREVIEW_CHARACTERS)}</li>"
        for i in evenly_spaced(len(samples), MAX_STEPS)
    )
    return f'<h3>One prompt over training</h3>\n<ol class="timeline">\n{items}\n</ol>'


def _table(run: Run) -> str:
    rows = [row for row in run.metrics if is_evaluation(row)]
    names = list(dict.fromkeys(key for row in rows for key in row if key.startswith("val_")))
    if not rows:
        return ""
    picked = [rows[i] for i in evenly_spaced(len(rows), MAX_TABLE_ROWS)]
    head = "".join(f'<th scope="col">{escape(name.removeprefix("val_"))}</th>' for name in names)
    lines = "\n".join(
        f'<tr><th scope="row">{format_count(number(row["step"]))}</th>'
        f"<td>{format_duration(number(row.get('time')))}</td>"
        + "".join(f"<td>{escape(format_value(row.get(name)))}</td>" for name in names)
        + "</tr>"
        for row in picked
    )
    return f"""<details><summary>Evaluations as a table</summary>
<div class="scroll"><table class="numbers">
<thead><tr><th scope="col">step</th><th scope="col">time</th>{head}</tr></thead>
<tbody>
{lines}
</tbody></table></div></details>"""
