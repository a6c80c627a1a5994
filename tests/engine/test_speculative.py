"""Speculative decoding returns the same tokens, greedy or sampled, and stops where it is slower."""

from __future__ import annotations

import collections.abc
import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.engine.draft_model import DraftModel
from gptsmith.engine.engine import Engine
from gptsmith.engine.make_runner import Kernels
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Sequence
from gptsmith.engine.speculative import Drafter, PromptLookup, Speculator
from gptsmith.errors import UsageError
from tests.engine.conftest import PROGRAMS


class Always(Speculator):
    def should_speculate(self, batch: int) -> bool:
        return True


class Oracle:
    """A drafter that is right with a given probability."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], right: float) -> None:
        self.texts, self.right, self.rng = texts, right, random.Random(0)

    def propose(self, sequences: Any, count: int) -> list[list[int]]:
        proposals = []
        for s in sequences:
            after = self.texts[tuple(s.request.prompt)][len(s.generated) :][:count]
            proposals.append([id if self.rng.random() < self.right else (id + 1) % 30 for id in after])
        return proposals


@pytest.mark.parametrize(("family", "kernels"), PROGRAMS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_tokens_are_the_same_as_without_speculation(
    make_model: Any, family: str, kernels: Kernels, data: st.DataObject
) -> None:
    model = make_model(family, kernels=kernels)
    count = data.draw(st.integers(1, 5))
    prompts = [[data.draw(st.integers(0, 5)) for _ in range(data.draw(st.integers(1, 9)))] for _ in range(count)]
    params_of = [
        SamplingParams(
            max_tokens=14,
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5])),
            top_p=data.draw(st.sampled_from([None, 0.9])),
            seed=i,
            n=data.draw(st.integers(1, 2)),
            stop_ids=(11,),
            logprobs=0,
            presence_penalty=data.draw(st.sampled_from([0.0, 0.0, 1.0])),
            overflow=data.draw(st.sampled_from(["error", "shift"])),
        )
        for i in range(count)
    ]
    plain = Engine(model, kernels=kernels).generate(prompts, params_of)
    texts = {tuple(p): r.ids for p, r in zip(prompts, plain, strict=True)}
    other = make_model(family, seed=4)
    drafters: list[Drafter] = [PromptLookup(3, 1), Oracle(texts, 0.7), DraftModel(model), DraftModel(other)]
    drafter = data.draw(st.sampled_from(drafters))
    engine = Engine(
        model,
        block_size=data.draw(st.integers(1, 4)),
        cache_tokens=data.draw(st.integers(30, 90)),
        max_batch=4,
        max_batch_tokens=data.draw(st.integers(4, 30)),
        speculator=Always(drafter, data.draw(st.integers(1, 5))),
        kernels=kernels,
    )
    for actual, expected in zip(engine.generate(prompts, params_of), plain, strict=True):
        assert actual.error is None
        for a, b in zip(actual.completions, expected.completions, strict=True):
            assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
    assert engine.stats.blocks_used == 0


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral"])
def test_samples_that_fork_in_a_step_with_drafts(make_model: Any, family: str) -> None:
    """If the last prompt token is computed alone, it can have drafts when samples fork: the first sample's."""
    model = make_model(family)
    prompts = [[0, 0], [0, 0], [0]]
    for seed in range(6):
        first = SamplingParams(max_tokens=14, temperature=0.7, n=2, seed=seed)
        params_of = [first, *[SamplingParams(max_tokens=14, temperature=0)] * 2]
        speculator = Always(PromptLookup(3, 1), 1)
        engine = Engine(model, block_size=1, cache_tokens=30, max_batch=4, max_batch_tokens=4, speculator=speculator)
        made = engine.generate(prompts, params_of)
        plain = Engine(model).generate(prompts, params_of)
        assert [[c.ids for c in r.completions] for r in made] == [[c.ids for c in r.completions] for r in plain]
        assert engine.stats.drafted > 0


def test_right_drafts_save_steps(make_model: Any) -> None:
    model = make_model("qwen3", context=80)
    params = SamplingParams(max_tokens=50, temperature=1.0, seed=0)
    (plain,) = Engine(model).generate([[1]], params)
    for drafter in (Oracle({(1,): plain.ids}, 1.0), DraftModel(model)):  # the model itself is always right
        engine = Engine(model, speculator=Always(drafter, 4))
        assert engine.generate([[1]], params)[0].ids == plain.ids
        assert engine.stats.steps <= 12
        assert engine.stats.acceptance_rate == 1.0
    never = Engine(model, speculator=Always(Oracle({(1,): plain.ids}, 0.0), 4))
    assert never.generate([[1]], params)[0].ids == plain.ids
    assert never.stats.acceptance_rate == 0.0


