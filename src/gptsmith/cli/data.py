"""`gptsmith data`: named corpora."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptsmith.cli.parser import parse_subcommand
from gptsmith.errors import UsageError
from gptsmith.storage import atomic_file


@dataclass(frozen=True)
class List:
    """List the named corpora with their size, state, description and license."""


@dataclass(frozen=True)
class Get:
    """Fetch a named corpus, if it is not cached yet, and print its path."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """A name from `gptsmith data list`."""
    out: Path | None = None
    """Also copy the text to this file, which must not exist."""


def main(arguments: list[str]) -> int:
    chosen: List | Get = parse_subcommand(
        {"list": List, "get": Get},
        "gptsmith data",
        arguments,
        "List and fetch named corpora. They are fetched on first use, verified and cached.",
    )
    from gptsmith.data.corpora import CORPORA, corpus_path

    if isinstance(chosen, List):
        for corpus in CORPORA.values():
            state = "cached" if corpus.cached else "not prepared"
            size = f"{corpus.size / 1e6:,.1f} MB"
            print(f"{corpus.name:16} {size:>9}  {state:13} {corpus.description}. License: {corpus.license}.")
        return 0
    if chosen.out is not None and chosen.out.exists():
        raise UsageError(f"{chosen.out} already exists. Choose another --out.")
    path = corpus_path(chosen.name)
    if chosen.out is not None:
        with open(path, "rb") as source, atomic_file(chosen.out) as copy:
            shutil.copyfileobj(source, copy)
        path = chosen.out
    print(path)
    return 0
