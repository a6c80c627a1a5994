"""Conversion of dataclasses to plain data and back, with strict checks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.config import from_dict, to_dict
from gptsmith.errors import UsageError
from gptsmith.presets import PRESETS
from gptsmith.train.config import run_config


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["one", "two"] = "one"
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    steps: int
    path: Path
    inner: Inner = field(default_factory=Inner)
    many: list[Inner] = field(default_factory=list)
    limit: int | None = None
    flag: bool = False
    share: Annotated[float | None, "with a note"] = None


inners = st.builds(
    Inner,
    rate=st.floats(allow_nan=False),
    kind=st.sampled_from(["one", "two"]),
    words=st.lists(st.text()).map(tuple),
)
outers = st.builds(
    Outer,
    steps=st.integers(),
    path=st.sampled_from(["a", "/b/c", "d/e.txt", "ü"]).map(Path),
    inner=inners,
    many=st.lists(inners, max_size=3),
    limit=st.none() | st.integers(),
    flag=st.booleans(),
    share=st.none() | st.floats(allow_nan=False),
)


@settings(deadline=None)
@given(outers)
def test_round_trip_through_json(config: Outer) -> None:
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


@settings(deadline=None)
@given(outers, outers)
def test_missing_keys_come_from_the_default(config: Outer, default: Outer) -> None:
    values = {"limit": config.limit, "inner": {"kind": config.inner.kind}}
    expected = replace(default, limit=config.limit, inner=replace(default.inner, kind=config.inner.kind))
    assert from_dict(Outer, values, default=default) == expected


def test_every_preset_round_trips() -> None:
    for make in PRESETS.values():
        assert run_config(**json.loads(json.dumps(to_dict(make())))) == make()


def test_an_integer_is_accepted_for_a_float() -> None:
    rate = from_dict(Inner, {"rate": 3}).rate
    assert (rate, type(rate)) == (3.0, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "unknown configuration key 'stepz'. Did you mean 'steps'?"),
        ({"inner": {"rat": 1.0}}, "unknown configuration key 'inner.rat'. Did you mean 'rate'?"),
        ({"zzzzzzzz": 1}, "unknown configuration key 'zzzzzzzz'."),
        ({"steps": "ten"}, "steps must be int, not 'ten'."),
        ({"steps": 1.5}, "steps must be int, not 1.5."),
        ({"steps": True}, "steps must be int, not True."),
        ({"steps": None}, "steps must be int, not None."),
        ({"flag": 1}, "flag must be bool, not 1."),
        ({"path": 3}, "path must be Path, not 3."),
        ({"limit": "x"}, "limit must be int, not 'x'."),
        ({"inner": 3}, "inner must be a mapping, not 3."),
        ({"inner": {"rate": "x"}}, "inner.rate must be float, not 'x'."),
        ({"inner": {"rate": False}}, "inner.rate must be float, not False."),
        ({"inner": {"kind": "tow"}}, "inner.kind is 'tow'; choose from one, two. Did you mean 'two'?"),
        ({"inner": {"kind": ["one"]}}, "inner.kind is ['one']; choose from one, two."),
        ({"inner": {"words": "abc"}}, "inner.words must be a list, not 'abc'."),
        ({"inner": {"words": ["a", 2]}}, "inner.words[1] must be str, not 2."),
        ({"many": [{}, {"rate": []}]}, "many[1].rate must be float, not []."),
        ({3: 4}, "unknown configuration key '3'."),
    ],
)
def test_mistakes_are_reported(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        from_dict(Outer, values, default=Outer(steps=1, path=Path("a")))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("values", [[1], "steps", None, 3])
def test_a_configuration_must_be_a_mapping(values: Any) -> None:
    with pytest.raises(UsageError, match="the configuration must be a mapping"):
        from_dict(Outer, values)


def test_a_missing_key_is_reported() -> None:
    with pytest.raises(UsageError, match="'path'"):
        from_dict(Outer, {"steps": 1})


def test_seeds_have_64_bits() -> None:
    with pytest.raises(UsageError, match="--seed must be an integer of 64 bits"):
        run_config(seed=2**64)
    assert run_config(seed=2**63 - 1).loop.seed == 2**63 - 1
