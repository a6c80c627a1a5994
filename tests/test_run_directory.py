from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gptsmith.errors import GptsmithError
from gptsmith.run_directory import best_evaluation, last_number, number, read_metrics, read_run


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run directory"),
        ("{not json", "is not valid JSON"),
        ("[1, 2]", "does not describe a run"),
    ],
)
def test_a_directory_that_is_no_run_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(GptsmithError, match=message) as caught:
        read_run(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(GptsmithError, match="there is no run directory .*nowhere"):
        read_run(tmp_path / "nowhere")


def test_a_run_with_nothing_but_its_description(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": [], "model": {"a": 1}}')
    run = read_run(tmp_path)
    assert (run.metrics, run.samples, run.unreadable_lines) == ([], [], 0)
    assert run.part("config") == {}
    assert run.part("model") == {"a": 1}
    assert run.name == tmp_path.name


def test_a_half_written_line_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n\n{"loss": 3}\n{"step": 2, "lo\xff')
    run = read_run(tmp_path)
    assert run.metrics == [{"step": 1, "loss": 2.0}]
    assert run.unreadable_lines == 2


def test_a_line_separator_inside_a_sample_does_not_split_its_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    sample = {"step": 1, "text": "one\u2028two\x85three"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_run(tmp_path).samples == [sample]


def test_steps_done_again_after_a_resume_count_once(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": 10, "loss": 3}, {"step": 20, "loss": 2}, {"step": 20, "val_loss": 2.5}, {"step": 30, "loss": 9}],
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:  # resumed from step 20
        file.write('{"step": 25, "loss": 1.9}\n{"step": 30, "loss": 1.5}\n')
    assert [(row["step"], row.get("loss")) for row in read_metrics(tmp_path)] == [
        (10, 3),
        (20, 2),
        (20, None),
        (25, 1.9),
        (30, 1.5),
    ]


def test_numbers_that_are_none() -> None:
    nothings: list[Any] = [None, "1.0", True, [], math.nan]
    assert all(math.isnan(number(value)) for value in nothings)
    assert number(3) == 3.0
    rows: list[dict[str, Any]] = [
        {"val_loss": 2.0, "step": 1},
        {"val_loss": 1.0, "step": 2},
        {"val_loss": math.nan, "step": 3},
        {"step": 4},
    ]
    assert best_evaluation(rows) == rows[1]
    assert last_number(rows, "val_loss") == 1.0
    assert best_evaluation([{"val_loss": math.inf}]) is None
    assert math.isnan(last_number([], "loss"))