def test_accepted_drafts_are_counted_with_several_samples(make_model: Any) -> None:
    """Samples that fork or end in a step do not count as accepted drafts."""
    model = make_model("qwen3")
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=0, n=3, stop_ids=(4,))
    for right in (0.0, 1.0):
        engine = Engine(model, max_batch_tokens=64, speculator=Always(Oracle({(1,): [7] * 20}, right), 2))
        (result,) = engine.generate([[1]], params)
        stats = engine.stats
        assert stats.drafted > 0
        ids = [id for completion in result.completions for id in completion.ids]
        assert stats.accepted <= (ids.count(7) if right else ids.count(8))


def test_a_draft_with_nan_logits_is_only_rejected(make_model: Any, naive: Any) -> None:
    """The request continues, and no other sequence reads what was computed for the draft."""
    model = make_model("gpt2")
    expected = {p: naive(model, p, 9) for p in [(1, 2, 3), (5,)]}
    damaged = next(token for token in range(30) if token not in {1, 2, 3, 5, *expected[1, 2, 3], *expected[5,]})
    with torch.no_grad():
        model.embed_tokens.weight[damaged] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.nan_to_num())

    class Damaged:
        def propose(self, sequences: Any, count: int) -> list[list[int]]:
            return [[damaged] * count for _ in sequences]

    for block_size in (1, 4):
        engine = Engine(model, block_size=block_size, cache_tokens=48, speculator=Always(Damaged(), 3))
        for _ in range(2):
            results = engine.generate([[1, 2, 3], [5]], SamplingParams(max_tokens=9, temperature=0))
            assert [r.ids for r in results] == [expected[1, 2, 3], expected[5,]]
        assert engine.stats.drafted > 0
        assert engine.stats.blocks_used == 0


def test_decoding_continues_without_a_failing_drafter(make_model: Any, naive: Any, capsys: Any) -> None:
    class Failing:
        def propose(self, sequences: Any, count: int) -> list[list[int]]:
            raise MemoryError("no room")

    model = make_model("qwen3")
    params = SamplingParams(max_tokens=9, temperature=0)
    engine = Engine(model, speculator=Always(Failing(), 3))
    assert engine.generate([[1]], params)[0].ids == naive(model, [1], 9)
    assert capsys.readouterr().err.count("off from now on: MemoryError: no room") == 1
    # A draft model with fewer tokens, or a shorter context, proposes where it can.
    small = Engine(model, speculator=Always(DraftModel(make_model("qwen3", 9, context=8)), 3))
    assert [r.ids for r in small.generate([[20], [1]], params)] == [naive(model, [20], 9), naive(model, [1], 9)]


@pytest.mark.parametrize("kind", ["prompt-lookup", "draft-model"])
def test_sampled_tokens_keep_their_distribution(make_model: Any, kind: str) -> None:
    """Chi-squared of the second and third token over seeds, with drafts from the text or another model, against
    exact probabilities (99.9 % points)."""
    model, other = make_model("gpt2", 6), make_model("gpt2", 6, seed=4)
    drafter = PromptLookup(2, 1) if kind == "prompt-lookup" else DraftModel(other)
    engine = Engine(model, speculator=Always(drafter, 3), max_batch=64, max_batch_tokens=400)
    n = 1500
    params = [SamplingParams(max_tokens=4, temperature=1.0, seed=10 * i) for i in range(n)]
    batches = [params[i : i + 60] for i in range(0, n, 60)]  # no request may wait, since there are no drafts then
    ids = torch.tensor([r.ids for batch in batches for r in engine.generate([[1, 2]] * len(batch), batch)])
    assert engine.stats.drafted > n / 2
    assert 0.05 < engine.stats.acceptance_rate < 0.95
    with torch.no_grad():
        p1 = model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
        p2 = model(torch.tensor([[1, 2, a] for a in range(6)]))[:, -1].softmax(-1)
        pairs = torch.tensor([[1, 2, a, b] for a in range(6) for b in range(6)])
        p3 = model(pairs)[:, -1].softmax(-1).view(6, 6, 6)
    second = p1 @ p2
    third = torch.einsum("a,ab,abc->c", p1, p2, p3)
    for place, expected in ((1, second), (2, third)):
        counts = torch.bincount(ids[:, place], minlength=6)
        assert ((counts - expected * n) ** 2 / (expected * n)).sum() < 20.5  # 5 degrees of freedom


