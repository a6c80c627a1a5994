"""`gptsmith report`: rewrite report.html of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptsmith.cli.parser import parse


@dataclass(frozen=True)
class Report:
    """Rewrite RUN/report.html from the configuration, metrics, samples and best checkpoint of the run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    text: str | None = None
    """Short text for the attention maps (default: the start of a sample)."""


def main(arguments: list[str]) -> int:
    chosen = parse(Report, "gptsmith report", arguments)
    from gptsmith.report import write_report

    print(write_report(chosen.run, attention_text=chosen.text))
    return 0
