"""The page's files: their HTTP headers, and what they must not contain."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from gptsmith.server import webapp
from gptsmith.server.webapp import Assets, watch_app

WEB = Path(webapp.__file__).parent / "web"


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(watch_app(tmp_path))


def test_files_exist_and_can_be_cached(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["cache-control"] == "no-cache"
    paths = set(re.findall(r'(?:src|href)="(static/[^"]+)"', page.text))
    assert {path.rsplit("/", 1)[1] for path in paths} == {"icon.svg", "app.css", "theme.js", "app.js"}
    base = next(iter(paths)).rsplit("/", 1)[0]
    for script in WEB.glob("*.js"):
        paths |= {f"{base}/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    for path in paths:
        file = client.get(f"/{path}")
        assert file.status_code == 200, path
        assert "immutable" in file.headers["cache-control"]
        assert file.content == (WEB / path.rsplit("/", 1)[1]).read_bytes()
    stale = client.get("/static/0000000000000000/app.js")  # requested by an open page of an older version
    assert stale.headers["cache-control"] == "no-store"


def test_etag(client: TestClient) -> None:
    etag = client.get("/").headers["etag"]
    again = client.get("/", headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200


def test_security_headers(client: TestClient) -> None:
    page = client.get("/")
    for path in ("/", "/" + re.findall(r'src="(static/[^"]+app\.js)"', page.text)[0], "/favicon.ico"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "'self' data:"
        assert policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "name", ["../webapp.py", "..%2fwebapp.py", "%2e%2e/webapp.py", "index.html", "x", "app.js/", ".."]
)
def test_only_the_pages_files_are_served(client: TestClient, name: str) -> None:
    response = client.get(f"/static/{Assets.read().version}/{name}")
    assert response.status_code in (200, 404)  # the client may have normalized the URL
    assert "def add_web_app" not in response.text


def test_no_inline_code_external_urls_or_raw_html() -> None:
    html = (WEB / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", html)
    for file in WEB.iterdir():
        text = file.read_text()
        found = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not found, (file.name, found)
        if file.suffix == ".js":
            raw = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
            assert raw == (["innerHTML"] if file.name == "markdown.js" else []), file.name
    assert "innerHTML = policy.createHTML(html)" in (WEB / "markdown.js").read_text()


def test_watch_checks_the_host_header(tmp_path: Path) -> None:
    client = TestClient(watch_app(tmp_path, hosts=["127.0.0.1", "localhost"]), base_url="http://127.0.0.1:8001")
    assert client.get("/api/runs").status_code == 200
    assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 400


def test_watch_does_not_import_torch() -> None:
    code = """
import pathlib, sys
import gptsmith.cli.watch
from gptsmith.server.webapp import watch_app
watch_app(pathlib.Path("."))
print("torch" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
