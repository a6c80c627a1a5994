"""Task heads, from rows of labeled texts to a classifier that transformers loads."""

from __future__ import annotations

import json
import string
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gptsmith
from gptsmith.errors import CheckpointError, DataError, UsageError
from gptsmith.evaluate.classifier import Classifier
from gptsmith.evaluate.scores import calibration_error, class_scores, pearson, spearman
from gptsmith.formats.hf_heads import load_classifier
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from tests.factories import tiny_model, tiny_run_config
from tests.forked import command

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off"}
FULL: dict[str, Any] = {**QUIET, "lora": "off", "optim.name": "adamw", "optim.lr": 0.003, "epochs": 12.0}
WORDS = {"good": ("fine", "great", "nice"), "bad": ("poor", "awful", "dull")}


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, values)))
    return path


def reviews(count: int = 48) -> list[dict[str, Any]]:
    return [
        {"text": f"a {WORDS[label][i % 3]} film {i}", "label": label}
        for i, label in ((i, ("good", "bad")[i % 2]) for i in range(count))
    ]


ROWS: dict[str, Any] = {
    "classification": reviews,
    "regression": lambda: [{"text": f"{'good ' * (i % 4)}film {i}", "label": i % 4} for i in range(40)],
    "entailment": lambda: [
        {"premise": f"a cat {i}", "hypothesis": ("a cat", "a dog")[i % 2], "label": ("yes", "no")[i % 2]}
        for i in range(40)
    ],
    "similarity": lambda: [
        {"sentence1": f"a cat {i}", "sentence2": ("a cat", "a dog")[i % 2], "label": i % 2} for i in range(40)
    ],
    "multiple-choice": lambda: [
        {"question": f"what {i}", "choices": ["cat", "dog", "bird"][: 2 + i % 2], "answer": i % 2} for i in range(40)
    ],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    (place / "text.txt").write_text((string.printable.replace("\r", "") + "a fine dull film\n") * 30)
    model = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    config = tiny_run_config(steps=4, eval_every=4, context=96, model=model)
    return gptsmith.fit(place / "text.txt", config, out=place / "run").directory


@pytest.mark.report
@pytest.mark.parametrize("task", ROWS)
def test_every_task_trains_and_is_loaded_by_transformers(task: str, base: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = write(tmp_path / "rows.jsonl", ROWS[task]())
    run = gptsmith.classify(base, data, task=task, out=tmp_path / "run", **{**FULL, "epochs": 2.0})
    metric = "pearson" if task == "regression" else "accuracy"
    best = run.best
    assert best is not None
    assert run.selection == (metric, "max")
    assert best[f"{metric}_low"] <= best[metric] <= best[f"{metric}_high"]
    ours, pad_id = load_classifier(run.directory / "best")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.directory / "best", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert ours.head.task == task
    classifier = Classifier.load(str(run.directory))
    sequences = classifier.inputs(("a cat", "a dog", "cat")[: {"classification": 1, "regression": 1}.get(task, 2)])
    with torch.no_grad():
        for ids in sequences:
            padded = torch.tensor([ids + [pad_id] * 5])
            alone = ours(torch.tensor([[ids]]) if task == "multiple-choice" else torch.tensor([ids]))
            torch.testing.assert_close(theirs(padded).logits, alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(CheckpointError, match="a task head, not a language model"):
        gptsmith.load(run)
    assert [row["step"] for row in map(json.loads, (run.directory / "evaluations.jsonl").read_text().splitlines())]
    report = (run.directory / "report.html").read_text()
    assert f"Best {metric}" in report
    assert "Most confident mistakes" in report or "No mistake" in report
    assert ("Confusion matrix" in report) is (task in ("classification", "entailment", "similarity"))


@pytest.mark.parametrize("lora", ["on", "off"])
def test_it_learns_labels_and_predicts(lora: str, base: Path, tmp_path: Path, run_cli: Any) -> None:
    data = write(tmp_path / "rows.jsonl", reviews(96))
    rate = 0.01 if lora == "on" else 0.003
    code, _, err = run_cli(
        *("classify", base, data, "--out", tmp_path / "run", "--lora", lora, "--optim.name", "adamw"),
        *("--optim.lr", rate, "--epochs", 25, "--compile", "off", "--eval-every", 60),
    )
    assert code == 0, err
    assert "2 classes: bad 48, good 48" in err
    run = gptsmith.runs(tmp_path / "run")[0]
    assert run.best is not None
    assert run.best["accuracy"] == 1.0
    found = write(tmp_path / "new.jsonl", [{"text": "a great film 3"}, {"text": "a dull film 4", "label": "good"}])
    code, out, err = run_cli("classify", tmp_path / "run", "--predict", found)
    assert code == 0, err
    assert [json.loads(line)["label"] for line in out.splitlines()] == ["good", "bad"]


def test_the_loss_is_that_of_transformers(base: Path, tmp_path: Path) -> None:
    """GPT2ForSequenceClassification has the same loss, and the same gradient of the head, on the same ids."""
    transformers = pytest.importorskip("transformers")
    from gptsmith.formats.hf_heads import save_classifier

    torch.manual_seed(0)
    ours = SequenceClassifier(tiny_model("gpt2"), HeadConfig(("a", "b"), "single_label_classification"))
    save_classifier(ours, tmp_path, pad_token_id=29)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, last = torch.randint(0, 29, (3, 9)), torch.tensor([8, 4, 6])
    for row, end in enumerate(last):
        ids[row, end + 1 :] = 29
    labels = torch.tensor([1, 0, 1])
    loss = ours.losses(ours(ids, last=last), labels).mean()
    other = theirs(ids, labels=labels).loss
    loss.backward()
    other.backward()
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(ours.score.weight.grad, theirs.score.weight.grad)


def test_the_auxiliary_loss_is_the_mean_loss_of_the_tokens_of_a_row(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["entailment"]())
    options = {**QUIET, "task": "entailment", "lora": "off", "steps": 1, "log_every": 1}
    with_it = gptsmith.classify(base, data, out=tmp_path / "with", aux_loss=0.5, **options)
    without = gptsmith.classify(base, data, out=tmp_path / "without", aux_loss=0.0, **options)
    one, other = with_it.metrics[0], without.metrics[0]
    assert one["task_loss"] == pytest.approx(other["loss"])
    assert one["loss"] == pytest.approx(one["task_loss"] + 0.5 * one["text_loss"])
    assert 1 < one["text_loss"] < 10


@pytest.mark.parametrize(("method", "lora"), [("classify", "on"), ("classify", "off")])
def test_killed_and_resumed(method: str, lora: str, base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", reviews())

    options = ["--steps", 24, "--save-every", 1, "--eval-every", 8, "--compile", "off", "--lora", lora]
    whole = command(method, base, data, "--out", tmp_path / "whole", *options)
    killed = command(method, base, data, "--out", tmp_path / "killed", *options)
    deadline = time.monotonic() + 120
    while killed.poll() is None and time.monotonic() < deadline:
        if any(int(p.name[5:]) >= 9 for p in (tmp_path / "killed" / "checkpoints").glob("step-*")):
            break
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert command("train", "--resume", tmp_path / "killed").wait(timeout=180) == 0
    assert whole.wait(timeout=180) == 0
    last = Path("checkpoints") / "step-00000024"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes()
    one, other = (gptsmith.runs(tmp_path / each)[0] for each in ("whole", "killed"))
    assert [row.get("loss") for row in one.metrics] == [row.get("loss") for row in other.metrics]
    details = [(tmp_path / each / "evaluations.jsonl").read_text() for each in ("whole", "killed")]
    assert details[0] == details[1]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*reviews(6), {"text": "a film", "label": "so"}], {"labels": ("good", "bad")}, "line 7: the label 'so'"),
        ([{"text": f"a film {i}", "label": "good"} for i in range(6)], {}, "every row has the label 'good'"),
        ([*reviews(6), {"premise": "a", "hypothesis": "b", "label": "good"}], {}, "line 7: the row has two texts"),
        (reviews(8), {"context": 5, "too_long": "error"}, "line 1: the row has"),
        (reviews(8), {"context": 5, "too_long": "skip"}, "no row is left to train on: 8: longer than the context of 5"),
        (reviews(8), {"sample_tokens": 20}, "writes no text"),
        (reviews(8), {"aux_loss": -1.0}, "--aux-loss must be 0 or more"),
    ],
)
def test_bad_input(rows: Any, options: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises((DataError, UsageError), match=message):
        gptsmith.classify(base, data, out=tmp_path / "run", **{**QUIET, "steps": 2, **options})
    assert not (tmp_path / "run").exists()


def test_scores_equal_their_definitions() -> None:
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (labels, found), 1)
    scores = class_scores(confusion)
    f1 = [2 * ((labels == k) & (found == k)).sum() / ((labels == k).sum() + (found == k).sum()) for k in range(3)]
    assert scores["accuracy"] == pytest.approx((labels == found).mean())
    assert scores["f1"] == pytest.approx(np.mean(f1))
    x, y = np.eye(3)[labels], np.eye(3)[found]
    covariance = lambda a, b: sum(((a - a.mean(0)) * (b - b.mean(0))).sum(0))  # noqa: E731
    assert scores["matthews"] == pytest.approx(covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y)))
    a, b = rng.normal(size=30), rng.normal(size=30)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.9486833)
    assert pearson(a, np.ones(30)) == 0.0
    sure = np.full(10, 0.8)
    assert calibration_error(sure, np.arange(10) < 8) == pytest.approx(0.0)
    assert calibration_error(sure, np.arange(10) < 5) == pytest.approx(0.3)
