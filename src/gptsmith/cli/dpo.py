"""`gptsmith dpo`: train a model on preferences, without a reward model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.run_options import FLAT
from gptsmith.cli.tune_options import TuneOptions, run_tuning
from gptsmith.train.config import DpoConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Dpo(TuneOptions):
    """Train a model on preferences, without a reward model: DPO and its relatives.

    DATA: rows with a prompt, a chosen and a rejected answer, rankings of answers, or (with --loss kto) answers rated
    good or bad. The model is compared with a reference, by default itself at the start. Default learning rates are a
    tenth of those of sft.
    """

    method: Annotated[DpoConfig, FLAT] = field(default_factory=DpoConfig)
    """preferences"""


def main(arguments: list[str]) -> int:
    return run_tuning(Dpo, DpoConfig, "dpo", arguments, began=BEGAN)
