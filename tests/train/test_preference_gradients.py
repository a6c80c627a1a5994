"""Gradients in expectation, exactly, as docs/alignment.md states them: answers are enumerated, as in
test_policy_losses.py, whose policy this uses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith.train.objectives.policy_losses import cispo_loss, clipped_policy_loss, kl_loss
from gptsmith.train.objectives.preference_losses import PAIR_LOSSES, LossOptions, PairLogprobs
from gptsmith.train.rollout.advantages import gae, group_advantages
from tests.train.test_policy_losses import PAIRS, Policy, T, V, expected, rewards

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-10}


# Averages over tokens ------------------------------------------------------------------------------------------------


def reinforce(policy: Policy) -> Tensor:
    """(N, T): the loss of each token of fresh answers."""
    logprobs = policy.logprobs()
    losses, _ = clipped_policy_loss(
        logprobs, logprobs.detach(), rewards(policy.answers)[:, None].expand(policy.mask.shape), 0.2, 0.2
    )
    return losses * policy.mask


def test_a_constant_divisor_is_unbiased_and_the_mean_over_an_answer_is_not() -> None:
    policy = Policy(11, ends=True)
    lengths, score = policy.mask.sum(dim=1), rewards(policy.answers)
    exact = policy.gradient((policy.probabilities() * score).sum())
    torch.testing.assert_close(-expected(policy, reinforce(policy) / T), exact / T, **CLOSE)
    shorter = policy.gradient((policy.probabilities() * score / lengths).sum())
    torch.testing.assert_close(-expected(policy, reinforce(policy) / lengths[:, None]), shorter, **CLOSE)
    assert not torch.allclose(exact / exact.norm(), shorter / shorter.norm(), atol=1e-2)


def token_mean(policy: Policy, n: int) -> Tensor:
    """The expected gradient of the mean over the tokens of an update of n answers, all of which are enumerated."""
    chosen = torch.tensor(list(itertools.product(range(len(policy.answers)), repeat=n)))  # (G, n)
    weights = policy.probabilities().detach()[chosen].prod(dim=1)
    sums, lengths = reinforce(policy).sum(dim=1), policy.mask.sum(dim=1)
    return -policy.gradient((weights * sums[chosen].sum(dim=1) / lengths[chosen].sum(dim=1)).sum())


def test_the_mean_over_tokens_comes_near_with_more_answers() -> None:
    policy = Policy(12, PAIRS, ends=True)
    lengths = policy.mask.sum(dim=1)
    sequence = -expected(policy, reinforce(policy) / lengths[:, None])
    torch.testing.assert_close(token_mean(policy, 1), sequence, **CLOSE)
    probabilities = policy.probabilities()
    exact = policy.gradient((probabilities * rewards(policy.answers)).sum())
    limit = exact / float((probabilities.detach() * lengths).sum())
    errors = [float((token_mean(policy, n) - limit).norm() / limit.norm()) for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert 0.01 < errors[3] < 0.6 * errors[0]


# Older policies ------------------------------------------------------------------------------------------------------


def test_answers_of_an_older_policy() -> None:
    """The ratio of a token has no ratio of the tokens before it: those count as the older policy drew them."""
    policy, old = Policy(13, ends=True), Policy(14, ends=True)
    logprobs, before = policy.logprobs(), old.logprobs().detach()
    weights = old.probabilities().detach()
    score = rewards(policy.answers)[:, None].expand(policy.mask.shape)
    # Σ_t E[prefix ~ μ, token ~ π, rest ~ μ] of the reward: the answer's probability with one token's ratio.
    surrogate = (weights[:, None] * (logprobs - before).exp() * score * policy.mask).sum()
    wanted = policy.gradient(surrogate)
    for loss in (
        clipped_policy_loss(logprobs, before, score, 1.0, 1e9)[0],
        cispo_loss(logprobs, before, score, 1.0, 1e9)[0],
    ):
        found = -policy.gradient((weights[:, None] * loss * policy.mask).sum())
        torch.testing.assert_close(found, wanted, **CLOSE)
    exact = policy.gradient((policy.probabilities() * rewards(policy.answers)).sum())
    assert not torch.allclose(wanted, exact, atol=1e-2)


# Baselines -----------------------------------------------------------------------------------------------------------


def test_dividing_by_the_spread_of_two_gives_the_gradient_of_winning() -> None:
    """Two answers have the advantages ±1/√2 whatever their distance: that of the probability to beat an answer."""
    policy = Policy(15, PAIRS, ends=True)
    score, probabilities = rewards(policy.answers), policy.probabilities()
    chosen = torch.tensor(list(itertools.product(range(len(score)), repeat=2)))
    numbers = torch.arange(len(chosen)).repeat_interleave(2)
    advantages, _ = group_advantages(score[chosen].flatten(), numbers, scale="group")
    weights = (probabilities.detach()[chosen].prod(dim=1) / 2).repeat_interleave(2)
    sums = policy.logprobs().sum(dim=1)[chosen.flatten()]
    found = policy.gradient((weights * advantages.double() * sums).sum())
    wins = torch.sign(score[:, None] - score[None, :])  # of a fresh answer against one of the frozen policy
    winning = policy.gradient((probabilities[:, None] * probabilities.detach()[None, :] * wins).sum())
    torch.testing.assert_close(found, winning / 2**0.5, rtol=0, atol=1e-6)


def values_of(policy: Policy, *, exact: bool) -> Tensor:
    """(N, T): what is expected before each token; exact, or from arbitrary numbers for each prefix."""
    score, probabilities = rewards(policy.answers), policy.probabilities().detach()
    values = torch.zeros(policy.mask.shape, dtype=torch.float64)
    before = policy.before  # column t: the token before position t
    for t in range(values.shape[1]):
        _, prefix = torch.unique(before[:, : t + 1], dim=0, return_inverse=True)
        size = int(prefix.max()) + 1
        mass = torch.zeros(size, dtype=torch.float64).index_add(0, prefix, probabilities)
        total = torch.zeros(size, dtype=torch.float64).index_add(0, prefix, probabilities * score)
        arbitrary = torch.randn(size, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        values[:, t] = ((total / mass) if exact else arbitrary)[prefix]
    return values * policy.mask


@pytest.mark.parametrize("lam", [1.0, 0.6])
def test_generalized_advantages_are_unbiased_with_lambda_1_or_exact_values(lam: float) -> None:
    policy = Policy(16, ends=True)
    truth = policy.gradient((policy.probabilities() * rewards(policy.answers)).sum())
    logprobs, tokens = policy.logprobs(), torch.zeros(policy.mask.shape, dtype=torch.float64)
    tokens[torch.arange(len(tokens)), policy.mask.sum(dim=1) - 1] = rewards(policy.answers)
    for exact in (True, False):
        advantages, _ = gae(tokens, values_of(policy, exact=exact), policy.mask, 1.0, lam)
        losses, _ = clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2)
        found = -expected(policy, losses)
        if exact or lam == 1.0:
            torch.testing.assert_close(found, truth, **CLOSE)
        else:
            assert not torch.allclose(found, truth, atol=1e-2)


# The divergence, weighted by the ratio -------------------------------------------------------------------------------


def test_the_ratio_of_probabilities_repairs_k3_in_the_loss() -> None:
    """With the gradient of the ratio too, k1 and k3 in the loss have that of the divergence of each token."""
    policy, reference = Policy(17, ends=True), Policy(18, ends=True)
    logprobs, others = policy.logprobs(), reference.logprobs().detach()
    ratio = (logprobs - logprobs.detach()).exp()
    wanted = expected(policy, kl_loss(logprobs, others, "k2"))
    for kind in ("k1", "k3"):
        found = expected(policy, ratio * kl_loss(logprobs, others, kind))
        torch.testing.assert_close(found, wanted, **CLOSE)


# Preferences ---------------------------------------------------------------------------------------------------------


class Tree:
    """A policy with logits of its own after every prefix, so that every distribution over answers is one."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.answers = torch.tensor(list(itertools.product(range(V), repeat=length)))
        generator = torch.Generator().manual_seed(seed)
        self.logits = [torch.randn(V**t, V, generator=generator, dtype=torch.float64) for t in range(length)]

    def logprobs(self) -> Tensor:
        """(N,), in the order of `answers`."""
        total = torch.zeros(1, dtype=torch.float64)
        for logits in self.logits:
            total = (total[:, None] + logits.log_softmax(dim=-1)).flatten()
        return total

    def set(self, logprobs: Tensor) -> None:
        """Become the distribution with these log-probabilities (N,), which need not sum to 1."""
        for t in reversed(range(len(self.logits))):
            logprobs = logprobs.view(-1, V)
            self.logits[t] = logprobs.clone()
            logprobs = logprobs.logsumexp(dim=-1)
        self.logits = [logits.requires_grad_() for logits in self.logits]


