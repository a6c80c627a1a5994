"""`gptsmith ppo`: learn from a reward with a value model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.train import train_or_resume
from gptsmith.cli.tune_options import _FLAT, TuneOptions, parse_tune
from gptsmith.errors import UsageError
from gptsmith.train.config import PpoConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Ppo(TuneOptions):
    """Train a model by a reward with PPO: a value model, and a KL penalty that keeps it close to where it starts.

    PROMPTS: a file with one prompt per line, rows with a prompt or messages, or task:NAME.
    """

    method: Annotated[PpoConfig, _FLAT] = field(default_factory=PpoConfig)
    """reinforcement learning"""


def main(arguments: list[str]) -> int:
    chosen, overrides = parse_tune(Ppo, PpoConfig, "ppo", arguments)
    if chosen.resume is None and not chosen.method.reward:
        raise UsageError("No reward given. Use: gptsmith ppo MODEL PROMPTS --reward module:function")
    return train_or_resume(chosen, overrides, ["ppo", *arguments], began=BEGAN, objective="ppo")
