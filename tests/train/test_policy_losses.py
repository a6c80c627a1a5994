"""The gradients of policy losses, exactly: all 1,024 answers of 5 tokens from a vocabulary of 4 are enumerated, so that
expectations are sums. docs/alignment.md has the results in words."""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptsmith.train.objectives.policy_losses import (
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    gspo_loss,
    kl_loss,
)
from gptsmith.train.rollout.advantages import gae, group_advantages, kl_estimate, overlong_penalty, whiten

V, T = 4, 5
ANSWERS = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (1024, 5)
Kind = Literal["k1", "k2", "k3"]
KINDS: tuple[Kind, ...] = ("k1", "k2", "k3")


class Policy:
    """Logits for each position and last token: (T, V + 1, V). With `ends`, token 0 ends an answer."""

    def __init__(self, seed: int, answers: Tensor = ANSWERS, *, ends: bool = False) -> None:
        length = answers.shape[1]
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(length, V + 1, V, generator=generator, dtype=torch.float64).requires_grad_()
        self.mask = torch.ones(answers.shape, dtype=torch.bool)
        if ends:  # what comes after the first 0 is no part of an answer; of equal ones keep the first
            over = (answers == 0).int().cumsum(dim=1) - (answers == 0).int() > 0
            kept = ~(over & (answers != 0)).any(dim=1)
            answers, self.mask = answers[kept], ~over[kept]
        self.answers = answers
        self.before = torch.cat([torch.full_like(answers[:, :1], V), answers[:, :-1]], dim=1)

    def all_logprobs(self) -> Tensor:
        """(N, T, V): at every position of every answer."""
        positions = torch.arange(self.answers.shape[1])
        return self.logits[positions, self.before].log_softmax(dim=-1)

    def logprobs(self) -> Tensor:
        """(N, T), 0 after the end."""
        return self.all_logprobs().gather(2, self.answers[..., None])[..., 0] * self.mask

    def probabilities(self) -> Tensor:
        """(N,), which sum to 1."""
        return self.logprobs().sum(dim=1).exp()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]


def rewards(answers: Tensor) -> Tensor:
    return (answers == 2).double().sum(dim=1) ** 2 - 0.7 * (answers[:, 0] == 1) + 0.3 * answers[:, -1]


def expected(policy: Policy, losses: Tensor) -> Tensor:
    """The gradient of the loss over answers that the policy samples, in expectation: the weights have none."""
    return policy.gradient((policy.probabilities().detach()[:, None] * losses * policy.mask).sum())


def test_the_answers_are_all_there_are() -> None:
    for ends in (False, True):
        assert float(Policy(0, ends=ends).probabilities().detach().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("loss", ["clip", "cispo"])
def test_the_loss_of_fresh_answers_is_unbiased(loss: str, ends: bool) -> None:
    """Summed over tokens, with any baseline: minus the gradient of the expected reward."""
    policy = Policy(1, ends=ends)
    score = rewards(policy.answers)
    exact = policy.gradient((policy.probabilities() * score).sum())
    logprobs = policy.logprobs()
    advantages = (score - 1.3)[:, None].expand(policy.mask.shape)
    make = clipped_policy_loss if loss == "clip" else cispo_loss
    losses, clipped = make(logprobs, logprobs.detach(), advantages, 0.2, 0.28)
    assert not clipped.any()
    torch.testing.assert_close(-expected(policy, losses), exact, rtol=0, atol=1e-10)


def test_gspo_and_the_mean_over_an_answers_tokens_divide_rewards_by_the_length() -> None:
    """So they are biased towards what short answers gain: the gradient is that of the mean of reward / length."""
    policy = Policy(2, ends=True)
    score, lengths = rewards(policy.answers), policy.mask.sum(dim=1)
    shorter = policy.gradient((policy.probabilities() * score / lengths).sum())
    logprobs, advantages = policy.logprobs(), score[:, None].expand(policy.mask.shape)
    weights = policy.mask.double() / lengths[:, None]
    gspo, _ = gspo_loss(logprobs, logprobs.detach(), advantages, policy.mask, 3e-4, 4e-4)
    clip, _ = clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2)
    for losses in (gspo, clip):
        torch.testing.assert_close(-expected(policy, losses * weights), shorter, rtol=0, atol=1e-10)
    exact = policy.gradient((policy.probabilities() * score).sum())
    assert not torch.allclose(shorter, exact, atol=1e-2)


