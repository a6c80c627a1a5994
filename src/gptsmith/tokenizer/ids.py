"""The tokenizer of a model that has none: its text is token ids, such as "5 17 3"."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer.tokenizer import Tokenizer, UnknownTextError

_SPACE = "▁"


class IdTokenizer(Tokenizer):
    """A tokenizer whose tokens are the decimal numbers of their ids, each after a space."""

    @classmethod
    def of(cls, vocab_size: int, end_ids: Iterable[int] = ()) -> IdTokenizer:
        """Return the tokenizer for a model with so many ids. end_ids: those at which its texts end."""
        metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}
        replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        description: dict[str, Any] = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [replace, {"type": "Fuse"}]},
            "model": {"type": "WordLevel", "vocab": {f"{_SPACE}{id}": id for id in range(vocab_size)}, "unk_token": ""},
        }
        return cls(json.dumps(description, ensure_ascii=False), {}, end_ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts of ids. Raises TokenizerError for any other text, and for ids out of range."""
        try:
            return super().encode_batch(texts)
        except UnknownTextError:
            raise TokenizerError(
                f"this model has no tokenizer: write token ids from 0 to {self.vocab_size - 1} instead of text, with "
                "spaces between them (5 17 3)."
            ) from None
