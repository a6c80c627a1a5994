"""PPO as in InstructGPT: a value model, generalized advantages, and a KL penalty in the rewards.

The value model starts as a copy of the model that training starts from, or of the reward model, with a new head.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptsmith.checkpoint import TrainState
from gptsmith.data.loader import TokenLoader
from gptsmith.model.documents import is_fake
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.model.loss import head_entropies, head_logprobs, token_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.train.config import PpoConfig
from gptsmith.train.init import load_init, with_tokens
from gptsmith.train.objectives.base import LossOutput, Models, Sum
from gptsmith.train.objectives.policy import PolicyObjective, policy_arguments
from gptsmith.train.objectives.policy_losses import clipped_policy_loss, clipped_value_loss
from gptsmith.train.rollout.advantages import AdaptiveKl, gae, whiten
from gptsmith.train.rollout.batch import RolloutBatch, Stats, padded
from gptsmith.train.rollout.rollout import Rollout
from gptsmith.train.text import Text

VALUE_HEAD = HeadConfig(("value",), "regression")


def value_model(trunk: Transformer) -> SequenceClassifier:
    """Return a value model on `trunk`, whose values are 0 at first."""
    if not trunk.config.tie_word_embeddings:
        trunk.lm_head.requires_grad_(False)  # no part of a value
    model = SequenceClassifier(trunk, VALUE_HEAD)
    torch.nn.init.zeros_(model.score.weight)
    return model


class Ppo(PolicyObjective):
    """Proximal policy optimization (Schulman et al. 2017, 1707.06347; Ouyang et al. 2022, 2203.02155).

    value: the value model. text: batches of plain text that are trained on besides, and their weight.
    """

    method: PpoConfig

    def __init__(
        self, *arguments: Any, value: SequenceClassifier, text: tuple[TokenLoader, float] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.value, self.text = value, text
        self.kl = AdaptiveKl(self.method.kl, self.method.kl_target)

    def models(self, policy: Transformer) -> Models:
        models = super().models(policy)
        if is_fake(next(policy.parameters())):  # in a forecast
            models.value = value_model(Transformer(self.value.transformer.config, initialize=False))
        else:
            models.value = self.value.to(next(policy.parameters()).device)
        return models

    def values(self, models: Models, batch: RolloutBatch) -> Tensor:
        """Return the value (B, T) of the text up to each token."""
        model = models.value
        assert isinstance(model, SequenceClassifier)
        values: Tensor = model.score(model.transformer.hidden_states(batch.ids))[..., 0].float()
        return values

    def batch_of(self, models: Models, rollouts: Sequence[Rollout], scores: Tensor) -> tuple[RolloutBatch, Stats]:
        method, batch = self.method, padded(rollouts)
        mask = batch.mask
        if method.whiten_rewards:
            scores = scores / scores.std().clamp_min(1e-6)
        rewards = torch.zeros_like(batch.logprobs)
        stats: dict[str, tuple[float, float]] = {}
        if method.kl:
            divergence = (batch.logprobs - self.reference_logprobs(models, batch)) * mask
            rewards = rewards - self.kl.weight * divergence
            per_answer = float(divergence.sum()) / len(rollouts)
            stats |= {"kl": (per_answer, 1.0), "kl_weight": (self.kl.weight, 1.0)}
            self.kl.update(per_answer, len(rollouts))
        last = torch.tensor([len(each.prompt.ids) + len(each.ids) - 2 for each in rollouts])
        rewards[torch.arange(len(rollouts)), last] += scores.float()
        values = self.in_chunks(batch, models.device, lambda rows: self.values(models, rows)) * mask
        advantages, returns = gae(rewards, values, mask, method.gamma, method.gae_lambda)
        explained = 1 - (returns - values)[mask].var() / returns[mask].var().clamp_min(1e-8)
        stats["value_explained"] = (float(explained), 1.0)
        advantages = whiten(advantages, mask)
        return dataclasses.replace(batch, advantages=advantages, values=values, returns=returns), stats

    def finish(self, batch: RolloutBatch, index: int) -> RolloutBatch:
        batch = super().finish(batch, index)
        return batch if self.text is None else dataclasses.replace(batch, text=next(self.text[0]))

    def loss(self, models: Models, batch: RolloutBatch) -> LossOutput:
        method, mask = self.method, batch.mask
        assert batch.values is not None
        assert batch.returns is not None
        hidden = models.policy.hidden_states(batch.ids)
        logprobs = self.from_hidden(head_logprobs, models.policy, hidden, batch)
        losses, clipped = clipped_policy_loss(
            logprobs, batch.logprobs, batch.advantages, method.clip_low, method.clip_high
        )
        values = self.values(models, batch)
        value_losses = clipped_value_loss(values, batch.values, batch.returns, method.value_clip)
        metrics = self.loss_metrics(batch, logprobs, clipped)
        metrics["value_loss"] = Sum((value_losses.detach() * mask).sum(), mask.sum())
        total = ((losses + method.value_coef * value_losses) * batch.weights).sum()
        if method.entropy:
            entropies = self.from_hidden(head_entropies, models.policy, hidden, batch)
            total = total - method.entropy * (entropies * batch.weights).sum()
        if batch.text is not None and self.text is not None and batch.text.num_rows:
            weight = self.text[1] * batch.count / (self.method.ptx_rows * batch.text.ids.shape[1])
            text_loss = token_loss_sum(models.policy, *batch.text)
            metrics["text_loss"] = Sum(text_loss.detach(), float(batch.text.num_targets))
            total = total + weight * text_loss
        return LossOutput(total, metrics)

    def state(self) -> TrainState:
        state = super().state()
        values = state.values | {"kl_weight": self.kl.weight}
        if self.text is not None:
            values["text"] = self.text[0].state_dict()
        weights = {f"value/{name}": p for name, p in self.value.named_parameters() if p.requires_grad}
        return TrainState(values, state.tensors | weights)

    def load_state(self, state: TrainState) -> None:
        super().load_state(state)
        self.kl.weight = state.values["kl_weight"]
        if self.text is not None:
            self.text[0].load_state_dict(state.values["text"])
        with torch.no_grad():
            for name, p in self.value.named_parameters():
                if p.requires_grad:
                    p.copy_(state.tensors[f"value/{name}"])


def ppo(context: Any) -> Ppo:
    """Make the objective of an `ObjectiveContext`."""
    config, method = context.config, context.config.method
    arguments = policy_arguments(context, "ppo", needs_reference=method.kl > 0)
    trunk = _trunk(arguments, config, context.tokenizer)
    text = None
    if (mixed := method.mixed_text()) is not None:
        corpus, weight = mixed
        dataset = Text.open(corpus, config.replace(val=None)).prepare(config, context.tokenizer, allow_unknown=True)
        loader = TokenLoader(
            dataset.train,
            batch_size=method.ptx_rows,
            seq_len=config.loop.context,
            seed=config.loop.seed,
            mask_documents=True,
        )
        text = (loader, weight)
    return Ppo(**arguments, value=value_model(trunk), text=text)


def _trunk(arguments: dict[str, Any], config: Any, tokenizer: Any) -> Transformer:
    """Return what the value model starts from: the one reward model, as in InstructGPT, if it has the policy's
    architecture; otherwise the model that training starts from."""
    start: Transformer | None = arguments["reference"]
    if start is None:
        start = with_tokens(load_init(str(config.init.init)), tokenizer).model
    models = [reward.classifier for reward in arguments["rewards"].rewards if hasattr(reward, "classifier")]
    if len(models) == 1 and models[0].transformer.config == start.config:
        start = models[0].transformer
    return copy.deepcopy(start).requires_grad_(True)
