"""`gptsmith bestofn`: keep the best of n answers by a reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.cli.parser import parse
from gptsmith.errors import UsageError
from gptsmith.train.best_of_n import BestOfNOptions


@dataclass(frozen=True)
class BestOfNCommand:
    """Sample n answers to each prompt, score them by a reward, and keep the best: best-of-n and rejection sampling.

    The same command continues after a stop. Options after -- are those of the command that --then runs:
    gptsmith bestofn MODEL PROMPTS --reward module:function --then sft -- --epochs 1
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """What answers: a run, a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    prompts: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPTS")]
    """A file or folder of rows, a text file with a prompt on each line, a named data set, task:NAME or
    reasoning-gym:NAME."""
    out: Path = Path("best.jsonl")
    """File for the best answers. All answers go into a file beside it that ends in .samples.jsonl."""
    options: tyro.conf.OmitArgPrefixes[BestOfNOptions] = field(default_factory=BestOfNOptions)
    """best of n"""
    then: Literal["sft"] | None = None
    """Fine-tune the model on the best answers."""


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, more = arguments[:at], arguments[at + 1 :]
    chosen = parse(BestOfNCommand, "gptsmith bestofn", own)
    if not chosen.options.reward:
        raise UsageError("No reward given. Use: gptsmith bestofn MODEL PROMPTS --reward module:function")
    if more and chosen.then is None:
        raise UsageError("options after -- belong to the command that --then runs; give --then sft.")

    from gptsmith.train.best_of_n import best_of_n

    result = best_of_n(chosen.model, chosen.prompts, chosen.out, chosen.options)
    print(result.summary())
    print(f"answers {result.path}")
    if chosen.then is None:
        return 0
    from gptsmith.cli.sft import main as sft

    return sft([chosen.model, str(result.path), *more])
