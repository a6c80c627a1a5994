"""Processes that share a run make the updates of one process, and all stop, save and resume together."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith import api
from gptsmith.checkpoint import verify
from gptsmith.data.loader import TokenBatch
from gptsmith.distributed.context import join_processes
from gptsmith.errors import DataError, DivergedError, GptsmithError, ProcessError, TrainingError, UsageError
from gptsmith.formats.safetensors import open_weights
from gptsmith.log import JsonLines
from gptsmith.model import loss as loss_module
from gptsmith.run_directory import read_run
from gptsmith.train.budget.deadline import Deadline
from gptsmith.train.config import RunConfig
from gptsmith.train.objectives.base import LossOutput, Models, Sum
from gptsmith.train.objectives.pretrain import NextToken
from gptsmith.train.session import Session
from gptsmith.train.step import TrainingStep
from gptsmith.train.trainer import Trainer
from tests.distributed.processes import results, run_processes
from tests.factories import tiny_model, tiny_run_config
from tests.train.test_objectives import alphabet
from tests.train.toy_objective import WriteLiked

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

CONFIG = tiny_run_config(steps=12, eval_every=6, save_every=3, mask_documents=True)
TWO_AND_FOUR = [2, pytest.param(4, marks=pytest.mark.slow)]


def fit(data: Any, config: RunConfig, out: Path, **options: Any) -> None:
    gptsmith.fit(data, config, out=out, **options)


def fit_twice(cases: list[tuple[Any, RunConfig, Path]]) -> None:
    """Several runs in one process, one after the other: each joins anew."""
    for case in cases:
        fit(*case)


def resume(out: Path, options: Any = None, **more: Any) -> None:
    gptsmith.fit(resume=out, **(options or {}), **more)


def rows(run: Path, *names: str) -> list[list[float]]:
    metrics = read_run(run).metrics
    return [[row[name] for name in names] for row in metrics if all(name in row for name in names)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(open_weights(run / "last"))  # in one file, or in one for each layer


def assert_same_run(a: Path, b: Path, tolerance: float = 1e-6) -> None:
    for names in (("step", "loss"), ("step", "val_loss"), ("step", "tokens")):
        expected = rows(a, *names)
        assert expected
        assert rows(b, *names) == [pytest.approx(row, abs=tolerance) for row in expected]
    assert rows(b, "grad_norm") == [pytest.approx(row, rel=10 * tolerance) for row in rows(a, "grad_norm")]
    expected_weights, found = weights(a), weights(b)
    assert expected_weights.keys() == found.keys()
    for name, tensor in expected_weights.items():
        assert torch.allclose(tensor, found[name], atol=10 * tolerance), name


# -- one update --------------------------------------------------------------------------------------------------------


class Skewed(NextToken):
    """Batches whose targets are mostly in the last row, with metrics that not all rows have."""

    def __init__(self) -> None:
        super().__init__(seq_len=12, vocab_size=30)

    def batch(self, step: int, num_rows: int = 6) -> TokenBatch:
        random = torch.Generator().manual_seed(step)
        ids, targets = torch.randint(30, (2, num_rows, 12), generator=random)
        targets[:-1, 2:] = -100
        return TokenBatch(ids, targets)

    def loss(self, models: Models, batch: TokenBatch) -> LossOutput:
        output = super().loss(models, batch)
        metrics = {"targets": Sum(torch.tensor(float(batch.num_targets)), len(batch.ids))}
        if long := int(((batch.targets != -100).sum(dim=1) > 2).sum()):
            metrics["long"] = Sum(torch.tensor(7.0 * long), torch.tensor(long))
        return LossOutput(output.loss_sum, metrics)


def updates(optimizer: str, family: str, rows_of: list[int]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Make updates on skewed batches and return their results, and the weights."""
    config = tiny_run_config(batch_size=6, optim={"name": optimizer, "lr": 0.01, "weight_decay": 0.1, "clip": 0.5})
    with join_processes(20) as ranks:
        model, objective = tiny_model(family, seed=1, initializer_range=0.1), Skewed()
        step: TrainingStep[TokenBatch] = TrainingStep.build(
            model, objective, config, precision="fp32", micro_batch_size=2, ranks=ranks
        )
        found = []
        for number, num_rows in enumerate(rows_of):
            result = step(objective.batch(number, num_rows), 1.0)
            metrics = {name: (float(part.total), float(part.count)) for name, part in result.metrics.items()}
            found.append((float(result.loss), float(result.grad_norm), result.tokens, metrics))
    return found, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world_size", TWO_AND_FOUR)
