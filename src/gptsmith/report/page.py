"""The report: one HTML file that contains everything it shows and loads nothing from the network."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from gptsmith.report.alignment import is_alignment, reward_section
from gptsmith.report.attention import attention_section, mask_section
from gptsmith.report.configuration import configuration_section
from gptsmith.report.evaluation import evaluation_sections
from gptsmith.report.html import escape, html_page
from gptsmith.report.losses import loss_section
from gptsmith.report.predictions import predictions_section
from gptsmith.report.results import results_section, run_status, summary
from gptsmith.report.samples import sample_opening, samples_section
from gptsmith.report.tasks import tasks_section
from gptsmith.report.trained_model import FALLBACK_TEXT, TrainedModel, inspect_trained_model
from gptsmith.run_directory import Run, read_run
from gptsmith.storage import write_text

MAX_MASK_CHARACTERS = 12


def write_report(run_directory: Path, *, attention_text: str | None = None) -> Path:
    """Write `run_directory`/report.html and return its path.

    Works at any time during a run: the report says what is not available yet.
    attention_text: the text whose attention is drawn; by default the start of a sample.
    Raises GptsmithError if the directory is not a run or cannot be written, and TokenizerError for an
    attention_text that the run's tokenizer cannot encode.
    """
    run = read_run(Path(run_directory))
    trained = inspect_trained_model(run, attention_text)
    text = attention_text or (trained.attention and "".join(trained.attention.tokens)) or sample_opening(run)
    page = _page(run, trained, (text or FALLBACK_TEXT)[:MAX_MASK_CHARACTERS])
    path = run.directory / "report.html"
    write_text(path, page.encode("utf-8", "replace").decode())  # lone surrogates cannot be encoded
    return path


def _page(run: Run, trained: TrainedModel, mask_text: str) -> str:
    predictions, tasks = predictions_section(run), tasks_section(run)
    sections = [
        ("results", "Results", results_section(run, trained)),
        ("reward", "Reward", reward_section(run)) if is_alignment(run) else ("loss", "Loss", loss_section(run)),
        *((("predictions", "Predictions", predictions),) if predictions else ()),
        *((("tasks", "Tasks", tasks),) if tasks else ()),
        *evaluation_sections(run),
        ("samples", "Samples", samples_section(run)),
        ("mask", "The causal mask", mask_section(mask_text)),
        ("attention", "Attention", attention_section(trained)),
        ("configuration", "Configuration", configuration_section(run)),
    ]
    word, tone = run_status(run)
    return html_page(
        title=f"{run.name} · gptsmith training report",
        eyebrow="gptsmith training report",
        heading=f'{escape(run.name)} <span class="badge {tone}">{word}</span>',
        lead=summary(run, trained),
        sections=sections,
        footer=_dates(run),
        version=run.info.get("version", ""),
    )


def _dates(run: Run) -> str:
    parts = [
        f"{word} {_format_time(run.info[key])}"
        for key, word in (("started", "Started"), ("ended", "ended"))
        if run.info.get(key)
    ]
    parts.append(f"report written {_format_time(datetime.now().astimezone().isoformat())}")
    if version := run.info.get("version"):
        parts.append(f"gptsmith {escape(version)}")
    return " · ".join(parts)


def _format_time(value: Any) -> str:
    """Format an ISO 8601 timestamp as a local time; return anything else as text."""
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return escape(value)
