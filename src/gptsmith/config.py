"""Convert dataclasses to plain dictionaries and back.

Reading is strict: an unknown key is an error, with a suggestion where it looks like a misspelling.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gptsmith.errors import UsageError, nearest

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested plain data for JSON. Paths become strings."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def from_dict(cls: type[T], values: Mapping[str, Any], *, default: T | None = None, where: str = "") -> T:
    """Build dataclass `cls` from nested plain data.

    default: provides the fields that `values` lacks. where: the dotted name of `values`, for messages.
    Raises UsageError for an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where or 'the configuration'} must be a mapping, not {values!r}.")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UsageError(f"unknown configuration key {name!r}.{nearest(str(key), known)}")
        base = getattr(default, key) if default is not None else None
        arguments[key] = _convert(hints[key], value, name, base)
    try:
        if default is not None:
            return dataclasses.replace(default, **arguments)  # type: ignore[type-var]
        return cls(**arguments)
    except TypeError as error:
        raise UsageError(f"{where or 'the configuration'}: {error}.") from None


def _convert(hint: Any, value: Any, name: str, default: Any) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(options[0], value, name, default)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is not type(None):
                try:
                    return _convert(option, value, name, default)
                except UsageError as error:
                    errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        if value not in options:
            near = nearest(str(value), map(str, options))
            raise UsageError(f"{name} is {value!r}; choose from {', '.join(map(str, options))}.{near}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise UsageError(f"{name} must be a list, not {value!r}.")
        return origin(_convert(options[0], item, f"{name}[{i}]", None) for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, default=default, where=name)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise UsageError(f"{name} must be {hint.__name__}, not {value!r}.")
    return value
