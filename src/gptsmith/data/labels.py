"""Labeled texts from rows, in the forms that people have them in: what task heads are trained on.

    data = read_labeled(Path("reviews.csv"), "classification")
    data.names, data.rows[0].texts, data.rows[0].label       # ("neg", "pos"), ("A fine film.",), 1

| task | texts of a row | label |
|---|---|---|
| classification | one | a class: the index of its name |
| regression | one | a number |
| entailment | premise and hypothesis, or any ordered pair | a class |
| similarity | two texts without an order | a class, or a number |
| multiple-choice | a context, and at least two choices | the index of the right choice |

Fields are recognized by their names, without regard to case and underscores.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from gptsmith.data.conversations import Counts, RowError, bad_row, finite_number
from gptsmith.data.rows import Split, read_rows
from gptsmith.errors import DataError, UsageError, nearest

Task = Literal["classification", "regression", "entailment", "similarity", "multiple-choice"]
TASKS: tuple[Task, ...] = get_args(Task)
OnBad = Literal["error", "skip"]

TEXT_FIELDS = ("text", "sentence", "review", "content", "document", "body", "comment", "tweet")
PAIR_FIELDS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("texta", "textb"),
    ("question", "sentence"),
    ("passage", "question"),
    ("text", "hypothesis"),
)
_NUM_DISTINCT = 5  # pairs of which one name tells that the other belongs to it
LABEL_FIELDS = (
    "label",
    "labels",
    "goldlabel",
    "class",
    "category",
    "target",
    "sentiment",
    "intent",
    "topic",
    "emotion",
)
NUMBER_FIELDS = ("label", "score", "similarity", "relatednessscore", "rating", "stars", "target", "value", "labels")
CHOICE_FIELDS = ("choices", "options", "endings", "candidates")
ANSWER_FIELDS = ("answerkey", "answerrightending", "answeridx", "label", "answer", "gold", "correct", "target")
_DOCUMENTS = ("article", "passage", "document", "context", "ctx", "story", "premise", "support")
_QUESTIONS = ("question", "questionstem", "query", "prompt", "goal", "stem", "startphrase", "sentence", "text")
_NUMBERED_CHOICE = re.compile(r"(choice|option|ending|sol|answer|randomfifthsentencequiz|sentencequiz)(\d+|[a-h])")
_NO_CONSENSUS = ("-", "-1")  # SNLI's rows on which the annotators did not agree, and the hub's form of them
_WHOLE = re.compile(r"[+-]?\d+")

Fields = Mapping[str, Any]  # by normalized name; empty values are left out


class Labeled(NamedTuple):
    """A row: where it is, its texts, and its label: an index (of a class or choice) or a number."""

    where: str
    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class LabeledData:
    """Labeled rows of one task. names: of the classes; () where labels are numbers or choices."""

    task: Task
    rows: list[Labeled]
    names: tuple[str, ...]
    counts: Counts

    @property
    def has_numbers(self) -> bool:
        """Whether labels are numbers to be predicted, and not classes or choices."""
        return not self.names and self.task != "multiple-choice"

    def class_counts(self) -> dict[str, int]:
        """Return the number of rows of each class, in the order of `names`."""
        found = collections.Counter(int(row.label) for row in self.rows) if self.names else {}
        return {name: found[i] for i, name in enumerate(self.names)}

    def summary(self) -> str:
        """Return the sizes in words."""
        forms = ", ".join(f"{form} {number:,}" for form, number in self.counts.forms.most_common() if number)
        text = f"{len(self.rows):,} rows ({forms})"
        if self.names:
            classes = ", ".join(f"{name} {number:,}" for name, number in self.class_counts().items())
            text += f"; {len(self.names)} classes: {classes}"
        elif self.has_numbers:
            numbers = [row.label for row in self.rows]
            text += f"; labels from {min(numbers):g} to {max(numbers):g}"
        if self.counts.skipped:
            text += f"; left out {sum(self.counts.skipped.values()):,} rows: {self.counts.describe_skipped()}"
        return text


def read_labeled(
    path: Path,
    task: Task,
    *,
    labels: Sequence[str] = (),
    numbers: bool | None = None,
    on_bad: OnBad = "error",
    counts: Counts | None = None,
    advance: Callable[[int], None] | None = None,
    needs_variety: bool = True,
    split: Split = "train",
) -> LabeledData:
    """Read a file or folder of rows.

    labels: the names of the classes, in the order of their outputs; by default those in the data, sorted. Where they
    are given, rows may also have the indices 0, 1, ... of these names. numbers: whether the labels of a similarity task
    are numbers; by default they are if all of them are and one has a fraction.
    on_bad: stop at the first row that cannot be used with a DataError that names it, or leave it out and count it.
    needs_variety: refuse data in which all labels are equal; validation data may be so.

    Raises DataError for rows that cannot be used and for labels from which nothing can be learned, and UsageError for
    names of classes that do not make sense.
    """
    if task not in TASKS:
        raise UsageError(f"there is no task {task!r}.{nearest(task, TASKS)} Tasks: {', '.join(TASKS)}.")
    _check_names(labels, task)
    if numbers is not None and task != "similarity" and numbers != (task == "regression"):
        raise UsageError(f"labels of the task {task} are {'not ' if numbers else ''}numbers.")
    counts = Counts() if counts is None else counts
    rows = list(_read(path, task, on_bad, counts, advance, split))
    if not rows:
        raise DataError(f"{path} has no row that can be used. {counts.describe_skipped()}".strip())
    if task == "similarity" and numbers is None:
        numbers = not labels and _look_like_scores([label for _, _, label, _ in rows])
    if task == "multiple-choice":
        convert: Callable[[Any], float] = float
        names: tuple[str, ...] = ()
    elif task == "regression" or numbers:
        if labels:
            raise UsageError("names of classes were given, but the labels are numbers.")
        convert, names = _number, ()
    else:
        texts = _class_texts(rows, task, on_bad, counts, declared=bool(labels))
        rows = [(where, row_texts, label, form) for (where, row_texts, _, form), label in texts]
        names = tuple(labels) or _found_names([label for _, label in texts], path)
        convert = _ClassIndex(names, declared=bool(labels))
    data = LabeledData(task, list(_converted(rows, convert, on_bad, counts)), names, counts)
    _check_variety(data, path, needs_variety)
    return data


# Rows ----------------------------------------------------------------------------------------------------------------

_Raw = tuple[str, tuple[str, ...], Any, str]  # where, texts, label, form


def _read(
    path: Path, task: Task, on_bad: OnBad, counts: Counts, advance: Callable[[int], None] | None, split: Split
) -> Iterator[_Raw]:
    for row in read_rows(path, advance, split=split):
        try:
            texts, label, form = as_labeled(row.values, task)
        except RowError as error:
            bad_row(error, row.where, on_bad, counts)
            continue
        counts.forms[form] += 1
        yield row.where, texts, label, form


def as_labeled(values: Mapping[str, Any], task: Task) -> tuple[tuple[str, ...], Any, str]:
    """Return the texts of a row, its label as it is written, and the fields they come from. Raise RowError.

    The label of a multiple-choice row is the index of the right choice.
    """
    row: dict[str, Any] = {}
    for name, value in values.items():
        if not _is_missing(value):
            row.setdefault(_normalized(name), value)
    if task == "multiple-choice":
        return _choices_of(row, values)
    if task in ("classification", "regression"):
        fields = _single_text(row, values)
    else:
        fields = _pair(row, values, task)
    texts = tuple(_text(row[name], name) for name in fields)
    known: tuple[str, ...] = NUMBER_FIELDS if task == "regression" else LABEL_FIELDS
    if task == "similarity":
        known = tuple(dict.fromkeys((*LABEL_FIELDS, *NUMBER_FIELDS)))
    elif task == "entailment":
        known = (*LABEL_FIELDS, "answer")
    name = _label_field(row, tuple(f for f in known if f not in fields), values)
    label = row[name]
    if isinstance(label, list | tuple | Mapping):
        raise RowError(f"{name} has several values; a row has one label.")
    return texts, label, "+".join((*fields, name))


def unlabeled_texts(values: Mapping[str, Any], task: Task) -> tuple[str, ...]:
    """Return the texts of a row as `as_labeled` does; it needs no label. Raise RowError."""
    row = dict(values)
    if task == "multiple-choice":
        kept = {name: value for name, value in row.items() if _normalized(name) not in ANSWER_FIELDS}
        return as_labeled({**kept, "answer_idx": 0}, task)[0]
    row = {name: value for name, value in row.items() if _normalized(name) not in LABEL_FIELDS}
    return as_labeled({**row, "label": 0}, task)[0]


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _normalized(name: str) -> str:
    return re.sub(r"[\s_\-]", "", str(name)).lower()


def _single_text(row: Fields, values: Mapping[str, Any]) -> tuple[str, ...]:
    found = [name for name in TEXT_FIELDS if name in row]
    if len(found) > 1:
        raise RowError(f"the fields {' and '.join(found)} could both be the text. Keep one of them.")
    if not found:
        if any(first in row and second in row for first, second in PAIR_FIELDS):
            raise RowError("the row has two texts. Use the task entailment or similarity.")
        raise RowError(_no_field("text", TEXT_FIELDS, values))
    return (found[0],)


def _pair(row: Fields, values: Mapping[str, Any], task: Task) -> tuple[str, ...]:
    found = next((pair for pair in PAIR_FIELDS if pair[0] in row and pair[1] in row), None)
    if found is None:
        half = next((pair for pair in PAIR_FIELDS[:_NUM_DISTINCT] if (pair[0] in row) != (pair[1] in row)), None)
        if half is not None:
            missing = half[1] if half[0] in row else half[0]
            raise RowError(f"{task} compares two texts, and {missing} is missing or empty.")
        pairs = [" and ".join(pair) for pair in PAIR_FIELDS]
        raise RowError(
            f"{task} compares two texts; the fields {_named(values)} have none such. Use {', or '.join(pairs)}."
        )
    return found


def _label_field(row: Fields, known: Sequence[str], values: Mapping[str, Any]) -> str:
    found = [name for name in known if name in row]
    if not found:
        if any(_normalized(name) in known for name in values):
            raise RowError("the label is missing.")
        raise RowError(_no_field("label", known, values))
    if len(found) > 1 and found[0] != "label":
        raise RowError(f"the fields {' and '.join(found)} could all be the label. Rename the right one to label.")
    return found[0]


def _no_field(what: str, known: Sequence[str], values: Mapping[str, Any]) -> str:
    empty = [name for name in values if _normalized(name) in known]
    if empty:
        return f"the {what} ({empty[0]}) is empty."
    hint = next((found for name in values if (found := nearest(str(name), known))), "")
    return f"the fields {_named(values)} have no {what}.{hint} Use one of {', '.join(known)}."


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(map(str, values)) or "(none)"


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is not a text, but {json.dumps(value, default=str)[:40]}.")
    if not value.strip():
        raise RowError(f"{name} is empty.")
    return value


# Multiple choice -----------------------------------------------------------------------------------------------------


def _choices_of(row: Fields, values: Mapping[str, Any]) -> tuple[tuple[str, ...], int, str]:
    row = _unfolded(row)
    name, choices, keys = _choices(row, values)
    if len(choices) < 2:
        raise RowError(f"{name} has {len(choices)} choice; at least 2 are needed.")
    texts = [_text(choice, f"choice {number}") for number, choice in enumerate(choices, 1)]
    context = _context_fields(row)
    if not context:
        raise RowError(_no_field("question or context", (*_QUESTIONS, *_DOCUMENTS), values))
    joined = " ".join(_text(row[field], field).strip() for field in context)
    answer = next((field for field in ANSWER_FIELDS if field in row), None)
    if answer is None:
        if any(_normalized(field) in ANSWER_FIELDS for field in values):
            raise RowError("the answer is missing.")
        raise RowError(_no_field("answer", ANSWER_FIELDS, values))
    index = _answer(row[answer], answer, texts, keys)
    if texts.count(texts[index]) > 1:
        raise RowError("the right choice is given twice.")
    return (joined, *texts), index, "+".join((*context, name, answer))


def _unfolded(row: Fields) -> Fields:
    """Return a row without the nesting of ARC's own files: {"question": {"stem": ..., "choices": [...]}}."""
    question = row.get("question")
    if not isinstance(question, Mapping):
        return row
    inner = {_normalized(name): value for name, value in question.items()}
    return {**{name: value for name, value in row.items() if name != "question"}, **inner}