def token_divergence(policy: Policy, reference: Policy, *, reverse: bool = False) -> Tensor:
    """(N, T): the divergence of the policy's next token from the reference's after each prefix; reverse: the other."""
    ours, theirs = policy.all_logprobs(), reference.all_logprobs().detach()
    p, q = (theirs, ours) if reverse else (ours, theirs)
    return (p.exp() * (p - q)).sum(dim=-1) * policy.mask


@pytest.mark.parametrize("ends", [False, True])
def test_estimators_of_the_divergence(ends: bool) -> None:
    """k1 and k3 are unbiased; k2 is not; k3 is never negative."""
    policy, reference = Policy(3, ends=ends), Policy(4, ends=ends)
    weights = policy.probabilities().detach()
    logprobs, others = policy.logprobs().detach(), reference.logprobs().detach()
    exact = float((weights[:, None] * (logprobs - others)).sum())
    assert float((weights[:, None] * token_divergence(policy, reference).detach()).sum()) == pytest.approx(exact)
    found = {kind: float((weights[:, None] * kl_estimate(logprobs, others, kind)).sum()) for kind in KINDS}
    assert found["k1"] == pytest.approx(exact)
    assert found["k3"] == pytest.approx(exact)
    assert abs(found["k2"] - exact) > 0.05 * exact
    assert (kl_estimate(logprobs, others, "k3") >= 0).all()


@pytest.mark.parametrize("ends", [False, True])
def test_the_divergence_in_the_loss(ends: bool) -> None:
    """k1: no gradient. k2: that of the divergence at the sampled prefixes. k3: that of the opposite divergence there.
    None has the part of the whole divergence's gradient that comes from sampling other prefixes."""
    policy, reference = Policy(5, ends=ends), Policy(6, ends=ends)
    logprobs, others = policy.logprobs(), reference.logprobs().detach()
    weights = policy.probabilities().detach()[:, None]
    at_prefixes = policy.gradient((weights * token_divergence(policy, reference)).sum())
    opposite = policy.gradient((weights * token_divergence(policy, reference, reverse=True)).sum())
    gradients = {kind: expected(policy, kl_loss(logprobs, others, kind)) for kind in KINDS}
    close: Any = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(at_prefixes), **close)
    torch.testing.assert_close(gradients["k2"], at_prefixes, **close)
    torch.testing.assert_close(gradients["k3"], opposite, **close)
    whole = policy.gradient((policy.probabilities() * (policy.logprobs() - others).sum(dim=1)).sum())
    assert not torch.allclose(at_prefixes, whole, atol=1e-2)
    assert not torch.allclose(opposite, at_prefixes, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_in_the_reward(kind: Kind) -> None:
    """k1 gives the gradient of the expected reward less the divergence of whole answers. k2 and k3 give that of their
    own mean, less what they would give in the loss."""
    policy, reference, beta = Policy(7, ends=True), Policy(8, ends=True), 0.4
    logprobs, others = policy.logprobs(), reference.logprobs().detach()
    score = rewards(policy.answers)
    penalty = kl_estimate(logprobs, others, kind)
    tokens = -beta * penalty.detach()
    last = policy.mask.sum(dim=1) - 1
    tokens[torch.arange(len(tokens)), last] += score
    advantages, returns = gae(tokens, torch.zeros_like(tokens), policy.mask, 1.0, 1.0)
    torch.testing.assert_close(advantages, returns)
    losses, _ = clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2)
    found = -expected(policy, losses)
    mean = (policy.probabilities() * (score - beta * penalty.sum(dim=1))).sum()
    exact = policy.gradient(mean)
    in_loss = expected(policy, kl_loss(policy.logprobs(), others, kind))
    torch.testing.assert_close(found, exact + beta * in_loss, rtol=0, atol=1e-10)
    if kind == "k1":
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    else:
        assert not torch.allclose(found, exact, atol=1e-2)


