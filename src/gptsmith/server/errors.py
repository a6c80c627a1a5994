"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptsmith.errors import GptsmithError, TokenizerError, UsageError

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


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
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

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


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Convert the first of pydantic's validation errors of a request body into a 400 error."""
    error = errors[0]
    path = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
    name = ".".join(part for part in path if not part.startswith("function-")) or None
    shown = name or "The request body"
    kind = error["type"]
    if kind == "json_invalid":
        return ApiError(400, f"The request body is not valid JSON: {error.get('ctx', {}).get('error', error['msg'])}.")
    if kind == "extra_forbidden":
        return ApiError(400, f"{name} is not a known field of this request.", param=name, code="unknown_parameter")
    if kind == "none_required":
        return ApiError(400, f"{name} is not supported by this server.", param=name, code="unsupported_parameter")
    if kind == "missing":
        return ApiError(400, f"{shown} is missing.", param=name, code="missing_required_parameter" if name else None)
    message = error["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        message = message.replace("True", "true").replace("False", "false")
    message, required = re.subn(r"^\w+ should ", "must ", message)
    return ApiError(400, f"{shown}{' ' if required else ': '}{message}.".replace("..", "."), param=name)
