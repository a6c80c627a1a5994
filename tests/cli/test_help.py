"""Help texts and what unknown commands suggest."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro

import gptsmith
from gptsmith.cli import COMMANDS
from gptsmith.cli.help import Section, format_help
from gptsmith.cli.parser import Option, command_help, options_of, parse
from tests.surface.test_surface import parser_of

Cli = Callable[..., tuple[int, str, str]]
WITH_SUBCOMMANDS = {"data": ["list", "get"], "tokenizer": ["train"], "launch": ["torchrun", "slurm", "sky", "k8s"]}
HELPS = [[], *([name] for name in COMMANDS), *([name, sub] for name, subs in WITH_SUBCOMMANDS.items() for sub in subs)]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_fits_the_terminal(command: list[str], run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (20, 33, 59, 60, 80, 100, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        code, out, err = run_cli(*command, "--help")
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) <= width
        assert all(line == line.rstrip() for line in out.splitlines())
        words = " ".join(out.split())
        assert words.startswith(" ".join(["usage: gptsmith", *command]))
        assert "None" not in words
    narrow = []
    for width in (1, 2, 5, 20):
        monkeypatch.setenv("COLUMNS", str(width))
        narrow.append(run_cli(*command, "--help")[1])
    assert len(set(narrow)) == 1


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_names_the_options_of_the_parser(command: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parsers: list[tuple[list[str], Any]] = [([], parser_of(command))]
    for action in parser_of(command)._actions:
        if getattr(action, "_name_parser_map", None):
            parsers = [([name], parser) for name, parser in action.choices.items()]
    for subcommand, parser in parsers:
        parsed = {", ".join(action.option_strings) for action in parser._actions if action.option_strings}
        out = run_cli(command, *subcommand, "--help")[1]
        shown = re.findall(r"^  (-[^ ,]+(?:, --\S+)?)", out, re.MULTILINE)
        assert sorted(shown) == sorted(parsed)


def test_help_shows_the_chosen_configuration(run_cli: Cli) -> None:
    assert "(default: 2000)" in run_cli("train", "--help")[1]
    assert "(default: 20000)" in run_cli("train", "--preset", "gpt2-124m", "--help")[1]


def all_options(command: type) -> Iterator[Option]:
    for option in options_of(command):
        yield option
        if option.is_group:
            yield from all_options(option.type)


def test_every_option_is_documented_with_one_default() -> None:

    modules = [
        importlib.import_module(f"gptsmith.cli.{'import_' if name == 'import' else name.replace('-', '_')}")
        for name in COMMANDS
    ]
    commands = [
        value
        for module in modules
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and getattr(value, "__module__", "") == module.__name__
    ]
    assert len(commands) >= len(COMMANDS)
    for command in commands:
        assert isinstance(command, type)
        for option in all_options(command):
            assert option.help(), f"{command.__name__}.{option.field.name} has no docstring"
            assert option.is_group or option.help().endswith("."), option.help()
            assert option.description.lower().count("default:") <= 1, option.description


@dataclass(frozen=True)
class Inner:
    """Inner options."""

    size: int | None = None
    """Size (default: that of the file)."""
    deep: bool = True
    """Go deep."""


@dataclass(frozen=True)
class Base:
    rate: float = 0.5
    """A rate,
    over two lines."""


@dataclass(frozen=True)
class Command(Base):
    """Do something.

    In a second paragraph.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = field(kw_only=True)
    """A model."""
    out: Path = field(kw_only=True)
    """Where to write."""
    kind: Literal["a", "b"] | None = None
    """What kind."""
    text: str = "\n"
    """A text."""
    stop: tuple[str, ...] = ()
    """Stop here."""
    inner: Inner = field(default_factory=Inner)
    """inner"""
    flat: Annotated[Inner, tyro.conf.arg(name="")] = field(default_factory=lambda: Inner(size=3))
    """flat"""


