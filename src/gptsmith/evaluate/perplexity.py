"""Perplexity of a text: exp of the mean loss, the effective number of tokens a model chooses between."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from gptsmith.data.loader import TokenBatch
from gptsmith.errors import UsageError
from gptsmith.evaluate.validation import split_loss
from gptsmith.log import progress
from gptsmith.model.transformer import Transformer


def perplexity(model: Transformer, ids: Sequence[int], *, window: int = 512) -> float:
    """Return exp of the mean loss over the tokens of a text, in consecutive windows that do not overlap.

    window: tokens, at most the model's context. The first token of each window is context only and not scored. The
    model's training mode is restored. Raises UsageError for a text of fewer than two tokens.
    """
    window = min(window, model.config.max_position_embeddings)
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    windows = [part for part in windows if len(part) > 1]
    if not windows:
        raise UsageError("the text is too short to measure perplexity: it has fewer than two tokens.")
    with progress(len(windows), "Measuring perplexity") as bar:

        def batches() -> Iterator[TokenBatch]:
            for part in windows:
                row = torch.tensor([list(part)])
                yield TokenBatch(row[:, :-1], row[:, 1:])
                bar.advance(1)

        loss = split_loss(model, batches())
    assert loss is not None, "nothing stops it"
    return math.exp(loss)
