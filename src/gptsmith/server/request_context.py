"""The state of one HTTP request while it is handled."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from gptsmith.server.errors import ApiError

_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """One HTTP request: its id, its deadline (in the event loop's time), the status of its response, and the fields of
    its log line, which must not contain anybody's text."""

    def __init__(self, scope: Scope, timeout: float) -> None:
        offered = Headers(scope=scope).get("x-request-id", "")
        self.id = offered if _VALID_ID.fullmatch(offered) else uuid.uuid4().hex
        self.started_at = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + timeout
        self.status: int | None = None
        self.complete = False
        """Whether the whole response has been sent."""
        self.log_fields: dict[str, Any] = {}
        self._callbacks: list[Callable[[], None]] = []

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the request ends, however it ends. The last one registered is called first."""
        self._callbacks.append(callback)

    def log_error(self, error: ApiError) -> None:
        """Describe an error in the log line. Messages about the client's mistakes quote what it sent, so only their
        kind and the field are logged."""
        if error.status >= 500:
            self.log_fields.setdefault("error", error.message)
            return
        self.log_fields.setdefault("error", error.code or error.body()["error"]["type"])
        if error.param is not None and error.code != "unknown_parameter":
            self.log_fields.setdefault("param", error.param.partition(".")[0])

    def close(self) -> None:
        while self._callbacks:
            self._callbacks.pop()()
