"""`gptsmith import`: a model from elsewhere as a model directory of this package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.export.transforms import ModelTransform


@dataclass(frozen=True)
class Import:
    """Write a model from elsewhere as a model directory, which every command and transformers read."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A Hugging Face directory, a .gguf file, org/name on the hub (also org/name@revision), or smollm2-135m."""
    out: Path
    """The directory to write (must not exist)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What to store weights in. auto: as they are stored there (fp32 for a quantized file)."""
    change: Annotated[ModelTransform, tyro.conf.arg(name="")] = field(default_factory=ModelTransform)


def main(arguments: list[str]) -> int:
    chosen = tyro.cli(Import, prog="gptsmith import", args=arguments)

    from gptsmith.export.export import describe, export_directory

    model, dtype = export_directory(chosen.source, chosen.out, dtype=chosen.dtype, transform=chosen.change)
    print(describe(chosen.out, model, dtype))
    print(f'try  gptsmith generate {chosen.out} --prompt "..."')
    return 0
