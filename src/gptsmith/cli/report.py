"""`gptsmith report`: write a run's report.html again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Report:
    """Write RUN/report.html from the run's configuration, metrics, samples and best checkpoint."""

    run: tyro.conf.Positional[Path]
    """A run directory."""
    text: str | None = None
    """The short text over which attention is drawn (default: the start of a sample)."""


def main(arguments: list[str]) -> int:
    chosen = tyro.cli(Report, prog="gptsmith report", args=arguments)
    from gptsmith.report import write_report

    print(write_report(chosen.run, attention_text=chosen.text))
    return 0
