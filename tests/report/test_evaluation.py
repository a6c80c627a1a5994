"""The page about a model, from results as plain data: complete, partial and hostile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptsmith.errors import DataError
from gptsmith.evaluate.curves import curves_of
from gptsmith.evaluate.harness import Outcome, Results, TaskResult
from gptsmith.report import write_report
from gptsmith.report.evaluation import (
    read_record,
    report_evaluation,
    save_shot_figures,
    shot_figure,
    write_evaluation,
)
from tests.report.test_page import EVIL, Page, make_run


def record(model: str = "runs/a", level: float = 0.5, tasks: tuple[str, ...] = ("piqa", "t.yaml")) -> dict[str, Any]:
    """Return results of tasks whose score grows with the number of shots."""
    found = []
    for task in tasks:
        for shots in (0, 1, 4):
            for seed in (0, 1) if shots else (0,):
                share = level * (1 + shots / 8)
                outcomes = tuple(Outcome(i, "", EVIL, float(i < 40 * share), "right answer") for i in range(40))
                about = {"first_prompt": f"Goal: {EVIL}\nAnswer:"}
                found.append(TaskResult(task, outcomes, shots, seed, "accuracy", 0.5, about))
    environment = {"gptsmith": "9.9", "model": model, "model_sha256": "ab" * 32, "parameters": 1_234_567, "context": 64}
    return json.loads(json.dumps(Results(tuple(found), environment).to_json()))


TEXTS = [
    {"name": "plays", "bytes": 1000, "bits_per_byte": 1.5, "perplexity": 4.2}
    | {"bits_per_byte_low": 1.4, "bits_per_byte_high": 1.6},
    {"name": "short", "bytes": 10, "bits_per_byte": 2.5, "perplexity": 9.0},
]
SAMPLES = [{"temperature": 0.8, "prompt": "Once", "text": f" upon {EVIL}"}]


def test_the_page_shows_everything_that_was_measured(tmp_path: Path) -> None:
    results = record() | {"texts": TEXTS, "samples": SAMPLES, "missing": {"code": f"no {EVIL} in the tokenizer"}}
    page = Page(write_evaluation(tmp_path / "page.html", results, [record("runs/b", 0.3)]))
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == ["texts", "shots", "tasks", "samples", "missing", "settings"]
    assert EVIL not in page.source
    assert not re.search(r'(?:src|href)="(?!#|data:)', page.source), "nothing is loaded"
    assert "1.23 M parameters" in page.text("")
    assert "1.400 to 1.600" in page.text("texts")
    assert "too short" in page.text("texts")
    assert "no <script>" in page.text("missing")
    assert "right answer" in page.text("tasks")
    assert page.text("tasks").count("accuracy") == 6, "a row for each task and number of shots"
    assert "Once" in page.text("samples")
    assert "abab" in page.text("settings")
    alts = " ".join(attributes.get("aria-label") or "" for attributes in page.all("svg"))
    assert "runs/b: 0.30 with 0" in alts
    assert "plays: 1.500 bits per byte" in alts


def test_sections_without_results_are_left_out(tmp_path: Path) -> None:
    results = {"model": "m", "model_sha256": "ab", "gptsmith": "1", "texts": TEXTS}
    page = Page(write_evaluation(tmp_path / "page.html", results))
    assert [attributes["id"] for attributes in page.all("section")] == ["texts", "settings"]


def test_a_score_above_guessing_is_counted(tmp_path: Path) -> None:
    page = Page(write_evaluation(tmp_path / "page.html", record(level=0.66)))
    assert "better than guessing on 2 of 2 tasks" in page.text("")
    page = Page(write_evaluation(tmp_path / "page.html", record(level=0.3)))
    assert "better than guessing on 0 of 2 tasks" in page.text("")


def test_pictures_have_a_line_for_each_model(tmp_path: Path) -> None:
    records = [record(), record("runs/b", 0.3, ("piqa",)), record("runs/c", 0.2, ("other",))]
    paths = save_shot_figures(records, tmp_path)
    assert [path.name for path in paths] == ["piqa.png", "t.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    figure = shot_figure([curve for each in records[:2] for curve in curves_of(each) if curve.task == "piqa"])
    axes = figure.axes[0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["runs/a", "runs/b", "guessing"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "4"]
    assert len(axes.collections) == 2, "a band for each model"
    assert np.asarray(axes.lines[1].get_ydata()) == pytest.approx([0.3, 0.35, 0.45])


def test_a_run_gets_the_page_and_the_sections_of_its_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert report_evaluation(str(run), record()) == run / "evaluation.html"
    assert read_record(run / "evaluation.json") == record()
    page = Page(run / "report.html")
    ids = [attributes["id"] for attributes in page.all("section")]
    assert ids[ids.index("samples") - 2 : ids.index("samples")] == ["shots", "tasks"]
    (run / "evaluation.json").write_text("{")
    assert "not readable" in Page(write_report(run)).text("tasks")


def test_the_page_is_here_if_the_model_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report_evaluation("org/name", record("org/name"))
    assert "org/name" in Page(tmp_path / "evaluation.html").text("")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(DataError, match=r"other\.json"):
        read_record(tmp_path / "other.json")
