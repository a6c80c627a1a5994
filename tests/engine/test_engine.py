"""The engine against the naive loop: single requests and batches, with a cache too small, with cancellations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gptsmith.engine.block_manager import NO_BLOCK
from gptsmith.engine.cpu_runner import CpuRunner
from gptsmith.engine.engine import Engine
from gptsmith.engine.make_runner import Kernels
from gptsmith.engine.sampler import SamplerState, adjust, choose
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.scheduler import Scheduled
from gptsmith.engine.sequence import Event, Result
from gptsmith.engine.speculative import PromptLookup, Speculator
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.model import families
from gptsmith.model.transformer import Transformer
from tests.engine.conftest import PROGRAMS

CONTEXT = 24
FAMILIES = sorted(families.FAMILIES)
GREEDY = SamplingParams(max_tokens=9, temperature=0)
TIGHT: list[dict[str, Any]] = [
    {},
    {"block_size": 4, "cache_tokens": 40, "max_batch": 5, "max_batch_tokens": 6},
    {"block_size": 1, "cache_tokens": 24, "max_batch": 3, "max_batch_tokens": 5},
    {"block_size": 3, "cache_tokens": 60, "max_batch": 32, "max_batch_tokens": 64, "prefix_caching": False},
]


def prompts(count: int, longest: int = 15, vocabulary: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (size,), generator=generator).tolist() for size in sizes]


def drained(engine: Engine) -> list[Event]:
    events = []
    while engine.has_work:
        events += engine.step()
    assert engine.blocks.used() == 0
    return events


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("room", TIGHT, ids=["ample", "tight", "tightest", "no-prefixes"])
def test_greedy_equals_the_naive_loop(make_model: Any, naive: Any, family: str, room: dict[str, Any]) -> None:
    model = make_model(family)
    engine = Engine(model, **room)
    for count in (1, 3, 17):
        given = prompts(count)
        results = engine.generate(given, GREEDY)
        assert [r.ids for r in results] == [naive(model, p, 9) for p in given]
        assert engine.stats.blocks_used == 0
    if room.get("cache_tokens") == 40 and family not in ("mistral", "phi3"):
        assert engine.stats.preemptions > 0  # the cache was too small for all of them


@pytest.mark.parametrize(("family", "kernels"), PROGRAMS)
def test_logits_are_batch_invariant(make_model: Any, family: str, kernels: Kernels) -> None:
    """In batches of 1 to 32, however prompts are cut into chunks."""
    model, seen = make_model(family, kernels=kernels), dict[tuple[int, ...], torch.Tensor]()
    for batch, budget in ((1, 64), (8, 11), (32, 40)):
        engine = Engine(
            model, max_batch=batch, max_batch_tokens=budget, block_size=4, prefix_caching=False, kernels=kernels
        )
        assert isinstance(engine.executor.runner, CpuRunner) == (kernels == "always")
        run = engine.executor.runner.run

        def note(chosen: list[Scheduled], run: Any = run) -> Any:
            rows = run(chosen)
            for each in rows:
                s = each.scheduled.sequence
                if len(each.logits):
                    key = tuple(s.tokens)
                    last = each.logits.last(1).tensor()[0]
                    torch.testing.assert_close(last, seen.setdefault(key, last), atol=1e-4, rtol=1e-4)
            return rows

        engine.executor.runner.run = note  # type: ignore[assignment, method-assign]
        engine.generate(prompts(32), SamplingParams(max_tokens=5, temperature=0))
    assert len(seen) >= 100
    with torch.no_grad():
        for tokens, logits in list(seen.items())[::9]:
            torch.testing.assert_close(model(torch.tensor([tokens]))[0, -1], logits, atol=1e-4, rtol=1e-4)


def uncached(model: Transformer, prompt: list[int], params: SamplingParams, sample: int) -> tuple[list[int], str]:
    """Return the ids and finish reason of one sample, computed by running the whole model over all tokens each time."""
    tokens, start = list(prompt), 0
    state = SamplerState(params, (params.seed or 0) + sample, prompt, model.config.vocab_size)
    while True:
        if len(tokens) - start > CONTEXT:
            if params.overflow != "shift":
                return tokens[len(prompt) :], "context"
            start = len(tokens) - CONTEXT * 3 // 4
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:]]))[0, -1:]
        token = int(choose(adjust(logits, [state]), [state]))
        tokens.append(token)
        state.push(token)
        if token in params.stop_ids:
            return tokens[len(prompt) :], "stop"
        if state.generated == params.max_tokens:
            return tokens[len(prompt) :], "length"


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    top_p=st.sampled_from([None, 0.9]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    stop_ids=st.sampled_from([(), (11,)]),
    seed=st.integers(0, 3),
    n=st.sampled_from([1, 1, 2, 3]),
    overflow=st.sampled_from(["error", "shift"]),
)
PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=18)


class RandomRequests(RuleBasedStateMachine):
    """Requests arrive one by one and in bursts, and are cancelled while others run. The cache is too small for all."""

    @initialize(
        block_size=st.integers(1, 5),
        extra=st.integers(0, 30),
        batch=st.sampled_from([1, 2, 3, 5, 32]),
        budget=st.integers(0, 9),
        caching=st.booleans(),
        speculative=st.booleans(),
    )
    def begin(self, block_size: int, extra: int, batch: int, budget: int, caching: bool, speculative: bool) -> None:
        speculator = Speculator(PromptLookup(2, 1), 2)
        speculator.should_speculate = lambda batch: True  # type: ignore[method-assign]
        self.engine = Engine(
            self.model,  # type: ignore[attr-defined]
            block_size=block_size,
            cache_tokens=CONTEXT + block_size + extra,
            max_batch=batch,
            max_batch_tokens=batch + budget,
            prefix_caching=caching,
            speculator=speculator if speculative else None,
            kernels=self.kernels,  # type: ignore[attr-defined]
        )
        self.asked: dict[int, tuple[list[int], SamplingParams]] = {}
        self.cancelled: set[int] = set()
        self.results: dict[int, Result] = {}
        self.streamed: dict[tuple[int, int], list[int]] = {}

    @rule(prompt=PROMPTS, params=PARAMS)
    def arrive(self, prompt: list[int], params: SamplingParams) -> None:
        self.asked[self.engine.add_request(prompt, params)] = (prompt, params)

    @rule(prompts=st.lists(PROMPTS, min_size=8, max_size=32), size=st.integers(1, 3))
    def crowd(self, prompts: list[list[int]], size: int) -> None:
        for prompt in prompts:
            self.arrive(prompt, SamplingParams(max_tokens=size, temperature=0))

    @rule(count=st.integers(1, 6))
    def work(self, count: int) -> None:
        for _ in range(count):
            self._read(self.engine.step())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.asked)))
        before = number not in self.results
        self.engine.abort(number)
        held = [
            *self.engine.scheduler.running,
            *self.engine.scheduler.waiting,
            *self.engine.scheduler.waiting_for_beams,
        ]
        assert all(s.request.number != number for s in held)  # removed at once, with its blocks
        blocks = {(g, block) for s in held for g, table in enumerate(s.tables) for block in table if block != NO_BLOCK}
        assert self.engine.blocks.used() == len(blocks)
        if before:
            self.cancelled.add(number)

    def _read(self, events: list[Event]) -> None:
        for event in events:
            assert event.request not in self.results
            self.streamed.setdefault((event.request, event.index), []).extend(event.ids)
            if event.result is not None:
                self.results[event.request] = event.result

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.engine.has_work:
            self._read(self.engine.step())
            steps += 1
            assert steps < 20_000, "a request starves"
        assert self.engine.blocks.used() == 0
        assert self.results.keys() == self.asked.keys()
        for number, (prompt, params) in self.asked.items():
            completions = self.results[number].completions
            assert len(completions) == params.n or number in self.cancelled
            for completion in completions:
                expected, reason = self.expected(prompt, params, completion.index)  # type: ignore[attr-defined]
                assert self.streamed[number, completion.index] == completion.ids
                if completion.finish_reason == "cancelled":
                    assert number in self.cancelled
                    assert completion.ids == expected[: len(completion.ids)]
                else:
                    assert (completion.ids, completion.finish_reason) == (expected, reason)


@pytest.mark.parametrize(("family", "kernels"), PROGRAMS)
def test_random_requests(make_model: Any, family: str, kernels: Kernels) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    model, known = make_model(family, kernels=kernels), dict[Any, tuple[list[int], str]]()

    def remembered(prompt: list[int], params: SamplingParams, sample: int) -> tuple[list[int], str]:
        key = (*prompt, repr(params), sample)
        if key not in known:
            known[key] = uncached(model, prompt, params, sample)
        return known[key]

    class RequestsToFamily(RandomRequests):
        pass

    RequestsToFamily.model, RequestsToFamily.expected = model, staticmethod(remembered)
    RequestsToFamily.kernels = kernels
    run_state_machine_as_test(
        RequestsToFamily, settings=settings(max_examples=5, stateful_step_count=15, deadline=None)
    )


# sampling through the engine ------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_in_any_batch(make_model: Any) -> None:
    model = make_model("qwen3")
    params = [SamplingParams(max_tokens=8, temperature=1.0, seed=i, top_p=0.9 if i % 2 else None) for i in range(12)]
    given = prompts(12)
    alone = [Engine(model).generate([p], w)[0].ids for p, w in zip(given, params, strict=True)]
    for room in TIGHT:
        assert [r.ids for r in Engine(model, **room).generate(given, params)] == alone
    assert len({tuple(ids) for ids in alone}) > 6


def test_sample_i_of_several_uses_seed_plus_i(make_model: Any) -> None:
    model = make_model("gpt2")
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=5, n=4)
    for room in TIGHT:
        (result,) = Engine(model, **room).generate([[1, 2, 3, 4, 5]], params)
        for i, completion in enumerate(result.completions):
            single = SamplingParams(max_tokens=10, temperature=1.0, seed=5 + i)
            assert completion.ids == Engine(model).generate([[1, 2, 3, 4, 5]], single)[0].ids
            assert completion.index == i


def test_without_a_seed_samples_differ(make_model: Any) -> None:
    engine = Engine(make_model("gpt2"))
    params = SamplingParams(max_tokens=15, temperature=1.5)
    assert len({tuple(engine.generate([[1]], params)[0].ids) for _ in range(4)}) > 1


def test_best_of_keeps_the_most_probable(make_model: Any) -> None:
    engine = Engine(make_model("llama"))
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=0, n=2, best_of=6)
    (best,) = engine.generate([[3, 4]], params)
    (every,) = engine.generate([[3, 4]], SamplingParams(max_tokens=6, temperature=1.0, seed=0, n=6, logprobs=0))
    ranked = sorted(every.completions, key=lambda c: -(c.cumulative_logprob or 0.0))
    assert [c.ids for c in best.completions] == [c.ids for c in ranked[:2]]
    events = list(engine.stream([3, 4], params))
    assert [e.ids for e in events] == [c.ids for c in best.completions]
    assert events[-1].result is not None


@pytest.mark.parametrize("eos", [None, 7])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 0.4, 2.0])
def test_beam_search_equals_transformers(
    make_model: Any, tmp_path: Any, eos: int | None, early: bool, penalty: float
) -> None:
    from transformers import AutoModelForCausalLM

    from gptsmith.formats.hf import save_model

    model = make_model("gpt2", context=40)
    save_model(model, tmp_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    rooms: tuple[dict[str, Any], ...] = (
        {},
        {"block_size": 4, "cache_tokens": 44, "max_batch": 4, "max_batch_tokens": 8},
    )
    for room in rooms:
        engine = Engine(model, **room)
        given = [[1, 2, 3], [5], [9, 8, 7, 6]]
        params = SamplingParams(
            max_tokens=12,
            temperature=0,
            beams=4,
            n=4,
            length_penalty=penalty,
            early_stopping=early,
            stop_ids=() if eos is None else (eos,),
        )
        for prompt, result in zip(given, engine.generate(given, params), strict=True):
            expected = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                num_beams=4,
                num_return_sequences=4,
                max_new_tokens=12,
                do_sample=False,
                length_penalty=penalty,
                early_stopping=early,
                eos_token_id=eos,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
            for completion, ids, score in zip(
                result.completions, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True
            ):
                assert completion.ids == ids[len(prompt) : len(prompt) + len(completion.ids)]
                assert (completion.cumulative_logprob or 0) / len(completion.ids) ** penalty == pytest.approx(
                    score, abs=1e-4
                )
        assert engine.stats.blocks_used == 0


@pytest.mark.parametrize(
    "adjustments", [{"repetition_penalty": 1.6}, {"min_tokens": 6}, {"logit_bias": {4: 2.5, 9: -3.0}}]
)
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_beam_search_with_adjustments_equals_transformers(
    make_model: Any, tmp_path: Any, adjustments: dict[str, Any], seed: int
) -> None:
    """Also where a beam both ends and goes on, as with each of these seeds."""
    from transformers import AutoModelForCausalLM

    from gptsmith.formats.hf import save_model

    model = make_model("qwen3", context=40, seed=seed)
    save_model(model, tmp_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    params = SamplingParams(max_tokens=10, temperature=0, beams=3, n=3, stop_ids=(7,), **adjustments)
    bias = {(token,): value for token, value in adjustments.get("logit_bias", {}).items()}
    for prompt in ([1, 2, 3], [5], [9, 8, 7, 6]):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=10,
            min_new_tokens=adjustments.get("min_tokens"),
            repetition_penalty=adjustments.get("repetition_penalty"),
            sequence_bias=bias or None,
            do_sample=False,
            eos_token_id=7,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        (result,) = Engine(model).generate([prompt], params)
        for completion, ids, score in zip(
            result.completions, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True
        ):
            assert completion.ids == ids[len(prompt) : len(prompt) + len(completion.ids)]
            assert (completion.cumulative_logprob or 0) / len(completion.ids) == pytest.approx(score, abs=1e-4)


def test_beams_never_contain_forbidden_tokens(make_model: Any) -> None:
    """Even if fewer beams remain."""
    engine = Engine(make_model("qwen3"))
    for allowed in ({4}, {4, 9}):
        bias = {token: float("-inf") for token in range(30) if token not in allowed}
        params = SamplingParams(max_tokens=3, temperature=0, beams=4, n=4, logit_bias=bias)
        (result,) = engine.generate([[1]], params)
        assert len(result.completions) == min(4, len(allowed) ** 3)
        assert {id for c in result.completions for id in c.ids} <= allowed
    params = SamplingParams(max_tokens=3, temperature=0, beams=4, logit_bias=dict.fromkeys(range(30), float("-inf")))
    bad, good = engine.generate([[1], [1]], [params, GREEDY])
    assert "no token is allowed" in str(bad.error)
    assert len(good.ids) == 9
    assert engine.stats.blocks_used == 0


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_beams_samples_and_greedy_in_one_batch(make_model: Any, data: st.DataObject) -> None:
    """Requests return the same as alone, whatever else runs; cancelled beams leave nothing behind."""
    model = make_model("qwen3")
    kinds = [
        SamplingParams(max_tokens=6, temperature=0, beams=3, n=2),
        SamplingParams(max_tokens=6, temperature=1.0, seed=1, n=3),
        GREEDY,
    ]
    params = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))
    engine = Engine(model, block_size=4, cache_tokens=data.draw(st.integers(28, 90)), max_batch=4, max_batch_tokens=9)
    given = prompts(len(params), 12)
    cancel = data.draw(st.sets(st.integers(0, len(params) - 1), max_size=2))
    numbers = [engine.add_request(p, w) for p, w in zip(given, params, strict=True)]
    events = []
    for _ in range(data.draw(st.integers(0, 12))):
        events += engine.step()
    for i in cancel:
        engine.abort(numbers[i])
    events += drained(engine)
    results = {e.request: e.result for e in events if e.result is not None}
    assert results.keys() == set(numbers)
    for i, (prompt, its_params) in enumerate(zip(given, params, strict=True)):
        if i not in cancel:
            (alone,) = Engine(model).generate([prompt], its_params)
            together = results[numbers[i]]
            assert [c.ids for c in together.completions] == [c.ids for c in alone.completions]


def test_stop_tokens_and_min_tokens(make_model: Any, naive: Any) -> None:
    model = make_model("qwen2", seed=5)
    greedy = naive(model, [1, 2], 12)
    stop = next(token for token in greedy[2:] if token not in greedy[:2])
    place = greedy.index(stop)
    engine = Engine(model)
    (result,) = engine.generate([[1, 2]], SamplingParams(max_tokens=12, temperature=0, stop_ids=(stop,)))
    assert (result.ids, result.completions[0].finish_reason) == (greedy[: place + 1], "stop")
    longer = SamplingParams(max_tokens=12, min_tokens=place + 3, temperature=0, stop_ids=(stop,))
    (result,) = engine.generate([[1, 2]], longer)
    assert len(result.ids) >= place + 3
    assert stop not in result.ids[: place + 3]


def test_log_probabilities(make_model: Any) -> None:
    model = make_model("gpt3")
    prompt = [4, 9, 9, 1, 0, 3, 8]
    for budget in (3, 64):
        engine = Engine(model, max_batch=2, max_batch_tokens=budget, block_size=2)
        engine.generate([prompt], GREEDY)  # fill the prefix cache
        params = SamplingParams(max_tokens=6, temperature=0.7, seed=0, logprobs=3, prompt_logprobs=2, echo=True)
        (result,) = engine.generate([prompt], params)
        ids = result.ids
        assert ids[:7] == prompt
        assert result.cached_tokens == 0  # log-probabilities of the prompt need all of it computed
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0].log_softmax(-1)
        (completion,) = result.completions
        assert completion.logprobs is not None
        assert completion.logprobs[0] is None
        assert result.prompt_logprobs == completion.logprobs[:7]
        for place, got in enumerate(completion.logprobs[1:], 1):
            assert got is not None
            assert got.id == ids[place]
            assert got.logprob == pytest.approx(expected[place - 1, got.id].item(), abs=1e-4)
            best = expected[place - 1].topk(2 if place < 7 else 3)
            assert [id for id, _ in got.top] == best.indices.tolist()
            assert [value for _, value in got.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        chosen = sum(each.logprob for each in completion.logprobs[7:] if each is not None)
        assert completion.cumulative_logprob == pytest.approx(chosen)
        events = list(engine.stream(prompt, params))
        assert [id for e in events for id in e.ids] == ids
        streamed = [each for e in events for each in e.logprobs or []]
        assert [s and s.id for s in streamed] == [s and s.id for s in completion.logprobs]


def test_penalties_and_bias_affect_the_choice(make_model: Any) -> None:
    engine = Engine(make_model("gpt1"))
    (plain,) = engine.generate([[1, 2, 3]], GREEDY)
    forbidden = plain.ids[0]
    (biased,) = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=9, logit_bias={forbidden: -1e9}))
    assert forbidden not in biased.ids
    (varied,) = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=20, presence_penalty=100.0))
    assert len(set(varied.ids)) == 20


# the context ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mistral"])
def test_context_shift(make_model: Any, family: str) -> None:
    """When the context is full, its last three quarters are computed again, as in a naive loop that does so."""
    model = make_model(family)
    params = SamplingParams(max_tokens=60, temperature=0, overflow="shift")
    for room in TIGHT:
        (result,) = Engine(model, **room).generate([[5, 6, 7]], params)
        tokens, start = [5, 6, 7], 0
        with torch.no_grad():
            while len(tokens) < 63:
                if len(tokens) - start > CONTEXT:
                    start = len(tokens) - CONTEXT * 3 // 4
                tokens.append(int(model(torch.tensor([tokens[start:]]))[0, -1].argmax()))
        assert result.ids == tokens[3:]
        assert result.completions[0].finish_reason == "length"


def test_a_long_prompt_is_refused_truncated_or_shifted(make_model: Any, naive: Any) -> None:
    model = make_model("llama")
    engine, prompt = Engine(model), (prompts(1, 29)[0] * 40)[:40]
    (refused,) = engine.generate([prompt], GREEDY)
    assert isinstance(refused.error, UsageError)
    assert "context of 24" in str(refused.error)
    (cut,) = engine.generate([prompt], SamplingParams(max_tokens=9, temperature=0, overflow="truncate"))
    assert cut.prompt_ids == prompt[-15:]
    assert cut.ids == naive(model, prompt[-15:], 9)
    (shifted,) = engine.generate([prompt], SamplingParams(max_tokens=6, temperature=0, overflow="shift"))
    assert shifted.ids == naive(model, prompt[-18:], 6)
    assert shifted.prompt_ids == prompt


def test_a_full_context_ends_a_request_with_its_reason(make_model: Any, naive: Any) -> None:
    model = make_model("gpt2")
    (result,) = Engine(model).generate([[1, 2, 3, 4]], SamplingParams(max_tokens=500, temperature=0))
    assert result.completions[0].finish_reason == "context"
    assert result.ids == naive(model, [1, 2, 3, 4], CONTEXT - 4 + 1)


def test_sliding_window_layers_keep_only_their_window(make_model: Any, naive: Any) -> None:
    model = make_model("mistral", context=400)
    engine = Engine(model, block_size=4, cache_tokens=400, max_batch=1, max_batch_tokens=8)
    prompt = (prompts(1, 29)[0] * 300)[:300]
    most = 0
    number = engine.add_request(prompt, SamplingParams(max_tokens=40, temperature=0))
    ids = []
    while engine.has_work:
        for event in engine.step():
            assert event.request == number
            ids += event.ids
        most = max(most, engine.blocks.used())
    assert ids == naive(model, prompt, 40)
    assert most <= (7 + 8) // 4 + 2
    assert engine.stats.blocks <= (7 + 8) // 4 + 3


# failures -------------------------------------------------------------------------------------------------------------


def test_an_invalid_request_does_not_affect_others(make_model: Any, naive: Any) -> None:
    model = make_model("qwen3")
    engine = Engine(model, cache_tokens=16, block_size=4)
    wrong: list[tuple[list[int], SamplingParams, str]] = [
        ([], GREEDY, "empty"),
        ([30], GREEDY, "outside 0..29"),
        ([-1], GREEDY, "outside"),
        ([1.5], GREEDY, "token ids"),  # type: ignore[list-item]
        (["a"], GREEDY, "token ids"),  # type: ignore[list-item]
        ([1] * 25, GREEDY, "context"),
        ([1] * 10, GREEDY, "the cache holds 16"),
        ([1], SamplingParams(stop=("x",)), "stop strings"),
        ([1], SamplingParams(logit_bias={99: 1.0}), "logit_bias"),
        ([1], SamplingParams(stop_ids=(-3,)), "stop_ids"),
        ([1], SamplingParams(beams=16, temperature=0), "half of the vocabulary"),
        ([1], SamplingParams(logprobs=31), "logprobs"),
        ([1], SamplingParams(max_tokens=3, logit_bias=dict.fromkeys(range(30), float("-inf"))), "no token is allowed"),
    ]

    class Broken:
        def start(self) -> Any:
            raise ZeroDivisionError("oh")

    wrong.append(([1], SamplingParams(max_tokens=3, constraint=Broken()), "ZeroDivisionError: oh"))
    good = [1, 2, 3]
    given = [p for p, _, _ in wrong] + [good]
    results = engine.generate(given, [w for _, w, _ in wrong] + [GREEDY])
    for (_, _, expected), result in zip(wrong, results, strict=False):
        assert result.error is not None
        assert expected in str(result.error)
    assert results[-1].error is None
    assert results[-1].ids == naive(model, good, 9)
    assert engine.stats.blocks_used == 0
    with pytest.raises(UsageError, match="empty"):
        engine.stream([], GREEDY)


def test_nan_logits_fail_only_their_request(make_model: Any, naive: Any) -> None:
    model = make_model("gpt2")
    expected = naive(model, [1, 2, 3], 9)
    damaged = next(token for token in range(30) if token not in [1, 2, 3, *expected])
    with torch.no_grad():
        model.embed_tokens.weight[damaged] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.nan_to_num())
    engine = Engine(model, block_size=4, cache_tokens=60)
    for _ in range(2):
        bad, good = engine.generate([[1, 2, damaged], [1, 2, 3]], GREEDY)
        assert "NaN" in str(bad.error)
        assert bad.completions[0].finish_reason == "error"
        assert good.ids == expected  # the damaged blocks were cleared before other sequences got them
    assert engine.stats.blocks_used == 0


@pytest.mark.parametrize("params", [SamplingParams(n=3), SamplingParams(temperature=0, beams=3)], ids=["n", "beams"])
def test_out_of_memory_while_forking_fails_only_that_request(
    make_model: Any, naive: Any, params: SamplingParams
) -> None:
    model = make_model("gpt2")
    engine = Engine(model, block_size=4)

    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no")

    engine.executor.runner.cache.copy = fail  # type: ignore[assignment, method-assign]
    bad, good = engine.generate([[1, 2, 3], [4]], [params, GREEDY])
    assert "memory" in str(bad.error)
    assert good.ids == naive(model, [4], 9)
    assert engine.stats.blocks_used == 0
    assert engine.stats.running == 0


@pytest.mark.parametrize("failure", [MemoryError(), torch.OutOfMemoryError("no"), ZeroDivisionError("oh")])
def test_a_failing_step_is_retried_for_each_sequence(make_model: Any, naive: Any, failure: Exception) -> None:
    model = make_model("gpt2")
    engine = Engine(model)
    hidden_states = model.hidden_states

    def fail(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if 29 in ids:
            raise failure
        return hidden_states(ids, **options)

    model.hidden_states = fail
    good, bad, other = engine.generate([[1, 2], [29, 3], [4]], GREEDY)
    model.hidden_states = hidden_states
    assert isinstance(bad.error, GptsmithError)
    assert ("memory" if not isinstance(failure, ZeroDivisionError) else "oh") in str(bad.error)
    assert (good.ids, other.ids) == (naive(model, [1, 2], 9), naive(model, [4], 9))
    assert engine.stats.blocks_used == 0


def test_rejects_contradictory_sizes(make_model: Any) -> None:
    model = make_model("gpt2")
    impossible: tuple[dict[str, Any], ...] = (
        {"max_batch": 0},
        {"block_size": 0},
        {"cache_tokens": 0},
        {"max_batch": 8, "max_batch_tokens": 4},
    )
    for wrong in impossible:
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Engine(model, **wrong)
    with pytest.raises(UsageError, match="2 prompts and 1"):
        Engine(model).generate([[1], [2]], [GREEDY])


# scheduling -----------------------------------------------------------------------------------------------------------


def test_a_shared_prefix_is_computed_once(make_model: Any) -> None:
    model = make_model("qwen3")
    engine, beginning = Engine(model, block_size=4), list(range(16))
    engine.generate([[*beginning, 20]], GREEDY)
    computed = 0
    hidden_states = model.hidden_states

    def count(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        nonlocal computed
        computed += ids.numel()
        return hidden_states(ids, **options)

    model.hidden_states = count
    (result,) = engine.generate([[*beginning, 21]], SamplingParams(max_tokens=1, temperature=0))
    assert computed == 1
    assert result.cached_tokens == 16
    assert engine.stats.prefix_hit_rate == 16 / 34
    model.hidden_states = hidden_states
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(-1)
    engine.on_weights_updated()
    assert (
        engine.generate([[*beginning, 21]], GREEDY)[0].ids == Engine(model).generate([[*beginning, 21]], GREEDY)[0].ids
    )


def test_samples_share_the_blocks_of_their_prompt(make_model: Any) -> None:
    model = make_model("qwen3")
    engine = Engine(model, block_size=4)
    number = engine.add_request(list(range(16)), SamplingParams(max_tokens=4, n=5, seed=0))
    engine.step()
    assert engine.stats.blocks_used == 4
    engine.abort(number)
    assert engine.stats.blocks_used == 0


def test_stopping_one_sample(make_model: Any, naive: Any) -> None:
    model = make_model("qwen3")
    engine = Engine(model)
    number = engine.add_request([1], SamplingParams(max_tokens=9, temperature=0, n=2))
    events = [event for _ in range(3) for event in engine.step()]
    engine.stop(number, 0)
    engine.stop(number, 77)
    engine.stop(99, 0)
    (result,) = [e.result for e in events + drained(engine) if e.result is not None]
    expected = naive(model, [1], 9)
    first, second = result.completions
    assert (first.ids, first.finish_reason) == (expected[:3], "stop")
    assert (second.ids, second.finish_reason) == (expected, "length")


def test_closing_a_stream_cancels_its_request(make_model: Any, naive: Any) -> None:
    model = make_model("qwen3")
    engine = Engine(model)
    engine.stream([1], GREEDY)  # never iterated: nothing is queued
    other = engine.add_request([2], GREEDY)
    stream = engine.stream([1], GREEDY)
    assert next(stream).ids == naive(model, [1], 1)
    stream.close()
    assert engine.stats.running == 1
    events = drained(engine)
    assert {e.request for e in events} == {other}  # no event of the other request was lost
    assert [id for e in events for id in e.ids] == naive(model, [2], 9)


def test_the_model_stays_in_training_mode(make_model: Any) -> None:
    model = make_model("gpt2").train()
    model.dropout = 0.5
    engine = Engine(model)
    assert engine.generate([[1]], GREEDY)[0].ids == engine.generate([[1]], GREEDY)[0].ids
    assert model.training


def test_ids_beyond_vocab_size_are_never_chosen(make_model: Any) -> None:
    engine = Engine(make_model("gpt2"), vocab_size=7)
    params = SamplingParams(max_tokens=15, temperature=5.0, seed=0, repetition_penalty=1.1, n=4, logprobs=7)
    (result,) = engine.generate([[1]], params)
    assert max(id for c in result.completions for id in c.ids) < 7
    assert "outside 0..6" in str(engine.generate([[7]], params)[0].error)


def test_the_oldest_request_advances_and_short_prompts_overtake_long_ones(make_model: Any) -> None:
    model = make_model("gpt2", context=600)
    engine = Engine(model, max_batch=4, max_batch_tokens=16)
    long = engine.add_request([1] * 500, SamplingParams(max_tokens=2, temperature=0))
    engine.step()
    short = engine.add_request([2] * 12, SamplingParams(max_tokens=2, temperature=0))
    assert [e.request for _ in range(2) for e in engine.step()] == [short, short]  # at once, not after thirty steps
    engine.step()
    finished: list[int] = []
    for i in range(200):  # short requests keep arriving, as many as fit: the long one still ends
        engine.add_request([3 + i % 20] * 12, SamplingParams(max_tokens=1, temperature=0))
        finished += [e.request for e in engine.step() if e.result is not None]
        if long in finished:
            break
    assert long in finished
    drained(engine)


def test_a_long_prompt_does_not_delay_decoding(make_model: Any) -> None:
    """Each step computes a chunk of the prompt and one token of every other request."""
    model = make_model("gpt2", context=600)
    engine = Engine(model, max_batch=4, max_batch_tokens=16)
    decoding = [engine.add_request([i], SamplingParams(max_tokens=60, temperature=0)) for i in range(3)]
    engine.step()
    long = engine.add_request([7] * 500, SamplingParams(max_tokens=1, temperature=0))
    seen_requests = [[e.request for e in engine.step()] for _ in range(500 // 13 + 1)]
    assert seen_requests == [decoding] * (500 // 13) + [[*decoding, long]]


def test_preempted_requests_continue_and_none_starves(make_model: Any, naive: Any) -> None:
    """Long requests outgrow the cache together, while as many short ones arrive as fit."""
    model = make_model("llama")
    engine = Engine(model, max_batch=4, max_batch_tokens=8, cache_tokens=28, block_size=2)
    size = SamplingParams(max_tokens=20, temperature=0)
    asked = {engine.add_request([i, i + 1], size): naive(model, [i, i + 1], 20) for i in range(3)}
    results: dict[int, Result] = {}
    for i in range(200):
        if i < 100:
            asked[engine.add_request([i % 30], SamplingParams(max_tokens=2, temperature=0))] = naive(model, [i % 30], 2)
        results |= {e.request: e.result for e in engine.step() if e.result is not None}
        if i == 99:
            assert {0, 1, 2} <= results.keys()  # before the short requests stopped arriving
    results |= {e.request: e.result for e in drained(engine) if e.result is not None}
    assert engine.stats.preemptions > 0
    assert {number: result.ids for number, result in results.items()} == asked


def test_requests_are_admitted_in_the_order_of_arrival(make_model: Any) -> None:
    engine = Engine(make_model("gpt2"), max_batch=2, max_batch_tokens=64, cache_tokens=24, block_size=4)
    numbers = [engine.add_request([i] * (14 if i % 3 == 0 else 2), GREEDY) for i in range(9)]
    started: list[int] = []
    while engine.has_work:
        for event in engine.step():
            if event.request not in started:
                started.append(event.request)
    assert started == numbers


def test_events_report_each_token_once(make_model: Any) -> None:
    engine = Engine(make_model("gpt2"), max_batch=3, max_batch_tokens=3, cache_tokens=24, block_size=2)
    for i in range(5):
        engine.add_request([i, i], SamplingParams(max_tokens=7, temperature=0, n=2))
    seen: dict[tuple[int, int], list[Event]] = {}
    for event in drained(engine):
        seen.setdefault((event.request, event.index), []).append(event)
    assert len(seen) == 10
    for events in seen.values():
        assert sum(len(e.ids) for e in events) == 7
        assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["length"]