@pytest.mark.parametrize(
    ("optimizer", "family", "rows_of"), [("adamw", "llama", [6] * 20), ("muon", "qwen3", [6] * 17 + [1, 5, 3])]
)
def test_updates_are_those_of_one_process(
    optimizer: str, family: str, rows_of: list[int], world_size: int, tmp_path: Path
) -> None:
    """Also where a batch has fewer rows than there are processes, or does not divide."""
    alone, expected = updates(optimizer, family, rows_of)
    together = results(run_processes(world_size, tmp_path, updates, optimizer, family, rows_of))
    assert alone[0][2] == 5 * 2 + 12
    for found, tensors in together:
        assert found == together[0][0]  # all processes say the same, to the bit
        for mine, one in zip(found, alone, strict=True):
            assert mine[0] == pytest.approx(one[0], abs=1e-6)
            assert mine[1] == pytest.approx(one[1], rel=1e-5)
            assert mine[2] == one[2]
            assert mine[3] == {name: pytest.approx(value, rel=1e-5) for name, value in one[3].items()}
        for name, tensor in tensors.items():
            assert torch.equal(tensor, together[0][1][name])
            assert torch.allclose(tensor, expected[name], atol=1e-5), name


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    """A folder of documents of unequal lengths: with --mask-documents rows have unequal numbers of targets."""
    folder = tmp_path_factory.mktemp("documents") / "notes"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(words[number * 1000 : number * 1000 + 15 + 20 * number])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "write_report", lambda directory: None)
        fit(str(text), CONFIG, out)
    return out


@pytest.mark.parametrize("world_size", TWO_AND_FOUR)
def test_a_run_is_that_of_one_process(world_size: int, whole: Path, text: Path, tmp_path: Path) -> None:
    """Losses, validation losses over an uneven last batch, weights; written once, and recorded."""
    out = tmp_path / "run"
    results(run_processes(world_size, tmp_path, fit, str(text), CONFIG, out))
    assert_same_run(whole, out)
    run = read_run(out)
    assert (run.status, run.config["parallel"]["processes"]) == ("finished", world_size)
    steps = [row["step"] for row in JsonLines(out / "metrics.jsonl").read()]
    assert len(steps) == len(JsonLines(whole / "metrics.jsonl").read())
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_part_of_the_validation_split(text: Path, tmp_path: Path) -> None:
    config = CONFIG.replace(steps=2, eval_every=2, eval_tokens=700, batch_size=2, micro_batch_size=1)
    fit(str(text), config, tmp_path / "one")
    results(run_processes(2, tmp_path, fit, str(text), config.replace(micro_batch_size=None), tmp_path / "two"))
    assert rows(tmp_path / "two", "val_loss") == [pytest.approx(row) for row in rows(tmp_path / "one", "val_loss")]


def test_another_number_of_processes_resumes(whole: Path, text: Path, tmp_path: Path) -> None:
    """From two to one, and from one to two: the losses of a run that was never stopped."""
    started = {1: tmp_path / "one", 2: tmp_path / "two"}
    stop_at_seven(str(text), started[1])
    results(run_processes(2, tmp_path, stop_at_seven, str(text), started[2]))
    for out in started.values():
        assert read_run(out).status == "interrupted"
        assert rows(out, "step")[-1] == [7]
    resume(started[2])
    assert read_run(started[2]).config["parallel"]["processes"] == 1
    results(run_processes(2, tmp_path, resume, started[1]))
    assert read_run(started[1]).config["parallel"]["processes"] == 2
    for out in started.values():
        assert_same_run(whole, out)


