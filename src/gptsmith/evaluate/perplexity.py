"""Perplexity of a text: exp of the mean loss, the effective number of tokens a model chooses between."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gptsmith.errors import UsageError
from gptsmith.log import progress
from gptsmith.model.transformer import Transformer


@torch.inference_mode()
def perplexity(model: Transformer, ids: Sequence[int], *, window: int = 512) -> float:
    """Return exp of the mean loss over the tokens of a text, in consecutive windows that do not overlap.

    The first token of each window is context only and not scored. The model's training mode is restored.
    Raises UsageError for a text of fewer than two tokens.
    """
    window = min(window, model.config.max_position_embeddings)
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    parts = [part for part in parts if len(part) > 1]
    if not parts:
        raise UsageError("the text is too short to measure perplexity: it has fewer than two tokens.")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with progress(len(parts), "Measuring perplexity") as bar:
            for part in parts:
                row = torch.tensor([list(part)], device=device)
                loss = torch.nn.functional.cross_entropy(model(row[:, :-1])[0].float(), row[0, 1:], reduction="sum")
                total, count = total + float(loss), count + len(part) - 1
                bar.advance(1)
    finally:
        model.train(was_training)
    return math.exp(total / count)
