"""`gptsmith sft`: fine-tune a model on conversations or on prompts with completions."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from gptsmith.cli.run_options import FLAT
from gptsmith.cli.tune_options import TuneOptions, run_tuning
from gptsmith.train.config import SftConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Sft(TuneOptions):
    """Fine-tune a model on conversations or on prompts with completions (supervised fine-tuning).

    Only what the assistant says is trained on, its end-of-turn token included. The run directory gets checkpoints,
    metrics, samples and report.html; generate, chat, serve and export take it as they take any model.
    """

    method: Annotated[SftConfig, FLAT] = field(default_factory=SftConfig)
    """fine-tuning"""


def main(arguments: list[str]) -> int:
    return run_tuning(Sft, SftConfig, "sft", arguments, began=BEGAN)
