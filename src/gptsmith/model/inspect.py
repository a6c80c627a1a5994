"""Look inside a model: attention weights, the residual stream, and the logit lens.

Axis letters: T tokens · L layers · H heads · C hidden · V vocabulary.
The logit lens is nostalgebraist's (2020, "interpreting GPT: the logit lens"): it applies the final norm and the output
matrix to the residual stream after any layer, as if that layer were the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptsmith.model.transformer import Transformer


@dataclass(frozen=True)
class Internals:
    """What a forward pass over one text has computed. Lists are empty unless they were asked for."""

    logits: Tensor
    """(T, V)."""
    attention: list[Tensor]
    """L tensors (H, T, T): how much token i attends to token j. Rows sum to 1. Layers that were not asked for are
    empty: (H, T, 0)."""
    residuals: list[Tensor]
    """L + 1 tensors (T, C): the embeddings, then the residual stream after each layer."""


class _Weights(list[Tensor]):
    """A list that keeps the attention weights of one layer."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def append(self, weights: Tensor) -> None:
        super().append(weights if len(self) == self.layer else weights[..., :0].clone())


@torch.inference_mode()
def inspect(
    model: Transformer,
    ids: Sequence[int],
    *,
    attention: bool = False,
    layer: int | None = None,
    residuals: bool = False,
    embeddings: Tensor | None = None,
) -> Internals:
    """Run the model on one text without dropout, and return what it computes inside.

    layer: the one whose attention to keep; None: of all. embeddings: (T, C), in place of those of the ids.
    Raise IndexError for more tokens than the context.
    """
    weights: list[Tensor] = [] if layer is None else _Weights(layer)
    states: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        batch = torch.tensor([list(ids)], dtype=torch.int64, device=next(model.parameters()).device)
        logits = model(
            batch if embeddings is None else None,
            inputs_embeds=None if embeddings is None else embeddings[None],
            weights=weights if attention else None,
            residuals=states if residuals else None,
        )
    finally:
        model.train(training)
    return Internals(logits[0], [layer[0] for layer in weights], [state[0] for state in states])


@torch.inference_mode()
def logit_lens(model: Transformer, residual: Tensor, vocab_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the most likely next token at each position, and its probability, by the residual stream (T, C) of a
    layer: (T,) int64 and (T,) float32. vocab_size: ignore the padding of the vocabulary beyond it."""
    logits = model.lm_head(model.final_states(residual[None]))[0, :, :vocab_size].float()  # (T, V)
    best = logits.max(dim=-1)
    return best.indices, (best.values - logits.logsumexp(dim=-1)).exp()
