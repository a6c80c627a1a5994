"""Contamination: what is found, against a search of whole texts, and how scores are divided."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptsmith.data import sources
from gptsmith.data.shards import TokenSplit
from gptsmith.data.sources import open_source
from gptsmith.errors import DataError, UsageError
from gptsmith.evaluate import contamination
from gptsmith.evaluate.contamination import (
    Corpus,
    Overlaps,
    clean_and_dirty,
    corpora_of,
    corpus_of_data,
    corpus_of_split,
    corpus_of_text,
    find_overlaps,
    texts_of_item,
    words,
)
from gptsmith.tasks.definition import Item
from gptsmith.tokenizer import Tokenizer

VOCABULARY = [f"w{i}" for i in range(3000)]


def prose(count: int, seed: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def corpus(*texts: str) -> Corpus:
    return Corpus("text", "0", 1, lambda advance: iter(texts))


def dirty(examples: list[list[str]], *corpora: Corpus) -> Overlaps:
    return find_overlaps({"quiz": dict(enumerate(examples))}, corpora)["quiz"]


def test_words_are_compared_without_case_punctuation_and_white_space() -> None:
    text = prose(13, 1)
    written = "“" + text[0].upper() + ",\n\n" + ";   ".join(text[1:]) + "”!"
    assert words(written) == text
    found = dirty([[" ".join(text)]], corpus("before it " + written + " after it"))
    assert found.dirty[0].words == " ".join(text)
    assert found.dirty[0].corpus == "text"


def test_thirteen_words_are_an_overlap_and_twelve_are_not() -> None:
    example, other = prose(40, 1), prose(40, 2)
    for shared, is_dirty in ((12, False), (13, True)):
        text = " ".join([*other[:20], *example[15 : 15 + shared], *other[20:]])
        assert bool(dirty([[" ".join(example)]], corpus(text)).dirty) == is_dirty


def test_short_examples_occur_as_a_whole_or_cannot_be_checked() -> None:
    nine, seven = prose(9, 1), prose(7, 2)
    examples = [[" ".join(nine)], [" ".join(seven)], [""]]
    whole = dirty(examples, corpus(" ".join([*prose(5, 3), *nine, *seven])))
    assert set(whole.dirty) == {0}
    assert whole.unchecked == {1, 2}
    assert not dirty(examples, corpus(" ".join([*nine[:8], "x", nine[8]]))).dirty
    assert not dirty(examples, corpus(" ".join(reversed(nine)))).dirty


def test_what_is_found_is_what_a_search_finds() -> None:
    rng = random.Random(0)
    few = [f"w{i}" for i in range(3)]  # so few words that overlaps occur by chance
    examples = [[" ".join(rng.choices(few, k=rng.randint(5, 25)))] for _ in range(300)]
    texts = [" ".join(rng.choices(few, k=2000)) for _ in range(8)]
    found = dirty(examples, corpus(*texts))
    expected = set()
    for number, (example,) in enumerate(examples):
        split = example.split()
        n = min(13, len(split))
        grams = [" " + " ".join(split[i : i + n]) + " " for i in range(len(split) - n + 1)]
        if n >= 8 and any(gram in f" {text} " for gram in grams for text in texts):
            expected.add(number)
    assert set(found.dirty) == expected
    assert 10 < len(expected) < 250
    assert all(f" {overlap.words} " in f" {examples[i][0]} " for i, overlap in found.dirty.items())


def test_the_words_of_a_template_do_not_count() -> None:
    template = " ".join(prose(15, 9))
    examples = [[f"{template} {' '.join(prose(10, 100 + i))}"] for i in range(12)]
    own = examples[3][0].split()[5:20]
    assert not dirty(examples, corpus(template)).dirty
    assert set(dirty(examples, corpus(template, " ".join(own))).dirty) == {3}


def test_what_is_looked_for_of_an_example() -> None:
    record = {"ctx": "A man sits down, here.", "endings": ["He sings.", "He eats."], "label": 0, "source": "x"}
    item = Item(0, "Question: A man sits down, here.\nAnswer:", ("He sings.", "He eats."), 0, record)
    assert texts_of_item(item) == [
        "Question: A man sits down, here.\nAnswer: He sings.",
        "A man sits down, here. He sings.",
        "A man sits down, here.",
    ]


@pytest.mark.parametrize("block", [1 << 16, 700])
def test_token_shards_are_decoded(block: int, bpe: Tokenizer, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost where blocks or shards end, and nothing is found across two documents."""
    monkeypatch.setattr(contamination, "BLOCK_TOKENS", block)
    monkeypatch.setattr(contamination, "OVERLAP_TOKENS", 200)
    lines = [" ".join(words.split()[i : i + 40]) for i in range(0, 2000, 40)]
    assert bpe.eos_id is not None
    ids = np.array([id for line in lines for id in (*bpe.encode(line), bpe.eos_id)], np.uint16)
    split = TokenSplit([ids[:1234], ids[1234:]], np.zeros(1, np.int64))
    advanced: list[int] = []
    pieces = list(corpus_of_split(split, bpe, "shards").texts(advanced.append))
    assert sum(advanced) == len(ids)
    assert len(pieces) >= 50
    one, two = lines[7].split(), lines[8].split()
    examples = [[line] for line in lines] + [[" ".join([*one[-6:], *two[:7]])]]
    found = find_overlaps({"quiz": dict(enumerate(examples))}, [corpus_of_split(split, bpe, "shards")])["quiz"]
    assert set(found.dirty) == set(range(50))


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in pieces, and what goes across two of them is found."""
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(contamination, "OVERLAP_CHARACTERS", 200)
    monkeypatch.setattr(contamination, "_MOST_KNOWN_WORDS", 500)
    text = prose(5000, 1)
    (file := tmp_path / "text.txt").write_text(" ".join(text))
    source = corpus_of_text(open_source(file))
    assert max(len(piece) for piece in source.texts(lambda amount: None)) <= 600
    examples = [[" ".join(text[i : i + 13])] for i in range(0, 4987, 7)]
    assert len(dirty(examples, source).dirty) == len(examples)


def test_rows_of_any_form_are_read(tmp_path: Path) -> None:
    said, chosen = " ".join(prose(14, 1)), " ".join(prose(14, 2))
    row = {"messages": [{"role": "user", "content": said}], "chosen": [{"content": chosen}], "number": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert set(dirty([[said], [chosen]], corpus_of_data(str(tmp_path / "rows.jsonl"))).dirty) == {0, 1}


def test_scores_are_divided() -> None:
    overlap = contamination.Overlap("a b c", "text")
    found = clean_and_dirty({0: 1.0, 1: 0.0, 2: 1.0, 5: 0.0}, Overlaps({2: overlap, 7: overlap}, {1, 9}, {"text": "0"}))
    assert found.clean["score"] == pytest.approx(1 / 3)
    assert found.clean["examples"] == 3
    assert (found.dirty["score"], found.dirty["examples"]) == (1.0, 1)
    assert (found.unchecked, set(found.overlaps)) == (1, {2})
    said = found.describe()
    assert "1 of 4 examples occur in the training text: score 0.333 (" in said
    assert "on the clean ones, 1.000 (1.000 to 1.000) on the dirty ones; 1 are too short" in said
    none = clean_and_dirty({0: 1.0}, Overlaps())
    assert none.describe() == "none of 1 examples occurs in the training text"
    assert none.to_json()["dirty"] == {}
    every = clean_and_dirty({0: 1.0}, Overlaps({0: overlap}))
    assert "on the dirty ones" in every.describe()


# Runs -----------------------------------------------------------------------------------------------------------------

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, words: str) -> Iterator[Path]:
    """A finished run, with its text beside it."""
    from gptsmith.cli import main

    place = tmp_path_factory.mktemp("run")
    (place / "words.txt").write_text(words[:20_000])
    options = ["--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--context", "256", "--steps", "2"]
    options += ["--device", "cpu", "--compile", "off", "--sample-tokens", "0"]
    assert main(["train", str(place / "words.txt"), "--out", str(place / "run"), *options]) == 0
    yield place / "run"
    shutil.rmtree(place)


def quiz(place: Path, text: list[str], held_out: list[str]) -> Path:
    """Examples: two of the training text, two of words in another order, one of the text that was held out."""
    other = sorted(text[:60])
    questions = [text[20:40], text[50:70], other[:20], other[20:40], held_out[-30:-10]]
    rows = [{"q": " ".join(question), "a": "ba"} for question in questions]
    (place / "quiz.yaml").write_text(
        json.dumps({"source": {"rows": rows}, "prompt": "{{ q }}", "choices": ["{{ a }}", "mi"], "answer": 0})
    )
    return place / "quiz.yaml"


def test_a_run_knows_its_training_text(run: Path, tmp_path: Path, words: str, run_cli: Cli) -> None:
    task = quiz(tmp_path, words[:10_000].split(), words[:20_000].split())
    for model in (run, run / "best"):
        code, said, err = run_cli(
            *("eval", model, "--tasks", task, "--contamination", "--json", tmp_path / "out.json", "--no-resume")
        )
        assert code == 0, err
        assert "quiz, 0 shots: 2 of 5 examples occur in the training text" in said
        (found,) = json.loads((tmp_path / "out.json").read_text())["contamination"]
        assert set(found["overlaps"]) == {"0", "1"}  # what was held out for validation is clean
        assert (found["clean"]["examples"], found["dirty"]["examples"]) == (3, 2)
        assert list(found["corpora"]) == ["run (training split)"]


def test_the_files_are_read_where_the_shards_are_gone(
    run: Path, tmp_path: Path, words: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "cache"))
    task = quiz(tmp_path, words[:10_000].split(), words[:20_000].split())
    code, said, err = run_cli("eval", run, "--tasks", task, "--contamination", "--no-resume")
    assert code == 0, err
    assert "3 of 5 examples occur" in said  # the file has the text that was held out, too
    moved = run.parent / "moved.txt"
    shutil.move(run.parent / "words.txt", moved)
    try:
        code, _, err = run_cli("eval", run, "--tasks", task, "--contamination")
        assert (code, "is gone" in err, "--training-data" in err) == (1, True, True)
        code, said, err = run_cli("eval", run, "--tasks", task, "--training-data", moved, "--no-resume")
        assert code == 0, err
        assert "3 of 5 examples occur" in said
    finally:
        shutil.move(moved, run.parent / "words.txt")


def test_the_runs_that_a_run_began_with(run: Path, tmp_path: Path) -> None:
    child = tmp_path / "child"
    shutil.copytree(run, child, symlinks=True)
    info: dict[str, Any] = json.loads((child / "run.json").read_text())
    info["config"]["init"]["init"] = str(run)
    (child / "run.json").write_text(json.dumps(info))
    assert [each.name for each in corpora_of(child)] == ["child (training split)", "run (training split)"]


def test_runs_on_rows_and_on_prompts_that_a_task_makes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    shutil.copytree(run, child, symlinks=True)
    info: dict[str, Any] = json.loads((child / "run.json").read_text())
    said = " ".join(prose(14, 1))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": said}]}) + "\n")
    info |= {"objective": "sft", "data": {"spec": str(tmp_path / "chats.jsonl"), "val": None, "fingerprint": "f" * 64}}
    (child / "run.json").write_text(json.dumps(info))
    (rows,) = corpora_of(child)
    assert list(rows.texts(lambda amount: None)) == ["user", said]
    info |= {"objective": "grpo", "data": {"spec": "task:arithmetic", "val": None, "fingerprint": None}}
    (child / "run.json").write_text(json.dumps(info))
    assert corpora_of(child) == []
    assert "was trained on prompts that task:arithmetic makes" in capsys.readouterr().err


def test_models_that_are_no_runs(run: Path, tmp_path: Path, run_cli: Cli) -> None:
    with pytest.raises(UsageError, match="smollm2-135m is not a run.*--training-data"):
        corpora_of("smollm2-135m")
    child = tmp_path / "child"
    shutil.copytree(run, child, symlinks=True)
    info: dict[str, Any] = json.loads((child / "run.json").read_text())
    info["data"] = {"spec": None, "val": None, "fingerprint": None}
    (child / "run.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="does not record its training text"):
        corpora_of(child)
    code, _, err = run_cli("eval", run, "--contamination", "--induction")
    assert (code, "--contamination has no effect without --tasks" in err) == (2, True)
