"""One HTTP request and its answer."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Exchange:
    """One request and its answer. deadline: on the event loop's clock. facts: for the log; no text of anybody's."""

    def __init__(self, scope: Scope, timeout: float) -> None:
        offered = Headers(scope=scope).get("x-request-id", "")
        self.id = offered if _SANE_ID.fullmatch(offered) else uuid.uuid4().hex
        self.began = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + timeout
        self.status: int | None = None
        self.facts: dict[str, Any] = {}
        self._closers: list[Callable[[], None]] = []

    def on_close(self, close: Callable[[], None]) -> None:
        """Have `close` called when the exchange is over, however it ends."""
        self._closers.append(close)

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()