def _choices(row: Fields, values: Mapping[str, Any]) -> tuple[str, list[Any], list[str]]:
    """Return the field, the choices, and the key of each, such as A, B, C; [] where choices have none."""
    name = next((name for name in CHOICE_FIELDS if name in row), None)
    if name is None:
        matches = {match[2]: field for field in row if (match := _NUMBERED_CHOICE.fullmatch(field))}
        if len(matches) < 2:
            matches = {letter: letter for letter in "abcdefgh" if letter in row}
        if len(matches) < 2:
            raise RowError(_no_field("choices", (*CHOICE_FIELDS, "choice1"), values))
        keys = sorted(matches, key=lambda key: (len(key), key))
        return f"{matches[keys[0]]}…", [row[matches[key]] for key in keys], keys
    found = row[name]
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            raise RowError(f"{name} is not a list. In a CSV file write it as JSON.") from None
    if isinstance(found, Mapping):
        lists = {_normalized(key): value for key, value in found.items()}
        if isinstance(lists.get("text"), list | tuple):  # as ARC on the hub
            texts, labels = list(lists["text"]), list(lists.get("label") or [])
        else:  # {"A": ..., "B": ...}
            texts, labels = list(found.values()), list(found)
        if labels and len(labels) != len(texts):
            raise RowError(f"{name} has {len(texts)} texts and {len(labels)} labels.")
        return name, texts, [str(label) for label in labels]
    if not isinstance(found, list | tuple):
        raise RowError(f"{name} is not a list.")
    if found and all(isinstance(choice, Mapping) and "text" in choice for choice in found):
        texts = [choice["text"] for choice in found]
        labeled = all("label" in choice for choice in found)
        return name, texts, [str(choice["label"]) for choice in found] if labeled else []
    beside = row.get("labels")  # the keys in a field of their own
    if isinstance(beside, list | tuple) and len(beside) == len(found):
        return name, list(found), [str(key) for key in beside]
    return name, list(found), []