PAIRS = torch.tensor(list(itertools.product(range(V), repeat=2)))


def group_gradient(policy: Policy, n: int, **options: Any) -> Tensor:
    """The expected gradient of minus the loss, per answer, over all groups of n answers."""
    score = rewards(policy.answers)
    logprobs, probabilities = policy.logprobs(), policy.probabilities().detach()
    chosen = torch.tensor(list(itertools.product(range(len(policy.answers)), repeat=n)))  # (G, n)
    numbers = torch.arange(len(chosen)).repeat_interleave(n)
    advantages, _ = group_advantages(score[chosen].flatten(), numbers, **options)
    weights = probabilities[chosen].prod(dim=1).repeat_interleave(n) / n
    flat = chosen.flatten()
    losses, _ = clipped_policy_loss(
        logprobs[flat], logprobs[flat].detach(), advantages.double()[:, None].expand(-1, 2), 0.2, 0.2
    )
    return policy.gradient(-(weights[:, None] * losses * policy.mask[flat]).sum())


@pytest.mark.parametrize("n", [2, 3])
def test_baselines_of_groups(n: int) -> None:
    """The others' mean is unbiased. The whole group's mean shrinks the gradient by (n - 1) / n. Dividing by the spread
    of the group changes its direction."""
    policy = Policy(9, PAIRS, ends=True)
    exact = policy.gradient((policy.probabilities() * rewards(policy.answers)).sum())
    others = group_gradient(policy, n, scale="none", baseline="others")
    torch.testing.assert_close(others, exact, rtol=0, atol=1e-6)
    whole = group_gradient(policy, n, scale="none", baseline="group")
    torch.testing.assert_close(whole, exact * (n - 1) / n, rtol=0, atol=1e-6)
    scaled = group_gradient(policy, n, scale="group", baseline="group")
    cosine = torch.nn.functional.cosine_similarity(scaled.flatten(), exact.flatten(), dim=0)
    assert 0.5 < float(cosine) < 0.995


def test_clipping_stops_the_gradient_on_the_far_side_only() -> None:
    old = torch.zeros(4)
    logprobs = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    losses, clipped = clipped_policy_loss(logprobs, old, advantages, 0.2, 0.28)
    assert clipped.tolist() == [True, False, False, True]
    losses.sum().backward()
    assert (logprobs.grad != 0).tolist() == [False, True, True, False]  # type: ignore[union-attr]
    logprobs.grad = None
    losses, clipped = cispo_loss(logprobs, old, advantages, 0.2, 0.28)
    assert clipped.all()
    losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.28, -0.8, 1.28, 0.8]))


TRL_LOSSES = [
    ("clip", "dapo", "token"),
    ("cispo", "cispo", "token"),
    ("gspo", "grpo", "sequence"),
    ("clip", "dr_grpo", ""),
]


