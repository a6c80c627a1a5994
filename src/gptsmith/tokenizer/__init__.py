"""Tokenizers: characters, byte-level BPE, GPT-2's vocabulary, and any `tokenizer.json`."""

from __future__ import annotations

from gptsmith.tokenizer.bpe import gpt2_tokenizer, train_bpe
from gptsmith.tokenizer.char import train_char
from gptsmith.tokenizer.pretrained import read_tokenizer
from gptsmith.tokenizer.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer

load_tokenizer = read_tokenizer

__all__ = [
    "END_OF_TEXT",
    "StreamDecoder",
    "Tokenizer",
    "gpt2_tokenizer",
    "load_tokenizer",
    "train_bpe",
    "train_char",
]
