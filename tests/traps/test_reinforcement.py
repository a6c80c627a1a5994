"""Public reports about reinforcement learning and rewards, replayed. Each docstring names the report."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import DataError, RewardError
from gptsmith.formats.hf_heads import save_classifier
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.model.loss import token_logprobs
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.train.config import PromptConfig, RunConfig
from gptsmith.train.objectives.policy_losses import kl_loss
from gptsmith.train.prompts import PromptFiles
from gptsmith.train.rollout.advantages import gae, group_advantages
from gptsmith.train.rollout.checks import GoodhartAlarm, try_rewards
from gptsmith.train.rollout.rewards import Sample, open_rewards
from tests.factories import tiny_model


@dataclass
class Asked:
    prompt: str = "2 + 2 ="
    columns: dict[str, Any] = field(default_factory=lambda: {"answer": "4"})
    ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    place: str = "line 1"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["abcdefghijklmnopqrstuvwxyz 0123456789+=?"])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_E1_the_sampler_gives_the_probabilities_that_are_trained(temperature: float) -> None:
    """TRL #3867, #4493, #3029: sampler and trainer disagree, or the temperature is missing in one of them."""
    model = tiny_model(max_position_embeddings=64)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=7, logprobs=0, sampled_logprobs=True)
    for prompt, result in zip(prompts, Engine(model).generate(prompts, params), strict=True):
        ids = result.completions[0].ids
        recorded = [each.logprob for each in result.completions[0].logprobs or [] if each is not None]
        whole = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            logits = model(whole)[0, len(prompt) - 1 : -1] / temperature
        expected = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(recorded), expected, atol=1e-5, rtol=0)
        if temperature == 1:
            with torch.no_grad():
                trained = token_logprobs(model, whole[:, :-1], whole[:, 1:])[0, len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(recorded), trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "is_gradient"), [("k1", False), ("k2", True), ("k3", False)])
def test_E2_which_estimator_has_the_gradient_of_the_divergence(
    kind: Literal["k1", "k2", "k3"], is_gradient: bool
) -> None:
    """TRL #4637, verl #2953, open-instruct #534: k3 in the loss has another gradient than the divergence; with k1 it
    grew with its weight."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(4, generator=generator).log_softmax(-1)
    logits = torch.randn(4, generator=generator).requires_grad_()
    policy = logits.log_softmax(-1)
    (true,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    expected = (policy.exp().detach() * kl_loss(policy, reference, kind)).sum()  # over all tokens: no sampling
    (gradient,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(gradient, true, atol=1e-6) is is_gradient
    if kind == "k1":
        torch.testing.assert_close(gradient, torch.zeros(4), atol=1e-6, rtol=0)


def test_E3_reward_models_read_the_ids_that_were_sampled(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """TRL #5224, verl #6719, SkyRL #123: what was sampled is decoded and encoded again, and other ids are scored."""
    model = SequenceClassifier(tiny_model(vocab_size=tokenizer.vocab_size), HeadConfig(("reward",), "regression"))
    save_classifier(model, tmp_path)
    tokenizer.save(tmp_path)
    sampled = [tokenizer.encode("a")[0], int(tokenizer.eos_id or 0), tokenizer.encode("b")[0]]
    text = tokenizer.decode(sampled)
    assert tokenizer.encode(text) != sampled
    score = open_rewards([str(tmp_path)], tokenizer=tokenizer).score([Sample(Asked(), sampled, text)]).total[0]
    with torch.no_grad():
        assert score == pytest.approx(model(torch.tensor([[1, 2, 3, *sampled]])).item(), abs=1e-6)


def test_E4_long_prompts_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL #3644, #3646, #4358, ms-swift #10192: prompts are cut, at the system text or in the answer's template."""
    path = tmp_path / "prompts.jsonl"
    prompts = ["2 + 2 =", "what is " * 12, "3 + 3 =", "5 = ?"]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config = RunConfig(method=PromptConfig()).replace(val_fraction=0.25)
    data = PromptFiles.open(str(path), config).prepare(config, tokenizer)
    left = data.within(40, answer_tokens=16)
    assert sorted(p.prompt for p in [*left.train, *left.val] if isinstance(p.prompt, str)) == sorted(
        prompt for prompt in prompts if len(prompt) < 20
    )
    assert all(p.ids == tokenizer.encode_prompt(str(p.prompt)) for p in left.train)
    assert "1 prompts leave no room for an answer of 16 tokens" in capsys.readouterr().err
    with pytest.raises(DataError, match="1 prompts leave no room"):
        data.within(40, answer_tokens=16, on_long="error")


