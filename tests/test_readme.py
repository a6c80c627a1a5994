"""README's commands work as they stand, in order, on a machine that has only what they themselves make.

The test runs all shell and Python blocks of README.md in one shell, in a copy of the repository with a home of its own.
What it changes is all in this file: installations are only checked (MAKE, PIP, JUPYTER), training runs are as short as
`shorter` makes them, and servers are stopped once they answer (GPTSMITH).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ACTIVATE = 'export PATH="$PWD/.venv/bin:$PATH"\n'
MAKE = 'make() { command make -o .venv/.core "$@"; }\n'  # the environment counts as made
PIP = """\
import importlib.metadata, re, sys
command, requirement = sys.argv[1:]
extra = re.fullmatch(r"gptsmith\\[(\\w+)\\]", requirement)[1]
assert command == "install" and extra in importlib.metadata.metadata("gptsmith").get_all("Provides-Extra"), extra
"""
JUPYTER = """\
import sys
from pathlib import Path
command, notebook = sys.argv[1:]
assert command == "lab" and Path(notebook).is_file(), notebook
"""
GPTSMITH = """\
import re, signal, subprocess, sys, time, urllib.error, urllib.request
from tests.test_readme import shorter
arguments = [sys.executable, "-m", "gptsmith", *shorter(sys.argv[1:])]
if sys.argv[1] not in ("serve", "watch"):
    sys.exit(subprocess.call(arguments))
with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as server:
    (url,) = next(filter(None, (re.findall("http://127[0-9.:]+", line)[:1] for line in server.stderr)))
    for _ in range(600):
        try:
            urllib.request.urlopen(url + ("/health" if sys.argv[1] == "serve" else "/"))
            break
        except urllib.error.HTTPError:  # the model is being loaded
            time.sleep(0.1)
    server.send_signal(signal.SIGINT)
    sys.exit(server.wait())
"""


def shorter(arguments: list[str]) -> list[str]:
    """Return a command with a few updates in place of a training run of minutes or hours."""
    command, words = arguments[0], arguments[1:]
    if command == "train":
        smollm2 = ["--steps", "1", "--context", "64", "--batch-size", "1", "--val-fraction", "0.01"]
        for option in ("--steps", "--budget"):
            if option in words:
                at = words.index(option)
                del words[at : at + 2]
        init = words[words.index("--init") + 1] if "--init" in words else ""
        words += smollm2 if init == "smollm2-135m" else ["--steps", "4"]
    if command == "scale":
        words[words.index("--budgets") + 1] = "10s,15s,20s"
    return [command, *words]


def blocks() -> list[tuple[str, str]]:
    """Return README's blocks as (language, text), without transcripts, which begin with a prompt."""
    found = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [(language, text) for language, text in found if not text.startswith("$ ")]


def test_every_language_is_known() -> None:
    assert {language for language, _ in blocks()} == {"", "python"}
    assert len(blocks()) > 8


def test_how_commands_are_shortened() -> None:
    assert shorter(["train", "input.txt"]) == ["train", "input.txt", "--steps", "4"]
    assert shorter(["train", "--budget", "5m", "notes/"]) == ["train", "notes/", "--steps", "4"]
    assert shorter(["plan", "input.txt", "--steps", "9"]) == ["plan", "input.txt", "--steps", "9"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not shutil.which("make") or not shutil.which("bash"), reason="needs make and bash")
def test_commands_work_in_order(tmp_path: Path, own_cache: Path) -> None:
    clone = tmp_path / "clone"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("needs a clone")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    programs = clone / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(ACTIVATE)
    for name, source in {"pip": PIP, "jupyter": JUPYTER, "gptsmith": GPTSMITH}.items():
        (programs / name).write_text(f"#!{sys.executable}\n{source}")
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(sys.executable)

    script = "set -euo pipefail\n" + MAKE
    for language, text in blocks():
        if language == "python":
            text = f"{sys.executable} - <<'EOF'\n{text.replace('steps=500', 'steps=4')}EOF\n"
        # each line is printed before it runs, so that a failure shows which one it was
        script += text if language else "".join(f"echo {_quoted('+ ' + line)}\n{line}\n" for line in text.splitlines())
    (tmp_path / "script").write_text(script)
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        "HOME": str(home),
        "PATH": os.defpath if not (path := os.environ.get("PATH")) else path,
        "PYTHONPATH": f"{clone / 'src'}{os.pathsep}{clone}",
        "GPTSMITH_CACHE": str(own_cache),
        "MPLBACKEND": "agg",
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "OMP_"))},
    }
    command = ["bash", str(tmp_path / "script")]
    result = subprocess.run(
        command, cwd=clone, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = result.stdout.decode(errors="replace")
    assert result.returncode == 0, output[-3000:]
    for made in ("runs/demo/report.html", "runs/input/best", "runs/bard/best", "runs/mine/best", "bard.gguf"):
        assert (clone / made).exists(), made


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
