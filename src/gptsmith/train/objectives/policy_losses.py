"""Losses of PPO, GRPO and their relatives, token by token. Tensors in, tensors out; docs/alignment.md says of each what
its gradient is.

Axis letters: B answers · T tokens. Log-probabilities are in nats. Losses are to be minimized, and are not yet averaged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gptsmith.train.rollout.advantages import kl_estimate


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return PPO's loss of each token and whether it is clipped, which stops its gradient: (B, T) each.

    logprobs: of the policy. old_logprobs: when the tokens were sampled. advantages: of the tokens. The ratio of the two
    probabilities counts within [1 - low, 1 + high] only, where going further would lower the loss (Schulman et al.
    2017, 1707.06347; a higher `high` is DAPO's clip-higher).
    """
    ratio = (logprobs - old_logprobs).exp()
    free, bounded = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(free, bounded), (bounded > free).detach()


def gspo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return GSPO's loss of each token and whether it is clipped: (B, T) each (Zheng et al. 2025, 2507.18071).

    The ratio is that of whole answers, to the power of 1 / length. mask: (B, T) bool, the answers' tokens. The mean
    over an answer's tokens is the loss of the answer; each token carries its share of the gradient.
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp_min(1)
    log_ratio = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True) / lengths
    shared = log_ratio.detach() + logprobs - logprobs.detach()  # the answer's ratio, with the token's gradient
    return clipped_policy_loss(shared, torch.zeros_like(shared), advantages, low, high)


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return CISPO's loss of each token and whether its ratio is clipped: (B, T) each (MiniMax 2025, 2506.13585).

    The ratio, within [1 - low, 1 + high], is a constant weight of the log-probability: every token keeps a gradient.
    """
    ratio = (logprobs - old_logprobs).detach().exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    return -advantages * bounded * logprobs, bounded != ratio


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return half the squared error of each value, (B, T), where moving further than `clip` from the old value does not
    pay. clip: 0 for none."""
    loss = (values - returns).square()
    if clip:
        bounded = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (bounded - returns).square())
    return loss / 2


def kl_loss(logprobs: Tensor, reference: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Return a loss of each token, (B, T), that is to keep the policy close to the reference.

    On tokens that the policy has just sampled, the gradient of k2 is, in expectation, that of the divergence of the
    policy from the reference. That of k1 is 0; that of k3 is that of the divergence of the reference from the policy.
    reference: log-probabilities of the reference, without gradient.
    """
    return kl_estimate(logprobs, reference, kind)
