"""API keys and rate limits."""

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
    """The accepted API keys; with none, the server is open. Keys are stored as hashes and compared in constant time."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Headers) -> str:
        """Return a name for the key in these headers ("key 1", "key 2", …). Raise ApiError 401 if it is not valid."""
        scheme, _, offered = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not offered.strip():
            raise ApiError(401, "Missing API key: send the header Authorization: Bearer KEY.", code="missing_api_key")
        digest = hashlib.sha256(offered.strip().encode("latin-1", "replace")).digest()
        found = 0
        for number, known in enumerate(self._digests, start=1):  # compare with every key, so that the time is the same
            found += number * hmac.compare_digest(digest, known)
        if not found:
            raise ApiError(401, "Invalid API key.", code="invalid_api_key")
        return f"key {found}"


def read_keys(path: Path) -> list[str]:
    """Return the keys in a file, one per line; blank lines and lines that start with # are ignored. Raise UsageError
    for a file that cannot be read or has no keys."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UsageError(f"--api-key-file {path}: no such file.") from None
    except UnicodeDecodeError:
        raise UsageError(f"--api-key-file {path}: not a UTF-8 text file.") from None
    except OSError as error:
        raise UsageError(f"--api-key-file {path}: cannot be read ({error.strerror}).") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file {path}: contains no keys. Write one key per line.")
    return keys


class RateLimiter:
    """Allow `count` requests per `seconds` for each client: a token bucket of size `count` that refills steadily."""

    _MAX_CLIENTS = 10_000

    def __init__(self, count: int, seconds: float = 60.0) -> None:
        self.count, self.seconds = count, seconds
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, at this time)

    def take(self, client: str, now: float | None = None) -> None:
        """Count a request. Raise ApiError 429, with the time to wait, if the client has used up its requests."""
        now = time.monotonic() if now is None else now
        tokens, updated = self._buckets.pop(client, (float(self.count), now))
        tokens = min(float(self.count), tokens + (now - updated) * self.count / self.seconds)
        self._buckets[client] = (tokens - 1 if tokens >= 1 else tokens, now)
        while len(self._buckets) > self._MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            wait = (1 - tokens) * self.seconds / self.count
            raise ApiError(
                429,
                f"Rate limit of {self.count} requests per {self.seconds:g} seconds exceeded; "
                f"retry in {wait:.1f} seconds.",
                code="rate_limit_exceeded",
                retry_after=wait,
            )


def parse_rate(text: str) -> RateLimiter:
    """Parse `60/min`, `5/s` or `1000/h`. Raise UsageError for anything else."""
    units = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
    count, _, unit = text.partition("/")
    if not count.strip().isdecimal() or int(count) < 1 or unit.strip() not in units:
        raise UsageError(f"--rate-limit {text!r} is not a valid rate; write for example 60/min, 5/s or 1000/h.")
    return RateLimiter(int(count), units[unit.strip()])
