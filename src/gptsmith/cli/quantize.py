"""`gptsmith quantize`: quantize the weights of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptsmith.cli.parser import parse
from gptsmith.errors import TokenizerError, UsageError
from gptsmith.log import note

if TYPE_CHECKING:
    from gptsmith.model.transformer import Transformer


@dataclass(frozen=True)
class Quantize:
    """Quantize the weights of a model to 8 or 4 bits, and measure the perplexity before and after."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run (its best checkpoint), a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    out: Path
    """Directory to write; must not exist."""
    bits: Literal[8, 4] = 8
    """8: nearly lossless. 4: half the size, with some loss."""
    text: Path | None = None
    """Text file to measure perplexity on (default: Python's documentation)."""
    tokens: int = 8192
    """Number of tokens of the text to measure on; 0: do not measure."""


def main(arguments: list[str]) -> int:
    chosen = parse(Quantize, "gptsmith quantize", arguments)
    if chosen.out.exists():
        raise UsageError(f"--out {chosen.out} already exists. Choose another directory.")
    if chosen.tokens < 0:
        raise UsageError(f"--tokens must be 0 or more, not {chosen.tokens}.")

    from gptsmith.checkpoint import save_checkpoint
    from gptsmith.loading import load_model
    from gptsmith.model.quantized import quantize

    model, tokenizer = load_model(chosen.model, quantize="none")
    ids: list[int] = []
    if chosen.tokens:
        from gptsmith.evaluate.text import perplexity

        text = _text(chosen.text)
        try:
            ids = tokenizer.encode(text[: 20 * chosen.tokens])[: chosen.tokens]
        except TokenizerError:
            if chosen.text is not None:
                raise
            note("note: perplexity not measured: the tokenizer lacks characters of the default text. Use --text FILE.")
    before = perplexity(model, ids, prefix=tokenizer.prefix_ids) if ids else None
    size = _size(model)
    quantize(model, chosen.bits)
    save_checkpoint(chosen.out, model, tokenizer)
    print(f"{chosen.out}: {chosen.bits} bits, {size / 1e6:,.1f} MB -> {_size(model) / 1e6:,.1f} MB")
    if before is not None:
        after = perplexity(model, ids, prefix=tokenizer.prefix_ids)
        change = f"{100 * (after / before - 1):+.2f}%"
        print(f"perplexity {before:.3f} before, {after:.3f} after ({change}), on {len(ids):,} tokens")
    return 0


def _size(model: Transformer) -> int:
    from gptsmith.model.quantized import quantized_state

    return sum(int(tensor.nbytes) for tensor in quantized_state(model).values())


def _text(path: Path | None) -> str:
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {path} cannot be read: {error}.") from None
