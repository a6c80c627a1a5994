"""`gptsmith compare`, with models and with saved results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptsmith.checkpoint import save_checkpoint
from gptsmith.loading import load_model

Cli = Callable[..., tuple[int, str, str]]
TASK = """\
source:
  rows:
    - {q: "ba ko", a: "mi", b: "ten"}
    - {q: "ru ten", a: "ko", b: "dar"}
    - {q: "sha lo", a: "vi", b: "ba"}
prompt: "{{ q }}"
choices: ["{{ a }}", "{{ b }}"]
answer: 0
"""


@pytest.fixture
def worse(finished: Path, tmp_path: Path) -> Path:
    """The model of `finished` with one of its matrices destroyed."""
    model, tokenizer = load_model(finished)
    matrix = dict(model.named_parameters())["layers.0.mlp.down_proj.weight"]
    matrix.data.normal_(generator=torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path / "worse", model, tokenizer)
    return tmp_path / "worse"


def test_models_and_saved_results_give_the_same_comparison(
    finished: Path, worse: Path, tmp_path: Path, run_cli: Cli
) -> None:
    text, quiz = tmp_path / "text.txt", tmp_path / "quiz.yaml"
    text.write_text((finished.parent / "words.txt").read_text()[:6000])
    quiz.write_text(TASK)
    what = ("--data", text, "--tasks", quiz)
    code, said, err = run_cli("compare", finished, worse, *what, "--json", tmp_path / "out.json")
    assert code == 0, err
    record = json.loads((tmp_path / "out.json").read_text())
    on_task, on_text = record["comparisons"]
    assert (on_task["measure"], on_text["measure"]) == ("quiz", str(text))
    assert on_task["verdict"] == "not distinguishable"
    assert on_text["verdict"] == f"{finished} is better"
    assert on_text["low"] <= on_text["difference"] <= on_text["high"]
    a, b = (record["models"][str(each)]["texts"][0] for each in (finished, worse))
    assert on_text["value_a"] == pytest.approx(a["bits_per_byte"])
    assert on_text["difference"] == pytest.approx(b["bits_per_byte"] - a["bits_per_byte"], rel=1e-6)
    assert f"{finished} is better" in said
    assert "not distinguishable" in said
    assert "corrected for 2 comparisons" in said

    saved = []
    for name, model in (("a.json", finished), ("b.json", worse)):
        assert run_cli("eval", model, *what, "--json", tmp_path / name)[0] == 0
        saved.append(tmp_path / name)
    assert run_cli("compare", *saved, "--json", tmp_path / "again.json")[0] == 0
    again = json.loads((tmp_path / "again.json").read_text())["comparisons"]
    names = {"a", "b", "verdict"}
    assert [{k: v for k, v in each.items() if k not in names} for each in again] == [
        {k: v for k, v in each.items() if k not in names} for each in record["comparisons"]
    ]
    code, said, err = run_cli("compare", saved[0], worse, "--data", text)
    assert code == 0, err
    assert f"{saved[0]} is better" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{run}",), 2, "needs two models"),
        (("{run}", "{run}", "--data", "{text}"), 2, "is given twice"),
        (("{run}", "{run}/best"), 2, "nothing to measure"),
        (("{folder}/a.json", "{folder}/b.json"), 1, "cannot read {folder}/a.json"),
        (("{folder}/a.json", "{folder}/b.json", "--data", "{text}"), 2, "have no effect on files of results"),
        (("{folder}/bad.json", "{run}", "--data", "{text}"), 1, "bad.json is not JSON"),
        (("{run}", "{folder}/nowhere", "--data", "{folder}/none.txt"), 2, "no such file"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], code: int, message: str, finished: Path, tmp_path: Path, run_cli: Cli
) -> None:
    (tmp_path / "bad.json").write_text("{")
    places = {"text": finished.parent / "words.txt", "folder": tmp_path, "run": finished}
    found, _, err = run_cli("compare", *(each.format(**places) for each in arguments))
    assert found == code
    assert message.format(**places) in err
    assert "Traceback" not in err


def test_a_missing_model_is_found_before_the_first_is_measured(finished: Path, tmp_path: Path, run_cli: Cli) -> None:
    code, said, err = run_cli("compare", finished, tmp_path / "missing", "--data", finished.parent / "words.txt")
    assert code == 1
    assert "there is no model at" in err
    assert said == ""
