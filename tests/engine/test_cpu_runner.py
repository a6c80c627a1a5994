"""The compiled program computes what `Transformer.forward` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptsmith.engine import cpu_runner
from gptsmith.engine.cpu_runner import CpuRunner, is_supported
from gptsmith.engine.engine import Engine
from gptsmith.engine.runner import Runner
from gptsmith.engine.sampling import SamplingParams
from gptsmith.kernels.threads import kernels_available
from gptsmith.model import families
from gptsmith.model.quantized import quantize
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_model

pytestmark = pytest.mark.skipif(not kernels_available(), reason="needs numba and a processor with AVX-512 VNNI")


@pytest.fixture(autouse=True)
def compile_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_runner, "MIN_PARAMETERS", 0)


def make_model(family: str, **overrides: Any) -> Transformer:
    sizes = {"vocab_size": 101, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    model = tiny_model(family, **sizes | {"max_position_embeddings": 64, "initializer_range": 0.2} | overrides)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("family", ["gpt2", "gpt3", "llama", "mistral", "qwen2", "qwen3"])
def test_equals_the_transformer(family: str, bits: int, threads: int) -> None:
    """Compare each step, with chunked prompts and several sequences."""
    model = make_model(family)
    if bits != 32:
        quantize(model, bits)  # type: ignore[arg-type]
    engine = Engine(model, block_size=4, max_batch=6, max_batch_tokens=8 if bits == 32 else 30)
    runner = engine.executor.runner
    assert isinstance(runner, CpuRunner)
    steps = 0
    program = runner._logits

    def both(*arguments: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        actual, expected = program(*arguments), Runner._logits(runner, *arguments)
        # Quantized weights round their inputs to 8 bits, too: a value halfway between two can be rounded either way.
        assert (actual - expected).norm() <= (1e-5 if bits == 32 else 0.03) * expected.norm()
        return actual

    runner._logits = both  # type: ignore[assignment, method-assign]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prompts = [[1, 2, 3], [4], list(range(20)), [9, 9]]
        engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0, prompt_logprobs=0))
    finally:
        torch.set_num_threads(before)
    assert steps > 10


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
@pytest.mark.parametrize("bits", [32, 4])
def test_greedy_equals_the_naive_loop(family: str, bits: int, naive: Any) -> None:
    model = make_model(family)
    if bits != 32:
        quantize(model, 4)
    prompts = [[1, 2, 3], [4, 5], [6]]
    results = Engine(model, prefix_caching=False).generate(prompts, SamplingParams(max_tokens=8, temperature=0))
    if bits == 32:
        assert [r.ids for r in results] == [naive(model, p, 8) for p in prompts]
    assert all(len(r.ids) == 8 for r in results)


def test_unsupported_models_use_the_plain_runner() -> None:
    for family in families.FAMILIES:
        supported = ("gpt2", "gpt3", "llama", "mistral", "phi3", "qwen2", "qwen3")
        assert is_supported(make_model(family)) is (family in supported)
    assert not is_supported(make_model("gpt2", hidden_size=40))
    assert not is_supported(make_model("gpt2").to(torch.bfloat16))
    engine = Engine(make_model("gpt2").to(torch.bfloat16))
    assert len(engine.generate([[1]], SamplingParams(max_tokens=3))[0].ids) == 3


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mixtral", "mixtures of experts"), ("gemma3", "norms after attention"), ("deepseek_v3", "latent attention")],
)
def test_what_is_not_compiled_is_said_in_a_line(family: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    Engine(make_model(family))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"compiled program for CPUs has no {reason}" in lines[0]


def test_uses_weights_that_were_replaced_or_changed(naive: Any) -> None:
    model, greedy = make_model("qwen3"), SamplingParams(max_tokens=8, temperature=0)
    engine = Engine(model, prefix_caching=False)
    engine.generate([[1]], greedy)
    other = make_model("qwen3", initializer_range=0.3)
    with torch.no_grad():
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    assert engine.generate([[1]], greedy)[0].ids == naive(other, [1], 8)
    third = make_model("qwen3", initializer_range=0.4)
    model.load_state_dict(third.state_dict(), assign=True)
    assert engine.generate([[1]], greedy)[0].ids == naive(third, [1], 8)


def test_engines_in_several_threads() -> None:
    """The compiled program is called by one thread at a time."""
    from concurrent.futures import ThreadPoolExecutor

    greedy = SamplingParams(max_tokens=20, temperature=0)
    models = [quantize(make_model("llama", initializer_range=0.1 * (i + 1)), 4) for i in range(3)]
    alone = [Engine(m).generate([[1]], greedy)[0].ids for m in models]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda m: Engine(m).generate([[1]], greedy)[0].ids, models))
    assert together == alone
