"""Files are complete or unchanged, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from gptsmith.errors import GptsmithError
from gptsmith.storage import (
    TEMPORARY_PREFIX,
    atomic_directory,
    atomic_file,
    explain_os_errors,
    remove_temporaries,
    sha256_file,
    write_text,
)


class Crash(BaseException):
    """Not an Exception, like KeyboardInterrupt and SystemExit."""


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]


def test_a_file_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on" / "demand.txt"
    with atomic_file(path, "w") as file:
        file.write("höher\n")
        assert not path.exists()
    assert path.read_bytes() == "höher\n".encode()
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("failure", [ValueError, Crash])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def write() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise failure

    with pytest.raises(failure):
        write()
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(GptsmithError, match="no space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_newlines_are_untouched(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "a\r\nb\nc\r")
    assert (tmp_path / "file").read_bytes() == b"a\r\nb\nc\r"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    """mkstemp creates private files; the result must have the usual permissions."""
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with atomic_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_directory_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "folder"
    with atomic_directory(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("x")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same file system, or the rename would be a copy
    assert (path / "inner" / "file").read_text() == "x"
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("failure", [ValueError, Crash])
def test_a_failed_directory_leaves_nothing_behind(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "folder"

    def write() -> None:
        with atomic_directory(path) as temporary:
            (temporary / "file").write_text("x")
            raise failure

    with pytest.raises(failure):
        write()
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync every file and directory, rename, then fsync the parent directory."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def name(fd: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        return "temporary" if path.name.startswith(TEMPORARY_PREFIX) else path.name

    def recorded_fsync(fd: int) -> None:
        events.append(f"fsync {name(fd)}")
        fsync(fd)

    def recorded_replace(source: Path, target: Path) -> None:
        events.append(f"rename to {Path(target).name}")
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file a descriptor is")
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_text(tmp_path / "file", "x")
    assert events == ["fsync temporary", "rename to file", f"fsync {tmp_path.name}"]
    events.clear()
    with atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("x")
    assert events == [
        "fsync a",
        "fsync inner",
        "fsync temporary",
        "rename to folder",
        f"fsync {tmp_path.name}",
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the disk that holds .*place"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "no permission to write .*place"),
        (errno.EPERM, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.ENOTDIR, "place: part of that path is a file"),
    ],
)
def test_os_errors_are_explained(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(GptsmithError, match=message), explain_os_errors(tmp_path / "place"):
        raise OSError(code, os.strerror(code))


def test_other_errors_propagate(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), explain_os_errors(tmp_path):
        (tmp_path / "missing").read_text()


def test_a_path_below_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GptsmithError, match="part of that path is a file"):
        write_text(tmp_path / "file" / "inner" / "new", "y")
    with pytest.raises(GptsmithError, match="part of that path is a file"), atomic_directory(tmp_path / "file" / "d"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_only_temporaries_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}abc").write_text("half")
    (tmp_path / f"{TEMPORARY_PREFIX}def").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}def" / "file").write_text("half")
    (tmp_path / "mine.tmp").write_text("keep")
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")  # the example of FIPS 180-2
    assert sha256_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.skipif(os.name == "nt", reason="needs a named pipe")
def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_directory_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(GptsmithError, match="it is a directory"):
        write_text(tmp_path, "text")
    assert list(tmp_path.parent.glob(".tmp-*")) == []
