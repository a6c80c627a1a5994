"""`gptsmith import`: convert a model from elsewhere to a model directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.cli.parser import parse
from gptsmith.export.transforms import ModelTransform


@dataclass(frozen=True)
class Import:
    """Import a model from elsewhere as a model directory, which every command and transformers can read."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A Hugging Face directory, a .gguf file, ORG/NAME or ORG/NAME@REVISION on the hub, or smollm2-135m."""
    out: Path
    """Directory to write; must not exist."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights. auto: as stored in the source (fp32 if it is quantized)."""
    change: Annotated[ModelTransform, tyro.conf.arg(name="")] = field(default_factory=ModelTransform)
    """changes to the model"""


def main(arguments: list[str]) -> int:
    chosen = parse(Import, "gptsmith import", arguments)

    from gptsmith.export.export import describe, export_directory

    model, dtype = export_directory(chosen.source, chosen.out, dtype=chosen.dtype, transform=chosen.change)
    print(describe(chosen.out, model, dtype))
    print(f'try  gptsmith generate {chosen.out} --prompt "..."')
    return 0