def test_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "62")
    assert command_help(Command, "do", sections=[Section("more", [("name", "text")])]) == (
        """\
usage: do [OPTIONS] --out PATH MODEL

Do something.

In a second paragraph.

arguments:
  MODEL  A model.

options:
  --rate FLOAT  A rate, over two lines. (default: 0.5)
  --out PATH    Where to write. (required)
  --kind {a,b}  What kind.
  --text STR    A text. (default: '\\n')
  --stop STR    Stop here. (repeatable)
  -h, --help    Show this help and exit.

inner:
  --inner.size INT          Size (default: that of the file).
  --inner.deep, --inner.no-deep
                            Go deep. (default: True)

flat:
  --size INT         Size (default: that of the file).
  --deep, --no-deep  Go deep. (default: True)

more:
  name  text"""
    )


def test_parsing(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["m", "--out", "o", "--stop", "1", "--stop", "2", "--inner.size", "4", "--size", "None", "--kind", "b"]
    parsed = parse(Command, "do", given)
    assert parsed == Command(model="m", out=Path("o"), stop=("1", "2"), inner=Inner(size=4), flat=Inner(), kind="b")
    base = dataclasses.replace(parsed, rate=0.25)
    assert parse(Command, "do", ["n", "--rate", "1", "--inner.no-deep"], default=base) == dataclasses.replace(
        base, model="n", rate=1.0, inner=Inner(size=4, deep=False)
    )
    for wrong, message in [
        (["m"], "--out PATH"),
        (["--out", "o"], "MODEL"),
        (["m", "--out", "o", "--inner.size", "x"], "invalid literal for int"),
        (["m", "--out", "o", "--kind", "c"], "'a', 'b'"),
        (["m", "--out", "o", "--knd", "a"], "--kind {a,b}"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            parse(Command, "do", wrong)
        err = capsys.readouterr().err
        assert message in err
        assert "{None}" not in err


def test_long_words_are_broken() -> None:
    text = format_help("x" * 50, "y" * 50, [Section("z" * 50, [("n" * 50, "t" * 50)])], width=20)
    assert max(map(len, text.splitlines())) == 20
    assert "".join(text.split()) == "usage:" + "x" * 50 + "y" * 50 + "z" * 50 + ":" + "n" * 50 + "t" * 50


@pytest.mark.parametrize("word", ["version", "--version", "-V"])
def test_version(word: str, run_cli: Cli) -> None:
    assert run_cli(word) == (0, f"gptsmith {gptsmith.__version__}\n", "")


def test_help_for_a_command(run_cli: Cli) -> None:
    assert run_cli("help") == run_cli("--help") == run_cli("-h")
    assert run_cli("help", "report") == run_cli("report", "--help") == run_cli("report", "-h")
    assert run_cli("data", "--help") != run_cli("data", "get", "--help")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian", "unknown command 'trian'. Did you mean 'train'?"),
        ("find_lr", "unknown command 'find_lr'. Did you mean 'find-lr'?"),
        ("fine-tune", "gptsmith train DATA --init MODEL"),
        ("FineTune", "gptsmith train DATA --init MODEL"),
        ("evaluate", "gptsmith eval"),
        ("perplexity", "gptsmith eval MODEL --data"),
        ("resume", "gptsmith train --resume RUN"),
        ("--sed", "unknown option '--sed'. `gptsmith --help`"),
        ("lora", "unknown command 'lora'. `gptsmith --help`"),
    ],
)
def test_unknown_commands(word: str, message: str, run_cli: Cli) -> None:
    code, out, err = run_cli(word)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_main_help_imports_only_what_it_needs(option: str) -> None:
    code = (
        f"import sys\nfrom gptsmith.cli import main\nmain([{option!r}])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'tyro', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_of_a_command_imports_no_torch() -> None:
    code = (
        "import contextlib, sys\nfrom gptsmith.cli import main\n"
        f"for name in {list(COMMANDS)}:\n    with contextlib.suppress(SystemExit):\n        main([name, '--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'tokenizers', 'safetensors', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_closed_standard_streams() -> None:
    command = f'"{sys.executable}" -m gptsmith --version >&- 2>&- <&-'
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    wrong = subprocess.run(f'"{sys.executable}" -m gptsmith nothing 2>&-', shell=True, check=False, capture_output=True)
    assert wrong.returncode == 2
