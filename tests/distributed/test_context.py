"""What processes agree on, and how they find out that one is missing, has failed, has ended or hangs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.distributed import context
from gptsmith.distributed.context import DistributedContext, join_processes, seed_of_rank
from gptsmith.errors import DataError, GptsmithError, LostProcessError, ProcessError, UsageError
from tests.distributed.processes import ends_of, results, run_processes, started

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def collectives() -> dict[str, Any]:
    with join_processes(20) as ranks:
        rank = ranks.rank
        a, b = torch.full((2, 3), rank + 1.0), torch.arange(4) + rank
        column = torch.ones(4, 2).T[1:] * rank  # not contiguous
        ranks.sum(a, b, column)
        large = [torch.full((n,), float(rank + n)) for n in (5, 30, 1, 7)]
        context.BUCKET_BYTES = 40  # each message has one or two of them
        ranks.sum(*large)
        order: list[float] = []

        def work() -> None:
            time.sleep(0.3 * (not rank))
            order.append(time.monotonic())

        ranks.main_first(work)
        return {
            "sum": (a.tolist(), b.tolist(), column.tolist(), [tensor.tolist() for tensor in large]),
            "any": (ranks.any(rank == 1), ranks.any(False), ranks.any(True)),
            "broadcast": ranks.broadcast({"of": rank}),
            "gather": ranks.gather(rank * 10),
            "on_main": ranks.on_main(lambda: f"by {rank}"),
            "order": order[0],
            "shares": [ranks.share(rows) for rows in (8, 5, 1, 0)],
        }


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_collectives(world_size: int, tmp_path: Path) -> None:
    found = results(run_processes(world_size, tmp_path, collectives))
    total = sum(range(world_size))
    for mine in found:
        assert mine["sum"] == (
            [[float(total + world_size)] * 3] * 2,
            [world_size * n + total for n in range(4)],
            [[float(total)] * 4],
            [[float(total + world_size * n)] * n for n in (5, 30, 1, 7)],
        )
        assert mine["any"] == (True, False, True)
        assert mine["broadcast"] == {"of": 0}
        assert mine["gather"] == [10 * rank for rank in range(world_size)]
        assert mine["on_main"] == "by 0"
    assert min(found[1:], key=lambda mine: mine["order"])["order"] > found[0]["order"]
    for case, rows in enumerate((8, 5, 1, 0)):
        taken = [row for mine in found for row in range(*mine["shares"][case])]
        assert taken == list(range(rows))


def test_one_process_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with join_processes() as ranks:
        assert type(ranks) is DistributedContext
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with join_processes() as ranks:
        assert type(ranks) is DistributedContext
    assert not torch.distributed.is_initialized()
    tensor = torch.ones(2)
    ranks.sum(tensor)
    assert tensor.tolist() == [1, 1]
    assert (ranks.any(False), ranks.any(True)) == (False, True)
    assert (ranks.share(7), ranks.gather(3), ranks.broadcast(4), ranks.on_main(lambda: 5)) == ((0, 7), [3], 4, 5)


def test_seeds_of_processes_differ() -> None:
    seeds = {seed_of_rank(seed, rank) for seed in (0, 1, 2, 2**62) for rank in range(100)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def fails_on_one() -> None:
    with join_processes(20) as ranks:
        ranks.any(True)
        if ranks.rank == 1:
            raise DataError("the file is damaged.")
        ranks.any(True)


def test_the_error_of_one_process_stops_all(tmp_path: Path) -> None:
    began = time.monotonic()
    first, second = run_processes(2, tmp_path, fails_on_one)
    assert time.monotonic() - began < 10
    assert isinstance(second.error, DataError)  # it tells the user
    assert isinstance(first.error, ProcessError)
    assert str(first.error) == "the file is damaged."
    assert (first.error.rank, first.error.exit_code) == (1, 1)


def fails_on_all() -> None:
    with join_processes(20):
        raise UsageError("no such option.")


def test_an_error_of_all_is_told_by_one(tmp_path: Path) -> None:
    errors = [ended.error for ended in run_processes(2, tmp_path, fails_on_all)]
    assert sorted(type(error).__name__ for error in errors) == ["ProcessError", "UsageError"]
    assert {getattr(error, "exit_code", None) for error in errors} == {2}


def fails_on_main() -> None:
    with join_processes(20) as ranks:

        def work() -> None:
            time.sleep(0.3)
            raise GptsmithError("no space left.")

        ranks.on_main(work)


def test_the_others_do_not_wait_for_a_main_process_that_failed(tmp_path: Path) -> None:
    first, second = run_processes(2, tmp_path, fails_on_main)
    assert str(first.error) == str(second.error) == "no space left."
    assert isinstance(second.error, ProcessError)


def joins(timeout: float) -> None:
    with join_processes(timeout):
        pass


def test_a_missing_process_is_named(tmp_path: Path) -> None:
    (ended,) = run_processes(2, tmp_path, joins, 1.0, missing=(1,))
    assert type(ended.error) is GptsmithError
    assert str(ended.error).startswith("process 1 of 2 did not start within 1 s.")
    (ended,) = run_processes(2, tmp_path, joins, 1.0, missing=(0,))
    assert str(ended.error).startswith("process 1 cannot connect to localhost:")
    assert "no answer within 1 s" in str(ended.error)


def ends_or_hangs(how: str, timeout: float) -> None:
    with join_processes(timeout) as ranks:
        ranks.any(True)
        if ranks.rank == 1:
            if how.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            elif how.startswith("stopped"):
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(30)
        if how.endswith("while the other waits for it"):
            ranks.barrier()
        ranks.any(True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "process 1 of 2 ended without a message."),
        ("killed while the other waits for it", "process 1 of 2 ended without a message."),
        ("slow", "process 1 of 2 did not answer within 2 s."),
        pytest.param("stopped", "process 1 of 2 gives no sign of life.", marks=pytest.mark.slow),
        pytest.param(
            "stopped while the other waits for it",
            "process 1 of 2 gives no sign of life for 2 s.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_does_not_answer_is_named(how: str, message: str, tmp_path: Path) -> None:
    with started(2, tmp_path, ends_or_hangs, how, 2.0) as processes:
        (ended,) = ends_of(processes[:1], tmp_path)
    assert type(ended.error) is LostProcessError
    assert str(ended.error).startswith(message)


def waits_for_long_work() -> float:
    with join_processes(1.0) as ranks:
        began = time.monotonic()
        ranks.on_main(lambda: time.sleep(2.5))
        return time.monotonic() - began


def test_long_work_of_the_main_process_has_no_timeout(tmp_path: Path) -> None:
    assert min(results(run_processes(2, tmp_path, waits_for_long_work))) > 2.4


def has_other_facts() -> None:
    with join_processes(20) as ranks:
        ranks.check_same({"data": "same", "configuration": f"{ranks.rank % 2}"})


def test_processes_must_have_the_same_facts(tmp_path: Path) -> None:
    errors = [ended.error for ended in run_processes(2, tmp_path, has_other_facts)]
    assert {str(error).partition(". ")[0] for error in errors} == {
        "process 1 of 2 and process 0 do not have the same configuration"
    }


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    group = context.ProcessGroup(1, 2, 1.0)
    assert group.device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert group.device(torch.device("cuda")) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="--device cuda:1: several processes need"):
        group.device(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes need a GPU each, and this machine has 1"):
        group.device(torch.device("cuda"))
    assert DistributedContext().device(torch.device("cuda:1")) == torch.device("cuda:1")