def stop_at_seven(data: str, out: Path, config: RunConfig = CONFIG) -> None:
    """Ctrl-C while the loss of step 7 is logged, at one process."""
    log: Any = Trainer._log

    def log_and_stop(self: Trainer, factor: float) -> None:
        log(self, factor)
        if self.step == 7 and self.ranks.rank == self.ranks.world_size - 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_log", log_and_stop)
        with pytest.raises(KeyboardInterrupt):
            fit(data, config, out)


def draws() -> list[list[float]]:
    with join_processes(20) as ranks:
        torch.manual_seed(1)
        step: TrainingStep[TokenBatch] = TrainingStep.build(
            tiny_model(), Skewed(), CONFIG, precision="fp32", micro_batch_size=2, ranks=ranks
        )
        found = [torch.rand(3).tolist()]
        for _ in range(2):
            with step.own_random_numbers():
                found.append(torch.rand(3 + ranks.rank)[:3].tolist())
        return [*found, torch.rand(3).tolist()]


def test_random_numbers_of_losses_differ_and_those_of_batches_do_not(tmp_path: Path) -> None:
    first, second = results(run_processes(2, tmp_path, draws))
    assert (first[0], first[3]) == (second[0], second[3])
    different = [tuple(numbers) for numbers in (*first[1:3], *second[1:3], first[0], first[3])]
    assert len(set(different)) == 6


def batches_that_differ(out: Path) -> None:
    random = torch.Generator().manual_seed(int(os.environ["RANK"]))
    batches = [torch.randint(10, (2, 8, 32), generator=random).unbind() for _ in range(20)]
    gptsmith.fit(batches, CONFIG.replace(mask_documents=False), tokenizer=alphabet(), out=out)


def test_processes_with_other_batches_are_found_before_the_first_step(tmp_path: Path) -> None:
    errors = [each.error for each in run_processes(2, tmp_path, batches_that_differ, tmp_path / "run")]
    assert all("process 1 of 2 and process 0 do not have the same batches" in str(error) for error in errors)


def test_dropout_resumes_to_the_bit(text: Path, tmp_path: Path) -> None:
    config = CONFIG.replace(dropout=0.3)
    names = ("whole", "again", "stopped")
    results(run_processes(2, tmp_path, fit_twice, [(str(text), config, tmp_path / name) for name in names[:2]]))
    results(run_processes(2, tmp_path, stop_at_seven, str(text), tmp_path / "stopped", config))
    results(run_processes(2, tmp_path, resume, tmp_path / "stopped"))
    expected = weights(tmp_path / "whole")
    for name in names[1:]:
        assert rows(tmp_path / name, "step", "loss") == rows(tmp_path / "whole", "step", "loss")
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / name).items())


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    """Its batches have other numbers of rows each time, and the first process evaluates alone."""
    config = tiny_run_config(steps=10, eval_every=5, micro_batch_size=2, batch_size=4, optim={"lr": 0.05})
    fit(None, config, tmp_path / "one", objective=WriteLiked, tokenizer=alphabet())
    results(run_processes(2, tmp_path, fit_toy, config, tmp_path / "two"))
    for names in (("step", "loss", "advantage"), ("step", "reward")):
        expected = rows(tmp_path / "one", *names)
        assert len(expected) >= 2
        assert rows(tmp_path / "two", *names) == [pytest.approx(row, abs=1e-4) for row in expected]


def fit_toy(config: RunConfig, out: Path) -> None:
    fit(None, config, out, objective=WriteLiked, tokenizer=alphabet())


def test_fine_tuning_of_an_adapter(whole: Path, tmp_path: Path) -> None:
    """Rows have unequal numbers of trained tokens; the frozen weights are those of the model on all processes."""
    chats = tmp_path / "chats.jsonl"
    rows_of = [("ba" * (1 + i % 5), "ko mi" * (1 + i % 3)) for i in range(24)]
    chats.write_text("\n".join(json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows_of))
    options = {"steps": 6, "eval_every": 6, "log_every": 1, "batch_size": 4, "sample_tokens": 0, "compile": "off"}
    gptsmith.sft(whole, chats, out=tmp_path / "one", device="cpu", **options)
    results(run_processes(2, tmp_path, fine_tune, whole, chats, tmp_path / "two", options))
    for names in (("step", "loss"), ("step", "val_loss"), ("step", "tokens")):
        expected = rows(tmp_path / "one", *names)
        assert expected
        assert rows(tmp_path / "two", *names) == [pytest.approx(row, abs=1e-6) for row in expected]


