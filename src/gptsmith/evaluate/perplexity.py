"""Perplexity of a text: exp of the mean loss, the effective number of tokens a model chooses between."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from gptsmith.data.loader import TokenBatch
from gptsmith.errors import UsageError
from gptsmith.evaluate.validation import split_loss
from gptsmith.log import progress
from gptsmith.model.config import IGNORED
from gptsmith.model.transformer import Transformer


def perplexity(model: Transformer, ids: Sequence[int], *, window: int = 512, prefix: Sequence[int] = ()) -> float:
    """Return exp of the mean loss over the tokens of a text, in consecutive windows that do not overlap.

    window: tokens, at most the model's context. prefix: tokens to put before each window, such as a tokenizer's
    `prefix_ids`; they are not scored. Without any, the first token of each window is not scored. The model's training
    mode is restored. Raises UsageError for a text of fewer than two tokens.
    """
    step = max(1, min(window, model.config.max_position_embeddings) - len(prefix))
    windows = [[*prefix, *ids[start : start + step]] for start in range(0, len(ids), step)]
    windows = [part for part in windows if len(part) > max(1, len(prefix))]
    if not windows or len(ids) < 2:
        raise UsageError("the text is too short to measure perplexity: it has fewer than two tokens.")
    with progress(len(windows), "Measuring perplexity") as bar:

        def batches() -> Iterator[TokenBatch]:
            for part in windows:
                row = torch.tensor([part])
                targets = row[:, 1:].clone()
                targets[:, : len(prefix) - 1 if prefix else 0] = IGNORED
                yield TokenBatch(row[:, :-1], targets)
                bar.advance(1)

        loss = split_loss(model, batches())
    assert loss is not None, "nothing stops it"
    return math.exp(loss)
