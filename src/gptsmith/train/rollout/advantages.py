"""How good tokens were: advantages from rewards, and what is added to rewards. Tensors in, tensors out.

Axis letters: B answers · T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_SMALLEST = 1e-6  # spread of rewards that counts as none


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (B, T), by generalized advantage estimation (Schulman et al. 2015, 1506.02438).

    rewards: (B, T), for each token. values: (B, T), of the text before each. mask: (B, T) bool, the answers' tokens,
    contiguous in a row. An answer's last token ends the episode: nothing is expected after it.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    advantage = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t].to(rewards.dtype)
        surprise = rewards[:, t] + gamma * following - values[:, t]
        advantage = (surprise + gamma * lam * advantage) * inside
        following = values[:, t] * inside
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Return x, (B, T), scaled to variance 1 over the tokens in `mask`, and shifted to mean 0; 0 elsewhere."""
    chosen = x[mask]
    if len(chosen) < 2:
        return x * mask
    scaled = (x - chosen.mean()) / chosen.std().clamp_min(_SMALLEST)
    return (scaled if shift_mean else scaled + chosen.mean()) * mask


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    scale: Literal["group", "batch", "none"],
    baseline: Literal["group", "others"] = "group",
) -> tuple[Tensor, Tensor]:
    """Return the advantage of each answer over its group, (B,), and whether its group is dead, (B,) bool.

    rewards: (B,). groups: (B,) int64, the number of each answer's group.
    scale: what differences are divided by: the standard deviation of the group (GRPO), of all rewards, or nothing.
    baseline: the mean of the group, or of its other answers (RLOO), which is unbiased.
    A dead group has one reward for all its answers (or one answer alone): it teaches nothing.
    """
    rewards = rewards.double()
    _, numbers = torch.unique(groups, return_inverse=True)
    count = torch.zeros(int(numbers.max()) + 1, dtype=rewards.dtype).index_add_(0, numbers, torch.ones_like(rewards))
    total = torch.zeros_like(count).index_add_(0, numbers, rewards)
    difference = rewards - (total / count)[numbers]
    square = torch.zeros_like(count).index_add_(0, numbers, difference**2)
    spread = (square / count).sqrt()
    dead = (spread <= _SMALLEST * (total / count).abs().clamp_min(1))[numbers]
    n = count[numbers]
    if baseline == "others":
        difference = difference * n / (n - 1).clamp_min(1)
    if scale == "group":
        difference = difference / (square / (count - 1).clamp_min(1)).sqrt()[numbers].clamp_min(_SMALLEST)
    elif scale == "batch" and len(rewards) > 1:
        difference = difference / rewards.std().clamp_min(_SMALLEST)
    return difference.masked_fill(dead, 0.0).float(), dead


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Return an estimate of the divergence of the policy from the reference at each token that the policy sampled.

    logprobs, reference: of the token, of any shape. k1 and k3 are unbiased; k3 is never negative; k2 is biased (J.
    Schulman, "Approximating KL Divergence", 2020). As a loss they behave otherwise: see `policy_losses.kl_loss`.
    """
    difference = logprobs - reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    return (-difference).exp() - 1 + difference


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """Return 0 for answers that leave the last `buffer` of `limit` tokens free, falling to -1 at the limit (DAPO's soft
    penalty; Yu et al. 2025, 2503.14476). lengths: (B,)."""
    return -((lengths - (limit - buffer)).clamp(min=0).float() / buffer).clamp(max=1)


class AdaptiveKl:
    """The weight of a KL penalty. With a target it is adapted in proportion to the error (Ziegler et al. 2019,
    1909.08593); without, it stays."""

    HORIZON = 10_000  # answers over which an error of 20% changes the weight by a factor of about e^0.2

    def __init__(self, weight: float, target: float | None) -> None:
        self.weight, self.target = weight, target

    def update(self, divergence: float, answers: int) -> None:
        """Take the mean divergence of an answer, in nats, of so many answers into account."""
        if self.target is not None:
            error = min(max(divergence / self.target - 1, -0.2), 0.2)
            self.weight *= 1 + error * answers / self.HORIZON
