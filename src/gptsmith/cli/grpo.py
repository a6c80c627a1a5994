"""`gptsmith grpo`: learn from a reward by comparing answers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.train import train_or_resume
from gptsmith.cli.tune_options import _FLAT, TuneOptions, parse_tune
from gptsmith.errors import UsageError
from gptsmith.train.config import GrpoConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Grpo(TuneOptions):
    """Train a model by a reward: its answers to a prompt are compared with each other (GRPO and its variants).

    PROMPTS: a file with one prompt per line, rows with a prompt or messages, or task:NAME.
    """

    method: Annotated[GrpoConfig, _FLAT] = field(default_factory=GrpoConfig)
    """reinforcement learning"""


def main(arguments: list[str]) -> int:
    chosen, overrides = parse_tune(Grpo, GrpoConfig, "grpo", arguments)
    if chosen.resume is None and not chosen.method.reward:
        raise UsageError("No reward given. Use: gptsmith grpo MODEL PROMPTS --reward module:function")
    return train_or_resume(chosen, overrides, ["grpo", *arguments], began=BEGAN, objective="grpo")
