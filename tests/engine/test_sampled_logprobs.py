"""Log-probabilities of the distribution that tokens are drawn from, which reinforcement learning trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptsmith.engine.cpu_runner import CpuRunner
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import UsageError
from gptsmith.formats.peft import adapter_layout
from gptsmith.kernels.threads import kernels_available
from gptsmith.model.config import LoraConfig
from gptsmith.model.lora import adapter_off, add_lora
from gptsmith.model.loss import token_logprobs
from tests.factories import tiny_model


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.0},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.7, "temperature": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_they_sum_to_one_over_what_can_be_drawn(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family)
    params = SamplingParams(max_tokens=6, seed=3, logprobs=29, sampled_logprobs=True, n=3, **options)
    result = Engine(model, vocab_size=29).generate([[1, 2, 3]], params)[0]
    for completion in result.completions:
        assert completion.logprobs is not None
        for token in completion.logprobs:
            assert token is not None
            every = torch.tensor([value for _, value in token.top])
            assert float(every.exp().sum()) == pytest.approx(1, abs=1e-5)
            assert token.logprob == dict(token.top)[token.id] > -torch.inf
            if "top_k" in options:
                assert int(every.isfinite().sum()) == 3


@pytest.mark.parametrize("kernels", ["never", "always"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_they_equal_the_trainers(temperature: float, kernels: Any) -> None:
    """With a vocabulary that has rows in reserve, whose logits count on neither side."""
    model = tiny_model("llama", hidden_size=64, num_attention_heads=2, intermediate_size=96)
    params = SamplingParams(max_tokens=9, seed=5, temperature=temperature, logprobs=0, sampled_logprobs=True, n=4)
    engine = Engine(model, vocab_size=21, kernels=kernels)
    if kernels == "always" and kernels_available():
        assert isinstance(engine.executor.runner, CpuRunner)
    result = engine.generate([[4, 5, 6, 7]], params)[0]
    for completion in result.completions:
        whole = torch.tensor([[4, 5, 6, 7, *completion.ids]])
        trainer = token_logprobs(model, whole[:, :-1], whole[:, 1:], temperature=temperature, tokens=21)[0, 3:]
        sampler = torch.tensor([token.logprob for token in completion.logprobs or () if token is not None])
        torch.testing.assert_close(sampler, trainer.detach(), rtol=0, atol=1e-5 if kernels == "never" else 5e-5)
        assert max(completion.ids) < 21


def test_greedy_has_none() -> None:
    with pytest.raises(UsageError, match="sampled-logprobs must be left out at temperature 0"):
        SamplingParams(temperature=0, sampled_logprobs=True)


def test_an_adapter_can_be_switched_off() -> None:
    model, ids = tiny_model("qwen3"), torch.arange(6)[None]
    before = model(ids)
    add_lora(model, LoraConfig(rank=2), adapter_layout(model))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.add_(0.1)
        with adapter_off(model):
            assert torch.equal(model(ids), before)
        assert not torch.allclose(model(ids), before)
