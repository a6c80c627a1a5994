"""Names of what other packages add."""

from __future__ import annotations

import pytest

from gptsmith.errors import UsageError
from gptsmith.registry import Registry


def test_things_are_added_found_and_replaced() -> None:
    registry = Registry("animal", {"cat": 1})
    registry.register("dog", 2)
    registry.register("dog", 3)  # a notebook cell runs twice
    assert (registry.find("cat"), registry.find("dog"), list(registry)) == (1, 3, ["cat", "dog"])
    assert registry.metavar == "{cat,dog}"
    assert registry.builtin == {"cat"}


def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    registry = Registry("animal", {"horse": 1, "cat": 2})
    with pytest.raises(UsageError, match=r"there is no animal 'hrose'\. Did you mean 'horse'\? Known: horse, cat\."):
        registry.find("hrose")


@pytest.mark.parametrize("name", ["", "-cat", "a/b", "..", "two words", "module:name"])
def test_bad_names_are_refused(name: str) -> None:
    registry = Registry("animal", {"cat": 1})
    with pytest.raises(UsageError, match="cannot be the name of a animal"):
        registry.register(name, 2)
    with pytest.raises(UsageError, match="'cat' is part of gptsmith and cannot be replaced"):
        registry.register("cat", 2)
    assert dict(registry) == {"cat": 1}
