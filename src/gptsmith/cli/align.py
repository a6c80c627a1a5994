"""`gptsmith align demo`: the whole InstructGPT pipeline in one command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.cli.parser import parse


@dataclass(frozen=True)
class Align:
    """Make an aligned model from raw text: pretraining, fine-tuning, a reward model and PPO, in one command.

    OUT gets a run for each stage, the data, and report.html, which compares base, fine-tuned and aligned answers.
    """

    what: Annotated[tyro.conf.Positional[Literal["demo"]], tyro.conf.arg(metavar="demo")]
    """demo: an assistant that is asked about films, from movie reviews."""
    budget: str = "30m"
    """Time for everything (10m, 1h)."""
    out: Path = Path("runs/align")
    """Folder of the runs; must be empty or absent."""
    seed: int = 1337
    """Seed of everything."""


def main(arguments: list[str]) -> int:
    options = parse(Align, "gptsmith align", arguments)
    from gptsmith.align import align_demo

    align_demo(options.out, budget=options.budget, seed=options.seed)
    return 0
