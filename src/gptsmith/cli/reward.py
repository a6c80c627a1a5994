"""`gptsmith reward`: train a reward model on preferences."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.run_options import FLAT
from gptsmith.cli.tune_options import TuneOptions, run_tuning
from gptsmith.train.config import RewardConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Reward(TuneOptions):
    """Train a reward model, which scores answers, on preferences: which of two answers is better.

    The run's checkpoints are Hugging Face sequence-classification directories with one label. `ppo`, `grpo` and
    `bestofn` take the run as --reward.
    """

    method: Annotated[RewardConfig, FLAT] = field(default_factory=RewardConfig)
    """reward model"""


def main(arguments: list[str]) -> int:
    return run_tuning(Reward, RewardConfig, "reward", arguments, began=BEGAN)
