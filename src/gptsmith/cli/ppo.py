"""`gptsmith ppo`: learn from a reward with a value model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.run_options import FLAT
from gptsmith.cli.tune_options import RewardedOptions, run_tuning
from gptsmith.train.config import PpoConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Ppo(RewardedOptions):
    """Train a model by a reward with PPO: a value model, and a KL penalty that keeps it close to where it starts.

    PROMPTS: a file with one prompt per line, rows with a prompt or messages, or task:NAME.
    """

    method: Annotated[PpoConfig, FLAT] = field(default_factory=PpoConfig)
    """reinforcement learning"""


def main(arguments: list[str]) -> int:
    return run_tuning(Ppo, PpoConfig, "ppo", arguments, began=BEGAN)
