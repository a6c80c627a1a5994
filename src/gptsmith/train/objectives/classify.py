"""Task heads as in GPT-1 (Radford et al. 2018, section 3.2): labels for texts, with an auxiliary language-model loss.

    loss of a row = loss of its label + aux_loss · mean loss of the tokens of its texts

Axis letters: B rows · C sequences of a row · T tokens · N scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptsmith.checkpoint import TrainState
from gptsmith.data.task_inputs import LabeledBatch, LabeledExamples, LabeledLoader, TaskInput
from gptsmith.errors import UsageError
from gptsmith.evaluate.scores import classification, correlations, mean_with_interval
from gptsmith.log import JsonLines
from gptsmith.model.config import IGNORED
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.model.lora import lora_layers, merge_lora
from gptsmith.model.loss import head_logprobs
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Selection
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.config import ClassifyConfig
from gptsmith.train.labels import Labels
from gptsmith.train.objectives.base import LossHistory, LossOutput, Models, Objective, Sum
from gptsmith.train.objectives.pretrain import LARGEST_EXAMPLE_ID, evaluation_rows

EVALUATIONS_FILE = "evaluations.jsonl"
SHOWN = 10  # mistakes that are kept
_MOST_CHARACTERS = 400  # of a mistake


class Classify(Objective[LabeledBatch]):
    """A head on the policy, trained on labeled texts. directory: where the details of evaluations are written."""

    fixed_shapes = False
    restores_policy = True

    def __init__(
        self,
        labels: Labels,
        tokenizer: Tokenizer,
        method: ClassifyConfig,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        directory: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.names, self.has_numbers = labels.data.names, labels.data.has_numbers
        if method.task == "multiple-choice":
            head = HeadConfig(("score",), "multiple_choice", method.task)
        elif self.has_numbers:
            head = HeadConfig(("score",), "regression", method.task)
        else:
            head = HeadConfig(self.names, "single_label_classification", method.task)
        self.head = head
        self.loader = LabeledLoader(labels.train, batch_size=batch_size, seed=seed)
        self.pad_id = TaskInput(tokenizer, method.task, seq_len=seq_len).start[0]  # which ends no text
        self.directory, self.should_stop = directory, should_stop
        self.updates = 0  # made so far
        self.method, self.tokenizer, self.seq_len = method, tokenizer, seq_len
        self.val = _first(labels.val, method.eval_tokens)
        self.selection = Selection("pearson" if self.has_numbers else "accuracy", "max")

    def models(self, policy: Transformer) -> Models:
        if not (self.method.aux_loss or policy.config.tie_word_embeddings):
            policy.lm_head.requires_grad_(False)  # no part of a score
        return Models(policy, value=SequenceClassifier(policy, self.head))

    def saved(self, models: Models) -> SequenceClassifier:
        """Return the classifier; an adapter is folded into a copy."""
        classifier = _head_of(models)
        if lora_layers(models.policy):
            random = torch.get_rng_state()
            classifier = SequenceClassifier(merge_lora(copy.deepcopy(models.policy)), self.head)
            torch.set_rng_state(random)
            classifier.score.load_state_dict(_head_of(models).score.state_dict())
        classifier.pad_id = self.pad_id
        return classifier

    def next_batch(self, models: Models, step: int) -> LabeledBatch:
        self.updates = step + 1
        return next(self.loader)

    def state(self) -> TrainState:
        return TrainState({"loader": self.loader.state_dict(), "updates": self.updates}, {})

    def load_state(self, state: TrainState) -> None:
        self.loader.load_state_dict(state.values["loader"])
        self.updates = int(state.values["updates"])

    def sample_prompts(self, models: Models) -> list[tuple[str, list[int]]]:
        return []

    def normalizer(self, batch: LabeledBatch) -> tuple[float, int]:
        return float(batch.num_rows), int(batch.lengths.sum())

    def loss(self, models: Models, batch: LabeledBatch) -> LossOutput:
        scores, hidden = self._scores(models, batch)
        task = _head_of(models).losses(scores, batch.labels).sum()
        metrics = {"task_loss": Sum(task, float(batch.num_rows))}
        if not self.method.aux_loss:
            return LossOutput(task, metrics)
        targets = batch.targets
        tokens = head_logprobs(
            models.policy.lm_head, hidden.flatten(0, 1), targets.flatten(0, 1), models.policy.config.vocab_size
        ).view(batch.num_rows, -1)
        count = (targets != IGNORED).flatten(1).sum(dim=1).clamp(min=1)
        text = -(tokens.sum(dim=1) / count).sum()
        metrics["text_loss"] = Sum(text, float(batch.num_rows))
        return LossOutput(task + self.method.aux_loss * text, metrics)

    def _scores(self, models: Models, batch: LabeledBatch) -> tuple[Tensor, Tensor]:
        """Return the scores, (B, N) or of choices (B, C), and the hidden states (B, C, T, H)."""
        hidden = models.policy.hidden_states(batch.ids.flatten(0, 1))
        hidden = hidden.view(*batch.ids.shape, -1)
        last = batch.lengths - 1
        if batch.ids.shape[1] == 1 and self.head.problem != "multiple_choice":
            return _head_of(models).row_scores(hidden[:, 0], last[:, 0]), hidden
        return _head_of(models).row_scores(hidden, last), hidden

    def diverged(self, history: LossHistory) -> str | None:
        if not self.has_numbers:
            return super().diverged(history)
        if history.first is not None and history.recent > 10 * history.first + 1.0:
            return f"has risen to {history.recent:.2f}, from {history.first:.2f}"
        return None

    @torch.no_grad()
    def evaluate(self, models: Models, rows: int) -> dict[str, float] | None:
        """Return the metrics of the task, each with its bootstrap interval, and `val_loss`, that of the labels."""
        if not len(self.val):
            return None
        was_training = models.policy.training
        models.policy.eval()
        found, losses = [], []
        try:
            loader = LabeledLoader(self.val, batch_size=1, seed=0)
            for batch in loader.whole(evaluation_rows(rows, self.seq_len)):
                if self.should_stop():
                    return None
                batch = batch.to(models.device)
                scores, _ = self._scores(models, batch)
                losses.append(_head_of(models).losses(scores, batch.labels).cpu())
                found += [row.numpy() for row in scores.float().cpu()]
        finally:
            models.policy.train(was_training)
        value = {"val_loss": float(torch.cat(losses).mean())}
        return value | (self._numbers(found) if self.has_numbers else self._classes(found))

    def _record(self, **values: Any) -> None:
        """Write the details of the evaluation after the last update."""
        if self.directory is not None:
            JsonLines(self.directory / EVALUATIONS_FILE).append(step=self.updates, **values)

    def _numbers(self, found: Sequence[Any]) -> dict[str, float]:
        numbers, labels = np.array([float(row[0]) for row in found]), self.val.labels
        errors = np.abs(numbers - labels)
        worst = np.argsort(-errors, kind="stable")[:SHOWN]
        self._record(
            mistakes=[
                {"text": self._text(i), "label": f"{labels[i]:g}", "predicted": f"{numbers[i]:.3g}"} for i in worst
            ]
        )
        return correlations(labels, numbers)

    def _classes(self, found: Sequence[Any]) -> dict[str, float]:
        labels = self.val.labels.astype(np.int64)
        chosen = np.array([int(row.argmax()) for row in found])
        confidence = np.array([float(np.exp(row - row.max()).max() / np.exp(row - row.max()).sum()) for row in found])
        wrong = np.flatnonzero(chosen != labels)
        worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
        name: Callable[[int], str] = lambda i: self.names[i] if self.names else f"choice {i + 1}"  # noqa: E731
        mistakes = [
            {
                "text": self._text(i),
                "label": name(int(labels[i])),
                "predicted": name(int(chosen[i])),
                "confidence": round(float(confidence[i]), 4),
            }
            for i in worst
        ]
        if not self.names:
            self._record(mistakes=mistakes)
            return mean_with_interval("accuracy", (chosen == labels).astype(float))
        metrics, confusion = classification(labels, chosen, len(self.names))
        self._record(labels=list(self.names), confusion=confusion, mistakes=mistakes)
        return metrics

    def _text(self, row: int) -> str:
        """Return the texts of a row; of a choice, that of the right one."""
        right = int(self.val.labels[row]) if self.head.problem == "multiple_choice" else 0
        ids = self.val.sequences(row)[right][1:-1].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=False)[:_MOST_CHARACTERS]

    def example_batch(self, rows: int) -> LabeledBatch:
        sequences = max(1, int(np.diff(self.loader.examples.rows).max()))
        vocab_size = min(self.tokenizer.vocab_size, LARGEST_EXAMPLE_ID)
        labels = torch.zeros(rows) if self.has_numbers else torch.zeros(rows, dtype=torch.int64)
        length = min(self.seq_len, self.loader.examples.longest)
        ids = torch.randint(vocab_size, (rows, sequences, length))
        return LabeledBatch(ids, torch.full((rows, sequences), length), labels)


def _head_of(models: Models) -> SequenceClassifier:
    assert isinstance(models.value, SequenceClassifier)
    return models.value


def _first(examples: LabeledExamples, tokens: int | None) -> LabeledExamples:
    """Return the rows from the start that have so many tokens, one at least."""
    if tokens is None or not len(examples):
        return examples
    ends = examples.starts[examples.rows[1:]]
    return examples.select(range(max(1, int(np.searchsorted(ends, tokens, side="right")))))


def classify(context: Any) -> Classify:
    """Make the objective of an `ObjectiveContext`."""
    config, method, labels = context.config, context.config.method, context.dataset
    if not isinstance(method, ClassifyConfig) or not isinstance(labels, Labels):
        raise UsageError("a task head needs labeled texts: gptsmith classify MODEL DATA.")
    return Classify(
        labels,
        context.tokenizer,
        method,
        batch_size=config.loop.batch_size,
        seq_len=config.loop.context,
        seed=config.loop.seed,
        directory=context.directory if context.ranks.is_main else None,
        should_stop=context.should_stop,
    )
