"""Losses of learning from preferences without a reward model: the DPO family. Pure functions of tensors.

Every loss is given per pair, (N,). Log-probabilities are sums over the tokens of an answer, its end token included; the
losses that average over the length divide by its number of tokens.

| loss    | reference | formula, with Δ = log π(y)/π_ref(y) and |y| tokens                       | source     |
|---------|-----------|--------------------------------------------------------------------------|------------|
| sigmoid | yes       | -log σ(β(Δ_c - Δ_r)); with label smoothing: cDPO                         | 2305.18290 |
| ipo     | yes       | (Δ_c/|y_c| - Δ_r/|y_r| - 1/(2β))²                                        | 2310.12036 |
| hinge   | yes       | max(0, 1 - β(Δ_c - Δ_r))                                                 | 2305.10425 |
| simpo   | no        | -log σ(β(log π(y_c)/|y_c| - log π(y_r)/|y_r|) - γ)                       | 2405.14734 |
| orpo    | no        | -log π(y_c)/|y_c| - β log σ(log odds ratio of the answers, length-averaged) | 2403.07691 |
| kto     | yes       | unpaired: 1 - σ(β(Δ - z)) desirable, 1 - σ(β(z - Δ)) undesirable         | 2402.01306 |
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PairLossName = Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"]
WITHOUT_REFERENCE: Final = frozenset({"simpo", "orpo"})


@dataclass(frozen=True)
class PairLogprobs:
    """Log-probabilities of the two answers of each pair, (N,), summed over tokens, and their numbers of tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    """Under the reference model; None for the losses that have none."""
    ref_rejected: Tensor | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """log π(chosen) / π_ref(chosen)."""
        assert self.ref_chosen is not None
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log π(rejected) / π_ref(rejected)."""
        assert self.ref_rejected is not None
        return self.rejected - self.ref_rejected


@dataclass(frozen=True)
class LossOptions:
    """The numbers in the losses."""

    beta: float = 0.1
    """How strongly the policy is held to the reference (sigmoid, hinge, ipo, kto); the scale of the margin (simpo); the
    weight of the odds ratio (orpo)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (sigmoid and simpo)."""
    margin: float = 0.0
    """By how much the chosen answer's reward should exceed the rejected one's (simpo's γ)."""


def sigmoid_loss(pairs: PairLogprobs, options: LossOptions) -> Tensor:
    return _logistic(options.beta * (pairs.chosen_ratio - pairs.rejected_ratio), options.label_smoothing)


def ipo_loss(pairs: PairLogprobs, options: LossOptions) -> Tensor:
    chosen, rejected = pairs.chosen_ratio / pairs.chosen_tokens, pairs.rejected_ratio / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * options.beta)) ** 2


def hinge_loss(pairs: PairLogprobs, options: LossOptions) -> Tensor:
    return torch.relu(1 - options.beta * (pairs.chosen_ratio - pairs.rejected_ratio))


def simpo_loss(pairs: PairLogprobs, options: LossOptions) -> Tensor:
    chosen, rejected = _mean_logprobs(pairs)
    return _logistic(options.beta * (chosen - rejected) - options.margin, options.label_smoothing)


def orpo_loss(pairs: PairLogprobs, options: LossOptions) -> Tensor:
    chosen, rejected = _mean_logprobs(pairs)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - options.beta * F.logsigmoid(log_odds)


PAIR_LOSSES: Final[dict[PairLossName, Callable[[PairLogprobs, LossOptions], Tensor]]] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}


def pair_loss(name: PairLossName, pairs: PairLogprobs, options: LossOptions, *, sft_weight: float = 0.0) -> Tensor:
    """Return the loss of each pair, (N,), in nats.

    sft_weight: adds that times `nll_loss`, which keeps the chosen answers likely.
    """
    loss = PAIR_LOSSES[name](pairs, options)
    return loss + sft_weight * nll_loss(pairs.chosen, pairs.chosen_tokens) if sft_weight else loss


def nll_loss(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """Return the negative log-likelihood of answers in nats per token: the SFT term."""
    return -logprobs / tokens


def rewards(name: PairLossName, pairs: PairLogprobs, beta: float) -> tuple[Tensor, Tensor]:
    """Return the implicit rewards of the chosen and the rejected answers, (N,), detached: what the loss compares."""
    if name == "ipo":
        chosen, rejected = pairs.chosen_ratio / pairs.chosen_tokens, pairs.rejected_ratio / pairs.rejected_tokens
    elif name in WITHOUT_REFERENCE:
        chosen, rejected = _mean_logprobs(pairs)
    else:
        chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    return (beta * chosen).detach(), (beta * rejected).detach()


def kto_loss(
    ratio: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the KTO loss of each answer, (N,).

    ratio: (N,) log π(y)/π_ref(y). desirable: (N,) bool. baseline: what `kto_baseline` gives, broadcastable.
    """
    good = desirable_weight * (1 - torch.sigmoid(beta * (ratio - baseline)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (baseline - ratio)))
    return torch.where(desirable, good, bad)


def kto_baseline(mismatched_ratio: Tensor) -> Tensor:
    """Return KTO's estimate of KL(policy || reference), a scalar without gradient that is never negative.

    mismatched_ratio: (N,) log π(y)/π_ref(y) of prompts, each with the answer to another: see
    `mismatched`.
    """
    return mismatched_ratio.detach().mean().clamp(min=0)


def mismatched(prompts: Sequence[Hashable]) -> list[int]:
    """Return for each prompt the row whose answer it is mismatched with: the next one with another prompt.

    After the last row comes the first. Where all prompts are equal, it is the next row. Raises ValueError for fewer
    than 2 rows: an answer cannot be mismatched with its own prompt.
    """
    count = len(prompts)
    if count < 2:
        raise ValueError("mismatched pairs need at least 2 rows")
    partner, found = [0] * count, 0
    for i in reversed(range(2 * count)):  # the second time around, the rows after the last are known
        row, following = i % count, (i + 1) % count
        found = following if prompts[following] != prompts[row] else found
        partner[row] = found
    if all(prompt == prompts[0] for prompt in prompts):
        return [(i + 1) % count for i in range(count)]
    return partner


def _logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    loss = -F.logsigmoid(logits)
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


def _mean_logprobs(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    return pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, accurate near 0 and far from it; finite, with a finite gradient, at 0."""
    x = x.clamp(max=-1e-7)
    near = x > -0.6931471805599453
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)
