"""From text to batches: sources of text, memory-mapped token shards, and a resumable loader.

Importing this package does not import torch; only the batches themselves are made of its tensors.
"""

from __future__ import annotations

from gptsmith.data.loader import TokenBatch, TokenLoader, whole_split_batches
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Dataset, TokenSplit, open_dataset
from gptsmith.data.sources import DocumentChunk, Source, open_source

__all__ = [
    "Dataset",
    "DocumentChunk",
    "Source",
    "TokenBatch",
    "TokenLoader",
    "TokenSplit",
    "open_dataset",
    "open_source",
    "prepare",
    "whole_split_batches",
]