LENGTH, BETA = 3, 0.7


def population_gradient(name: str, policy: Tree, reference: Tensor, score: Tensor, options: LossOptions) -> float:
    """The norm of the expected gradient over all pairs, drawn from the reference and labeled by Bradley and Terry."""
    logprobs = policy.logprobs()
    n = len(logprobs)
    one, other = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    length = torch.full((n * n,), float(LENGTH), dtype=torch.float64)
    pairs = PairLogprobs(logprobs[one], logprobs[other], length, length, reference[one], reference[other])
    weights = (reference[one] + reference[other]).exp() * torch.sigmoid(score[one] - score[other])
    loss = (weights * PAIR_LOSSES[name](pairs, options)).sum()  # type: ignore[index]
    return float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.logits)]).norm())


def test_where_the_losses_of_preferences_end() -> None:
    """DPO ends at the optimum of reward less β times the divergence; IPO at a regression; hinge goes on."""
    reference = Tree(LENGTH, 1).logprobs()
    score = (reference.new_tensor(range(V**LENGTH)) * 37 % 17) / 10
    difference = score[:, None] - score[None, :]
    policy = Tree(LENGTH)
    policy.set(reference)
    start = {name: population_gradient(name, policy, reference, score, LossOptions(BETA)) for name in PAIR_LOSSES}
    policy.set(reference + score / BETA)
    assert population_gradient("sigmoid", policy, reference, score, LossOptions(BETA)) < 1e-12
    assert population_gradient("hinge", policy, reference, score, LossOptions(BETA)) > 1e-2 * start["hinge"]
    smoothed = LossOptions(BETA, label_smoothing=0.2)
    assert population_gradient("sigmoid", policy, reference, score, smoothed) > 1e-2 * start["sigmoid"]
    # IPO: Δ/|y| is the probability to be preferred to an answer of the reference, divided by β
    preferred = (torch.sigmoid(difference) * reference.exp()[None, :]).sum(dim=1)
    policy.set(reference + LENGTH * preferred / BETA)
    assert population_gradient("ipo", policy, reference, score, LossOptions(BETA)) < 1e-12
    assert start["ipo"] > 1e-3


