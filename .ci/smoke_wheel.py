"""Install a wheel of gptsmith in a clean environment and use it there: `python .ci/smoke_wheel.py dist/*.whl`.

The new environment holds the wheel and, linked from the environment that runs this script, exactly the distributions
that the wheel declares as its dependencies (and theirs): what `pip install` would install, without downloading torch.
An import that no declared dependency provides fails here as it would for a user. The sources are not on its path.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"{i}: the quick brown fox jumps over the lazy dog.\n" for i in range(200))
# Printed by the new environment: where it imports the package from, and its version by both definitions.
ASK = "import gptsmith, importlib.metadata as m; print(gptsmith.__file__, gptsmith.__version__, m.version('gptsmith'))"


def check_contents(wheel: Path) -> None:
    """Raise SystemExit if a tracked file of src/gptsmith (web files, styles, C++) is missing from the wheel."""
    command = ["git", "-C", str(ROOT / "src"), "ls-files", "gptsmith"]
    tracked = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    missing = tracked - set(zipfile.ZipFile(wheel).namelist())
    if missing or not tracked:
        sys.exit(f"{wheel.name} lacks {', '.join(sorted(missing)) or 'everything'}")


def requirements(package: Distribution, extras: frozenset[str] = frozenset()) -> set[tuple[str, frozenset[str]]]:
    """Return the distributions that `package[extras]` requires on this machine, each with the extras asked of it.

    Raises SystemExit if one is not installed here in a version that satisfies the requirement.
    """
    required: set[tuple[str, frozenset[str]]] = set()
    for line in package.requires or []:
        requirement = Requirement(line)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        version = distribution(requirement.name).version
        if not requirement.specifier.contains(version, prereleases=True):
            sys.exit(f"{package.name} requires {line}, but {version} is installed")
        required.add((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return required


def link_dependencies(site_packages: Path) -> list[str]:
    """Link all that the gptsmith in `site_packages` requires beside it; return the names of those distributions."""
    (package,) = Distribution.discover(name="gptsmith", path=[str(site_packages)])
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = requirements(package)
    while waiting:
        dependency, extras = waiting.pop()
        seen.add((dependency, extras))
        installed = distribution(dependency)
        waiting |= requirements(installed, extras) - seen
        for top in {PurePosixPath(file).parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(str(installed.locate_file(top)))
    return sorted({dependency for dependency, _ in seen})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args().wheel.resolve()
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        venv.create(place / "venv", symlinks=True)
        python = place / "venv" / "bin" / "python"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["GPTSMITH_CACHE"] = str(place / "cache")

        def run(*command: object) -> str:
            """Run a command outside the repository; return what it printed, or end with it if it failed."""
            arguments = [str(part) for part in command]
            done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
            if done.returncode:
                sys.exit(f"{' '.join(arguments)} exited with {done.returncode}\n{done.stdout}{done.stderr}")
            return done.stdout

        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
        run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
        site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        dependencies = link_dependencies(site_packages)
        run(*pip, "check")

        where, version, installed = run(python, "-c", ASK).split()
        if not Path(where).is_relative_to(site_packages.resolve()) or version != installed:
            sys.exit(f"imported {where} {version}, installed {installed} in {site_packages}")
        gptsmith = python.with_name("gptsmith")
        if run(gptsmith, "--version").split() != ["gptsmith", version]:
            sys.exit("gptsmith --version does not print the version of the wheel")
        if "train" not in run(gptsmith, "--help"):
            sys.exit("gptsmith --help does not name the command train")
        (place / "text.txt").write_text(TEXT)
        size = ["--model.hidden-size", 32, "--model.num-hidden-layers", 1, "--context", 32, "--batch-size", 4]
        run(gptsmith, "train", "text.txt", "--out", "run", "--steps", 3, "--device", "cpu", "--compile", "off", *size)
        if not (place / "run" / "report.html").is_file():
            sys.exit("training wrote no report")
        if not run(gptsmith, "generate", "run", "--prompt", "the ", "--max-tokens", 8, "--seed", 1).strip():
            sys.exit("the trained model generated nothing")
    print(f"{wheel.name} works in a clean environment with {len(dependencies)} dependencies: {' '.join(dependencies)}")


if __name__ == "__main__":
    main()
