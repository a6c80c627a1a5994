from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.engine.sampling import SamplingParams, choose, filter_logits, penalize_repetition
from gptsmith.errors import UsageError


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' own processors, in the same order."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    logits = TemperatureLogitsWarper(params.temperature)(ids, logits)
    if params.top_k is not None:
        logits = TopKLogitsWarper(params.top_k)(ids, logits)
    if params.top_p is not None:
        logits = TopPLogitsWarper(params.top_p)(ids, logits)
    if params.min_p is not None:
        logits = MinPLogitsWarper(params.min_p)(ids, logits)
    return logits


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 0.999),
    min_p=st.none() | st.floats(0.001, 0.9),
    seed=st.integers(0, 999),
)
def test_filters_equal_transformers(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(4, 50) * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours, theirs = filter_logits(logits, params).softmax(-1), reference(logits, params).softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@given(penalty=st.floats(0.5, 3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_repetition_penalty_equals_transformers(penalty: float, seed: int) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(seed)
    logits, ids = torch.randn(2, 20), torch.randint(0, 20, (2, 5))
    seen = torch.zeros(2, 20, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), expected)


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 20,000 draws (6 degrees of freedom: 22.5 is the 0.1 % point)."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0])
    params = SamplingParams(temperature=0.9)
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits.expand(n, 7), params, [generator] * n)
    counts = torch.bincount(drawn, minlength=7).float()
    expected = (logits / 0.9).softmax(-1) * n
    assert ((counts - expected) ** 2 / expected).sum() < 22.5


def test_rows_draw_from_their_own_generators() -> None:
    logits = torch.randn(3, 40)
    params = SamplingParams(temperature=1.0)

    def draw(rows: torch.Tensor, seeds: list[int]) -> list[int]:
        return choose(rows, params, [torch.Generator().manual_seed(s) for s in seeds]).tolist()

    together = draw(logits, [1, 2, 3])
    assert together == [draw(logits[i : i + 1], [i + 1])[0] for i in range(3)]


def test_greedy_takes_the_most_probable() -> None:
    logits = torch.randn(5, 9)
    assert torch.equal(choose(logits, SamplingParams(temperature=0), []), logits.argmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 2.0},
        {"top_p": 0.0},
        {"top_k": 0},
        {"min_p": -0.1},
        {"max_tokens": 0},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
    ],
)
def test_values_out_of_range_are_usage_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
        SamplingParams(**wrong)  # type: ignore[arg-type]