def fine_tune(model: Path, chats: Path, out: Path, options: dict[str, Any]) -> None:
    gptsmith.sft(model, chats, out=out, device="cpu", **options)


# -- what goes wrong on one process ------------------------------------------------------------------------------------


def fails_at_step(data: str, out: Path, step: int, rank: int, error: Exception) -> None:
    """Train; at the batch of update `step`, one process fails."""
    next_batch: Any = Trainer._next_batch

    def failing(self: Trainer) -> Any:
        if (self.step, self.ranks.rank) == (step, rank):
            raise error
        return next_batch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_next_batch", failing)
        fit(data, CONFIG, out)


def test_an_error_on_one_process_stops_all(text: Path, whole: Path, tmp_path: Path) -> None:
    """run.json and the error have its message, the checkpoints before are intact, and the run resumes."""
    out = tmp_path / "run"
    error = DataError("the shard 7 is damaged.")
    first, second = run_processes(2, tmp_path, fails_at_step, str(text), out, 8, 1, error)
    assert type(second.error) is TrainingError
    assert str(second.error).startswith(
        "stopped at step 8: the shard 7 is damaged. The checkpoint of step 6 is intact."
    )
    assert isinstance(first.error, ProcessError)
    assert str(first.error) == str(second.error)
    run = read_run(out)
    assert (run.status, run.info["error"]) == ("failed", str(second.error))
    results(run_processes(2, tmp_path, resume, out))
    assert_same_run(whole, out)


def killed_at_step(data: str, out: Path, step: int, rank: int) -> None:
    """Train; at the batch of update `step`, one process is killed."""
    next_batch: Any = Trainer._next_batch

    def killed(self: Trainer) -> Any:
        if (self.step, self.ranks.rank) == (step, rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return next_batch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_next_batch", killed)
        fit(data, CONFIG, out)


def test_a_killed_process_stops_all(text: Path, whole: Path, tmp_path: Path) -> None:
    """The run says which one it was, the checkpoint before is intact, and the run resumes."""
    out = tmp_path / "run"
    first, second = run_processes(2, tmp_path, killed_at_step, str(text), out, 8, 1)
    assert second.code == -signal.SIGKILL
    assert str(first.error).startswith("stopped at step 8: process 1 of 2 ended without a message.")
    assert "The checkpoint of step 6 is intact. Resume with: gptsmith train --resume" in str(first.error)
    assert read_run(out).info["error"] == str(first.error)
    verify(out / "checkpoints" / "step-00000006")
    results(run_processes(2, tmp_path, resume, out))
    assert_same_run(whole, out)


def save_fails(data: str, out: Path) -> None:
    from gptsmith.checkpoint import CheckpointStore

    def full(self: CheckpointStore, *_: Any, **__: Any) -> Path:
        raise GptsmithError(f"no space left on the disk that holds {self.directory}.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "write", full)
        fit(data, CONFIG, out)


def test_a_full_disk_stops_all(text: Path, tmp_path: Path) -> None:
    first, second = run_processes(2, tmp_path, save_fails, str(text), tmp_path / "run")
    assert str(first.error).startswith("stopped at step 3: no space left on the disk")
    assert isinstance(second.error, ProcessError)
    assert str(second.error) == str(first.error)


def test_divergence_is_found_by_all(text: Path, tmp_path: Path) -> None:
    config = CONFIG.replace(optim={"name": "adamw", "lr": 1e38, "warmup_steps": 0, "clip": 0})
    errors = [each.error for each in run_processes(2, tmp_path, fit, str(text), config, tmp_path / "run")]
    assert sorted(type(error).__name__ for error in errors) == ["DivergedError", "ProcessError"]
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, DivergedError | ProcessError) for error in errors)
    assert read_run(tmp_path / "run").status == "diverged"


