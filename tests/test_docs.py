"""The documentation is true: links, paths, names, commands, options, messages and examples."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

import gptsmith
from gptsmith.cli import COMMANDS, main, run_options, tune_options
from gptsmith.train.config import PretrainConfig, RunConfig, default_config, option_places

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGE_NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
SOURCES = Path(gptsmith.__file__).parent
# They take most of the options of a run, some with other defaults.
TUNE_COMMANDS = ("sft", "distill", "ppo", "grpo", "dpo", "reward", "classify")
RUN_COMMANDS = ("dry-run", "train", "plan", "find-lr", "scale")  # they take all options of a run

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w./-])((?:src|tests|docs|benchmarks|notebooks|\.ci)/[\w./-]*\w)")
NAME = re.compile(r"`(gptsmith(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_blocks(text: str) -> str:
    return BLOCK.sub("", text)


# -- links, paths and names --------------------------------------------------------------------------------------------


@functools.cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_links(page: str) -> None:
    wrong = []
    for link in LINK.findall(without_blocks(read(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.resolve())):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_paths(page: str) -> None:
    assert not [path for path in PATH.findall(read(page)) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", [name for name in PAGE_NAMES if name != "CHANGELOG.md"])  # it names what was moved
def test_names(page: str) -> None:
    for name in set(NAME.findall(read(page))):
        value: Any = gptsmith
        for part in name.split(".")[1:]:
            prefix = value.__name__ if hasattr(value, "__path__") else None
            if not hasattr(value, part) and prefix:
                importlib.import_module(f"{prefix}.{part}")
            value = getattr(value, part)


# -- commands ----------------------------------------------------------------------------------------------------------


class _Parsed(Exception):
    """Raised in place of the rest of a command, once its command line has been parsed."""


def command_lines() -> Iterator[tuple[str, str]]:
    """Yield (page, command line) of code blocks, and of code within the text that is complete: with an option, and
    without placeholders such as MODEL."""
    for page in PAGE_NAMES:
        text = read(page)
        blocks = "\n".join(block for language, block in BLOCK.findall(text) if language in ("", "sh"))
        lines = [line.strip().removeprefix("$ ") for line in blocks.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`(gptsmith [^`]+)`", without_blocks(text))
        lines += [line for line in inline if " --" in line and not re.search(r" [A-Z]+\b", line)]
        for line in lines:
            line = line.rpartition("| ")[2].removeprefix(".venv/bin/")
            words = line.split()
            if len(words) > 2 and words[0] == "gptsmith" and words[1] in COMMANDS and "…" not in line:
                yield page, line


@pytest.mark.parametrize(("page", "line"), sorted(set(command_lines())))
def test_command_lines(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = tyro.cli

    def parse_only(*args: Any, **options: Any) -> Any:
        parse(*args, **options)
        raise _Parsed

    extras = importlib.import_module("tyro.extras._subcommand_cli_from_dict")
    monkeypatch.setattr(tyro, "cli", parse_only)
    monkeypatch.setattr(extras, "cli", parse_only)
    if "--resume" in line or "--config" in line:  # the files do not exist
        for module in (run_options, tune_options):
            monkeypatch.setattr(
                module, "base_config", lambda arguments, method=PretrainConfig: (default_config(method), False)
            )
    arguments = shlex.split(line, comments=True)[1:]
    try:
        main(arguments)
    except _Parsed:
        return
    except SystemExit as ended:
        if ended.code == 0 and "--help" in arguments:
            return
    pytest.fail(f"{page}: {line}")


def option_table(text: str) -> dict[str, str]:
    """Return option -> default of the tables of a page or section."""
    options = {}
    for names, default in re.findall(r"^\| (`--[^|]*) \| ([^|]*?) \|", text, re.MULTILINE):
        options.update(dict.fromkeys(re.findall(r"`(--[\w.-]+)`", names), default))
    return options


def shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "newline" if value == "\n" else str(value)


def test_configuration_options() -> None:
    config = RunConfig()
    expected = {f"--{name.replace('_', '-')}": shown(config.flat()[name]) for name in option_places()}
    page = read("docs/reference/configuration.md")
    tables = option_table(page[page.index("## Budget") :])
    assert tables == expected
    parts = re.findall(r"^## .*\(`(\w+)`\)$", page, re.MULTILINE)
    assert parts == [part.name for part in dataclasses.fields(RunConfig)]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_options(command: str) -> None:
    page = read("docs/reference/commands.md")
    section = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section, f"docs/reference/commands.md has no section about {command}"
    recorded = json.loads(read("tests/surface/commands.json"))["commands"][command]
    options = dict(recorded.get("options", {}))
    for subcommand in recorded.get("subcommands", {}).values():
        options |= subcommand.get("options", {})
    usual = {f"--{name.replace('_', '-')}": shown(value) for name, value in RunConfig().flat().items()}
    if command in TUNE_COMMANDS[1:]:  # their sections refer to that of the first
        first = re.search(r"^## sft\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert first
        usual |= option_table(first[1])
    config = set(usual) if command in RUN_COMMANDS else set()
    expected = {}
    for names, description in options.items():
        name = names.split(",")[0]
        if name not in config and name != "--model.tie-word-embeddings":
            note = re.sub(r"\{.*\}", "", description).partition(", ")[2]  # without the type or choices
            default = note.removeprefix("default: ")
            named = {"": "–", "False": "no", "True": "yes", "'\\n'": "newline"}
            value = named.get(default, default)
            if command not in TUNE_COMMANDS or usual.get(name, "").replace("()", "repeatable") != value:
                expected[name] = value
    assert option_table(section[1]) == expected


# -- architecture ------------------------------------------------------------------------------------------------------


def test_the_layout_lists_every_module() -> None:
    """Each module is named beside its package, and nothing is there that is not."""
    page = read("docs/architecture.md")
    block = page[page.index("src/gptsmith/\n") :]
    block = block[: block.index("```")]
    listed: dict[Path, str] = {}  # the text beside each package or module
    package = where = SOURCES
    for line in block.splitlines()[1:]:
        if found := re.match(r"  (  )?([\w/]+/|\w+\.py)  +(.*)", line):
            package = package if found[1] else SOURCES / found[2]
            where = package / found[2] if found[1] else package
            assert where.exists(), line
            listed[where] = found[3]
        else:
            listed[where] += line
    for package, text in listed.items():
        if package.is_dir() and package.name != "cli":
            modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("_")}
            assert modules - set(re.findall(r"\w+", text)) == set(), package
    assert {path for path in SOURCES.glob("*.py") if not path.stem.startswith("_")} <= listed.keys()


# -- messages ----------------------------------------------------------------------------------------------------------


def test_messages() -> None:
    """Every message on the page is one of the program's."""
    nodes = [node for path in SOURCES.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = read("docs/reference/messages.md")
    rows = re.findall(r"^\| (`[^|]*) \|", page[page.index("## Data") :], re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 30
    fragments = {part.strip() for message in messages for part in message.split("…")}
    assert not [part for part in fragments if not any(part in string for string in strings)]


# -- examples ----------------------------------------------------------------------------------------------------------


def test_python_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "cache"))
    Path("input.txt").write_text("ROMEO: the cat sat on the mat and the dog ran to the hill.\n" * 200)
    names: dict[str, Any] = {"__name__": "examples"}
    for page in ("docs/how-to/python.md", "docs/reference/python.md"):
        for number, (language, block) in enumerate(BLOCK.findall(read(page)), 1):
            assert language == "python"
            exec(compile(block.replace("runs/bard", "runs/mine"), f"{page}, block {number}", "exec"), names)
    out = capsys.readouterr().out
    assert out.startswith("finished ")
    assert "\n4567\n" in out  # the model that counts
    assert names["run"].status == "finished"
