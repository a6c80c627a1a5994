"""The results of a run: the summary at the top of the page and the section of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptsmith.report.alignment import alignment_tiles, is_alignment
from gptsmith.report.html import escape, format_count, format_duration, format_size, missing_note
from gptsmith.report.losses import loss_unit
from gptsmith.report.trained_model import TrainedModel
from gptsmith.run_directory import PLAIN_TEXT_METRIC, Run, best_evaluation, last_number, number

_STATUS = {  # status in run.json: word and CSS class of the badge
    "running": ("in progress", "warn"),
    "finished": ("finished", "good"),
    "interrupted": ("interrupted", "warn"),
    "diverged": ("diverged", "bad"),
    "failed": ("failed", "bad"),
}


def run_status(run: Run) -> tuple[str, str]:
    """Return the run's status as a word (HTML) and the CSS class of its badge."""
    status = run.info.get("status")
    if not isinstance(status, str):
        status = "finished" if run.info.get("ended") else "running"
    return _STATUS.get(status, (escape(status), "warn"))


def summary(run: Run, trained: TrainedModel) -> str:
    """Return a sentence (HTML) about the run's size, length, speed and loss."""
    numbers = _run_numbers(run, trained)
    unit = loss_unit(run)
    if unit == "nats per token" and _is_char(run, trained):
        unit = "nats per character"
    size = f"A GPT of {format_size(numbers.parameters)} parameters" if math.isfinite(numbers.parameters) else "A GPT"
    if not math.isfinite(numbers.step):
        return f"{size}. No step had been logged when this was written."
    text = f"{size}, trained for {format_count(numbers.step)} steps"
    if math.isfinite(numbers.tokens):
        text += f" on {format_size(numbers.tokens)} tokens"
    if math.isfinite(numbers.seconds):
        text += f" in {format_duration(numbers.seconds)}"
    if math.isfinite(numbers.best):
        text += f": validation loss <strong>{numbers.best:.4f}</strong> {unit}"
        if numbers.final != numbers.best:
            text += f" at best, {numbers.final:.4f} at the end"
    elif run.best is not None:
        metric = run.selection.metric
        text += f": {escape(metric)} <strong>{number(run.best[metric]):.4f}</strong> at best"
    elif is_alignment(run):
        text += ", not evaluated yet"
    elif math.isfinite(numbers.train):
        text += f": training loss {numbers.train:.4f} {unit}, not validated yet"
    if math.isfinite(numbers.tokens_per_second):
        text += f", at {format_count(numbers.tokens_per_second)} tokens per second"
    if machine := _machine(run):
        text += f" on {escape(machine)}"
    return text + "."


def results_section(run: Run, trained: TrainedModel) -> str:
    n = _run_numbers(run, trained)
    unit = loss_unit(run)
    tiles = [  # label, text, value (a tile is blank if it is not finite), note
        ("Best validation loss", f"{n.best:.4f}", n.best, f"{unit}, at step {format_count(n.best_step)}"),
        ("Final validation loss", f"{n.final:.4f}", n.final, _loss_in_other_units(n.final, run, trained) or unit),
        ("Final training loss", f"{n.train:.4f}", n.train, f"{unit}, as last logged"),
        ("Steps", format_count(n.step), n.step, f"{format_count(n.tokens)} tokens"),
        ("Training time", format_duration(n.seconds), n.seconds, ""),
        ("Speed", format_count(n.tokens_per_second), n.tokens_per_second, "tokens per second, median"),
        ("Parameters", format_size(n.parameters), n.parameters, f"{format_count(n.parameters)} trainable"),
    ]
    if (metric := run.selection.metric) != "val_loss":
        best = number(run.best[metric]) if run.best else math.nan
        step = number(run.best["step"]) if run.best else math.nan
        tiles[:2] = [(f"Best {escape(metric)}", f"{best:.4f}", best, f"at step {format_count(step)}")]
    if is_alignment(run):
        tiles[1:2] = alignment_tiles(run)  # the loss of a policy says nothing
    tiles += _changes(run)
    items = "".join(
        f"<div><dt>{label}</dt><dd>{text}<small>{note}</small></dd></div>\n"
        if math.isfinite(value)
        else f"<div><dt>{label}</dt><dd>–<small>not known yet</small></dd></div>\n"
        for label, text, value, note in tiles
    )
    content = f'<dl class="tiles">\n{items}</dl>'
    if machine := _machine(run):
        content += f'\n<p class="note" style="margin: 1.2rem 0 0">Machine: {escape(machine)}.</p>'
    word, _ = run_status(run)
    if word in ("diverged", "failed"):
        content += missing_note("An error stopped this run, such as a diverging loss. Its last checkpoint is intact.")
    elif word != "finished":
        content += missing_note(f"This run is {word}. The numbers are those up to its last logged step.")
    for alarm in run.alarms:
        content += missing_note(f"Alarm at step {format_count(alarm['step'])}: {alarm['message']}")
    if run.unreadable_lines:
        content += missing_note(
            f"Skipped {run.unreadable_lines} unreadable line(s) of metrics.jsonl and samples.jsonl."
        )
    return content


