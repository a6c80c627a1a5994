"""`gptsmith reward`: train a reward model on preferences."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.train import train_or_resume
from gptsmith.cli.tune_options import _FLAT, TuneOptions, parse_tune
from gptsmith.train.config import RewardConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Reward(TuneOptions):
    """Train a reward model, which scores answers, on preferences: which of two answers is better.

    The run's checkpoints are Hugging Face sequence-classification directories with one label. `ppo`, `grpo` and
    `bestofn` take the run as --reward.
    """

    method: Annotated[RewardConfig, _FLAT] = field(default_factory=RewardConfig)
    """reward model"""


def main(arguments: list[str]) -> int:
    chosen, overrides = parse_tune(Reward, RewardConfig, "reward", arguments)
    return train_or_resume(chosen, overrides, ["reward", *arguments], began=BEGAN, objective="reward")
