"""From text to batches: sources of text, memory-mapped token shards, and a resumable loader. No torch in here."""

from __future__ import annotations

from gptsmith.data.loader import Batch, TokenLoader, whole_split_batches
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Dataset, TokenSplit, open_dataset
from gptsmith.data.sources import Piece, Source, open_source

__all__ = [
    "Batch",
    "Dataset",
    "Piece",
    "Source",
    "TokenLoader",
    "TokenSplit",
    "open_dataset",
    "open_source",
    "prepare",
    "whole_split_batches",
]
