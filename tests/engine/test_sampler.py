"""Choosing tokens: parity with transformers' processors, the right distributions, and independent rows."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptsmith.engine.sampler import SamplerState, adjust, choose, draw, filter_logits
from gptsmith.engine.sampling import SamplingParams

V = 50

PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.1, 3),
        "top_k": st.none() | st.integers(1, 60),
        "top_p": st.none() | st.floats(0.05, 0.999),
        "min_p": st.none() | st.floats(0.001, 0.9),
        "typical_p": st.none() | st.floats(0.05, 0.999),
    }
)


def reference(logits: Tensor, params: SamplingParams) -> Tensor:
    """Apply transformers' own processors in its order."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    ids: Any = torch.zeros(len(logits), 1, dtype=torch.int64)
    logits = TemperatureLogitsWarper(params.temperature)(ids, logits)
    if params.top_k is not None:
        logits = TopKLogitsWarper(params.top_k)(ids, logits)
    if params.top_p is not None:
        logits = TopPLogitsWarper(params.top_p)(ids, logits)
    if params.min_p is not None:
        logits = MinPLogitsWarper(params.min_p)(ids, logits)
    if params.typical_p is not None:
        logits = TypicalLogitsWarper(params.typical_p)(ids, logits)
    return logits


@settings(max_examples=80, deadline=None)
@given(values=st.lists(PARAMS, min_size=1, max_size=5), seed=st.integers(0, 999))
def test_filters_equal_transformers(values: list[dict[str, Any]], seed: int) -> None:
    """Each row has its own parameters."""
    torch.manual_seed(seed)
    params = [SamplingParams(**each) for each in values]
    logits = torch.randn(len(params), V) * 3
    actual = filter_logits(logits, params).softmax(-1)
    for row, one in enumerate(params):
        expected = reference(logits[row : row + 1], one).softmax(-1)[0]
        torch.testing.assert_close(actual[row], expected, atol=1e-5, rtol=1e-4)


def test_a_flat_nucleus_over_a_large_vocabulary() -> None:
    """The nucleus extends beyond the 1,024 most probable tokens, so all are sorted."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5000) * 0.01
    logits[1, :3] += 12
    params = [SamplingParams(temperature=1.0, top_p=p) for p in (0.9, 0.5, 0.3)]
    actual = filter_logits(logits, params)
    for row, one in enumerate(params):
        expected = reference(logits[row : row + 1], one)[0]
        sizes = [int(torch.isfinite(each).sum()) for each in (actual[row], expected)]
        assert abs(sizes[0] - sizes[1]) <= 1  # the last bit of a sum can differ
    assert torch.isfinite(actual[1]).sum() <= 3


def state(prompt: list[int], made: list[int], seed: int = 0, **params: Any) -> SamplerState:
    made_so_far = SamplerState(SamplingParams(**params), seed, prompt, V)
    for token in made:
        made_so_far.push(token)
    return made_so_far


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_adjustments_equal_transformers(data: st.DataObject) -> None:
    """Repetition penalty, bias and minimum length per row; presence and frequency penalty by OpenAI's formula."""
    from transformers import (
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    torch.manual_seed(data.draw(st.integers(0, 99)))
    ids = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)
    states, expected = [], []
    logits = torch.randn(data.draw(st.integers(1, 4)), V)
    for row in logits:
        prompt, made = data.draw(ids), data.draw(st.just([]) | ids)
        penalty = data.draw(st.just(1.0) | st.floats(0.5, 3))
        presence, frequency = data.draw(st.just(0.0) | st.floats(-2, 2)), data.draw(st.just(0.0) | st.floats(-2, 2))
        bias = data.draw(st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=3))
        least = data.draw(st.integers(0, 8))
        states.append(
            state(
                prompt,
                made,
                repetition_penalty=penalty,
                presence_penalty=presence,
                frequency_penalty=frequency,
                logit_bias=bias,
                min_tokens=least,
                stop_ids=(3, 4),
            )
        )
        so_far, want = torch.tensor([prompt + made]), row[None].clone()
        if penalty != 1:
            want = RepetitionPenaltyLogitsProcessor(penalty)(so_far, want)
        for token in set(made):
            want[0, token] -= presence + frequency * made.count(token)
        if bias:
            want = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(so_far, want)
        if least:
            want = MinNewTokensLengthLogitsProcessor(len(prompt), least, [3, 4], device="cpu")(so_far, want)
        expected.append(want[0])
    torch.testing.assert_close(adjust(logits, states), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_sampled_tokens_follow_the_distribution() -> None:
    """Chi-squared over 20,000 draws (6 degrees of freedom: 22.5 is the 0.1 % point), and against transformers' filters
    over the same logits."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0])
    n = 20_000
    for values in ({"temperature": 0.9}, {"temperature": 1.3, "top_p": 0.8, "top_k": 5}):
        params = SamplingParams(**values)  # type: ignore[arg-type]
        states = [SamplerState(params, seed, [0], 7) for seed in range(n)]
        drawn = choose(logits.expand(n, 7), states)
        counts = torch.bincount(drawn, minlength=7).float()
        expected = reference(logits[None], params).softmax(-1)[0] * n
        likely = expected > 0
        assert counts[~likely].sum() == 0
        assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 22.5


def test_random_numbers_of_a_seed_are_uniform_and_independent() -> None:
    """Check mean and lag-one correlation over 10,000 positions, for two purposes."""
    one = SamplerState(SamplingParams(), 7, [0], 7)
    for purpose in (0, 1):
        numbers = torch.tensor([one.uniform(ahead, purpose) for ahead in range(10_000)], dtype=torch.float64)
        assert abs(numbers.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 100
        centered = numbers - 0.5
        assert abs((centered[1:] * centered[:-1]).mean() * 12) < 0.04
        assert ((numbers >= 0) & (numbers < 1)).all()
    expected = one.uniform(2)
    one.push(0)
    one.push(0)
    assert one.uniform() == expected
    assert one.uniform(purpose=1) != expected


def test_rows_are_independent() -> None:
    logits = torch.randn(3, V)
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 9}]
    states = [state([1], [2], seed, **kind) for seed, kind in enumerate(kinds)]
    together = choose(logits, states).tolist()
    assert together == [choose(logits[i : i + 1], states[i : i + 1]).item() for i in range(3)]
    assert together[0] == logits[0].argmax()


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]] * 3)
    assert draw(logits, [0.0, 0.5, 1 - 2**-53]).tolist() == [1, 3, 3]


def test_a_fork_is_independent() -> None:
    one = state([1], [2], 5, presence_penalty=1.0, repetition_penalty=1.2)
    two = one.fork(6)
    two.push(9)
    assert one.counts is not None
    assert two.counts is not None
    assert [one.counts[9], two.counts[9], two.counts[2], one.generated] == [0, 1, 1, 1]
    assert one.uniform() != two.uniform()
