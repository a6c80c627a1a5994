"""Importing the package and printing help are fast."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "matplotlib", "tokenizers", "safetensors", "pyarrow", "pandas", "scipy")


def loaded(code: str) -> list[str]:
    """Return the heavy modules that `code` imports in a new interpreter."""
    report = f"import sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return list(json.loads(done.stderr.splitlines()[-1]))


def test_importing_the_package_is_light() -> None:
    assert loaded("import gptsmith; gptsmith.__version__; dir(gptsmith)") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["generate", "--help"],
        ["report", "--help"],
        ["data", "--help"],
        ["data", "list"],
        ["tokenizer", "train", "--help"],
    ],
    ids=" ".join,
)
def test_help_is_light(arguments: list[str]) -> None:
    run = f"from gptsmith.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    assert loaded(run) == []


@pytest.mark.parametrize(("arguments", "seconds"), [(["--help"], 0.5), (["train", "--help"], 1.5)])
def test_help_is_quick(arguments: list[str], seconds: float) -> None:
    """Measured as processor time, best of three, so that a busy machine does not matter."""
    resource = pytest.importorskip("resource", reason="Windows does not say what children cost")
    costs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "gptsmith", *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(costs) < seconds


def test_the_public_names_are_there() -> None:
    import gptsmith

    assert {"load", "generate", "__version__"} <= set(dir(gptsmith))
    assert callable(gptsmith.load)
    assert callable(gptsmith.generate)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = gptsmith.laod
