"""`gptsmith eval MODEL --tasks` and `gptsmith tasks`, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptsmith.evaluate import harness
from gptsmith.evaluate.harness import run_tasks
from gptsmith.loading import load_model
from gptsmith.tasks.definition import definition_names
from gptsmith.tasks.registry import TASKS

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    rows = [{"q": "ba ko mi ru ten"[: 3 + i], "options": ["ten", "sha"], "right": i % 2} for i in range(12)]
    path = tmp_path / "mine.yaml"
    path.write_text(
        json.dumps(
            {
                "source": {"rows": rows},
                "prompt": "{{ q }}",
                "choices": "options",
                "answer": "right",
                "unconditional": "ba",
            }
        )
    )
    return path


def test_the_table_and_the_record_have_the_scores(
    finished: Path, task_file: Path, tmp_path: Path, run_cli: Cli
) -> None:
    out = tmp_path / "out.json"
    code, said, err = run_cli(
        *("eval", finished, "--tasks", task_file, "--shots", "0,1", "--draws", 2, "--seed", 5, "--controls"),
        *("--json", out),
    )
    assert code == 0, err
    assert "mine: 1 examples are shots, or equal one, and are not graded" in err
    model, tokenizer = load_model(finished)
    expected = run_tasks(model, tokenizer, [task_file], shots=(0, 1), seeds=(5, 6), controls=True)
    assert said.splitlines()[:3] == expected.table().splitlines()[:3]
    record = json.loads(out.read_text())
    assert record["summary"] == json.loads(json.dumps(expected.to_json()["summary"]))
    assert [(each["shots"], each["seed"]) for each in record["tasks"]] == [(0, 5), (1, 5), (1, 6)]
    assert record["model"] == str(finished)


def test_a_stopped_evaluation_goes_on(
    finished: Path, task_file: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "ITEMS_AT_ONCE", 4)
    original, calls = harness._Evaluation._scored, [0]

    def stop_at_second(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(harness._Evaluation, "_scored", stop_at_second)
    command = ("eval", finished, "--tasks", task_file, "--limit", 11)
    code, _, err = run_cli(*command)
    assert code == 130
    assert "the same command continues" in err
    code, said, err = run_cli(*command)
    assert code == 0
    assert "mine: 4 of 11 outcomes are known from before" in err
    assert "11" in said
    calls[0] = 2
    code, again, err = run_cli(*command, "--no-resume")
    assert (code, again) == (0, said)
    assert "known from before" not in err


def test_tasks_are_listed_with_sizes_and_licenses(run_cli: Cli) -> None:
    code, said, _ = run_cli("tasks")
    assert code == 0
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert {*definition_names(), *TASKS} <= lines.keys()
    assert "1,172" in lines["arc_challenge"]
    assert "CC BY-SA 4.0" in lines["arc_challenge"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--tasks", "hela_swag"), 2, "Did you mean 'hellaswag'"),
        (("--tasks", "{folder}/none.yaml"), 2, "none.yaml cannot be read"),
        (("--tasks", "{task}", "--shots", "many"), 2, "--shots takes numbers"),
        (("--tasks", "{task}", "--shots", "-1"), 2, "at least 0"),
        (("--tasks", "{task}", "--shots", "7"), 2, "too few for 7 shots"),
        (("--tasks", "{task}", "--draws", "0"), 2, "--draws must be at least 1"),
        (("--tasks", "{task}", "--limit", "0"), 2, "limit must be at least 1"),
        (("--tasks", "{task}", "--samples", "2"), 2, "none of the tasks has any"),
        (("--tasks", "{task}", "--chat", "on"), 2, "the model has none"),
        (("--tasks", "{folder}/wrong.yaml"), 1, "rows, record 0: the template of prompt fails"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], code: int, message: str, finished: Path, task_file: Path, run_cli: Cli
) -> None:
    wrong = json.loads(task_file.read_text()) | {"prompt": "{{ question }}"}
    (task_file.parent / "wrong.yaml").write_text(json.dumps(wrong))
    given = [each.format(folder=task_file.parent, task=task_file) for each in arguments]
    found, _, err = run_cli("eval", finished, *given)
    assert found == code, err
    assert message in err
    assert "Traceback" not in err