def _context_fields(row: Fields) -> list[str]:
    story = sorted(field for field in row if re.fullmatch(r"inputsentence\d", field))
    if story:
        return story
    if "startphrase" not in row and "sent1" in row:
        return [field for field in ("sent1", "sent2") if field in row]
    document = next((field for field in _DOCUMENTS if field in row), None)
    question = next((field for field in _QUESTIONS if field in row), None)
    return [field for field in (document, question) if field is not None]


def _answer(value: Any, name: str, choices: Sequence[str], keys: Sequence[str]) -> int:
    """Return the index of the right choice: given by its key, its index from 0, its letter, or its text."""
    written = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    by_text = choices.index(value) if value in choices else None
    by_key = _by_key(written, name, len(choices), keys)
    if by_key is not None and by_text is not None and by_key != by_text and not keys:
        raise RowError(f"{name} {value!r} is the text of choice {by_text + 1} and the name of choice {by_key + 1}.")
    found = by_text if by_key is None else by_key
    if found is None:
        allowed = ", ".join(keys) if keys and name != "label" else f"an index from 0 to {len(choices) - 1}"
        raise RowError(f"{name} {value!r} is none of the {len(choices)} choices ({allowed}, or the text of one).")
    return found


def _by_key(written: str, name: str, num_choices: int, keys: Sequence[str]) -> int | None:
    lowered = [key.lower() for key in keys]
    if written.lower() in lowered and name != "label":  # "label" counts from 0 in every public set
        return lowered.index(written.lower())
    if re.fullmatch(r"[A-Za-z]", written):
        index = ord(written.upper()) - ord("A")
    elif _WHOLE.fullmatch(written) and (not keys or name in ("label", "answeridx")):
        index = int(written)
    else:
        return None
    return index if 0 <= index < num_choices else None


