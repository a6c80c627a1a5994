"""`gptsmith distill`: train a student to write as a teacher does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.train import train_or_resume
from gptsmith.cli.tune_options import _FLAT, TuneOptions, parse_tune
from gptsmith.errors import UsageError
from gptsmith.train.config import DistillConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Distill(TuneOptions):
    """Train MODEL, the student, to predict as a teacher with the same vocabulary does.

    On the answers in DATA it minimizes the divergence from the teacher's predictions; with --on-policy, on its own
    answers to the prompts in DATA.
    """

    method: Annotated[DistillConfig, _FLAT] = field(default_factory=DistillConfig)
    """distillation"""


def main(arguments: list[str]) -> int:
    chosen, overrides = parse_tune(Distill, DistillConfig, "distill", arguments)
    check(chosen)
    return train_or_resume(chosen, overrides, ["distill", *arguments], began=BEGAN, objective="distill")


def check(chosen: TuneOptions) -> None:
    """Raise UsageError where a new run has no teacher."""
    assert isinstance(chosen.method, DistillConfig)
    if chosen.resume is None and chosen.method.teacher is None:
        raise UsageError("No teacher given. Use: gptsmith distill STUDENT DATA --teacher MODEL")
