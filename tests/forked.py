"""Processes that tests kill: copies of this one, which need not import torch again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Forked:
    """Call something in a copy of this process, with torch on one thread; the methods are those of `subprocess.Popen`.

    The process ends with the number that the call returns, if it returns one. errors: a file that gets what it writes
    to standard error; the rest of its output goes nowhere.
    """

    def __init__(self, call: Callable[[], object], errors: Path | str = os.devnull) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("there is no fork here")
        context: Any = multiprocessing.get_context("fork")
        self._process = context.Process(target=_run, args=(call, errors))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            self._process.start()

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def kill(self) -> None:
        self._process.kill()


def command(*arguments: object, errors: Path | str = os.devnull) -> Forked:
    """Start a command of the command line in a copy of this process."""
    from gptsmith.cli import main

    return Forked(lambda: main([str(argument) for argument in arguments]), errors)


def _run(call: Callable[[], object], errors: Path | str) -> None:
    import torch

    for number, place in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    result = call()
    sys.exit(result if isinstance(result, int) else 0)
