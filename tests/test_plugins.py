"""Plugins are imported once, only by commands, and one that cannot be imported is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith import plugins
from gptsmith.errors import GptsmithError

Plugin = Callable[[str, str], None]

COUNTED = """
with open(__file__.replace(".py", ".log"), "a") as log:
    log.write("imported\\n")
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_registries: None) -> Plugin:
    """Write a module, and name it in GPTSMITH_PLUGINS, after those written before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: list[str] = []

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        names.append(name)
        monkeypatch.setenv(plugins.VARIABLE, " , ".join(names))

    return write


def test_plugins_are_imported_once_and_by_commands_only(plugin: Plugin, tmp_path: Path, run_cli: Any) -> None:
    plugin("first", COUNTED)
    plugin("second", COUNTED)
    for arguments in (["--help"], ["--version"], []):
        run_cli(*arguments)
    assert not (tmp_path / "first.log").exists()
    assert run_cli("data", "list")[0] == 0
    assert run_cli("data", "list")[0] == 0
    gptsmith.load_plugins()
    assert [(tmp_path / f"{name}.log").read_text() for name in ("first", "second")] == ["imported\n"] * 2


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import absent_module", "ModuleNotFoundError: No module named 'absent_module'"),
        ("1 +", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        (
            "from gptsmith.model.families import register_family, llama\nregister_family('gpt2', llama)",
            "UsageError: the model family 'gpt2' is part of gptsmith and cannot be replaced; choose another name.",
        ),
    ],
    ids=["import", "syntax", "exception", "taken"],
)
def test_a_plugin_that_cannot_be_imported_is_named(plugin: Plugin, run_cli: Any, code: str, reason: str) -> None:
    plugin("broken", code)
    code_of, out, err = run_cli("data", "list")
    assert (code_of, out) == (1, "")
    assert err.startswith(f"error: the plugin broken cannot be imported: {reason}")
    assert err.count("\n") == 1
    assert run_cli("--help")[0] == 0


def test_a_missing_plugin_is_named(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "no_such_plugin,")
    with pytest.raises(GptsmithError, match="the plugin no_such_plugin cannot be imported.*named in GPTSMITH_PLUGINS"):
        gptsmith.load_plugins()


def test_an_entry_point_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Any
) -> None:
    information = tmp_path / "broken_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[gptsmith.plugins]\nbroken = absent_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._entry_points.cache_clear()
    try:
        code, _, err = run_cli("data", "list")
    finally:
        plugins._entry_points.cache_clear()
    assert code == 1
    assert "the plugin absent_module of the package broken-package cannot be imported" in err


COMMAND = """
from gptsmith.cli import register_command
register_command("greet", "say hello", "greeting")
"""


def test_commands_of_plugins(plugin: Plugin, tmp_path: Path, run_cli: Any) -> None:
    plugin("greet_plugin", COMMAND)
    code, _, err = run_cli("greet")
    assert code == 1
    assert err.startswith("error: the command 'greet' of a plugin cannot be imported: ModuleNotFoundError")
    (tmp_path / "greeting.py").write_text("def main(arguments):\n    print('hello', *arguments)\n    return 3\n")
    assert run_cli("greet", "you", "--too") == (3, "hello you --too\n", "")
    assert "say hello" in run_cli("help")[1]
    assert "Did you mean 'greet'?" in run_cli("gret")[2]
