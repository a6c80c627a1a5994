"""GRPO and its variants: an answer is better or worse than the other answers to the same prompt.

There is no value model. Groups whose answers all have the same reward teach nothing; they are left out and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from gptsmith.train.config import GRPO_VARIANTS, GrpoConfig, RunConfig
from gptsmith.train.objectives.base import LossOutput, Models
from gptsmith.train.objectives.policy import PolicyObjective, policy_arguments, settle_policy
from gptsmith.train.objectives.policy_losses import cispo_loss, clipped_policy_loss, gspo_loss, kl_loss
from gptsmith.train.rollout.advantages import group_advantages, overlong_penalty
from gptsmith.train.rollout.batch import RolloutBatch, Stats, padded
from gptsmith.train.rollout.rollout import Rollout


class Grpo(PolicyObjective):
    """Group-relative policy optimization (Shao et al. 2024, 2402.03300)."""

    method: GrpoConfig

    @property
    def resampling(self) -> int:
        return self.method.dynamic_sampling

    def batch_of(self, models: Models, rollouts: Sequence[Rollout], scores: Tensor) -> tuple[RolloutBatch, Stats]:
        method, batch = self.method, padded(rollouts)
        lengths = torch.tensor([len(each.ids) for each in rollouts])
        groups = torch.tensor([each.group for each in rollouts])
        if method.overlong_buffer:
            buffer = max(1, round(method.overlong_buffer * method.answer_tokens))
            scores = scores + overlong_penalty(lengths, method.answer_tokens, buffer)
        advantages, dead = group_advantages(scores, groups, scale=method.scale, baseline=method.baseline)
        keep = ~dead
        if method.mask_unended:
            keep = keep & torch.tensor([each.ended for each in rollouts])
        mask = batch.weights
        weights = mask / lengths[:, None] if method.normalize == "sequence" else mask
        batch = dataclasses.replace(batch, advantages=advantages[:, None] * mask, weights=weights)
        stats = {"dead_groups": (float(dead.sum()) / method.group_size, float(len(dead)) / method.group_size)}
        batch = batch.rows(keep.nonzero()[:, 0])
        if method.kl and batch.num_rows:
            reference = self.reference_logprobs(models, batch)
            batch = dataclasses.replace(batch, reference=reference)
            difference = ((batch.logprobs - reference) * batch.mask).sum()
            stats["kl"] = (float(difference), float(batch.num_rows))
        return batch, stats

    def finish(self, batch: RolloutBatch, index: int) -> RolloutBatch:
        if self.method.normalize == "constant":
            return dataclasses.replace(batch, count=float(self.batch_size * self.method.answer_tokens))
        return super().finish(batch, index)

    def loss(self, models: Models, batch: RolloutBatch) -> LossOutput:
        method, mask = self.method, batch.mask
        logprobs = self.logprobs(models.policy, batch)
        if method.loss == "gspo":
            losses, clipped = gspo_loss(
                logprobs, batch.logprobs, batch.advantages, mask, method.clip_low, method.clip_high
            )
        elif method.loss == "cispo":
            losses, clipped = cispo_loss(logprobs, batch.logprobs, batch.advantages, method.clip_low, method.clip_high)
        else:
            losses, clipped = clipped_policy_loss(
                logprobs, batch.logprobs, batch.advantages, method.clip_low, method.clip_high
            )
        metrics = self.loss_metrics(batch, logprobs, clipped)
        if batch.reference is not None and method.kl:
            losses = losses + method.kl * kl_loss(logprobs, batch.reference, method.kl_estimator)
        return LossOutput((losses * batch.weights).sum(), metrics)


def settle_grpo(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration with what its variant sets and the user does not, and what follows from the prompts."""
    method = config.method
    assert isinstance(method, GrpoConfig)
    options = GRPO_VARIANTS[method.variant]
    config = config.replace(**{name: value for name, value in options.items() if name not in overrides})
    return settle_policy(config, overrides, prepared)


def grpo(context: Any) -> Grpo:
    """Make the objective of an `ObjectiveContext`."""
    return Grpo(**policy_arguments(context, "grpo", needs_reference=context.config.method.kl > 0))
