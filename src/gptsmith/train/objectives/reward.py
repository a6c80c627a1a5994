"""Reward models: a score for an answer, learned from which of two answers people prefer.

The score is a linear function of the hidden state of an answer's last token, which is found by its length. A checkpoint
is a Hugging Face sequence-classification directory with one label; with an adapter, the adapter is folded in.

Axis letters: B pairs · T tokens · 2B answers: all chosen ones, then all rejected ones.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.checkpoint import TrainState
from gptsmith.data.conversations import Example
from gptsmith.data.loader import RowLoader
from gptsmith.errors import UsageError
from gptsmith.model.documents import is_fake
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.model.lora import lora_layers, merge_lora
from gptsmith.model.transformer import Transformer
from gptsmith.storage import atomic_file
from gptsmith.train.config import RewardConfig, RunConfig
from gptsmith.train.objectives.base import LossHistory, LossOutput, Models, Objective, Selection, Sum
from gptsmith.train.preferences import Pairs, Preferences, settle_preferences

HEAD = HeadConfig(("reward",), "regression")
MAX_TOKENS = 8192  # in one forward pass without gradients
SCALED_ON = 256  # held-out pairs whose scores give mean and spread, and which evaluations measure
BINS = 10  # of predicted probabilities, for the calibration error
SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class PairBatch:
    """Pairs of answers, each with its prompt, padded on the right.

    chosen, rejected: (B, T) int64. lengths: (B, 2). margins: (B,), 0 where a pair has none.
    """

    chosen: Tensor
    rejected: Tensor
    lengths: Tensor
    margins: Tensor

    @classmethod
    def of(cls, pairs: Pairs, rows: Sequence[int]) -> PairBatch:
        sides = [[_scored(part[i]) for i in rows] for part in (pairs.chosen, pairs.rejected)]
        width = max(len(ids) for side in sides for ids in side)
        chosen, rejected = (
            torch.stack([F.pad(torch.tensor(ids), (0, width - len(ids))) for ids in side]) for side in sides
        )
        lengths = torch.tensor([[len(a), len(b)] for a, b in zip(*sides, strict=True)])
        return cls(chosen, rejected, lengths, torch.tensor([pairs.margins[i] or 0.0 for i in rows]))

    @property
    def num_rows(self) -> int:
        return len(self.chosen)

    def slice(self, start: int, stop: int) -> Self:
        parts = {f.name: getattr(self, f.name)[start:stop] for f in dataclasses.fields(self)}
        if not is_fake(self.chosen) and len(parts["lengths"]):
            width = int(parts["lengths"].max())
            parts |= {name: parts[name][:, :width] for name in ("chosen", "rejected")}
        return dataclasses.replace(self, **parts)

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(self, **{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


def _scored(example: Example) -> list[int]:
    """Return the ids up to the end of the answer, where it is scored. A template can have text after it, which an
    answer that is being sampled does not have yet."""
    end = len(example.trained)
    while end and not example.trained[end - 1]:
        end -= 1
    return example.ids[:end]


class PairLoader(RowLoader[PairBatch]):
    """Endless batches of pairs, each pair once in an epoch."""

    def __init__(self, pairs: Pairs, *, batch_size: int, seed: int) -> None:
        super().__init__(len(pairs), batch_size=batch_size, seed=seed)
        self.pairs = pairs

    def batch_of(self, rows: Sequence[int]) -> PairBatch:
        return PairBatch.of(self.pairs, rows)

    def _identity(self) -> dict[str, Any]:
        return {"pairs": self.pairs.fingerprint(), "seed": self.seed, "batch_size": self.batch_size}


def preference_losses(chosen: Tensor, rejected: Tensor, margins: Tensor, centering: float) -> Tensor:
    """Return the loss of each pair, (B,), in nats, from the scores of its answers (Bradley & Terry 1952; Ouyang et al.
    2022, 2203.02155).

    margins: by how much the chosen answer should be ahead (Touvron et al. 2023, 2307.09288). centering: weight of the
    squared sum of the two scores, which keeps their mean near 0 (Eisenstein et al. 2023, 2312.09244).
    """
    losses = -F.logsigmoid(chosen - rejected - margins)
    return losses + centering * (chosen + rejected).square() if centering else losses


class Reward(Objective[PairBatch]):
    """Bradley-Terry on pairs of answers."""

    selection = Selection("val_loss", "min")
    evaluates_start = True
    fixed_shapes = False
    restores_policy = True

    def __init__(
        self,
        pairs: Pairs,
        val: Pairs,
        *,
        batch_size: int,
        context: int,
        seed: int,
        vocab_size: int,
        centering: float = 0.01,
        directory: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.pairs, self.val, self.context, self.vocab_size = pairs, val, context, vocab_size
        self.centering, self.directory, self.should_stop = centering, directory, should_stop
        self.loader = PairLoader(pairs, batch_size=batch_size, seed=seed)

    def models(self, policy: Transformer) -> Models:
        classifier = SequenceClassifier(policy, HEAD)
        if not is_fake(classifier.score.weight):
            torch.nn.init.zeros_(classifier.score.weight)  # all answers are equally good at first
        if not policy.config.tie_word_embeddings:
            policy.lm_head.requires_grad_(False)  # no part of a score
        return Models(policy, value=classifier)

    def next_batch(self, models: Models, step: int) -> PairBatch:
        return next(self.loader)

    def normalizer(self, batch: PairBatch) -> tuple[float, int]:
        return float(batch.num_rows), int(batch.lengths.sum())

    def scores(self, models: Models, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen and of the rejected answers, (B,) each."""
        assert models.value is not None
        ids, last = torch.cat([batch.chosen, batch.rejected]), batch.lengths.T.flatten() - 1
        scores: Tensor = models.value(ids, last=last)[:, 0].float()
        chosen, rejected = scores.chunk(2)
        return chosen, rejected

    def loss(self, models: Models, batch: PairBatch) -> LossOutput:
        chosen, rejected = self.scores(models, batch)
        losses = preference_losses(chosen, rejected, batch.margins, self.centering)
        right = (chosen > rejected).sum().float()
        return LossOutput(losses.sum(), {"accuracy": Sum(right, float(batch.num_rows))})

    def diverged(self, history: LossHistory) -> str | None:
        if history.first is not None and history.recent > history.first + 3.0:
            return f"has risen to {history.recent:.2f}, from {history.first:.2f}"
        return None

    @torch.no_grad()
    def held_out_scores(self, models: Models) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the scores of chosen and of rejected held-out answers, (N,) each, and their lengths, (N, 2). None on a
        stop or where nothing is held out."""
        pairs = self.val if len(self.val) else self.pairs
        number = min(SCALED_ON, len(pairs))
        rows = max(1, MAX_TOKENS // (2 * self.context))
        was_training = models.policy.training
        models.policy.eval()
        found, lengths = [], []
        for start in range(0, number, rows):
            if self.should_stop():
                return None
            batch = PairBatch.of(pairs, range(start, min(start + rows, number)))
            found.append(torch.stack(self.scores(models, batch.to(models.device))).cpu())
            lengths.append(batch.lengths)
        models.policy.train(was_training)
        chosen, rejected = torch.cat(found, dim=1)
        return chosen, rejected, torch.cat(lengths)

    def evaluate(self, models: Models, rows: int) -> dict[str, float] | None:
        """Return loss and accuracy on held-out pairs, calibration, and how much the score follows the length."""
        if not len(self.val) or (scored := self.held_out_scores(models)) is None:
            return None
        chosen, rejected, lengths = scored
        if self.directory is not None:
            with atomic_file(self.directory / SCORES_FILE, "w") as file:
                json.dump({"chosen": chosen.tolist(), "rejected": rejected.tolist(), "lengths": lengths.tolist()}, file)
        return measures(chosen, rejected, lengths)

    def saved(self, models: Models) -> SequenceClassifier:
        """Return the reward model with mean and spread of its scores; an adapter is folded into a copy."""
        assert isinstance(models.value, SequenceClassifier)
        classifier = models.value
        random = torch.get_rng_state()
        scored = self.held_out_scores(models)
        if lora_layers(models.policy):
            classifier = SequenceClassifier(merge_lora(copy.deepcopy(models.policy)), HEAD)
            classifier.score.load_state_dict(models.value.score.state_dict())
        torch.set_rng_state(random)
        if scored is not None:
            values = torch.cat(scored[:2])
            classifier.scale = (float(values.mean()), max(float(values.std()), 1e-6) if len(values) > 1 else 1.0)
        return classifier

    def sample_prompts(self, models: Models) -> list[tuple[str, list[int]]]:
        return []

    def example_batch(self, rows: int) -> PairBatch:
        length = min(self.context, max(self.pairs.lengths()))
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return PairBatch(ids, ids, torch.full((rows, 2), length), torch.zeros(rows))

    def state(self) -> TrainState:
        return TrainState({"loader": self.loader.state_dict()}, {})

    def load_state(self, state: TrainState) -> None:
        self.loader.load_state_dict(state.values["loader"])


def measures(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> dict[str, float]:
    """Return what is known of scores of held-out pairs: (N,), (N,) and lengths (N, 2) in tokens.

    val_loss: mean −log P(chosen). val_accuracy. val_calibration: the expected calibration error, the mean difference
    between predicted and observed frequency. val_length_bias: the correlation of score and length over all answers;
    val_accuracy_shorter and val_accuracy_longer: where the chosen answer is the shorter or the longer one.
    """
    difference = chosen - rejected
    right = (difference > 0).float() + 0.5 * (difference == 0)
    found = {
        "val_loss": float(-F.logsigmoid(difference).mean()),
        "val_accuracy": float(right.mean()),
        "val_calibration": _calibration_error(difference),
    }
    scores, sizes = torch.cat([chosen, rejected]), lengths.T.flatten().float()
    if len(scores) > 2 and float(scores.std()) > 0 and float(sizes.std()) > 0:
        found["val_length_bias"] = float(torch.corrcoef(torch.stack([scores, sizes]))[0, 1])
    shorter, longer = lengths[:, 0] < lengths[:, 1], lengths[:, 0] > lengths[:, 1]
    for name, mask in (("shorter", shorter), ("longer", longer)):
        if bool(mask.any()):
            found[f"val_accuracy_{name}"] = float(right[mask].mean())
    return found


def _calibration_error(difference: Tensor) -> float:
    """Return the expected calibration error of P(the preferred answer is the one with the higher score)."""
    confidence, right = difference.abs().sigmoid(), (difference > 0).float()
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    error = 0.0
    for number in range(BINS):
        mine = bins == number
        if bool(mine.any()):
            error += float(mine.float().mean()) * abs(float(confidence[mine].mean() - right[mine].mean()))
    return error


def settle_reward(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration as for preferences; a reward model writes nothing."""
    return settle_preferences(config, overrides, prepared).replace(sample_tokens=0)


def reward(context: Any) -> Reward:
    """Make the objective of an `ObjectiveContext`."""
    config, method, preferences = context.config, context.config.method, context.dataset
    if not isinstance(method, RewardConfig) or not isinstance(preferences, Preferences):
        raise UsageError("a reward model needs preferences: gptsmith reward MODEL PREFERENCES.")
    pairs, val = preferences.within(config.loop.context, on_long=method.too_long).pairs()
    return Reward(
        pairs,
        val,
        batch_size=config.loop.batch_size,
        context=config.loop.context,
        seed=config.loop.seed,
        vocab_size=context.tokenizer.vocab_size,
        centering=method.centering,
        directory=context.directory if context.ranks.is_main else None,
        should_stop=context.should_stop,
    )