# Labels --------------------------------------------------------------------------------------------------------------


class _ClassIndex:
    """Returns the index of a class by its name, or where names are declared also by its number."""

    def __init__(self, names: tuple[str, ...], *, declared: bool) -> None:
        self.names = names
        self.index = {name: float(i) for i, name in enumerate(names)}
        self.takes_numbers = declared and not any(_WHOLE.fullmatch(name) for name in names)

    def __call__(self, label: str) -> float:
        if label in self.index:
            return self.index[label]
        if self.takes_numbers and _WHOLE.fullmatch(label) and 0 <= int(label) < len(self.names):
            return float(int(label))
        raise RowError(f"the label {label!r} is not one of {', '.join(self.names)}.{nearest(label, self.names)}")


def _check_names(labels: Sequence[str], task: Task) -> None:
    if not labels:
        return
    if task in ("regression", "multiple-choice"):
        raise UsageError(f"the task {task} has no classes; leave out their names.")
    if len(labels) < 2:
        raise UsageError(f"{labels[0]!r} is the only class; at least 2 are needed.")
    twice = [name for name, number in collections.Counter(labels).items() if number > 1]
    if twice:
        raise UsageError(f"the class {twice[0]!r} is named twice.")
    if any(not name.strip() or name != name.strip() for name in labels):
        raise UsageError("the name of a class is empty, or begins or ends with a space.")


