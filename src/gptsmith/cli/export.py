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
    "q6_k": "q6_k",
    "q5_k_m": "q5_k_m",
    "q4_k_m": "q4_k_m",
    "q4_0": "q4_0",
    "mxfp4": "mxfp4",
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
    dtype: Literal[
        "auto", "fp32", "bf16", "fp16", "f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "mxfp4"
    ] = "auto"
    """Type of the weights, in small or capital letters. hf: fp32, bf16 or fp16 (auto: as stored). gguf: f32, f16 or
    quantized: q8_0, q6_k, q5_k_m, q4_k_m, q4_0, mxfp4 (auto: f16)."""
    calibration: Path | None = None
    """Text file whose inputs to each layer weigh the errors of its quantized weights (gguf of 4 and 5 bits; default: a
    small built-in mixture)."""
    calibration_tokens: int | None = None
    """Number of tokens of that text to read (default: 16384); 0: weigh all inputs alike."""
    split_size: float | None = None
    """Split a GGUF file into parts of at most so many gigabytes of weights (default: one file)."""
    license: str | None = None
    """License for the model card, such as mit or apache-2.0 (default: the license of the model, if it is known)."""
    change: Annotated[ModelTransform, tyro.conf.arg(name="")] = field(default_factory=ModelTransform)
    """changes to the model"""


def main(arguments: list[str]) -> int:
    chosen = parse(Export, "gptsmith export", _with_small_types(arguments))
    if chosen.to == "gguf":
        return _write_gguf(chosen)
    dtype = {"f32": "fp32", "f16": "fp16"}.get(chosen.dtype, chosen.dtype)
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise UsageError(
            f"--to hf writes fp32, bf16 or fp16, not --dtype {dtype}. For quantized weights use --to gguf."
        )
    for name in ("calibration", "calibration_tokens", "split_size"):
        if getattr(chosen, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} requires --to gguf.")

    from gptsmith.export.export import describe, export_directory

    model, dtype = export_directory(
        chosen.model, chosen.out, dtype=dtype, license=chosen.license, transform=chosen.change
    )
    print(describe(chosen.out, model, dtype))
    return 0


def _with_small_types(arguments: list[str]) -> list[str]:
    """Return the arguments with types as they are often written, such as Q4_K_M, in small letters."""
    found = []
    for i, argument in enumerate(arguments):
        is_type = argument.startswith("--dtype=") or (i > 0 and arguments[i - 1] == "--dtype")
        found.append(argument.lower() if is_type else argument)
    return found


def _write_gguf(chosen: Export) -> int:
    dtype = _GGUF.get(chosen.dtype)
    if dtype is None:
        raise UsageError(f"--to gguf writes {', '.join(dict.fromkeys(_GGUF.values()))}, not --dtype {chosen.dtype}.")
    if chosen.out.suffix.lower() != ".gguf":
        raise UsageError(f"--out {chosen.out}: the name of a GGUF file must end in .gguf.")
    if chosen.split_size is not None and not 0 < chosen.split_size < 1e6:
        raise UsageError(f"--split-size must be a number of gigabytes above 0, not {chosen.split_size:g}.")

    from gptsmith.export.export import WEIGHTED_TYPES, describe, export_gguf, mmproj_path
    from gptsmith.quantize.calibration import TOKENS

    tokens = TOKENS if chosen.calibration_tokens is None else chosen.calibration_tokens
    if dtype not in WEIGHTED_TYPES and (chosen.calibration is not None or chosen.calibration_tokens):
        raise UsageError(f"--calibration has no use for --dtype {dtype}: it is for {', '.join(WEIGHTED_TYPES)}.")
    if tokens == 0 and chosen.calibration is not None:
        raise UsageError("--calibration has no use with --calibration-tokens 0.")
    model, paths = export_gguf(
        chosen.model,
        chosen.out,
        dtype=dtype,
        transform=chosen.change,
        calibration=chosen.calibration,
        calibration_tokens=tokens,
        part_bytes=None if chosen.split_size is None else round(chosen.split_size * 1e9),
    )
    print(describe(chosen.out, model, dtype, paths))
    if model.config.vision is not None:
        vision = mmproj_path(chosen.out)
        print(f"{vision}: vision tower and projector, {vision.stat().st_size / 1e6:,.1f} MB")
    return 0
