"""Files that are either wholly there or not there at all.

Everything this package writes goes through here: to a temporary sibling, fsynced, then renamed. A crash, a signal or a
full disk leaves the old file as it was; what is left of the temporary is removed by the next writer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gptsmith.errors import GptsmithError

TEMPORARY_PREFIX = ".tmp-"


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable (a rename is only on disk once its directory is)."""
    if os.name == "nt":  # Windows cannot open a directory
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(path: Path) -> None:
    """fsync every file under `path`, then its directories, deepest first."""
    for root, _, files in os.walk(path, topdown=False):
        for name in files:
            with open(Path(root) / name, "rb+") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(root))


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn 'no space' and 'no permission' into messages that say where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GptsmithError(f"no space left on the disk that holds {path}. Free some, then try again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise GptsmithError(f"no permission to write {path}. Choose a place you can write to.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise GptsmithError(f"cannot write {path}: a part of that path is a file, not a folder.") from error
        raise


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb", **open_options: Any) -> Iterator[IO[Any]]:
    """Open a temporary sibling of `path` for writing; on success fsync it and rename it onto `path`.

    Raises GptsmithError for a full disk or a place that cannot be written; `path` is then as it was.
    """
    path = Path(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if "b" not in mode:
            open_options.setdefault("encoding", "utf-8")
        fd, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=path.name[-40:], dir=path.parent)
        try:
            with os.fdopen(fd, mode, **open_options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8, newlines untouched), atomically."""
    with atomic_file(path, "w", newline="") as file:
        file.write(text)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`; on success fsync its files and rename it to `path`.

    `path` must not exist (or be an empty directory). On any failure nothing of it is left.
    """
    path = Path(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, suffix="-" + path.name[-40:], dir=path.parent))
        try:
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            fsync_tree(temporary)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_directory(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Delete what a killed writer left behind in `directory`. Call only where no other writer is at work."""
    for entry in Path(directory).glob(TEMPORARY_PREFIX + "*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """The hexadecimal sha256 of a file's bytes, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
