"""Who may ask, and how often."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers

from gptsmith.errors import UsageError
from gptsmith.server.errors import ApiError


class Keys:
    """The keys that open the server; none: it is open. Kept as hashes, and compared in a time that tells nothing."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Headers) -> str:
        """What to call whoever sent these headers ("key 1", ...). Raises ApiError 401."""
        scheme, _, offered = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not offered.strip():
            raise ApiError(401, "this server needs a key: Authorization: Bearer KEY.", code="missing_api_key")
        digest = hashlib.sha256(offered.strip().encode("latin-1", "replace")).digest()
        found = 0
        for number, known in enumerate(self._digests, start=1):  # all of them, always
            found += number * hmac.compare_digest(digest, known)
        if not found:
            raise ApiError(401, "that is not a key of this server.", code="invalid_api_key")
        return f"key {found}"


def read_keys(path: Path) -> list[str]:
    """The keys in a file: one a line; empty lines and those that begin with # do not count. Raises UsageError."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path} cannot be read: {error}.") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file {path} holds no key.")
    return keys


class RateLimiter:
    """At most `count` requests in `seconds`, for each name: a bucket of `count` that fills steadily."""

    _MOST_NAMES = 10_000

    def __init__(self, count: int, seconds: float = 60.0) -> None:
        self.count, self.seconds = count, seconds
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, now: float | None = None) -> None:
        """Count a request. Raises ApiError 429 that says when to come again."""
        now = time.monotonic() if now is None else now
        level, since = self._buckets.pop(name, (float(self.count), now))
        level = min(float(self.count), level + (now - since) * self.count / self.seconds)
        self._buckets[name] = (level - 1 if level >= 1 else level, now)
        while len(self._buckets) > self._MOST_NAMES:
            self._buckets.popitem(last=False)
        if level < 1:
            wait = (1 - level) * self.seconds / self.count
            raise ApiError(
                429,
                f"more than {self.count} requests in {self.seconds:g} seconds; come again in {wait:.1f} seconds.",
                code="rate_limit_exceeded",
                retry_after=wait,
            )


def parse_rate(text: str) -> RateLimiter:
    """`60/min`, `5/s`, `1000/h`. Raises UsageError."""
    units = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
    count, _, unit = text.partition("/")
    if not count.strip().isdecimal() or int(count) < 1 or unit.strip() not in units:
        raise UsageError(f"--rate-limit {text!r} is no rate; write for example 60/min, 5/s or 1000/h.")
    return RateLimiter(int(count), units[unit.strip()])