def test_prompt_lookup_proposes_what_followed() -> None:
    class Fake:
        tokens = [1, 2, 3, 4, 9, 2, 3, 5, 7, 2, 3]  # noqa: RUF012

    lookup, fake = PromptLookup(3, 2), Fake()
    assert lookup.propose([fake], 3) == [[5, 7, 2]]  # type: ignore[list-item]
    fake.tokens = [*fake.tokens, 4, 9]
    assert lookup.propose([fake], 2) == [[2, 3]]  # type: ignore[list-item]
    fake.tokens = [*fake.tokens, 0]
    assert lookup.propose([fake], 2) == [[]]  # type: ignore[list-item]
    with pytest.raises(UsageError):
        PromptLookup(1, 2)


def test_speculates_where_it_is_faster_and_only_there() -> None:
    class Silent:
        def propose(self, sequences: collections.abc.Sequence[Sequence], count: int) -> list[list[int]]:
            return []

    for cost, expected in ((3.0, False), (1.1, True)):
        speculator, num_drafted, seconds = Speculator(Silent()), 0, 0.0
        tokens = 0
        for _ in range(2000):
            drafts = speculator.should_speculate(1)
            made = 2 if drafts else 1
            speculator.record(1, drafts, cost if drafts else 1.0, made)
            seconds += cost if drafts else 1.0
            tokens += made
            num_drafted += drafts
        assert (num_drafted > 1000) is expected
        assert tokens / seconds > 0.95  # plain decoding generates one token per second
    with pytest.raises(UsageError):
        Speculator(Silent(), 0)


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("right", "drafting", "checking"),
    [(0.0, 0.0, 0.3), (0.0, 60.0, 2.0), (0.3, 4.0, 0.3), (1.0, 0.5, 0.3)],
)
def test_never_slower_than_nine_tenths_of_plain_decoding(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, right: float, drafting: float, checking: float
) -> None:
    """On a simulated clock, a plain step takes 1, plus the costs of proposing and checking drafts. The engine, with
    requests that arrive and leave, takes at most 10/9 of the time without drafts, and less where drafts pay."""
    clock = Clock()
    monkeypatch.setattr("gptsmith.engine.step.time", clock)
    model = make_model("gpt2")
    params_of = [SamplingParams(max_tokens=20, temperature=1.0, seed=i) for i in range(30)]
    prompts = [[i] for i in range(30)]
    plain = Engine(model, max_batch=2)
    texts = {tuple(p): r.ids for p, r in zip(prompts, plain.generate(prompts, params_of), strict=True)}

    class Slow(Oracle):
        def propose(self, sequences: Any, count: int) -> list[list[int]]:
            clock.now += drafting
            return super().propose(sequences, count)

    engine = Engine(model, max_batch=2, max_batch_tokens=64, speculator=Speculator(Slow(texts, right), 4))
    run = engine.executor.runner.run

    def timed(batch: Any) -> Any:
        clock.now += 1.0 + checking * any(each.sequence.drafts for each in batch)
        return run(batch)

    engine.executor.runner.run = timed  # type: ignore[method-assign]
    for first in [*range(0, 30, 2)] * 2:
        some = slice(first, first + (1 if first % 4 else 2))
        assert [r.ids for r in engine.generate(prompts[some], params_of[some])] == [
            texts[tuple(p)] for p in prompts[some]
        ]
    without = 30 * 20
    assert engine.stats.drafted > 0
    first_trial = drafting + checking  # its cost is not known before
    assert clock.now <= without / 0.9 + first_trial
    if right == 1.0 and drafting + checking < 1:
        assert clock.now < 0.6 * without


@pytest.mark.slow
def test_measured_speed_is_at_least_nine_tenths_of_plain_decoding(make_model: Any) -> None:
    """Measured, trials included, with mostly wrong drafts of a model as large as the one that checks them. The two
    alternate, and the best of three attempts counts, since other programs disturb."""
    model, other = make_model("qwen3", context=300), make_model("qwen3", context=300, seed=4)
    params = SamplingParams(max_tokens=250, temperature=2.0, seed=0)
    speeds: list[float] = []
    while len(speeds) < 3 and max(speeds, default=0.0) < 0.9:
        plain, speculative = Engine(model), Engine(model, speculator=Speculator(DraftModel(other), 4))
        spent = {plain: 0.0, speculative: 0.0}
        for _ in range(4):
            for engine in spent:
                began = time.process_time()
                assert len(engine.generate([[1]], params)[0].ids) == 250
                spent[engine] += time.process_time() - began
        assert speculative.stats.drafted > 0  # it was tried
        assert speculative.stats.acceptance_rate < 0.5
        speeds.append(spent[plain] / spent[speculative])
    assert max(speeds) >= 0.9
