"""`gptsmith quantize`: quantize the weights of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptsmith.cli.eval import refuse_unwritable, write_record
from gptsmith.cli.parser import parse
from gptsmith.errors import UsageError

if TYPE_CHECKING:
    from gptsmith.model.quantized import Bits
    from gptsmith.model.transformer import Transformer
    from gptsmith.quantize.report import Size
    from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class Quantize:
    """Quantize the weights of a model to 4 to 8 bits, and compare it with the full model: perplexity, KL divergence,
    agreement on the most likely token, and size. Run an interrupted command again to continue."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run (its best checkpoint), a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    out: Path | None = None
    """Directory to write; must not exist. Not needed to ask for a recommendation with --memory."""
    bits: Literal[8, 6, 5, 4] | None = None
    """8: nearly lossless (default). 4: half the size. Below 8, matrices that matter more get more bits."""
    memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """Memory that the weights may take, such as 100MB: recommends a number of bits, and uses it if there is no
    --bits."""
    calibration: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file for whose words the rounding is chosen (default: a built-in mixture). none: round each weight to the
    nearest, all matrices to the same width; fast."""
    calibration_tokens: int = 16384
    """Number of tokens of the calibration text to use."""
    text: Path | None = None
    """Text file to measure perplexity on (default: Python's documentation)."""
    tokens: int = 8192
    """Number of tokens of the text to measure on; 0: do not measure."""
    json: Path | None = None
    """Write the report to this file."""


def main(arguments: list[str]) -> int:
    chosen = parse(Quantize, "gptsmith quantize", arguments)
    _check(chosen)

    from gptsmith.loading import load_model
    from gptsmith.quantize.directory import read_text
    from gptsmith.quantize.report import parse_bytes, planned_sizes

    memory = None if chosen.memory is None else parse_bytes(chosen.memory, "--memory")
    if chosen.tokens and chosen.out is not None:
        read_text(chosen.text)  # refuse one that cannot be read before the model is loaded
    model, tokenizer = load_model(chosen.model, quantize="none")
    record: dict[str, Any] = {"model": chosen.model}
    bits: Bits = chosen.bits or 8
    if memory is not None:
        sizes = planned_sizes(model, spare=0.0 if chosen.calibration == "none" else 0.5)
        bits = _recommend(chosen, model, sizes, memory, record)
    if chosen.out is not None:
        record |= _quantize(chosen, chosen.out, model, tokenizer, bits)
    if chosen.json is not None:
        write_record(chosen.json, record)
    return 0


def _check(chosen: Quantize) -> None:
    if chosen.out is None and chosen.memory is None:
        raise UsageError("--out is missing: the directory to write.")
    if chosen.out is not None and chosen.out.exists():
        raise UsageError(f"--out {chosen.out} already exists. Choose another directory.")
    if chosen.tokens < 0:
        raise UsageError(f"--tokens must be 0 or more, not {chosen.tokens}.")
    if chosen.calibration == "none" and chosen.calibration_tokens != Quantize.calibration_tokens:
        raise UsageError("--calibration-tokens has no effect with --calibration none: leave it out.")
    if chosen.json is not None:
        refuse_unwritable(chosen.json)


def _recommend(chosen: Quantize, model: Transformer, sizes: list[Size], memory: int, record: dict[str, Any]) -> Bits:
    """Print what fits in memory, and return the number of bits to use."""
    from gptsmith.quantize.report import recommended

    best = recommended(sizes, memory)
    for size in sizes[::-1]:
        fits = "recommended" if size == best else "fits" if size.memory <= memory else "too large"
        print(f"{size.bits} bits: {_size(size.memory)} in memory, {_size(size.file)} on disk: {fits}")
    record |= {"sizes": [asdict(size) for size in sizes], "recommended": None if best is None else best.bits}
    if best is None:
        least = _size(sizes[0].memory)
        raise UsageError(f"--memory {chosen.memory} is too little for this model: 4 bits take {least}.")
    if chosen.bits is None:
        return best.bits
    wanted = next(size for size in sizes if size.bits == chosen.bits)
    if wanted.memory > memory:
        raise UsageError(
            f"--bits {chosen.bits} takes {_size(wanted.memory)}, more than --memory {chosen.memory}. Use --bits "
            f"{best.bits}."
        )
    return chosen.bits


def _quantize(chosen: Quantize, out: Path, model: Transformer, tokenizer: Tokenizer, bits: Bits) -> dict[str, Any]:
    """Quantize the model, write it, print a report, and return it as plain data."""
    from gptsmith.quantize.directory import quantize
    from gptsmith.quantize.widths import count_widths

    made = quantize(
        model,
        tokenizer,
        out,
        bits=bits,
        calibration=chosen.calibration,
        calibration_tokens=chosen.calibration_tokens,
        text=chosen.text,
        tokens=chosen.tokens,
    )
    print(
        f"{out}: {bits} bits, {_size(made.bytes_fp32)} in fp32 -> {_size(made.bytes)}, "
        f"{_size(made.bytes_in_memory)} in memory"
    )
    counts = count_widths(made.widths.values())
    if len(counts) > 1:
        print("matrices of the layers: " + ", ".join(f"{n:,} in {width} bits" for width, n in counts.items()))
    if (c := made.comparison) is not None:
        print(f"perplexity {c.before:.3f} before, {c.after:.3f} after ({100 * c.change:+.2f}%), on {c.tokens:,} tokens")
        agreement = f"the same most likely token in {100 * c.agreement:.2f}% of places"
        print(f"KL divergence {c.divergence:.5f} nats, {agreement}")
    return made.record()


def _size(size: int) -> str:
    return f"{size / 1e3:,.0f} KB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
