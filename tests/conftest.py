"""Shared by all tests: a cache of their own, small models, small texts."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.factories import Reports

if TYPE_CHECKING:
    from gptsmith.tokenizer import Tokenizer

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; small models gain nothing from threads


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache; corpora are fetched once for the whole session."""
    path = tmp_path_factory.mktemp("cache")
    before = os.environ.get("GPTSMITH_CACHE")
    os.environ["GPTSMITH_CACHE"] = str(path)
    yield path
    if before is None:
        del os.environ["GPTSMITH_CACHE"]
    else:
        os.environ["GPTSMITH_CACHE"] = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Runs end with their report in tests with the mark `report`, and for fixtures within `Reports.drawn_if(True)`."""
    with Reports.drawn_if(item.get_closest_marker("report") is not None):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def reports_on_request() -> Iterator[None]:
    from gptsmith.report.page import write_report
    from gptsmith.train.session import RunResult, Session

    train = Session.train

    def train_without(self: Session, on_end: Callable[[Path], object]) -> RunResult:
        return train(self, on_end if Reports.drawn or on_end is not write_report else lambda directory: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "train", train_without)
        yield


@pytest.fixture(scope="session")
def words() -> str:
    """About 60,000 characters of made-up prose: learnable, but not trivially so."""
    rng = random.Random(0)
    syllables = ["ba", "ko", "mi", "ru", "ten", "sha", "lo", "vi", "ne", "dar"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(200)]
    lines = [" ".join(rng.choices(vocabulary, k=rng.randint(4, 10))) for _ in range(1500)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def bpe(words: str) -> Tokenizer:
    """300 byte pairs made from `words`."""
    from gptsmith.tokenizer import train_bpe

    return train_bpe([words], 300)


@pytest.fixture
def text_file(tmp_path: Path, words: str) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(words, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def restored_log_handlers() -> Iterator[None]:
    """Remove the handlers that a test (of lm_eval, above all) adds to the root logger: they write to a captured stream
    that is closed after the test."""
    before = list(logging.root.handlers)
    yield
    for handler in [each for each in logging.root.handlers if each not in before]:
        logging.root.removeHandler(handler)


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, standard output, standard error)."""
    from gptsmith.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def restored_registries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the test registers, and the import of modules (plugins) in its `tmp_path`."""
    from gptsmith import cli
    from gptsmith.data.corpora import CORPORA
    from gptsmith.model.families import FAMILIES
    from gptsmith.server import app
    from gptsmith.tasks.registry import TASKS
    from gptsmith.tasks.text_rewards import REWARDS
    from gptsmith.train.objectives.registry import METHODS

    registries: tuple[dict[str, Any], ...] = (cli.COMMANDS, cli._modules, CORPORA, FAMILIES, METHODS, REWARDS, TASKS)
    before = [dict(registry) for registry in registries]
    monkeypatch.setattr(app, "ROUTERS", list(app.ROUTERS))
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
