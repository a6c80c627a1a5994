"""`gptsmith vision`: add a vision tower to a text model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from gptsmith.cli.parser import parse_subcommand
from gptsmith.export.vision_options import VisionOptions


@dataclass(frozen=True)
class Init:
    """Put an untrained vision tower and projector on a text model, and write it as a model directory.

    Train it on pictures with words: gptsmith sft OUT captions.jsonl.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run, a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    out: Path
    """Directory to write; must not exist."""
    tower: Annotated[VisionOptions, tyro.conf.arg(name="")] = field(default_factory=VisionOptions)
    """tower"""


def main(arguments: list[str]) -> int:
    chosen: Init = parse_subcommand({"init": Init}, "gptsmith vision", arguments, "Add a vision tower to a text model.")

    from gptsmith.export.vision import add_vision
    from gptsmith.formats.hf import read_config

    out = add_vision(chosen.model, chosen.out, **vars(chosen.tower))
    vision = read_config(out).vision
    assert vision is not None
    print(f"{out}: reads pictures of {vision.image_size}×{vision.image_size} pixels, {vision.tokens} tokens each")
    print(f"try  gptsmith sft {out} captions.jsonl")
    return 0
