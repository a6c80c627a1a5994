"""Tasks that are measured during training: when, what is written, and that training does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import gptsmith
from gptsmith.errors import DataError, UsageError
from gptsmith.evaluate.harness import run_tasks
from gptsmith.export.model_card import About, model_card
from gptsmith.report import write_report
from gptsmith.run_directory import Run, read_run

OPTIONS = {"steps": 8, "context": 32, "eval_every": 4, "log_every": 2, "compile": "off", "device": "cpu"}
SHAPE = {"model.num_hidden_layers": 1, "model.hidden_size": 16, "model.num_attention_heads": 2}


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    rows = [{"q": "ba ko mi ru ten"[: 3 + i], "options": ["ten", "sha"], "right": i % 2} for i in range(12)]
    task = {"source": {"rows": rows}, "prompt": "{{ q }}", "choices": "options", "answer": "right"}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(task))
    return path


def fit(text: Path, out: Path, **options: Any) -> Run:
    values = {**OPTIONS, **SHAPE, **options}
    if "budget" in values:
        del values["steps"]
    return gptsmith.fit(text, out=out, sample_tokens=0, **values)


def measured(run: Run) -> dict[int, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["tasks"] for row in rows if "tasks" in row}


def test_scores_are_those_of_the_checkpoint_and_training_stays_the_same(
    text_file: Path, task_file: Path, tmp_path: Path
) -> None:
    without = fit(text_file, tmp_path / "without")
    run = fit(text_file, tmp_path / "run", **{"eval.tasks": str(task_file), "eval.every": 3, "keep_checkpoints": 9})
    one, other = (load_file(each.directory / "last" / "model.safetensors") for each in (without, run))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    scores = measured(run)
    assert list(scores) == [3, 6, 8]
    for step, rows in scores.items():
        model, tokenizer = gptsmith.load(run.directory / "checkpoints" / f"step-{step:08d}")
        (expected,) = run_tasks(model, tokenizer, [task_file], limit=200).summary()
        assert [(row["task"], row["shots"], row["score"], row["chance"]) for row in rows] == [
            ("mine", 0, expected.score, 0.5)
        ]


def test_by_default_tasks_are_measured_at_each_evaluation(text_file: Path, task_file: Path, tmp_path: Path) -> None:
    run = fit(text_file, tmp_path / "run", **{"eval.tasks": str(task_file), "eval.shots": "0,2", "eval.limit": 4})
    scores = measured(run)
    assert list(scores) == [4, 8]
    assert [(row["shots"], row["examples"]) for row in scores[8]] == [(0, 4), (2, 4)]


def test_a_measurement_that_is_owed_is_made_when_the_run_goes_on(
    text_file: Path, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptsmith.train.task_evaluation import TaskEvaluation

    def killed(self: TaskEvaluation) -> list[dict[str, Any]]:
        raise SystemExit(9)

    options = {"eval.tasks": str(task_file)}
    whole = measured(fit(text_file, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        patch.setattr(TaskEvaluation, "measure", killed)
        with pytest.raises(SystemExit):
            fit(text_file, tmp_path / "run", **options)
    run = gptsmith.fit(resume=tmp_path / "run")
    assert measured(run) == whole


def test_the_report_and_the_model_card_have_the_scores(text_file: Path, task_file: Path, tmp_path: Path) -> None:
    run = fit(text_file, tmp_path / "run", **{"eval.tasks": str(task_file)})
    score = measured(run)[8][0]["score"]
    page = write_report(run.directory).read_text(encoding="utf-8")
    assert '<h2 id="tasks-title">Tasks</h2>' in page
    assert f"<td>{score:.3f}</td>" in page
    assert page.count("Score on mine") == 1
    model, _ = gptsmith.load(run)
    card = model_card(About("mine", "mit", "float32"), model.config, 1, read_run(run.directory))
    assert f"| mine | {score:.3f} (95% interval" in card
    assert "12 examples; chance 0.500" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval.tasks": "hela_swag"}, "Did you mean 'hellaswag'"),
        ({"eval.tasks": "MINE", "eval.shots": "9"}, "too few for 9 shots"),
        ({"eval.tasks": "MINE", "eval.shots": "many"}, "--eval.shots must be numbers"),
        ({"eval.tasks": "MINE", "eval.every": 0}, "--eval.every must be at least 1"),
        ({"eval.tasks": "MINE", "eval.limit": 0}, "--eval.limit must be at least 1"),
        ({"eval.tasks": "MINE", "eval.every": 2, "budget": "10m"}, "--eval.every: a --budget plans"),
        ({"eval.tasks": "MINE", "context": 4}, "even without shots"),
    ],
)
def test_tasks_that_do_not_fit_are_refused_before_training(
    options: dict[str, Any], message: str, text_file: Path, task_file: Path, tmp_path: Path
) -> None:
    given = {key: str(task_file) if value == "MINE" else value for key, value in options.items()}
    with pytest.raises((UsageError, DataError), match=message):
        fit(text_file, tmp_path / "run", **given)
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())