def _class_texts(
    rows: Sequence[_Raw], task: Task, on_bad: OnBad, counts: Counts, *, declared: bool
) -> list[tuple[_Raw, str]]:
    """Return the rows with their labels as text; 1, 1.0 and "1" are the same class."""
    found = []
    for row in rows:
        where, _, value, form = row
        try:
            found.append((row, _class_text(value, task, declared=declared)))
        except RowError as error:
            counts.forms[form] -= 1
            bad_row(error, where, on_bad, counts)
    return found


def _class_text(value: Any, task: Task, *, declared: bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if not text:
        raise RowError("the label is missing.")
    if task == "entailment" and text in _NO_CONSENSUS:
        raise RowError(f"the label is {text!r}: the row has none that annotators agree on.")
    if not declared and _is_fraction(text):
        raise RowError(f"the label {text} is a number, not a class. Use the task regression, or name the classes.")
    return text


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer() and not text.lower().strip("+-").startswith(("n", "i"))
    except ValueError:
        return False


def _found_names(labels: Sequence[str], path: Path) -> tuple[str, ...]:
    names = sorted(set(labels))
    if names and all(_WHOLE.fullmatch(name) for name in names):
        names.sort(key=int)
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise DataError(
                f"{path}: the labels {other!r} and {name!r} differ only in case. Fix them, or name the classes "
                "if both are meant."
            )
    if len(names) == len(labels) > 2:
        raise DataError(
            f"{path}: each of the {len(labels):,} rows has a label of its own ({names[0]!r}, {names[1]!r}, ...), so "
            "there is nothing to learn from. Is the label in another field?"
        )
    return tuple(names)


def _look_like_scores(labels: Sequence[Any]) -> bool:
    try:
        numbers = [_number(label) for label in labels]
    except RowError:
        return False
    return any(not number.is_integer() for number in numbers)


def _number(label: Any) -> float:
    return finite_number(label, "the label")


def _converted(
    rows: Sequence[_Raw], convert: Callable[[Any], float], on_bad: OnBad, counts: Counts
) -> Iterator[Labeled]:
    for where, texts, label, form in rows:
        try:
            yield Labeled(where, texts, convert(label))
        except RowError as error:
            counts.forms[form] -= 1
            bad_row(error, where, on_bad, counts)


def _check_variety(data: LabeledData, path: Path, needs_variety: bool) -> None:
    if not data.rows:
        raise DataError(f"{path} has no row that can be used. {data.counts.describe_skipped()}".strip())
    labels = {row.label for row in data.rows}
    if not needs_variety or data.task == "multiple-choice" or len(labels) > 1:
        return
    (label,) = labels
    shown = f"{data.names[int(label)]!r}" if data.names else f"{label:g}"
    raise DataError(
        f"{path}: every row has the label {shown}, so there is nothing to learn. Add rows with other labels, or see "
        "whether the label is in another field."
    )