def test_label_smoothing_is_right_for_labels_that_are_so_often_wrong() -> None:
    """cDPO with ε on clean labels ends where DPO ends on labels of which the share ε is turned round."""
    reference = Tree(LENGTH, 2).logprobs()
    n = len(reference)
    score = (reference.new_tensor(range(n)) * 29 % 13) / 10
    policy = Tree(LENGTH, 3)
    for logits in policy.logits:
        logits.requires_grad_()
    logprobs = policy.logprobs()
    one, other = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    length = torch.ones(n * n, dtype=torch.float64)
    pairs = PairLogprobs(logprobs[one], logprobs[other], length, length, reference[one], reference[other])
    drawn, clean = (reference[one] + reference[other]).exp(), torch.sigmoid(score[one] - score[other])
    noisy = 0.8 * clean + 0.2 * (1 - clean)
    smooth = (drawn * clean * PAIR_LOSSES["sigmoid"](pairs, LossOptions(BETA, label_smoothing=0.2))).sum()
    plain = (drawn * noisy * PAIR_LOSSES["sigmoid"](pairs, LossOptions(BETA))).sum()
    for a, b in zip(
        torch.autograd.grad(smooth, policy.logits, retain_graph=True),
        torch.autograd.grad(plain, policy.logits),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **CLOSE)
