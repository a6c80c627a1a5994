"""Label texts with a trained classifier.

classifier = Classifier.load("runs/sentiment")
classifier.label([("A fine film.",)])                # [{"label": "positive", "probability": 0.98}]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from gptsmith.data.conversations import RowError
from gptsmith.data.labels import Task, unlabeled_texts
from gptsmith.data.rows import read_rows
from gptsmith.data.task_inputs import LabeledExamples, TaskInput, labeled_batch
from gptsmith.errors import DataError, UsageError
from gptsmith.formats.hf_heads import load_classifier
from gptsmith.loading import resolve_model
from gptsmith.model.heads import SequenceClassifier
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.pretrained import read_tokenizer

_ROWS_AT_ONCE = 16


class Classifier:
    """A model with a task head, its tokenizer and its task. Raises UsageError for a head of no such task."""

    def __init__(self, model: SequenceClassifier, tokenizer: Tokenizer, spec: str) -> None:
        task: Any = model.head.task
        if task not in get_args(Task):
            raise UsageError(f"{spec} does not say what task its head is for. Train one: gptsmith classify MODEL DATA.")
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.inputs = TaskInput(tokenizer, task, seq_len=model.transformer.config.max_position_embeddings)

    @classmethod
    def load(cls, spec: str) -> Classifier:
        """Load a run of `gptsmith classify`, or one of its checkpoints."""
        path = resolve_model(spec)
        return cls(load_classifier(path)[0], read_tokenizer(path), spec)

    @torch.no_grad()
    def label(self, rows: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Return what the model says of each row of texts: a label with its probability, a number, or a choice (from
        0). Raise RowError for a row that cannot be encoded."""
        examples = LabeledExamples(((self.inputs(texts), 0.0) for texts in rows), has_numbers=True)
        batch = labeled_batch(examples, range(len(rows)))
        single = batch.ids.shape[1] == 1 and self.task != "multiple-choice"
        ids, last = (batch.ids[:, 0], batch.lengths[:, 0] - 1) if single else (batch.ids, batch.lengths - 1)
        scores = self.model(ids, last=last).float()
        if self.model.head.problem == "regression":
            return [{"value": float(row[0])} for row in scores]
        found = []
        for row in scores.softmax(dim=-1):
            best = int(row.argmax())
            name = {"choice": best} if self.task == "multiple-choice" else {"label": self.model.head.labels[best]}
            found.append({**name, "probability": round(float(row[best]), 6)})
        return found

    def label_file(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield what the model says of each row of a file; labels in it are ignored. Raises DataError with the row."""
        chunk: list[tuple[str, tuple[str, ...]]] = []
        for row in read_rows(path):
            try:
                texts = unlabeled_texts(row.values, self.task)
                self.inputs(texts)
            except RowError as error:
                raise DataError(f"{row.where}: {error}") from None
            chunk.append((row.where, texts))
            if len(chunk) == _ROWS_AT_ONCE:
                yield from self.label([texts for _, texts in chunk])
                chunk.clear()
        if chunk:
            yield from self.label([texts for _, texts in chunk])
