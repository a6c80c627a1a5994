"""The engine in its own thread, used from asyncio."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from gptsmith.engine.async_engine import AsyncEngine
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import GptsmithError, UsageError

GREEDY = SamplingParams(max_tokens=9, temperature=0)


@pytest.fixture
def engine(make_model: Any) -> Any:
    engine = AsyncEngine(Engine(make_model("qwen3"), block_size=4, cache_tokens=60, max_batch=4, max_batch_tokens=8))
    yield engine
    engine.close(drain=False)
    assert engine.engine.blocks.used() == 0


def test_many_tasks_share_one_engine(engine: AsyncEngine, make_model: Any, naive: Any) -> None:
    model = make_model("qwen3")
    prompts = [[i % 30, (i * 7) % 30, 3] for i in range(20)]

    async def stream(prompt: list[int]) -> list[int]:
        ids = []
        async for event in engine.stream(prompt, GREEDY):
            ids += event.ids
        return ids

    async def all_of_them() -> list[Any]:
        streams = [stream(prompt) for prompt in prompts[:10]]
        results = [engine.generate(prompt, GREEDY) for prompt in prompts[10:]]
        return list(await asyncio.gather(*streams, *results))

    made = asyncio.run(all_of_them())
    expected = [naive(model, prompt, 9) for prompt in prompts]
    assert made[:10] + [result.ids for result in made[10:]] == expected


def test_leaving_a_stream_frees_its_blocks(engine: AsyncEngine) -> None:
    endless = SamplingParams(max_tokens=100_000, temperature=0, overflow="shift")

    async def leave() -> None:
        events = engine.stream([1, 2], endless)
        async for _ in events:
            break
        await events.aclose()  # type: ignore[attr-defined]
        task = asyncio.create_task(engine.generate([3], endless))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(500):
            if not engine.engine.has_work:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the engine still works on an abandoned request")

    asyncio.run(leave())
    assert engine.stats.blocks_used == 0


def test_stopping_one_sample(engine: AsyncEngine) -> None:
    async def stop() -> Any:
        params = SamplingParams(max_tokens=100_000, temperature=0, n=2, overflow="shift")
        stopped: set[int] = set()
        async for event in engine.stream([1], params):
            if event.index not in stopped:
                engine.stop(event.request, event.index)
                stopped.add(event.index)
            if event.result is not None:
                return event.result
        return None

    result = asyncio.run(stop())
    assert [c.finish_reason for c in result.completions] == ["stop", "stop"]


def test_errors_are_raised_to_the_caller(engine: AsyncEngine) -> None:
    async def mistake() -> None:
        with pytest.raises(UsageError, match="empty"):
            await engine.generate([], GREEDY)
        with pytest.raises(UsageError, match="outside"):
            async for _ in engine.stream([99], GREEDY):
                pass

        class Broken:
            def start(self) -> Any:
                raise ZeroDivisionError("a mistake of its own")

        with pytest.raises(GptsmithError, match="ZeroDivisionError: a mistake of its own"):
            await engine.generate([1], SamplingParams(constraint=Broken()))
        assert (await engine.generate([1], GREEDY)).ids

    asyncio.run(mistake())


def test_closing_drains_or_cancels(make_model: Any) -> None:
    for drain in (True, False):
        engine = AsyncEngine(Engine(make_model("gpt2")))
        ended: list[Any] = []
        size = 9 if drain else 1_000_000
        params = SamplingParams(max_tokens=size, temperature=0, overflow="shift")
        for _ in range(5):
            engine.submit([1], params, lambda item, ended=ended: ended.append(item))  # type: ignore[misc]
        engine.close(drain=drain)
        results = [item.result for item in ended if getattr(item, "result", None)]
        reasons = {result.completions[0].finish_reason for result in results}
        assert len(results) == 5
        assert reasons == ({"length"} if drain else {"cancelled"})
        with pytest.raises(GptsmithError, match="closed"):
            asyncio.run(engine.generate([1], GREEDY))


def test_an_engine_failure_is_reported_to_all_requests(make_model: Any) -> None:
    engine = AsyncEngine(Engine(make_model("gpt2")))

    def broken() -> None:
        raise ZeroDivisionError("a bug of ours")

    engine.engine.scheduler.schedule = broken  # type: ignore[method-assign, assignment]
    for _ in range(2):
        with pytest.raises(GptsmithError, match="a bug of ours"):
            asyncio.run(engine.generate([1], GREEDY))


def test_functions_called_between_steps(engine: AsyncEngine) -> None:
    """A function runs in the engine's thread while requests run, and its errors are raised to its caller."""

    async def scene() -> tuple[list[Any], Any]:
        answers = asyncio.create_task(engine.generate([1, 2], GREEDY))
        names = [await engine.call(lambda: threading.current_thread().name) for _ in range(3)]
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda: 1 / 0)
        return names, await answers

    names, answer = asyncio.run(scene())
    assert names == ["gptsmith-engine"] * 3
    assert len(answer.ids) == 9
