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
        self.log_fields: dict[str, Any] = {}
        self._callbacks: list[Callable[[], None]] = []

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the request ends, however it ends. The last one registered is called first."""
        self._callbacks.append(callback)

    def close(self) -> None:
        while self._callbacks:
            self._callbacks.pop()()
