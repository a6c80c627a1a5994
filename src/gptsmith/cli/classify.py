"""`gptsmith classify`: train a model with a task head on labeled texts, or label texts with one."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from gptsmith.cli.run_options import FLAT
from gptsmith.cli.train import train_or_resume
from gptsmith.cli.tune_options import TuneOptions, parse_tune
from gptsmith.errors import UsageError
from gptsmith.train.config import ClassifyConfig

BEGAN = time.monotonic()  # the command starts by loading this module: a budget of time counts from here


@dataclass(frozen=True)
class Classify(TuneOptions):
    """Train MODEL to label texts: a task head with delimiter and extract tokens, as in GPT-1.

    DATA: rows with a text and a label, two texts and a label, or a question with choices. A checkpoint is a directory
    that transformers loads as AutoModelForSequenceClassification.
    """

    predict: Path | None = None
    """Label the rows of this file with MODEL, a trained classifier, instead of training; prints a line of JSON each."""
    method: Annotated[ClassifyConfig, FLAT] = field(default_factory=ClassifyConfig)
    """task"""

    @property
    def needs_data(self) -> bool:
        return self.predict is None


def main(arguments: list[str]) -> int:
    chosen, overrides = parse_tune(Classify, ClassifyConfig, "classify", arguments)
    if chosen.predict is None:
        return train_or_resume(chosen, overrides, ["classify", *arguments], began=BEGAN, objective="classify")
    if chosen.data is not None or chosen.resume is not None:
        raise UsageError("--predict labels texts with a trained classifier; leave out DATA and --resume.")
    if others := sorted(overrides - {"predict", "init"}):
        raise UsageError(f"--{others[0].replace('_', '-')} has no effect with --predict: leave it out.")
    from gptsmith.evaluate.classifier import Classifier

    for row in Classifier.load(str(chosen.model)).label_file(chosen.predict):
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return 0
