"""Parts of the server on their own: concurrency, keys and model names."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from gptsmith.errors import UsageError
from gptsmith.server.auth import Keys, RateLimiter, parse_rate, read_keys
from gptsmith.server.concurrency import ConcurrencyLimiter
from gptsmith.server.errors import ApiError
from gptsmith.server.models import ModelRegistry, default_name

# concurrency ----------------------------------------------------------------------------------------------------------


def test_slots_are_first_in_first_out() -> None:
    async def scenario() -> None:
        limiter = ConcurrencyLimiter(2, 10)
        slots = [await limiter.acquire(), await limiter.acquire()]
        order: list[int] = []

        async def request(number: int) -> None:
            slot = await limiter.acquire()
            order.append(number)
            await asyncio.sleep(0)
            slot.release()

        requests = [asyncio.create_task(request(i)) for i in range(6)]
        await asyncio.sleep(0)
        assert limiter.waiting == 6
        requests[2].cancel()
        slots[0].release()
        slots[0].release()  # releasing twice has no effect
        await asyncio.gather(*requests, return_exceptions=True)
        assert order == [0, 1, 3, 4, 5]
        slots[1].release()
        assert limiter.in_use == limiter.waiting == 0

    asyncio.run(scenario())


def test_slot_granted_to_a_canceled_request_is_released() -> None:
    async def scenario() -> None:
        limiter = ConcurrencyLimiter(1, 10)
        slot = await limiter.acquire()
        late = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(0)
        slot.release()
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert limiter.in_use == 0
        slot = await limiter.acquire()
        with pytest.raises(ApiError) as refused:
            await limiter.acquire(asyncio.get_running_loop().time() + 0.01)
        assert refused.value.status == 504
        slot.release()
        assert (limiter.in_use, limiter.waiting) == (0, 0)

    asyncio.run(scenario())


# keys -----------------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    keys = Keys(["abc", "abd", "abc"])
    assert keys.check(Headers({"authorization": "bearer abd"})) == "key 2"
    for header in ("Bearer ab", "Bearer abcd", "Basic abc", "abc", "Bearer", ""):
        with pytest.raises(ApiError):
            keys.check(Headers({"authorization": header}))
    assert not Keys()
    assert "abc" not in str(vars(keys))


def test_read_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# a comment\n\n one \ntwo\n")
    assert read_keys(path) == ["one", "two"]
    path.write_text("# none\n")
    for bad in (path, tmp_path / "missing"):
        with pytest.raises(UsageError):
            read_keys(bad)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.integers(1, 5))
def test_rate_limit(times: list[float], count: int) -> None:
    limiter, taken, waits = RateLimiter(count, 10.0), [], []
    for now in sorted(times):
        try:
            limiter.take("x", now)
            taken.append(now)
        except ApiError as error:
            waits.append(error.retry_after or 0)
            limiter.take(f"another, {len(waits)}", now)
    assert all(0 < wait <= 10.0 / count + 1e-6 for wait in waits)
    for i, begin in enumerate(taken):  # a full bucket, and the tokens added in that time
        assert len([t for t in taken[i:] if t < begin + 10.0]) <= 2 * count


def test_parse_rate() -> None:
    assert (parse_rate("60/min").count, parse_rate("60/min").seconds) == (60, 60)
    assert parse_rate("5/s").seconds == 1
    for bad in ("5", "x/min", "0/s", "5/fortnight", "-1/s"):
        with pytest.raises(UsageError):
            parse_rate(bad)


# names ----------------------------------------------------------------------------------------------------------------


def test_model_names(tmp_path: Path) -> None:
    (tmp_path / "bard").mkdir()
    (tmp_path / "small.Q4.gguf").write_bytes(b"")
    assert default_name(str(tmp_path / "bard")) == "bard"
    assert default_name(str(tmp_path / "small.Q4.gguf")) == "small.Q4"
    assert default_name("org/name") == "org/name"

    def load(spec: str) -> Any:
        raise AssertionError

    models = ModelRegistry(["a", "b"], load, aliases={"c": "b"}, adapters={"d": ("a", tmp_path)})
    assert models.names == ["a", "b", "d", "c"]
    wrongs: tuple[dict[str, Any], ...] = (
        {"specs": ["a", "a"]},
        {"specs": []},
        {"specs": ["a"], "aliases": {"x": "b"}},
        {"specs": ["a"], "aliases": {"a": "a"}},
        {"specs": ["a"], "adapters": {"x": ("b", tmp_path)}},
    )
    for wrong in wrongs:
        with pytest.raises(UsageError):
            ModelRegistry(load=load, **wrong)
