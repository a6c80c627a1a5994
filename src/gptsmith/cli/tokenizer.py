"""`gptsmith tokenizer`: train a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.cli.parser import parse_subcommand
from gptsmith.errors import UsageError


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a tokenizer on a text and save it as tokenizer.json, which transformers can also read."""

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA ...")]
    """Files of text or rows (.jsonl, .json, .csv, .parquet, .arrow; also .gz, .zst), folders, or named corpora
    (`gptsmith data list`)."""
    out: Path
    """Directory to write, which must be empty or not exist."""
    kind: Literal["bpe", "char"] = "bpe"
    """bpe: byte-level byte-pair encoding, which can encode any text. char: one token per character of the text."""
    vocab_size: int = 4096
    """Vocabulary size of a bpe tokenizer."""
    unknown: bool = False
    """Add a token for unknown characters to a char tokenizer."""
    field: str = "text"
    """Field or column with the text, for rows of JSON, CSV, Parquet and Arrow."""


def main(arguments: list[str]) -> int:
    chosen: TrainTokenizer = parse_subcommand(
        {"train": TrainTokenizer}, "gptsmith tokenizer", arguments, "Train tokenizers."
    )
    from gptsmith.data.sources import open_source, refuse_useless_field
    from gptsmith.log import note
    from gptsmith.tokenizer import train_bpe, train_char
    from gptsmith.train.text import read_texts

    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        raise UsageError(f"{chosen.out} exists and is not an empty directory. Choose another --out.")
    source = open_source(chosen.data, field=chosen.field)
    refuse_useless_field(chosen.field, source)
    texts = read_texts(source)
    if chosen.kind == "bpe":
        tokenizer = train_bpe(texts, chosen.vocab_size)
    else:
        tokenizer = train_char(texts, unknown=chosen.unknown)
    if skipped := source.skipped_rows.describe():
        note(f"{source.spec}: {skipped}")
    tokenizer.save(chosen.out)
    print(f"{chosen.out}/tokenizer.json: {tokenizer.vocab_size:,} tokens")
    return 0
