"""`gptsmith tokenizer`: train one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from gptsmith.errors import UsageError


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a tokenizer on a text and save it as tokenizer.json, which transformers reads as well."""

    data: tyro.conf.Positional[str]
    """A text file, a folder, .jsonl[.gz|.zst], .parquet, or a named corpus."""
    out: Path
    """The directory to write."""
    kind: Literal["bpe", "char"] = "bpe"
    """bpe: byte-level, any text encodes. char: a token for each character of the text."""
    vocab_size: int = 4096
    """Number of tokens of a bpe tokenizer."""
    unknown: bool = False
    """Give a char tokenizer a token for characters it has not seen."""
    field: str = "text"
    """The field that holds the text, for JSONL and parquet."""


def main(arguments: list[str]) -> int:
    chosen: TrainTokenizer = tyro.extras.subcommand_cli_from_dict(
        {"train": TrainTokenizer}, prog="gptsmith tokenizer", args=arguments, description="Make tokenizers."
    )
    from gptsmith.data.sources import open_source
    from gptsmith.tokenizer import train_bpe, train_char

    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        raise UsageError(f"{chosen.out} exists and is not an empty directory. Choose another --out.")
    source = open_source(chosen.data, field=chosen.field)
    texts = (chunk.text for chunk in source.pieces())
    if chosen.kind == "bpe":
        tokenizer = train_bpe(texts, chosen.vocab_size)
    else:
        tokenizer = train_char(texts, unknown=chosen.unknown)
    tokenizer.save(chosen.out)
    print(f"{chosen.out}/tokenizer.json: {tokenizer.vocab_size:,} tokens")
    return 0