@pytest.mark.parametrize(("loss", "theirs", "average"), TRL_LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_losses_and_gradients_equal_trls(loss: str, theirs: str, average: str, beta: float) -> None:
    """`GRPOTrainer`'s own function on the same tensors, with unequal lengths."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    torch.manual_seed(0)
    logprobs = (-torch.rand(6, 7, dtype=torch.float64)).requires_grad_()
    old, reference = (logprobs.detach() + 0.3 * torch.randn(6, 7, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(6, dtype=torch.float64)
    mask = torch.arange(7) < torch.randint(1, 8, (6, 1))
    lengths = mask.sum(dim=1, keepdim=True)
    low, high = (1.0, 4.0) if loss == "cispo" else (0.2, 0.28)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *arguments, **options: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=theirs,
        epsilon_low=low,
        epsilon_high=1 + high if loss == "cispo" else high,  # TRL's CISPO takes the bound itself
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        max_completion_length=7,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 1),
        "prompt_mask": torch.ones(6, 1),
        "completion_ids": torch.zeros(6, 7),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    expected_loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    expected_gradient = torch.autograd.grad(expected_loss, logprobs)[0]
    rows = advantages[:, None].expand(6, 7)
    if loss == "gspo":
        losses, _ = gspo_loss(logprobs, old, rows, mask, low, high)
    elif loss == "cispo":
        losses, _ = cispo_loss(logprobs, old, rows, low, high)
    else:
        losses, _ = clipped_policy_loss(logprobs, old, rows, low, high)
    losses = losses + beta * kl_loss(logprobs, reference, "k3")
    if average == "sequence":
        found = (losses * mask / lengths).sum() / 6
    else:
        found = (losses * mask).sum() / (mask.sum() if average == "token" else 6 * 7)
    torch.testing.assert_close(found, expected_loss)
    torch.testing.assert_close(torch.autograd.grad(found, logprobs)[0], expected_gradient)


def test_gae_by_its_definition() -> None:
    """A_t = Σ (γλ)^k δ_{t+k}, for answers of different lengths at different places."""
    torch.manual_seed(1)
    rewards_, values = torch.randn(3, 8), torch.randn(3, 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    spans = [(0, 8), (2, 5), (6, 7)]
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = True
    gamma, lam = 0.9, 0.8
    advantages, returns = gae(rewards_, values, mask, gamma, lam)
    for row, (start, stop) in enumerate(spans):
        for t in range(start, stop):
            total = 0.0
            for k in range(t, stop):
                after = float(values[row, k + 1]) if k + 1 < stop else 0.0
                total += (gamma * lam) ** (k - t) * (float(rewards_[row, k]) + gamma * after - float(values[row, k]))
            assert float(advantages[row, t]) == pytest.approx(total, abs=1e-5)
            assert float(returns[row, t]) == pytest.approx(total + float(values[row, t]), abs=1e-5)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=24),
    st.integers(2, 4),
    st.sampled_from(["group", "batch", "none"]),
)
def test_dead_groups(values: list[int], size: int, scale: Any) -> None:
    """Exactly the groups with one reward are dead; advantages of a group sum to 0 and keep the order of the rewards."""
    groups = torch.arange(len(values)) // size
    scores = torch.tensor(values, dtype=torch.float32)
    advantages, dead = group_advantages(scores, groups, scale=scale)
    for number in groups.unique():
        mine = groups == number
        assert bool(dead[mine].all()) == bool(dead[mine].any()) == (len(scores[mine].unique()) == 1)
        assert float(advantages[mine].sum()) == pytest.approx(0, abs=1e-4)
        order = scores[mine][:, None] > scores[mine][None]
        assert bool((order <= (advantages[mine][:, None] > advantages[mine][None])).all())
    if len(values) % size == 0 and scale == "group" and not dead.any():
        spread = advantages.view(-1, size).std(dim=1)
        torch.testing.assert_close(spread, torch.ones_like(spread))


def test_small_helpers() -> None:
    x, mask = torch.randn(3, 5), torch.rand(3, 5) < 0.7
    white = whiten(x, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white[mask].std()) == pytest.approx(1, abs=1e-5)
    assert not white[~mask].any()
    assert float(whiten(x, mask, shift_mean=False)[mask].mean()) == pytest.approx(float(x[mask].mean()), abs=1e-6)
    torch.testing.assert_close(
        overlong_penalty(torch.tensor([10, 80, 90, 100]), 100, 20), torch.tensor([0, 0, -0.5, -1])
    )
    values, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([2.0, 2.0])
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.2), torch.tensor([1.8**2, 1.9**2]) / 2)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0), torch.tensor([1.0, 1.9**2]) / 2)
