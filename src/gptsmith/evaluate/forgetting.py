"""How much a model knows of plain text: fine-tuning for one job can make it forget the language.

The measure is bits per byte on a fixed text that comes with the package, so it is the same before and after training,
and comparable between models with different vocabularies.
"""

from __future__ import annotations

import functools
import math
from importlib.resources import files

from gptsmith.errors import TokenizerError
from gptsmith.evaluate.text import mean_loss
from gptsmith.log import quiet
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer

_WINDOW = 256  # tokens, so that short and long contexts are measured alike


@functools.cache
def plain_text() -> str:
    """Return the text: some 2,500 characters of English prose, written for this purpose."""
    return files("gptsmith.evaluate").joinpath("plain_text.txt").read_text(encoding="utf-8").strip()


def text_bits_per_byte(model: Transformer, tokenizer: Tokenizer) -> float | None:
    """Return the loss on the plain text in bits per byte; None where the tokenizer lacks its characters."""
    text = plain_text()
    try:
        ids = tokenizer.encode(text)
    except TokenizerError:
        return None
    prefix = tokenizer.prefix_ids
    window = min(_WINDOW, model.config.max_position_embeddings)
    with quiet():
        loss, scored = mean_loss(model, ids, window=window, prefix=prefix)
    return loss * scored / math.log(2) / len(text.encode())
