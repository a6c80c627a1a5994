"""`gptsmith distill`: train a student to write as a teacher does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.run_options import FLAT
from gptsmith.cli.tune_options import TuneOptions, run_tuning
from gptsmith.errors import UsageError
from gptsmith.train.config import DistillConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Distill(TuneOptions):
    """Train MODEL, the student, to predict as a teacher with the same vocabulary does.

    On the answers in DATA it minimizes the divergence from the teacher's predictions; with --on-policy, on its own
    answers to the prompts in DATA.
    """

    method: Annotated[DistillConfig, FLAT] = field(default_factory=DistillConfig)
    """distillation"""

    def check(self, command: str) -> None:
        if self.method.teacher is None:
            raise UsageError(f"No teacher given. Use: gptsmith {command} STUDENT DATA --teacher MODEL")


def main(arguments: list[str]) -> int:
    return run_tuning(Distill, DistillConfig, "distill", arguments, began=BEGAN)
