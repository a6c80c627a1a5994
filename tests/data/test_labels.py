"""Labeled rows: the forms that public data has, label sets, and what cannot be learned from."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from gptsmith.data.conversations import RowError
from gptsmith.data.labels import LabeledData, Task, as_labeled, read_labeled
from gptsmith.errors import DataError, UsageError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def read(tmp_path: Path, rows: list[dict[str, Any]], task: Task, **options: Any) -> LabeledData:
    return read_labeled(write(tmp_path / "rows.jsonl", rows), task, **options)


def reviews(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"review {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("task", "values", "texts", "label"),
    [
        ("classification", {"text": "good", "label": 1}, ("good",), 1),
        ("classification", {"Review": "good", "Sentiment": "pos", "id": 7}, ("good",), "pos"),
        ("classification", {"text": "good", "label": 0, "sentiment": "neg"}, ("good",), 0),
        ("regression", {"sentence": "good", "score": 0.5}, ("good",), 0.5),
        ("entailment", {"premise": "It rains.", "hypothesis": "It is wet.", "label": "yes"}, None, "yes"),
        ("entailment", {"sentence1": "It rains.", "sentence2": "It is wet.", "gold_label": "yes"}, None, "yes"),
        ("entailment", {"passage": "It rains.", "question": "It is wet.", "answer": True}, None, True),
        ("similarity", {"question1": "It rains.", "question2": "It is wet.", "label": 1}, None, 1),
        ("similarity", {"sentence1": "It rains.", "sentence2": "It is wet.", "score": "2.5"}, None, "2.5"),
    ],
)
def test_fields(task: Task, values: dict[str, Any], texts: tuple[str, ...] | None, label: Any) -> None:
    found = as_labeled(values, task)
    assert found[:2] == (texts or ("It rains.", "It is wet."), label)


@pytest.mark.parametrize(
    ("values", "context", "choices", "answer"),
    [
        ({"question": "2+2?", "choices": ["3", "4"], "answer": 1}, "2+2?", ["3", "4"], 1),
        ({"question": "2+2?", "choices": '["three", "four"]', "answer": "B"}, "2+2?", ["three", "four"], 1),
        ({"question": "2+2?", "choices": ["three", "four"], "answer": "four"}, "2+2?", ["three", "four"], 1),
        (
            {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            *("Why?", ["x", "y"], 1),
        ),
        (
            {
                "question": {"stem": "Why?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
                "answerKey": "A",
            },
            *("Why?", ["x", "y"], 0),
        ),
        (
            {"article": "A man.", "question": "Who?", "options": ["a", "b", "c"], "answer": "C"},
            *("A man. Who?", ["a", "b", "c"], 2),
        ),
        (
            {"question": "Vitamin?", "choices": ["C", "D", "A"], "labels": ["A", "B", "C"], "answer": "C"},
            *("Vitamin?", ["C", "D", "A"], 2),
        ),
        ({"question": "a", "choices": ["x", "x", "y"], "answer": 2}, "a", ["x", "x", "y"], 2),
        ({"ctx": "He", "ctx_a": "H", "endings": ["runs", "eats"], "label": "1"}, "He", ["runs", "eats"], 1),
        ({"goal": "Boil", "sol1": "heat", "sol2": "cool", "label": 0}, "Boil", ["heat", "cool"], 0),
        ({"sentence": "_ won", "option1": "Ann", "option2": "Ben", "answer": "2"}, "_ won", ["Ann", "Ben"], 1),
        ({"sent1": "He", "sent2": "then", "ending0": "x", "ending1": "y", "label": 1}, "He then", ["x", "y"], 1),
        (
            {"premise": "It fell.", "question": "cause", "choice1": "x", "choice2": "y", "label": 0},
            *("It fell. cause", ["x", "y"], 0),
        ),
        ({"Question": "2+2?", "A": "3", "B": "4", "Answer": "B"}, "2+2?", ["3", "4"], 1),
        (
            {"question": "Drug?", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"},
            *("Drug?", ["x", "y"], 1),
        ),
        (
            {
                **{f"InputSentence{i}": f"s{i}." for i in range(1, 5)},
                "RandomFifthSentenceQuiz1": "x",
                "RandomFifthSentenceQuiz2": "y",
                "AnswerRightEnding": "2",
            },
            *("s1. s2. s3. s4.", ["x", "y"], 1),
        ),
    ],
)
def test_multiple_choice(values: dict[str, Any], context: str, choices: list[str], answer: int) -> None:
    assert as_labeled(values, "multiple-choice")[:2] == ((context, *choices), answer)


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("classification", {"txt": "a", "label": 1}, "have no text. Did you mean 'text'"),
        ("classification", {"text": "", "label": 1}, r"the text \(text\) is empty"),
        ("classification", {"text": " \n", "label": 1}, "text is empty"),
        ("classification", {"text": 5, "label": 1}, "text is not a text, but 5"),
        ("classification", {"text": "a", "label": None}, "the label is missing"),
        ("classification", {"text": "a", "lable": 1}, "have no label. Did you mean 'label'"),
        ("classification", {"text": "a", "label": [1, 2]}, "label has several values"),
        ("classification", {"text": "a", "review": "b", "label": 1}, "text and review could both be the text"),
        ("classification", {"text": "a", "category": "x", "topic": "y"}, "category and topic could all be the label"),
        ("classification", {"sentence1": "a", "sentence2": "b", "label": 1}, "Use the task entailment or similarity"),
        ("entailment", {"text": "a", "label": 1}, "compares two texts; the fields text, label have none such"),
        ("entailment", {"premise": "a", "hypothesis": "", "label": 1}, "hypothesis is missing or empty"),
        ("multiple-choice", {"question": "a", "choices": ["x"], "answer": 0}, "has 1 choice; at least 2"),
        ("multiple-choice", {"question": "a", "choices": ["x", "x"], "answer": 0}, "the right choice is given twice"),
        ("multiple-choice", {"question": "a", "choices": ["x", ""], "answer": 0}, "choice 2 is empty"),
        ("multiple-choice", {"question": "a", "choices": ["x", "y"], "answer": 2}, "an index from 0 to 1"),
        ("multiple-choice", {"question": "a", "choices": ["x", "y"], "answer": -1}, "an index from 0 to 1"),
        ("multiple-choice", {"question": "a", "choices": ["x", "y"]}, "have no answer"),
        ("multiple-choice", {"question": "a", "choices": ["1", "2"], "answer": "1"}, "the text of choice 1 and the"),
        ("multiple-choice", {"question": "a", "choices": "x, y", "answer": 0}, "In a CSV file write it as JSON"),
        ("multiple-choice", {"choices": ["x", "y"], "answer": 0}, "have no question or context"),
        ("multiple-choice", {"question": "a", "answer": 0}, "have no choices"),
    ],
)
def test_rows_that_cannot_be_used(task: Task, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        as_labeled(values, task)


def test_classes_are_found_and_sorted(tmp_path: Path) -> None:
    data = read(tmp_path, reviews("pos", "neg", " pos ", "neg"), "classification")
    assert data.names == ("neg", "pos")
    assert [row.label for row in data.rows] == [1, 0, 1, 0]
    assert data.rows[2].where.endswith("rows.jsonl, line 3")
    assert data.class_counts() == {"neg": 2, "pos": 2}
    assert data.summary() == "4 rows (text+label 4); 2 classes: neg 2, pos 2"
    assert not data.has_numbers


def test_numbers_as_classes_are_sorted_as_numbers_however_written(tmp_path: Path) -> None:
    data = read(tmp_path, reviews(10, "2", 2.0, 10, "-1"), "classification")
    assert data.names == ("-1", "2", "10")
    assert [row.label for row in data.rows] == [2, 1, 1, 2, 0]
    assert read(tmp_path, reviews(True, False, True), "classification").names == ("false", "true")


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", reviews("pos", "neg", "pos"))
    data = read_labeled(path, "classification")
    assert [row.label for row in data.rows] == [1, 0, 1]
    assert data.rows[0].where.endswith("rows.csv, line 2")


def test_declared_classes_keep_their_order(tmp_path: Path) -> None:
    data = read(tmp_path, reviews("pos", "neg"), "classification", labels=("pos", "neutral", "neg"))
    assert data.names == ("pos", "neutral", "neg")
    assert [row.label for row in data.rows] == [0, 2]
    assert data.class_counts() == {"pos": 1, "neutral": 0, "neg": 1}
    indices = read(tmp_path, reviews(1, 0, "1"), "classification", labels=("neg", "pos"))
    assert [row.label for row in indices.rows] == [1, 0, 1]
    stars = read(tmp_path, reviews(1, 2), "classification", labels=("2", "1"))
    assert [row.label for row in stars.rows] == [1, 0]


def test_labels_outside_the_declared_classes(tmp_path: Path) -> None:
    rows = reviews("pos", "neg", "postive", "pos")
    with pytest.raises(DataError, match=r"line 3: the label 'postive' is not one of neg, pos\. Did you mean 'pos'"):
        read(tmp_path, rows, "classification", labels=("neg", "pos"))
    data = read(tmp_path, rows, "classification", labels=("neg", "pos"), on_bad="skip")
    assert len(data.rows) == sum(data.counts.forms.values()) == 3
    assert "left out 1 rows: 1: the label 'postive' is not one of neg, pos" in data.summary()
    with pytest.raises(DataError, match=r"line 1: the label '2' is not one of neg, pos"):
        read(tmp_path, reviews(2, 1), "classification", labels=("neg", "pos"))


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        (reviews("pos", "pos", "pos"), "classification", "every row has the label 'pos', so there is nothing to learn"),
        (reviews(2.5, 2.5), "regression", "every row has the label 2.5"),
        (reviews("a", "b", "c"), "classification", "each of the 3 rows has a label of its own"),
        (reviews("Pos", "pos", "Pos"), "classification", "'Pos' and 'pos' differ only in case"),
        (reviews(1, 0.25), "classification", "line 2: the label 0.25 is a number, not a class. Use the task regress"),
        (reviews(1, "high"), "regression", "line 2: the label is not a finite number: 'high'"),
        (reviews(1, "inf"), "regression", "line 2: the label is not a finite number: 'inf'"),
        (reviews(1, 10**400), "regression", "line 2: the label is not a finite number: 1000"),
        (reviews(1, True), "regression", "line 2: the label is not a finite number: True"),
        ([{"text": "a", "label": 1}, {"x": 1}], "classification", "line 2: the fields x have no text"),
    ],
)
def test_data_that_cannot_be_learned_from(tmp_path: Path, rows: list[dict[str, Any]], task: Task, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, rows, task)


def test_validation_data_may_have_one_class(tmp_path: Path) -> None:
    data = read(tmp_path, reviews("pos"), "classification", labels=("neg", "pos"), needs_variety=False)
    assert [row.label for row in data.rows] == [1]


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*reviews("a", "b"), {"text": "", "label": "a"}, {"text": "x", "label": ""}, *reviews("a")]
    data = read(tmp_path, rows, "classification", on_bad="skip")
    assert len(data.rows) == 3
    assert sum(data.counts.skipped.values()) == 2
    with pytest.raises(DataError, match=r"no row that can be used. 1: the text \(text\) is empty \(first: .*line 1"):
        read(tmp_path, rows[2:3], "classification", on_bad="skip")


def test_similarity_is_of_classes_or_numbers(tmp_path: Path) -> None:
    def pairs(*labels: Any) -> list[dict[str, Any]]:
        return [{"sentence1": "a", "sentence2": f"b{i}", "label": label} for i, label in enumerate(labels)]

    assert read(tmp_path, pairs(0, 1, 1), "similarity").names == ("0", "1")
    scores = read(tmp_path, pairs("0", "2.5", 5), "similarity")
    assert scores.has_numbers
    assert [row.label for row in scores.rows] == [0, 2.5, 5]
    assert read(tmp_path, pairs(0, 5, 0), "similarity", numbers=True).has_numbers


def test_rows_without_consensus_are_no_class(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "gold_label": label} for label in ("yes", "-", "no")]
    with pytest.raises(DataError, match="line 2: the label is '-': the row has none that annotators agree on"):
        read(tmp_path, rows, "entailment")
    assert read(tmp_path, rows, "entailment", on_bad="skip").names == ("no", "yes")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("clasification", {}, "there is no task 'clasification'. Did you mean 'classification'"),
        ("classification", {"labels": ("a",)}, "'a' is the only class"),
        ("classification", {"labels": ("a", "a")}, "'a' is named twice"),
        ("classification", {"labels": ("a", " ")}, "is empty"),
        ("regression", {"labels": ("a", "b")}, "regression has no classes"),
        ("classification", {"numbers": True}, "labels of the task classification are not numbers"),
        ("similarity", {"numbers": True, "labels": ("a", "b")}, "but the labels are numbers"),
    ],
)
def test_wrong_options(tmp_path: Path, task: Any, options: dict[str, Any], message: str) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "text": "c", "label": i} for i in (1, 2)]
    with pytest.raises(UsageError, match=message):
        read(tmp_path, rows, task, **options)
