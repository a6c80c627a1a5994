"""`gptsmith grpo`: learn from a reward by comparing answers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.run_options import FLAT
from gptsmith.cli.tune_options import RewardedOptions, run_tuning
from gptsmith.train.config import GrpoConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Grpo(RewardedOptions):
    """Train a model by a reward: its answers to a prompt are compared with each other (GRPO and its variants).

    PROMPTS: a file with one prompt per line, rows with a prompt or messages, or task:NAME.
    """

    method: Annotated[GrpoConfig, FLAT] = field(default_factory=GrpoConfig)
    """reinforcement learning"""


def main(arguments: list[str]) -> int:
    return run_tuning(Grpo, GrpoConfig, "grpo", arguments, began=BEGAN)
