"""Decoding with tensors that stay where they are gives what decoding with new ones does; on a GPU, as graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptsmith.engine.cuda_graphs import GraphRunner
from gptsmith.engine.engine import Engine
from gptsmith.engine.runner import Runner
from gptsmith.engine.sampling import SamplingParams
from gptsmith.model import families
from gptsmith.model.transformer import Transformer

MakeModel = Callable[..., Transformer]
PROMPTS = [[1, 2, 3], [4], list(range(11)), [9, 9], [5, 6, 7, 8]]


def compare(model: Transformer, captured: bool, tolerance: float) -> int:
    """How many passes were decoded so; each pass's logits are compared."""
    engine = Engine(model, block_size=4, max_batch=4, cache_tokens=80)
    plain = engine.runner
    runner = GraphRunner(model, plain.cache, engine.vocab_size, captured=captured)
    passes = 0
    compute = runner._logits

    def both(*arguments: Any) -> torch.Tensor:
        nonlocal passes
        ids, _, rows = arguments
        passes += len(ids) == len(rows)
        ours, theirs = compute(*arguments), Runner._logits(runner, *arguments)
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
        return ours

    runner._logits = both  # type: ignore[assignment, method-assign]
    engine.runner = runner
    results = engine.generate(PROMPTS, SamplingParams(max_tokens=9, temperature=0))
    assert [len(result.ids) for result in results] == [9] * len(PROMPTS)
    return passes


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_equals_plain_steps(family: str, make_model: MakeModel) -> None:
    assert compare(make_model(family), captured=False, tolerance=1e-4) > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["gpt2", "gpt3", "llama", "qwen3"])
def test_graphs_equal_plain_steps(family: str, make_model: MakeModel) -> None:
    assert compare(make_model(family).to("cuda"), captured=True, tolerance=1e-3) > 10
