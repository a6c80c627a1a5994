"""Options of `gptsmith eval` and `compare` for texts, and their tables."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from gptsmith.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from gptsmith.data.sources import Source
    from gptsmith.evaluate.text import TextResult
    from gptsmith.model.transformer import Transformer
    from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextEvaluation:
    data: tuple[str, ...] = field(default=())
    """Text to measure loss, perplexity and bits per byte on: a file, a folder, rows, a named corpus. Several make a
    table."""
    field: str = "text"
    """Field of rows with the text."""
    context: int | None = None
    """Tokens of a window (default: the model's context)."""
    stride: int | None = None
    """How many tokens further on the next window begins; at most the context (default: half of it)."""
    prefix: Literal["first", "every"] = "first"
    """Where the beginning-of-sequence token stands, if the tokenizer has one. first: before the text. every: before
    each window."""
    join: bool = False
    """Score documents (rows, files of a folder) as one text with separators between them, as in training, instead of
    each on its own."""
    per_document: bool = False
    """Also show each document."""
    positions: bool = False
    """Also show the loss by the place of a token in its context."""
    induction: bool = False
    """Also measure how well the model copies random tokens that it has seen once."""


def open_texts(chosen: TextEvaluation) -> list[Source]:
    """Open the texts, so that a wrong name is found before the model is loaded."""
    from gptsmith.data.sources import open_source, refuse_useless_field

    sources = [open_source(text, field=chosen.field) for text in chosen.data]
    if sources:
        refuse_useless_field(chosen.field, *sources)
    for name in ("context", "stride"):
        if not sources and getattr(chosen, name) is not None:
            raise UsageError(f"--{name} has no effect without --data: leave it out.")
    return sources


def measure_texts(
    model: Transformer, tokenizer: Tokenizer, sources: Sequence[Source], chosen: TextEvaluation
) -> dict[str, Any]:
    """Measure the texts, print a table, and return the results as plain data."""
    from gptsmith.evaluate.text import TextOptions, evaluate_texts, induction

    options = TextOptions(chosen.context, chosen.stride, chosen.prefix, chosen.join)
    results = evaluate_texts(model, tokenizer, sources, options=options, per_document=chosen.per_document)
    if results:
        show_texts(results, chosen)
    record: dict[str, Any] = {}
    if results:
        settings = {"prefix": chosen.prefix, "join": chosen.join}
        record["texts"] = [result.to_json() | settings for result in results]
    if chosen.induction:
        record["induction"] = copied = induction(model, tokenizer)
        print(
            f"induction: {copied['accuracy']:.1%} of {copied['length']:.0f} random tokens copied "
            f"({copied['accuracy_low']:.1%} to {copied['accuracy_high']:.1%}); "
            f"loss {copied['first_loss']:.3f} at first, {copied['second_loss']:.3f} when repeated"
        )
    return record


def show_texts(results: list[TextResult], chosen: TextEvaluation) -> None:
    rows = [["text", "bytes", "tokens", "loss", "perplexity", "bits per byte", "95% interval"]]
    for each in results:
        low, high = each.values.get("bits_per_byte_low"), each.values.get("bits_per_byte_high")
        rows.append(
            [
                each.name,
                f"{each.bytes:,}",
                f"{each.tokens:,}",
                f"{each.loss:.4f}",
                f"{each.perplexity:,.3f}",
                f"{each.bits_per_byte:.4f}",
                "too short" if low is None or high is None else f"{low:.4f} to {high:.4f}",
            ]
        )
    print_table(rows)
    for each in results:
        start = f", after {' '.join(each.start)}" if each.start else ""
        documents = f"{each.documents:,} documents, " if each.documents > 1 else ""
        print(f"{each.name}: {documents}windows of {each.context:,} tokens, stride {each.stride:,}{start}")
        if score := each.in_context:
            interval = f" ({score['score_low']:.3f} to {score['score_high']:.3f})" if "score_low" in score else ""
            print(f"  in-context score (loss at token 500 minus loss at token 50): {score['score']:.3f}{interval}")
        if chosen.positions:
            print("  loss by the place of the token in its context:")
            print_table(
                [["  tokens", "loss"]]
                + [[f"  {a}" if a == b else f"  {a}-{b}", f"{loss:.4f}"] for a, b, loss, _ in each.positions]
            )
        if chosen.per_document:
            lines = [["  document", "bytes", "tokens", "loss", "bits per byte"]]
            for one in each.per_document:
                loss = "-" if one.loss is None else f"{one.loss:.4f}"
                bits = "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"
                lines.append([f"  {one.where}", f"{one.bytes:,}", f"{one.tokens:,}", loss, bits])
            print_table(lines)


def print_table(rows: list[list[str]]) -> None:
    """Print rows in columns: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
