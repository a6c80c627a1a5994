"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from gptsmith.errors import GptsmithError, TokenizerError, UsageError

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


def escape_surrogates(text: str) -> str:
    """Return the text with lone surrogates, which UTF-8 cannot encode, written as escapes (\\udc80)."""
    return text.encode("utf-8", "backslashreplace").decode()


class ApiError(Exception):
    """An error response. param: the request field at fault. retry_after: seconds, for 429 and 503."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after
        self.message = escape_surrogates(message)
        self.param = None if param is None else escape_surrogates(param)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def from_engine(error: GptsmithError, *, constrained: bool = False) -> ApiError:
    """Convert an error of the engine or the tokenizer: 400 for invalid input, 500 otherwise.

    constrained: the request has a grammar, so that any failure is attributed to it (400).
    Messages that name a command-line option ("--top-p must be …") name the request field instead ("top_p must be …").
    """
    if isinstance(error, UsageError | TokenizerError) or constrained:
        message = str(error)
        if message.startswith("--"):
            option, _, rest = message.partition(" ")
            name = option.lstrip("-").replace("-", "_")
            return ApiError(400, f"{name} {rest}", param=name)
        return ApiError(400, message)
    return ApiError(500, str(error))


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any = None) -> ApiError:
    """Convert pydantic's validation errors of a request body into a 400 error that names one field of `body`.

    Where a field takes several types, pydantic reports errors for each of them. The one reported here is of the type
    that fits best: the one whose first error is the deepest in the body.
    """
    if isinstance(body, bytes | str) and errors[0]["loc"] == ("body",):
        return ApiError(400, "The request body is not JSON; send the header Content-Type: application/json.")
    chosen = list(errors)
    while True:
        first = chosen[0]
        path = _path(first, body)
        branches: dict[Any, list[Mapping[str, Any]]] = {}  # by the type that pydantic tried
        for error in chosen:
            if _path(error, body)[: len(path)] == path:
                branches.setdefault(error["loc"][: _num_common(error["loc"], first["loc"]) + 1], []).append(error)
        fits = [_fit(_path(branch[0], body), len(path)) for branch in branches.values()]
        best = [branch for branch, fit in zip(branches.values(), fits, strict=True) if fit == max(fits)]
        if len(branches) == 1 or max(fits)[0] == len(path):
            break
        chosen = [error for branch in best for error in branch]
    name = ".".join(map(str, path)) or None
    # What kind of thing it is matters before what it lacks.
    siblings = (error for error in chosen if error["loc"] == (*first["loc"][:-1], "type"))
    other = next((error for error in siblings if error["type"] == "literal_error"), None)
    if other is not None:
        return _described(other, ".".join(map(str, _path(other, body))))
    firsts = [branch[0] for branch in branches.values()]
    right_type = [error for error in firsts if error["type"] not in _WRONG_TYPE]
    if len(right_type) == 1:
        return _described(right_type[0], name)
    kinds = list(dict.fromkeys(_kind(error["msg"]) for error in firsts))
    if len(kinds) > 1 and None not in kinds:  # none fits: name all of them
        expected = " or ".join(map(str, kinds))
        return ApiError(400, f"{name} must be {expected}{_received(first.get('input'))}.", param=name)
    return _described(first, name)


_WRONG_TYPE = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a valid integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a valid number"),
    "string_type": "a valid string",
    "list_type": "a list",
    "literal_error": None,
}
"""Errors about the type of a value, and what it must be."""


def _described(error: Mapping[str, Any], name: str | None) -> ApiError:
    shown = name or "The request body"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"The request body is not valid JSON: {context.get('error', error['msg'])}.")
    if kind == "extra_forbidden":
        return ApiError(400, f"{name} is not a known field of this request.", param=name, code="unknown_parameter")
    if kind == "none_required":
        return ApiError(400, f"{name} is not supported by this server.", param=name, code="unsupported_parameter")
    if kind == "union_tag_not_found" and not isinstance(error.get("input"), Mapping):
        return ApiError(400, f"{shown} must be an object{_received(error.get('input'))}.", param=name)
    if kind in ("missing", "union_tag_not_found"):
        if kind != "missing":
            name = shown = f"{name}.{_tag_field(context)}"
        return ApiError(400, f"{shown} is missing.", param=name, code="missing_required_parameter" if name else None)
    if kind == "union_tag_invalid":
        name = f"{name}.{_tag_field(context)}"
        return ApiError(400, f"{name} must be {context['expected_tags']}, not {context['tag'][:100]!r}.", param=name)
    expected = _WRONG_TYPE.get(kind)
    if expected is not None:
        return ApiError(400, f"{shown} must be {expected}{_received(error.get('input'))}.", param=name)
    message = error["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        message = message.replace("True", "true").replace("False", "false") + _received(error.get("input"))
    message, required = re.subn(r"^\w+ should ", "must ", message.replace(" after validation", ""))
    return ApiError(400, f"{shown}{' ' if required else ': '}{message}.".replace("..", "."), param=name)


def _tag_field(context: Mapping[str, Any]) -> str:
    """Return the field that decides between the types of a union."""
    field = str(context["discriminator"])
    return field.strip("'") if field.startswith("'") else "type"


def _path(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Return where in the body an error is. pydantic's locations also name the types of unions, which are left out."""
    parts = [part for part in error["loc"] if part not in ("body", "query", "path")]
    if body is None:
        return tuple(part for part in parts if not str(part).startswith("function-"))
    path: list[str | int] = []
    for i, part in enumerate(parts):
        held: Container[Any] = range(len(body)) if isinstance(body, list) else body if isinstance(body, Mapping) else ()
        if part in held:
            body = body[part]
        elif not (error["type"] == "missing" and i == len(parts) - 1):
            continue
        path.append(part)
    return tuple(path)


def _num_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common beginning of two locations, at most all of `other` but its last part."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other) - 1)


def _fit(path: Sequence[str | int], at: int) -> tuple[int, int]:
    """Return how well a type fits: how deep its first error is, and at which item of the list that the path enters."""
    item = path[at] if len(path) > at else -1
    return len(path), item if isinstance(item, int) else -1


def _kind(message: str) -> str | None:
    """Return the type of value that a message asks for, such as "a string"; None if it asks for something else."""
    found = re.match(r"Input should be (an? (?:valid )?\w+)", message)
    if found is None:
        return None
    return found[1].replace("a valid dictionary", "an object").replace("a valid i", "an i").replace("valid ", "")


def _received(value: Any) -> str:
    """Return ", not …" with a short form of a value."""
    if isinstance(value, Mapping | list):
        return f", not {'a list' if isinstance(value, list) else 'an object'}"
    text = json.dumps(value, ensure_ascii=True, default=str)
    return f", not {text if len(text) <= 60 else text[:60] + '...'}"


def check_json(value: Any) -> None:
    """Raise ApiError 400 for what Python reads as JSON but cannot write: NaN, Infinity and lone surrogates."""
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, str):
            _check_text(name, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ApiError(400, f"{name or 'The request body'} is not a finite number.", param=name or None)
        elif isinstance(value, dict):
            for key in value:
                _check_text(f"A name in {name or 'the request body'}", key)
            pending += [(f"{name}.{key}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(f"{name}.{i}".lstrip("."), item) for i, item in enumerate(value)]


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = name or "The request body"
        message = f"{shown} contains half of a surrogate pair (such as \\ud83d), which is no character."
        raise ApiError(400, message, param=name if name and " " not in name else None) from None