def test_E5_what_follows_the_end_of_an_answer_counts_for_nothing() -> None:
    """TRL #1893, verl #1758, OpenRLHF #1240: the reward is given to padding after the end, values are read one token
    off, and what is not a number gets through a mask of zeros."""
    generator = torch.Generator().manual_seed(0)
    lengths, T, gamma, lam = [6, 3, 1], 6, 0.9, 0.8
    rewards, values = torch.randn(2, 3, T, generator=generator)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    advantages, returns = gae(rewards.where(mask, 77.0), values.where(mask, -55.0), mask, gamma, lam)
    for row, n in enumerate(lengths):
        for t in range(n):  # the definition: a sum over the rest of the answer
            expected = 0.0
            for k in range(t, n):
                following = float(values[row, k + 1]) if k + 1 < n else 0.0
                expected += (gamma * lam) ** (k - t) * float(rewards[row, k] + gamma * following - values[row, k])
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-5)
            assert float(returns[row, t]) == pytest.approx(expected + float(values[row, t]), abs=1e-5)
        assert not advantages[row, n:].any()
        assert not returns[row, n:].any()


def test_E6_groups_without_differences_are_marked() -> None:
    """TRL #3452, #3857, #2884, open-r1 #239: groups whose answers get the same reward teach nothing, unnoticed, or
    rounding is divided by rounding."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 1.0, 0.3])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    for scale in ("group", "batch", "none"):
        scale_: Any = scale
        advantages, dead = group_advantages(rewards, groups, scale=scale_)
        assert dead.tolist() == [True, True, True, False, False, False, True]
        assert not advantages[dead].any()
        assert advantages[3:6].all()
        assert float(advantages[3:6].sum()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [None, math.nan, "raise"])
def test_E7_a_reward_that_fails_is_no_zero(value: Any, tokenizer: Tokenizer) -> None:
    """ms-swift #8123 (None becomes NaN for the whole batch), NeMo Gym #2015 (a timeout is scored 0), open-r1 #134."""

    def reward(prompts: list[str], completions: list[str]) -> list[Any]:
        if value == "raise" and "b" in completions:
            raise TimeoutError("the sandbox did not answer")
        return [1.0 if text != "b" else value for text in completions]

    samples = [Sample(Asked(place=f"line {i}"), [1], text) for i, text in enumerate("abc")]
    with pytest.raises(RewardError, match=r"the reward .*reward.* for the answer 'b' to line 1"):
        open_rewards([reward], tokenizer=tokenizer).score(samples)


def test_E7_a_reward_that_pays_for_nothing_is_found_before_training(tokenizer: Tokenizer) -> None:
    """Visual-RFT #176: a test for a part of the right answer paid for "", which is part of every text."""

    def substring(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        return [float(text in right) for text, right in zip(completions, answer, strict=True)]

    prompts = [Asked() for _ in range(4)]
    ordinary = [Sample(prompt, tokenizer.encode(text), text) for prompt, text in zip(prompts, "4573", strict=True)]
    found = try_rewards(open_rewards([substring], tokenizer=tokenizer), prompts, tokenizer, 20, ordinary).warnings
    assert any(warning.startswith("empty answers ('')") for warning in found)


def test_E9_the_step_is_named_where_the_reward_rises_and_quality_falls() -> None:
    """open-r1 #407, rllm #143, minimind's samples: the reward rises, and texts repeat themselves."""
    alarm, told = GoodhartAlarm("quality"), []
    noise = random.Random(0)
    for step in range(20):
        quality = 0.5 + 0.02 * min(step, 10) - 0.04 * max(0, step - 10)
        proxy = [0.1 * step + noise.gauss(0, 0.2) for _ in range(128)]
        told.append(alarm.add(step, proxy, [quality + noise.gauss(0, 0.2) for _ in range(128)]))
    (message,) = filter(None, told)
    assert message.startswith(f"step {alarm.step}: the reward rises at the cost of quality")
    assert alarm.step is not None
    assert 10 < alarm.step <= 14
    assert alarm.best_step in (8, 9, 10, 11)
