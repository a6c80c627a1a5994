"""Pictures from the network: only from allowed domains and public addresses, within a size and a time."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gptsmith.errors import UsageError
from gptsmith.server.media import MediaError, MediaFetcher, is_public, parse_domain

PRIVATE = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1"),
    *("ff02::1", "2001:db8::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "x", ""),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "text", ["", "*", "https://example.org", "example.org/x", "a b", "user@example.org", "example.org:80", "a..b"]
)
def test_domains_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--allow-media-domain"):
        parse_domain(text)


def test_domains_are_compared_as_hosts_are_written() -> None:
    assert parse_domain(" Images.Example.ORG. ") == "images.example.org"
    assert parse_domain("bücher.example") == "xn--bcher-kva.example"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append(self.headers["host"])  # type: ignore[attr-defined]
        name = self.path.partition("?")[0]
        if name.startswith("/redirect/"):
            self.send_response(302)
            target = name.removeprefix("/redirect/")
            self.send_header("location", target if "://" in target else f"/{target}")
            self.end_headers()
            return
        if name == "/slow-header":
            for letter in b"HTTP/1.0 200 OK\r\nx: " + b"a" * 100:
                self.wfile.write(bytes([letter]))
                time.sleep(0.1)
        self.send_response({"/missing": 404, "/broken": 500}.get(name, 200))
        if name == "/large":
            self.send_header("content-length", "5000")
        if name == "/short":
            self.send_header("content-length", "50")
        self.end_headers()
        if name == "/slow":
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        self.wfile.write(b"x" * (5000 if name in ("/large", "/endless") else 10))

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []  # type: ignore[attr-defined]
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server: ThreadingHTTPServer, path: str, host: str = "localhost", **options: Any) -> bytes:
    given: dict[str, Any] = {"domains": ("localhost",), "timeout": 5.0, "allowed": lambda address: True} | options
    url = path if re.match(r"\w+:", path) else f"http://{host}:{server.server_port}/{path}"
    return asyncio.run(MediaFetcher(**given).fetch(url, 1000))


def test_a_picture_of_an_allowed_domain(server: ThreadingHTTPServer) -> None:
    assert fetch(server, "x.png?a=b") == b"x" * 10
    assert fetch(server, "x.png", host="LOCALHOST.") == b"x" * 10
    assert fetch(server, "redirect/x.png") == b"x" * 10
    assert fetch(server, f"redirect/http://localhost:{server.server_port}/x.png") == b"x" * 10
    assert server.seen[-1] == f"localhost:{server.server_port}"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "HTTP status 404"),
        ("broken", "HTTP status 500"),
        ("large", "more than 1,000 bytes"),
        ("endless", "more than 1,000 bytes"),
        ("short", "cannot be fetched"),
        ("redirect/redirect/redirect/redirect/redirect/x", "redirected more than 3 times"),
        ("redirect/http://127.0.0.1/x", "no pictures from 127.0.0.1"),
        ("redirect/http://evil.example/x", "no pictures from evil.example"),
        ("redirect/file:///etc/passwd", "https and http only"),
        ("http://evil.example/x", "no pictures from evil.example"),
        ("http://localhost.evil.example/x", "no pictures from localhost.evil.example"),
        ("http://evil.example#localhost/x", "no pictures from evil.example"),
        ("http://localhost@evil.example/x", "no pictures from evil.example"),
        ("http://user:secret@localhost/x", "user name or password"),
        ("ftp://localhost/x", "https and http only"),
        ("file:///etc/passwd", "https and http only"),
        ("http:///x", "no pictures from there"),
        ("http://localhost:99999/x", "not a valid address"),
        ("http://[::1/x", "not a valid address"),
        ("http://localhost:1/x", "cannot be fetched"),
        ("http://localhost/\r\nx: y", "https and http only|cannot be fetched"),
        ("x.png", "https and http only"),
    ],
)
def test_what_is_not_fetched(server: ThreadingHTTPServer, path: str, message: str) -> None:
    def run() -> bytes:
        if path in ("x.png",):
            return asyncio.run(MediaFetcher(("localhost",), allowed=lambda address: True).fetch(path, 1000))
        return fetch(server, path)

    with pytest.raises(MediaError, match=message):
        run()


@pytest.mark.parametrize("path", ["slow", "slow-header"])
def test_a_slow_server_is_given_up(server: ThreadingHTTPServer, path: str) -> None:
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"did not answer within 0\.5 seconds"):
        fetch(server, path, timeout=0.5)
    assert time.monotonic() - began < 5


def test_nothing_is_fetched_without_domains(server: ThreadingHTTPServer) -> None:
    with pytest.raises(MediaError, match="fetches no pictures from the network"):
        fetch(server, "x.png", domains=())


def test_private_addresses_are_refused_whatever_the_name(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(server.seen)  # type: ignore[attr-defined]
    with pytest.raises(MediaError, match="not public"):
        fetch(server, "x.png", allowed=is_public)
    with pytest.raises(MediaError, match="not public"):
        fetch(server, f"http://127.0.0.1:{server.server_port}/x", domains=("127.0.0.1",), allowed=is_public)
    real = socket.getaddrinfo

    def both(host: str, *args: Any, **options: Any) -> Any:
        found = real("127.0.0.1", *args, **options)
        return [(*found[0][:4], ("8.8.8.8", 80)), *found] if host == "mixed.example" else found

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with pytest.raises(MediaError, match="not public"):
        fetch(server, "http://mixed.example/x", domains=("mixed.example",), allowed=is_public)
    assert len(server.seen) == before  # type: ignore[attr-defined]


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, names = socket.getaddrinfo, []

    def resolve(host: str, *args: Any, **options: Any) -> Any:
        names.append(host)
        return real("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"http://once.example:{server.server_port}/x.png"
    assert fetch(server, url, domains=("once.example",)) == b"x" * 10
    assert names.count("once.example") == 1
    assert server.seen[-1] == f"once.example:{server.server_port}"  # type: ignore[attr-defined]
