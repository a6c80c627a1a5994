"""Atomic writes: after a crash, a signal or a full disk, a file is either complete or as it was before.

Everything that this package writes goes through this module: it is written to a temporary sibling, fsynced, and renamed
into place. A killed writer can leave its temporary behind; `remove_temporaries` deletes it.
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
    """Make the directory's entries durable: a rename survives a crash only after its directory is synced."""
    if os.name == "nt":  # directories cannot be opened on Windows
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(path: Path) -> None:
    """fsync every file and directory under `path`, deepest first."""
    for root, _, files in os.walk(path, topdown=False):
        for name in files:
            with open(Path(root) / name, "rb+") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(root))


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn OSErrors that the user can fix (full disk, no permission, a file in the way) into GptsmithErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GptsmithError(
                f"no space left on the disk that holds {path}. Free some space and try again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise GptsmithError(f"no permission to write {path}. Choose another location.") from error
        if error.errno == errno.EISDIR:
            raise GptsmithError(f"cannot write {path}: it is a directory. Choose the name of a file.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise GptsmithError(f"cannot write {path}: part of that path is a file, not a directory.") from error
        raise


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb", **open_options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file for writing that replaces `path` when the block ends without an exception.

    Missing parent directories are created. On an exception the temporary is deleted and `path` is left as it was.
    Within `atomic_directory` the file is synced with the whole directory.
    open_options: as for `open`; text is UTF-8 by default.
    Raises GptsmithError if the disk is full or `path` cannot be written.
    """
    path = Path(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if "b" not in mode:
            open_options.setdefault("encoding", "utf-8")
        if (
            path.exists() and not path.is_file() and not path.is_dir()
        ):  # a device or a pipe, to be written, not replaced
            with open(path, mode, **open_options) as file:
                yield file
            return
        fd, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=path.name[-40:], dir=path.parent)
        try:
            with os.fdopen(fd, mode, **open_options) as file:
                yield file
                file.flush()
                if not _is_unfinished(path.parent):
                    os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        if not _is_unfinished(path.parent):
            fsync_directory(path.parent)


def _is_unfinished(directory: Path) -> bool:
    """Return whether a directory is a part of one that `atomic_directory` will sync and rename."""
    return any(part.startswith(TEMPORARY_PREFIX) for part in directory.parts)


def write_text(path: Path, text: str) -> None:
    """Write `text` to the file `path` atomically, as UTF-8, without translating newlines."""
    with atomic_file(path, "w", newline="") as file:
        file.write(text)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an exception.

    `path` must not exist, or must be an empty directory. On an exception the temporary is deleted.
    Raises GptsmithError if the disk is full or `path` cannot be written.
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
    """Delete temporaries that killed writers left in `directory`. Do not call while another writer is active there."""
    for entry in Path(directory).glob(TEMPORARY_PREFIX + "*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