def short_of_memory(data: str, out: Path, rows_that_fit: int) -> int:
    """Train; on the last process a forward pass has memory for so many rows."""
    loss = loss_module.token_loss_sum

    def scarce(model: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(ids) > rows_that_fit and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(model, ids, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "token_loss_sum", scarce)
        gptsmith.fit(data, CONFIG.replace(steps=6, dropout=0.2), out=out)
    return int(read_run(out).info["micro_batch_size"])


def test_memory_that_runs_out_on_one_process(text: Path, tmp_path: Path) -> None:
    """All repeat the update with smaller micro-batches: the run that had them from the start. Or all stop."""
    results(run_processes(2, tmp_path, short_of_memory, str(text), tmp_path / "run", 2))
    small = CONFIG.replace(steps=6, dropout=0.2, micro_batch_size=2)
    results(run_processes(2, tmp_path, fit, str(text), small, tmp_path / "small"))
    assert rows(tmp_path / "run", "step", "loss") == rows(tmp_path / "small", "step", "loss")

    errors = [each.error for each in run_processes(2, tmp_path, short_of_memory, str(text), tmp_path / "never", 0)]
    assert {str(error).partition(" (")[0] for error in errors} == {
        "memory ran out at step 1: even one row at a time is too much"
    }
    assert read_run(tmp_path / "never").status == "failed"


# -- what cannot be shared ---------------------------------------------------------------------------------------------


def fit_in_time(data: str, out: Path) -> list[int]:
    """Train for two seconds, by a clock that runs faster on the second process; return the planned numbers of steps."""
    plan = Deadline.plan
    plans: list[Any] = []

    def hurried(self: Deadline, step: int, steps: int, update: float, elapsed: float, every: int) -> int:
        return plan(self, step, steps, update, elapsed * (1 + 3 * int(os.environ["RANK"])), every)

    def noted(self: Trainer) -> None:
        replan(self)
        plans.append(self.steps)

    replan = Trainer._plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deadline, "plan", hurried)
        patch.setattr(Trainer, "_plan", noted)
        deadline = Deadline(2.0, before=0.0, eval_seconds=0.05, teardown_seconds=0.05)
        patch.setattr(Session, "_deadline", lambda self, began: deadline)
        gptsmith.fit(data, CONFIG.replace(steps=2000, eval_every=50, save_every=50), out=out)
    return plans


def test_a_budget_of_time_is_planned_by_one_clock(text: Path, tmp_path: Path) -> None:
    first, second = results(run_processes(2, tmp_path, fit_in_time, str(text), tmp_path / "run"))
    assert first == second
    assert len(set(first)) > 1
    run = read_run(tmp_path / "run")
    assert (run.status, rows(tmp_path / "run", "step")[-1]) == ("finished", [first[-1]])


def test_what_processes_cannot_share(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="2 processes cannot share batches of 7: set a --batch-size"):
        CONFIG.replace(processes=2, batch_size=7).check_processes()
    for budget in ("5m", "1Mtok"):
        CONFIG.replace(processes=2, budget=budget).check_processes()
    with pytest.raises(UsageError, match="processes=2, but 1 are here"):
        gptsmith.fit(str(text), CONFIG, processes=2, out=tmp_path / "run")
    with pytest.raises(UsageError, match="--processes must be at least 1"):
        CONFIG.replace(processes=0)
    assert not (tmp_path / "run").exists()


def other_configuration(data: str, out: Path) -> None:
    gptsmith.fit(data, CONFIG.replace(seed=int(os.environ["RANK"])), out=out)


def test_processes_with_another_configuration_are_found_before_the_first_step(text: Path, tmp_path: Path) -> None:
    errors = [each.error for each in run_processes(2, tmp_path, other_configuration, str(text), tmp_path / "run")]
    assert {str(error).partition(". ")[0] for error in errors} == {
        "process 1 of 2 and process 0 do not have the same configuration"
    }
    assert not (tmp_path / "run").exists()
