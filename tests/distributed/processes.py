"""Several processes on this machine, as torchrun would start them, but forked: they need not import torch again."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing


class Ended(NamedTuple):
    """How a process ended."""

    result: Any = None
    error: BaseException | None = None
    code: int | None = None
    """Its exit code; negative: the signal that killed it."""


@contextlib.contextmanager
def started(
    world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any, missing: tuple[int, ...] = ()
) -> Iterator[list[Any]]:
    """Start `function(*arguments)` in each of `world_size` processes but the missing ones, and end them afterwards."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context: Any = torch.multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    processes = []
    for rank in range(world_size):
        environment = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        if rank not in missing:
            process = context.Process(target=_run, args=(rank, environment, folder, function, arguments))
            process.start()
            processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_processes(
    world_size: int,
    folder: Path,
    function: Callable[..., Any],
    *arguments: Any,
    missing: tuple[int, ...] = (),
    seconds: float = 60,
) -> list[Ended]:
    """Return how each of `world_size` processes ended, in order of rank; those missing are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    with started(world_size, folder, function, *arguments, missing=missing) as processes:
        return ends_of(processes, folder, missing=missing, seconds=seconds)


def ends_of(processes: list[Any], folder: Path, *, missing: tuple[int, ...] = (), seconds: float = 60) -> list[Ended]:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        assert process.exitcode is not None, f"a process did not end within {seconds} s"
    ranks = [rank for rank in range(len(processes) + len(missing)) if rank not in missing]
    found = []
    for rank, process in zip(ranks, processes, strict=True):
        path = folder / f"ended-{rank}"
        result, error = pickle.loads(path.read_bytes()) if path.exists() else (None, None)  # noqa: S301  our own file
        path.unlink(missing_ok=True)
        found.append(Ended(result, error, process.exitcode))
    return found


def results(ended: list[Ended]) -> list[Any]:
    """Return the results of processes that must not have failed."""
    for each in ended:
        if each.error is not None:
            raise each.error
        assert each.code == 0
    return [each.result for each in ended]


def _run(rank: int, environment: dict[str, Any], folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    result, error = None, None
    try:
        result = function(*arguments)
    except BaseException as failed:
        error = failed
    (folder / f"ended-{rank}").write_bytes(pickle.dumps((result, error)))
