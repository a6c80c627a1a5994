"""`gptsmith eval MODEL --data`, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptsmith.cli import eval_report
from gptsmith.evaluate.provenance import weights_sha256
from gptsmith.evaluate.text import evaluate_text
from gptsmith.loading import load_model
from gptsmith.tasks.definition import definition_names

Cli = Callable[..., tuple[int, str, str]]


def test_several_texts_make_a_table(finished: Path, tmp_path: Path, run_cli: Cli) -> None:
    text, rows, out = finished.parent / "words.txt", tmp_path / "rows.jsonl", tmp_path / "out.json"
    rows.write_text('{"text": "ba ko mi"}\n{"text": "ru ten"}\n')
    code, said, err = run_cli(
        *("eval", finished, "--data", text, "--data", rows, "--per-document", "--positions", "--induction"),
        *("--stride", 8, "--json", out),
    )
    assert code == 0, err
    model, tokenizer = load_model(finished)
    record = json.loads(out.read_text())
    assert [each["name"] for each in record["texts"]] == [str(text), str(rows)]
    for path, each in zip((text, rows), record["texts"], strict=True):
        found = evaluate_text(model, tokenizer, path)
        assert each["bytes"] == path.stat().st_size if path == text else 14
        assert each["stride"] == 8
        line = next(line for line in said.splitlines() if line.startswith(str(path)))
        assert f"{each['bits_per_byte']:.4f}" in line
        assert each["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=0.05)
    assert [round(one["bytes"]) for one in record["texts"][1]["per_document"]] == [8, 6]
    assert "rows.jsonl, line 2" in said
    assert "random tokens copied" in said
    assert record["induction"]["length"] == 16
    assert record["model"] == str(finished)
    assert record["model_sha256"] == weights_sha256(model)
    assert record["tokenizer_sha256"] == tokenizer.fingerprint
    assert {"gptsmith", "python", "torch", "context", "dtype"} <= record.keys()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "nothing to measure"),
        (("--data", "{text}", "--stride", "33"), 2, "--stride must be between 1 and the context of 32 tokens"),
        (("--data", "{text}", "--context", "1"), 2, "--context"),
        (("--induction", "--stride", "3"), 2, "--stride has no effect without --data"),
        (("--data", "{text}", "--limit", "3"), 2, "--limit has no effect without --tasks"),
        (("--data", "{folder}/none.txt"), 2, "no such file"),
        (("--data", "{folder}/empty.txt"), 1, "empty.txt is empty"),
        (("--data", "{folder}/one.txt"), 2, "too short"),
        (("--data", "{folder}/other.txt"), 1, "other.txt: the character"),
        (("--data", "{text}", "--field", "body"), 2, "--field body has no use"),
        (("--data", "{text}", "--json", "{folder}/no/out.json"), 2, "its folder does not exist"),
        (("--data", "{text}", "--json", "{folder}"), 2, "this is a folder"),
        (("--data", "{text}", "--adapter", "{run}"), 1, "not an adapter"),
        (("--data", "{text}", "--plot", "{folder}"), 2, "--plot draws curves: give --tasks"),
        (("--tasks", "piqa", "--shots", "3", "--plot", "{folder}"), 2, "at least two numbers of --shots"),
        (("--data", "{text}", "--beside", "{text}"), 2, "--beside has no effect without --plot or --report"),
        (("--data", "{text}", "--report", "--beside", "{text}"), 1, "words.txt cannot be read"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], code: int, message: str, finished: Path, tmp_path: Path, run_cli: Cli
) -> None:
    for name, content in (("empty.txt", ""), ("one.txt", "b"), ("other.txt", "ba ΩΩ")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    places = {"text": finished.parent / "words.txt", "folder": tmp_path, "run": finished}
    found, said, err = run_cli("eval", finished, *(each.format(**places) for each in arguments))
    assert (found, said) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert err.count("error:") == 1


TASK = """
source: {rows: [{q: ba, a: ko}, {q: ko, a: mi}, {q: mi, a: ru}, {q: ru, a: ba}, {q: ten, a: ba}, {q: ba ba, a: ko}]}
kind: cloze
prompt: "{{ q }}"
answer: a
shots: {separator: " "}
"""


def test_report_and_plot(finished: Path, tmp_path: Path, run_cli: Cli) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "next.yaml").write_text(TASK)
    text, out, pictures = finished.parent / "words.txt", tmp_path / "out.json", tmp_path / "pictures"
    measured = ("--tasks", tmp_path / "next.yaml", "--shots", "0,1,2", "--draws", 2, "--data", text)
    code, _, err = run_cli("eval", run, *measured, "--json", out)
    assert code == 0, err
    code, _, err = run_cli("eval", run, *measured, "--report", "--plot", pictures, "--beside", out)
    assert code == 0, err
    assert [path.name for path in pictures.iterdir()] == ["next.png"]
    page = (run / "evaluation.html").read_text()
    assert err.count(str(run / "evaluation.html")) == 1
    for part in (str(text), "Learning from the context", "Temperature 0.8", "next, 2 shots"):
        assert part in page
    record, other = json.loads((run / "evaluation.json").read_text()), json.loads(out.read_text())
    assert record["summary"] == other["summary"]
    assert len(record["samples"]) == 3
    assert any(sample["text"] for sample in record["samples"])
    assert "Learning from the context" in (run / "report.html").read_text()


def test_report_measures_a_choice(
    finished: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tasks and texts, those that the tokenizer cannot write are listed with the reason."""
    (tmp_path / "next.yaml").write_text(TASK)
    monkeypatch.setattr(eval_report, "TASKS", (str(tmp_path / "next.yaml"), "addition_2"))
    monkeypatch.setattr(eval_report, "SHOTS", (0, 1))
    monkeypatch.setattr(eval_report, "DOMAINS", ("code",))
    run = shutil.copytree(finished, tmp_path / "run")
    code, said, err = run_cli("eval", run, "--report")
    assert code == 0, err
    record = json.loads((run / "evaluation.json").read_text())
    assert {row["task"] for row in record["summary"]} == {"next"}
    assert set(record["missing"]) == {"code", "addition_2"}
    assert "character" in record["missing"]["addition_2"]
    assert "Not measured" in (run / "evaluation.html").read_text()
    assert "addition_2 is not measured" in err
    assert "next" in said


def test_the_choice_exists() -> None:
    assert set(eval_report.TASKS) <= set(definition_names())
