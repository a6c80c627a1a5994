"""Decoding with static tensors, and on a GPU with graphs, equals decoding with new tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gptsmith.engine.cuda_graphs import GraphRunner
from gptsmith.engine.engine import Engine
from gptsmith.engine.runner import Runner, StepInputs
from gptsmith.engine.sampling import SamplingParams
from gptsmith.model import families
from gptsmith.model.transformer import Transformer

MakeModel = Callable[..., Transformer]
PROMPTS = [[1, 2, 3], [4], list(range(11)), [9, 9], [5, 6, 7, 8]]


def compare(model: Transformer, captured: bool, tolerance: float) -> int:
    """Compare the logits of each step with the plain runner's; return how many steps used static tensors."""
    engine = Engine(model, block_size=4, max_batch=4, cache_tokens=80)
    plain = engine.executor.runner
    runner = GraphRunner(model, plain.cache, engine.vocab_size, captured=captured)
    steps = 0
    compute = runner._logits

    def both(inputs: StepInputs) -> torch.Tensor:
        nonlocal steps
        steps += len(inputs.ids) == len(inputs.rows)
        actual, expected = compute(inputs), Runner._logits(runner, inputs)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        return actual

    runner._logits = both  # type: ignore[method-assign]
    engine.executor.runner = runner
    results = engine.generate(PROMPTS, SamplingParams(max_tokens=9, temperature=0))
    assert [len(result.ids) for result in results] == [9] * len(PROMPTS)
    return steps


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_static_batches_equal_plain_steps(family: str, make_model: MakeModel) -> None:
    assert compare(make_model(family), captured=False, tolerance=1e-4) > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["gpt2", "gpt3", "llama", "qwen3"])
def test_graphs_equal_plain_steps(family: str, make_model: MakeModel) -> None:
    assert compare(make_model(family).to("cuda"), captured=True, tolerance=1e-3) > 10
