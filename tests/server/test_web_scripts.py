"""The page's JavaScript: its unit tests, run by Node's test runner, and its linter. No browser is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODE = shutil.which("node")


def node(*arguments: str | Path) -> str:
    """Run Node in the repository's root and return its output; fail if it fails."""
    result = subprocess.run([NODE or "node", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def require_node() -> None:
    if NODE is None:
        pytest.skip("needs Node.js 20.19 or newer")
    if not (ROOT / "package.json").exists():
        pytest.skip("needs the repository: package.json is not here")
    version = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if tuple(int(part) for part in version[1:].split(".")[:2]) < (20, 19):
        pytest.skip(f"needs Node.js 20.19 or newer; this is {version}")


def test_unit_tests_of_the_page() -> None:
    files = sorted((ROOT / "tests" / "web").glob("*.test.js"))
    output = node("--test", "--test-reporter=tap", *files)
    (passed,) = re.findall(r"^# pass (\d+)$", output, re.MULTILINE)
    assert int(passed) >= len(files) > 0


def test_lint_of_the_page() -> None:
    npm = shutil.which("npm")
    if npm is None or not (ROOT / "node_modules" / "eslint").is_dir():
        pytest.skip("needs ESLint: run `npm ci`")
    result = subprocess.run([npm, "run", "lint"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
