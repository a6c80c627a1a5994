"""Character tokenizers: one token per Unicode code point of a text."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from gptsmith.errors import TokenizerError
from gptsmith.log import progress
from gptsmith.tokenizer.tokenizer import CHAR_PIPELINE, END_OF_TEXT, UNKNOWN, Tokenizer, _surrogate

_CODE_POINTS = 0x110000
_CHUNK = 1 << 20  # characters processed at a time


def train_char(texts: Iterable[str], *, unknown: bool = False) -> Tokenizer:
    """Make a tokenizer of all characters in `texts`: the special tokens first, then the characters by code point.

    unknown: add a token "<|unk|>" for all other characters, which are an error otherwise.
    Raises TokenizerError if there are no characters, or half of a surrogate pair.
    """
    seen = np.zeros(_CODE_POINTS, dtype=bool)
    with progress(None, "Collecting characters", "char") as bar:
        for text in texts:
            for start in range(0, len(text), _CHUNK):
                chunk = text[start : start + _CHUNK]
                try:
                    seen[np.frombuffer(chunk.encode("utf-32-le"), dtype="<u4")] = True
                except UnicodeEncodeError as error:
                    raise _surrogate(text, start + error.start) from None
                bar.advance(len(chunk))
    alphabet = [chr(code) for code in np.flatnonzero(seen)]
    if not alphabet:
        raise TokenizerError("the text is empty: a character tokenizer needs at least one character.")
    special = [END_OF_TEXT, *([UNKNOWN] if unknown else [])]
    return Tokenizer(_tokenizer_json(special, alphabet))


def _tokenizer_json(special: list[str], alphabet: list[str]) -> str:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token, **flags} for id, token in enumerate(special)],
        **CHAR_PIPELINE,
        "post_processor": None,
        # Without this token in the vocabulary, an unknown character is an error in transformers as well.
        "model": {
            "type": "WordLevel",
            "vocab": {token: id for id, token in enumerate([*special, *alphabet])},
            "unk_token": UNKNOWN,
        },
    }
    return json.dumps(description, ensure_ascii=False, indent=1)
