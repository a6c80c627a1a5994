"""A tokenizer whose tokens are the characters (Unicode code points) of a text."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from gptsmith.errors import TokenizerError
from gptsmith.log import progress
from gptsmith.tokenizer.tokenizer import CHAR_PIPELINE, END_OF_TEXT, UNKNOWN, Tokenizer, _surrogate

_CODE_POINTS = 0x110000
_CHUNK = 1 << 20  # characters looked at together


def train_char(pieces: Iterable[str], *, unknown: bool = False) -> Tokenizer:
    """The tokenizer of all characters in `pieces`: special tokens first, then the characters by code point.

    unknown: add a token "<|unk|>" for characters that are not among them; without it they are an error.
    Raises TokenizerError if there are no characters, or half a one (a lone surrogate).
    """
    seen = np.zeros(_CODE_POINTS, dtype=bool)
    with progress(None, "Collecting the characters", "char") as bar:
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK):
                chunk = piece[start : start + _CHUNK]
                try:
                    seen[np.frombuffer(chunk.encode("utf-32-le"), dtype="<u4")] = True
                except UnicodeEncodeError as error:
                    raise _surrogate(piece, start + error.start) from None
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
        # With no such token in the vocabulary, an unknown character is an error there too.
        "model": {
            "type": "WordLevel",
            "vocab": {token: id for id, token in enumerate([*special, *alphabet])},
            "unk_token": UNKNOWN,
        },
    }
    return json.dumps(description, ensure_ascii=False, indent=1)
