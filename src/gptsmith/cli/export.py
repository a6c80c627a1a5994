"""`gptsmith export`: write a model for other programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptsmith.cli.parser import parse
from gptsmith.errors import UsageError
from gptsmith.export.transforms import ModelTransform

if TYPE_CHECKING:
    from gptsmith.formats.gguf import GgufType

_GGUF: dict[str, GgufType] = {
    "auto": "f16",
    "fp32": "f32",
    "fp16": "f16",
    "f32": "f32",
    "f16": "f16",
    "q8_0": "q8_0",
    "q4_0": "q4_0",
}


@dataclass(frozen=True)
class Export:
    """Export a model for other programs: a Hugging Face directory with a model card, or a GGUF file for llama.cpp."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run (its best checkpoint), a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    out: Path
    """Directory (hf) or .gguf file to write; must not exist."""
    to: Literal["hf", "gguf"] = "hf"
    """hf: a Hugging Face directory, for transformers, vLLM and others. gguf: a file for llama.cpp and others."""
    dtype: Literal["auto", "fp32", "bf16", "fp16", "f32", "f16", "q8_0", "q4_0"] = "auto"
    """Type of the weights. hf: fp32, bf16 or fp16 (auto: as stored). gguf: f32, f16, q8_0 or q4_0 (auto: f16)."""
    license: str | None = None
    """License for the model card, such as mit or apache-2.0 (default: the license of the model, if it is known)."""
    change: Annotated[ModelTransform, tyro.conf.arg(name="")] = field(default_factory=ModelTransform)
    """changes to the model"""


def main(arguments: list[str]) -> int:
    chosen = parse(Export, "gptsmith export", arguments)
    if chosen.to == "gguf":
        return _write_gguf(chosen)
    dtype = {"f32": "fp32", "f16": "fp16"}.get(chosen.dtype, chosen.dtype)
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise UsageError(
            f"--to hf writes fp32, bf16 or fp16, not --dtype {dtype}. For quantized weights use --to gguf."
        )

    from gptsmith.export.export import describe, export_directory

    model, dtype = export_directory(
        chosen.model, chosen.out, dtype=dtype, license=chosen.license, transform=chosen.change
    )
    print(describe(chosen.out, model, dtype))
    return 0


def _write_gguf(chosen: Export) -> int:
    dtype = _GGUF.get(chosen.dtype)
    if dtype is None:
        raise UsageError(f"--to gguf writes f32, f16, q8_0 or q4_0, not --dtype {chosen.dtype}.")
    if chosen.out.suffix.lower() != ".gguf":
        raise UsageError(f"--out {chosen.out}: the name of a GGUF file must end in .gguf.")

    from gptsmith.export.export import describe, export_gguf, mmproj_path

    model = export_gguf(chosen.model, chosen.out, dtype=dtype, transform=chosen.change)
    print(describe(chosen.out, model, dtype))
    if model.config.vision is not None:
        eyes = mmproj_path(chosen.out)
        print(f"{eyes}: vision tower and projector, {eyes.stat().st_size / 1e6:,.1f} MB")
    return 0
