"""Heads for tasks: a linear layer that turns the last token of a text into scores (GPT-1, section 3.2 of its paper).

Axis letters: B texts · T tokens of a text · C hidden · N scores of a text: labels, or numbers to predict · K sequences
of a row: its choices, or the two orders of its texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.errors import UsageError
from gptsmith.model.initial import WithoutDefaultDraws, draw, draw_seed
from gptsmith.model.parameters import annotate
from gptsmith.model.transformer import Transformer

Problem = Literal["single_label_classification", "multi_label_classification", "regression", "multiple_choice"]


@dataclass(frozen=True)
class HeadConfig:
    """What a head computes.

    labels: the names of its scores. problem: a text has one of the labels; it has any number of them; the scores are
    numbers; or several texts compete, and one score each says how probable it is.
    task: what the head was made for, such as "entailment"; it says how the texts of a row become ids.
    """

    labels: tuple[str, ...]
    problem: Problem
    task: str = ""

    def __post_init__(self) -> None:
        least = 2 if self.problem == "single_label_classification" else 1
        if len(self.labels) < least or (self.problem == "multiple_choice" and len(self.labels) != 1):
            raise UsageError(
                f"{self.problem} needs {'exactly 1 label' if self.problem == 'multiple_choice' else f'{least} or more'}"
                f", not {len(self.labels)}."
            )
        if len(set(self.labels)) != len(self.labels):
            raise UsageError(f"the labels {', '.join(self.labels)} are not all different.")


class SequenceClassifier(nn.Module):
    """A Transformer with a head. `classifier(ids)`: (B, T) int64 -> scores (B, N).

    transformer: its output matrix is no part of the scores, but an auxiliary language-model loss can use it.
    scale (an attribute): of a reward model, mean and standard deviation of its scores; they are saved with it.
    pad_id (an attribute): the padding id that it is saved with, of a token that ends no text; None: any such one.
    The head's initial weights are drawn from N(0, initializer_range²).
    """

    def __init__(self, transformer: Transformer, head: HeadConfig) -> None:
        super().__init__()
        self.transformer, self.head = transformer, head
        self.scale: tuple[float, float] | None = None
        self.pad_id: int | None = None
        config = transformer.config
        with WithoutDefaultDraws():
            self.score = nn.Linear(config.embedding_size or config.hidden_size, len(head.labels), bias=False)
        with torch.no_grad():
            std = transformer.config.initializer_range
            draw(self.score.weight, "score.weight", draw_seed(), partial(nn.init.normal_, std=std))
        annotate(self, "score.weight", kind="head")
        if self.score.weight.device != transformer.embed_tokens.weight.device:
            self.score.to(transformer.embed_tokens.weight.device)

    def forward(self, ids: Tensor, *, last: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Return the scores of each text: (B, N), before a softmax or sigmoid; of multiple choice (B, K).

        ids: (B, T) int64; for rows of several sequences (B, K, T), and then `last` is (B, K) and `document_ids`
            (B, K, T). Choices compete; of other tasks the hidden states of the sequences are added (GPT-1: the two
            orders of texts that are compared).
        last: the position of the token whose hidden state is scored; None: the last one; -1: the row lacks this choice.
            Causal attention makes padding to its right harmless. document_ids: as in `Transformer.forward`; padding to
            the left needs them.
        """
        hidden = self.transformer.hidden_states(
            ids.flatten(0, -2), document_ids=None if document_ids is None else document_ids.flatten(0, -2)
        )
        return self.row_scores(hidden.view(*ids.shape, -1), last)

    def row_scores(self, hidden: Tensor, last: Tensor | None) -> Tensor:
        """Return the scores as `forward` does, from hidden states (B, T, C) or (B, K, T, C)."""
        scores = self.score_at(hidden.flatten(0, -3), None if last is None else last.flatten())
        if self.head.problem == "multiple_choice":
            scores = scores.view(hidden.shape[:-2])
            return scores if last is None else scores.masked_fill(last < 0, -torch.inf)
        # The head is linear: the sum of scores is the score of the sum of hidden states.
        return scores if hidden.ndim == 3 else scores.view(*hidden.shape[:2], -1).sum(dim=1)

    def score_at(self, hidden: Tensor, last: Tensor | None) -> Tensor:
        """Return the scores (B, N) of the tokens at positions `last`, (B,), of hidden: (B, T, C); None: the last."""
        rows = torch.arange(len(hidden), device=hidden.device)
        scores: Tensor = self.score(hidden[:, -1] if last is None else hidden[rows, last])
        return scores

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each text, (B,), in nats; of regression its mean squared error.

        scores: the result of `forward`. targets: one label or choice, (B,) int64; whether it has each label, (B, N); or
            the numbers, (B, N).
        """
        if self.head.problem in ("single_label_classification", "multiple_choice"):
            return F.cross_entropy(scores.float(), targets, reduction="none")
        targets = targets.view_as(scores).float()
        if self.head.problem == "regression":
            return F.mse_loss(scores.float(), targets, reduction="none").mean(dim=-1)
        return F.binary_cross_entropy_with_logits(scores.float(), targets, reduction="none").mean(dim=-1)


def last_positions(ids: Tensor, pad_id: int) -> Tensor:
    """Return the position of the rightmost token of each row of ids, (B, T), that is not padding: (B,) int64."""
    position = torch.arange(ids.shape[-1], device=ids.device)
    return (position * (ids != pad_id)).argmax(dim=-1)
