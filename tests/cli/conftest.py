"""Runs made once through the real command line; tests that change one get a copy."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.factories import Reports

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower with several threads

TINY = [
    *("--model.hidden-size", "32", "--model.num-hidden-layers", "1", "--context", "32", "--batch-size", "4"),
    *("--steps", "20", "--eval-every", "10", "--save-every", "5", "--log-every", "1", "--sample-tokens", "20"),
    *("--compile", "off", "--device", "cpu", "--sample-prompt", "ba"),
]

Snapshot = dict[str, bytes | str | None]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options of a run that takes a second."""
    return TINY


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, words: str, tiny: list[str]) -> Path:
    """A finished run, with its text beside it. Do not change it."""
    from gptsmith.cli import main

    place = tmp_path_factory.mktemp("finished")
    (place / "words.txt").write_text(words)
    with Reports.drawn_if(True):
        assert main(["train", str(place / "words.txt"), "--out", str(place / "run"), *tiny]) == 0
    return place / "run"


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory, words: str, tiny: list[str]) -> Path:
    """A run stopped by Ctrl-C at step 15, with checkpoints of steps 5, 10 and 15. Do not change it."""
    from gptsmith.cli import main
    from gptsmith.train.trainer import Trainer

    log: Callable[..., None] = Trainer._log

    def log_and_stop(self: Trainer, *arguments: Any) -> None:
        log(self, *arguments)
        if self.step == 15:
            signal.raise_signal(signal.SIGINT)

    place = tmp_path_factory.mktemp("stopped")
    (place / "words.txt").write_text(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_log", log_and_stop)
        command = ["train", str(place / "words.txt"), "--out", str(place / "run"), *tiny, "--keep-checkpoints", "3"]
        assert main(command) == 130
    return place / "run"


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "finished", symlinks=True))


@pytest.fixture
def stopped_copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "stopped", symlinks=True))


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], Snapshot]:
    """Return what is in a directory: contents of files, targets of links, None for folders."""

    def take(directory: Path) -> Snapshot:
        seen: Snapshot = {}
        for root, folders, files in os.walk(directory):
            for name in [*folders, *files]:
                path = Path(root, name)
                key = path.relative_to(directory).as_posix()
                seen[key] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        return seen

    return take
