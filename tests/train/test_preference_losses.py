from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gptsmith.train.objectives.preference_losses import (
    PAIR_LOSSES,
    WITHOUT_REFERENCE,
    LossOptions,
    PairLogprobs,
    kto_baseline,
    kto_loss,
    mismatched,
    nll_loss,
    pair_loss,
    rewards,
)


def some_pairs(*, equal: bool = False) -> PairLogprobs:
    torch.manual_seed(1)
    chosen, rejected = -torch.rand(4, dtype=torch.float64) * 20 - 2, -torch.rand(4, dtype=torch.float64) * 30 - 2
    shift = 0.0 if equal else torch.randn(2, 4, dtype=torch.float64)
    ref = torch.stack([chosen, rejected]) + shift
    lengths = torch.tensor([[3, 9, 1, 20], [7, 2, 5, 20]])  # unequal, or averages could pass for sums
    return PairLogprobs(
        chosen.requires_grad_(),
        rejected.requires_grad_(),
        lengths[0],
        lengths[1],
        ref_chosen=ref[0],
        ref_rejected=ref[1],
    )


def test_losses_equal_the_papers_formulas() -> None:
    p, o = some_pairs(), LossOptions(beta=0.3, margin=0.7, label_smoothing=0.1)
    assert p.ref_chosen is not None
    assert p.ref_rejected is not None
    for i in range(4):
        chosen, rejected = p.chosen[i].item(), p.rejected[i].item()
        n, m = int(p.chosen_tokens[i]), int(p.rejected_tokens[i])
        up, down = chosen - float(p.ref_chosen[i]), rejected - float(p.ref_rejected[i])
        sigma = 1 / (1 + math.exp(-0.3 * (up - down)))
        simpo = 1 / (1 + math.exp(-(0.3 * (chosen / n - rejected / m) - 0.7)))
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (chosen / n, rejected / m)]
        expected = {
            "sigmoid": -0.9 * math.log(sigma) - 0.1 * math.log(1 - sigma),
            "ipo": (up / n - down / m - 1 / 0.6) ** 2,
            "hinge": max(0.0, 1 - 0.3 * (up - down)),
            "simpo": -0.9 * math.log(simpo) - 0.1 * math.log(1 - simpo),
            "orpo": -chosen / n - 0.3 * math.log(1 / (1 + odds[1] / odds[0])),
        }
        assert set(expected) == set(PAIR_LOSSES)
        for name, value in expected.items():
            assert PAIR_LOSSES[name](p, o)[i].item() == pytest.approx(value, rel=1e-9), name  # type: ignore[index]


def test_the_first_loss_is_known_where_policy_and_reference_are_equal() -> None:
    p, o = some_pairs(equal=True), LossOptions()
    torch.testing.assert_close(PAIR_LOSSES["sigmoid"](p, o), torch.full((4,), math.log(2), dtype=torch.float64))
    torch.testing.assert_close(PAIR_LOSSES["hinge"](p, o), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(PAIR_LOSSES["ipo"](p, o), torch.full((4,), 25.0, dtype=torch.float64))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_raises_the_chosen_answer_and_lowers_the_rejected_one(name: str) -> None:
    p, o = some_pairs(equal=True), LossOptions(beta=0.1)
    loss = pair_loss(name, p, o)  # type: ignore[arg-type]
    up, down = torch.autograd.grad(loss.sum(), (p.chosen, p.rejected))
    assert (up < 0).all()
    assert (down > 0).all()
    if name in WITHOUT_REFERENCE:
        alone = PairLogprobs(p.chosen, p.rejected, p.chosen_tokens, p.rejected_tokens)
        torch.testing.assert_close(pair_loss(name, alone, o), loss)  # type: ignore[arg-type]


def test_the_sft_term_is_the_chosen_answers_likelihood() -> None:
    p, o = some_pairs(), LossOptions()
    plain, more = pair_loss("sigmoid", p, o), pair_loss("sigmoid", p, o, sft_weight=0.5)
    torch.testing.assert_close(more - plain, 0.5 * nll_loss(p.chosen, p.chosen_tokens))
    torch.testing.assert_close(nll_loss(p.chosen, p.chosen_tokens), -p.chosen / p.chosen_tokens)


def test_rewards_are_what_the_loss_compares() -> None:
    p = some_pairs()
    for name in PAIR_LOSSES:
        chosen, rejected = rewards(name, p, 0.3)
        assert not chosen.requires_grad
        loss = PAIR_LOSSES[name](p, LossOptions(beta=0.3))
        if name in ("sigmoid", "simpo"):
            torch.testing.assert_close(loss, -F.logsigmoid(chosen - rejected))


def test_kto_weighs_desirable_and_undesirable_answers() -> None:
    ratio, good = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([True, False, True])
    z = kto_baseline(torch.tensor([0.6, -0.2, 0.5], requires_grad=True))
    assert float(z) == pytest.approx(0.3)
    assert not z.requires_grad
    assert float(kto_baseline(torch.tensor([-1.0, 0.5]))) == 0.0
    found = kto_loss(ratio, good, z, beta=0.2, desirable_weight=2.0, undesirable_weight=3.0)
    sigmoid = torch.sigmoid(torch.tensor([0.2 * 0.2, 0.2 * 1.3, 0.2 * 1.7]))
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0, 2.0]) * (1 - sigmoid))


@pytest.mark.parametrize("prompts", ["ab", "abc", "abcdefgh", "aabb", "abba", "aaab", "baaa", "aabaacb"])
def test_no_prompt_is_mismatched_with_an_answer_to_it(prompts: str) -> None:
    n = len(prompts)
    for i, other in enumerate(mismatched(prompts)):
        expected = next(j % n for j in range(i + 1, i + n) if prompts[j % n] != prompts[i])
        assert other == expected


def test_mismatched_rows_where_there_is_one_prompt_or_one_row() -> None:
    assert mismatched("aaa") == [1, 2, 0]
    with pytest.raises(ValueError, match="at least 2"):
        mismatched("a")


def test_orpo_is_finite_for_certain_and_impossible_answers() -> None:
    chosen = torch.tensor([0.0, -1e4], requires_grad=True)
    p = PairLogprobs(chosen, torch.tensor([-1e4, 0.0]), torch.ones(2), torch.ones(2))
    loss = PAIR_LOSSES["orpo"](p, LossOptions())
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), chosen)[0].isfinite().all()


def test_losses_without_a_reference_equal_trls() -> None:
    """TRL's `CPOTrainer` (SimPO) and `ORPOTrainer` on the same log-probabilities."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    p = some_pairs()
    chosen, rejected = p.chosen / p.chosen_tokens, p.rejected / p.rejected_tokens
    accelerator = SimpleNamespace(device="cpu")
    simpo = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=0.3, label_smoothing=0.1, accelerator=accelerator
    )
    theirs, *_ = cpo.cpo_loss(simpo, chosen, rejected)
    options = LossOptions(beta=0.3, margin=0.7, label_smoothing=0.1)
    torch.testing.assert_close(PAIR_LOSSES["simpo"](p, options), theirs)
    theirs, *_ = orpo.odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=accelerator), chosen, rejected)
    found = PAIR_LOSSES["orpo"](p, options)
    torch.testing.assert_close((found + chosen).float(), -theirs, rtol=1e-5, atol=1e-6)