def _changes(run: Run) -> list[tuple[str, str, float, str]]:
    """Return tiles about what training has changed, for runs that were evaluated before their first step."""
    measured = [row for row in run.metrics if math.isfinite(number(row.get(PLAIN_TEXT_METRIC))) or row.get("step") == 0]
    if len(measured) < 2 or measured[0].get("step") != 0:
        return []
    first, last = measured[0], measured[-1]
    names = (
        ("Validation loss before", "val_loss", loss_unit(run)),
        ("Plain text", PLAIN_TEXT_METRIC, "bits per byte: forgetting"),
    )
    tiles = []
    for label, key, unit in names:
        before, after = number(first.get(key)), number(last.get(key))
        if math.isfinite(before):
            tiles.append((label, f"{before:.3f}", before, f"{unit}; {after:.3f} at the end"))
    return tiles


@dataclass(frozen=True)
class _RunNumbers:
    """The numbers of a run; NaN if not known. Losses in nats per token, time in seconds."""

    best: float
    best_step: float
    final: float
    train: float
    step: float
    tokens: float
    seconds: float
    tokens_per_second: float
    parameters: float


def _run_numbers(run: Run, trained: TrainedModel) -> _RunNumbers:
    best = best_evaluation(run.metrics)
    tokens, seconds = last_number(run.metrics, "tokens"), last_number(run.metrics, "time")
    rates = sorted(rate for row in run.metrics if math.isfinite(rate := number(row.get("tokens_per_second"))))
    rate = rates[len(rates) // 2] if rates else tokens / seconds if seconds > 0 else math.nan
    parameters = number(run.info.get("parameters"))
    if math.isnan(parameters) and trained.parameters is not None:
        parameters = trained.parameters
    return _RunNumbers(
        best=number(best["val_loss"]) if best else math.nan,
        best_step=number(best["step"]) if best else math.nan,
        final=last_number(run.metrics, "val_loss"),
        train=last_number(run.metrics, "loss"),
        step=last_number(run.metrics, "step"),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=rate,
        parameters=parameters,
    )


def _tokens_per_byte(run: Run) -> float:
    """Return validation tokens per UTF-8 byte, from `data` in run.json; NaN if that does not have the counts."""
    data = run.part("data")
    tokens, size = number(data.get("val_tokens")), number(data.get("val_bytes"))
    return tokens / size if size > 0 else math.nan


def _is_char(run: Run, trained: TrainedModel) -> bool:
    """Return whether a token is a character, by the saved tokenizer, else by the configuration."""
    return (trained.tokenizer_kind or run.options.get("tokenizer")) == "char"


def _loss_in_other_units(loss: float, run: Run, trained: TrainedModel) -> str:
    """Return a note with the loss as bits per byte and perplexity."""
    parts = []
    if _is_char(run, trained):
        parts.append("one token per character")
    if math.isfinite(tokens_per_byte := _tokens_per_byte(run)):
        parts.append(f"{loss * tokens_per_byte / math.log(2):.3f} bits per byte")
    if loss < 50:
        parts.append(f"perplexity {math.exp(loss):,.2f}")
    return ", ".join(parts)


def _machine(run: Run) -> str:
    machine = run.part("machine")
    cores = machine.get("cores")
    parts = [
        machine.get("gpu"),
        machine.get("processor"),
        f"{cores} core{'s' if cores != 1 else ''}" if cores else None,
    ]
    return ", ".join(str(part) for part in parts if part)
