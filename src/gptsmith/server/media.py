"""Fetch pictures from the domains that an operator allows: no others, no private addresses, bounded in size and time.

A request can name any address, and the server stands where the client may not. So nothing is fetched unless the domain
is on the list; the address that its name resolves to must be a public one, and is the one that is connected to; and a
redirect is a new address, to which all of this applies.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from gptsmith.errors import GptsmithError, UsageError

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16


class MediaError(GptsmithError):
    """A picture that is not fetched, or that cannot be."""


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet: not loopback, private, link-local or reserved."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):  # an IPv4 address in one of the forms that reach the same machine
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def parse_domain(text: str) -> str:
    """Return a domain as hosts are compared with it. Raise UsageError for what is no domain, such as a URL or *."""
    name = text.strip().rstrip(".").lower()
    with contextlib.suppress(UnicodeError):
        encoded = name.encode("idna").decode()
        if encoded and all(part and part.replace("-", "").isalnum() for part in encoded.split(".")):
            return encoded
    raise UsageError(f"--allow-media-domain {text!r}: expected a domain, such as images.example.org.")


@dataclass(frozen=True)
class MediaFetcher:
    """Fetches from `domains`, which are compared as a whole: example.org does not allow www.example.org.

    timeout: seconds for one picture, redirects included. allowed: tells which addresses may be connected to.
    """

    domains: tuple[str, ...] = ()
    timeout: float = 10.0
    allowed: Callable[[str], bool] = is_public

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """Return the body that a URL answers with. Raise MediaError."""
        self._check(url)
        deadline = time.monotonic() + self.timeout
        try:
            async with asyncio.timeout(self.timeout + 1):  # a name server's own limits can be much longer
                return await asyncio.to_thread(self._fetch, url, max_bytes, deadline)
        except TimeoutError:
            raise self._too_slow(url) from None

    def _fetch(self, url: str, max_bytes: int, deadline: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._check(url)
            try:
                with self._answer(parts, deadline) as answer:
                    if answer.status in _REDIRECTS and (target := answer.getheader("location")):
                        url = urljoin(url, target)
                        continue
                    if answer.status != 200:
                        raise MediaError(f"{_shown(url)} answered with HTTP status {answer.status}.")
                    body = self._body(answer, url, max_bytes)
                if time.monotonic() >= deadline:  # the connection was closed then, which can look like the end
                    raise self._too_slow(url)
                return body
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() >= deadline:
                    raise self._too_slow(url) from None
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise MediaError(f"{_shown(url)} cannot be fetched: {reason}.") from None
        raise MediaError(f"{_shown(url)} is redirected more than {MAX_REDIRECTS} times.")

    def _check(self, url: str) -> SplitResult:
        """Return the parts of a URL. Raise MediaError unless it is one that may be fetched."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip(".").lower().encode("idna").decode(), parts.port
        except ValueError:  # UnicodeError is one
            raise MediaError(f"{_shown(url)} is not a valid address.") from None
        if parts.scheme not in ("http", "https"):
            raise MediaError(f"{_shown(url)}: pictures are fetched by https and http only; or send a data: URL.")
        if not self.domains:
            raise MediaError("this server fetches no pictures from the network. Send the picture as a data: URL.")
        if host not in self.domains:
            raise MediaError(f"this server fetches no pictures from {host[:100] or 'there'}; send it as a data: URL.")
        if parts.username is not None or parts.password is not None:
            raise MediaError(f"the address of a picture at {host} must not contain a user name or password.")
        return parts._replace(netloc=host if port is None else f"{host}:{port}")

    @contextlib.contextmanager
    def _answer(self, parts: SplitResult, deadline: float) -> Iterator[http.client.HTTPResponse]:
        """Send the request to a public address of the host; close the connection at the deadline, whatever it does."""
        host, secure = parts.hostname or "", parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        addresses = _addresses(host, port)
        if not addresses or not all(self.allowed(address) for address in addresses):
            raise MediaError(f"{host} has an address that is not public, from which nothing is fetched.")
        remaining = max(0.01, deadline - time.monotonic())
        connection = socket.create_connection((addresses[0], port), remaining)
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, (connection,))
        timer.daemon = True
        timer.start()
        client = http.client.HTTPConnection(host, port)
        try:
            if secure:
                connection = ssl.create_default_context().wrap_socket(connection, server_hostname=host)
            client.sock = connection
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            client.request(
                "GET", target, headers={"user-agent": "gptsmith", "accept": "image/*", "connection": "close"}
            )
            with client.getresponse() as answer:
                yield answer
        finally:
            timer.cancel()
            client.close()
            connection.close()

    def _body(self, answer: http.client.HTTPResponse, url: str, max_bytes: int) -> bytes:
        too_large = f"the picture at {_shown(url)} has more than {max_bytes:,} bytes, the limit."
        if (answer.length or 0) > max_bytes:
            raise MediaError(too_large)
        expected, received, size = answer.length, [], 0
        while chunk := answer.read(_CHUNK):
            received.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                raise MediaError(too_large)
        if expected is not None and size < expected:
            raise OSError("the connection was closed early")
        return b"".join(received)

    def _too_slow(self, url: str) -> MediaError:
        return MediaError(f"{_shown(url)} did not answer within {self.timeout:g} seconds.")


def _addresses(host: str, port: int) -> Sequence[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise MediaError(f"there is no host {host}.") from None
    return [str(address[0]) for *_, address in found]


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _shown(url: str) -> str:
    return (url or "an empty address") if len(url) <= 100 else f"{url[:100]}..."
