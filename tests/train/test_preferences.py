"""The preferences of a run: what is read, held out, counted and left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptsmith.data.packing import packed_batch
from gptsmith.errors import DataError, UsageError
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.train.config import PreferenceConfig, RunConfig
from gptsmith.train.preferences import (
    LabeledRows,
    Pair,
    Pairs,
    PreferenceFiles,
    Preferences,
    settle_preferences,
)
from gptsmith.train.row_files import hold_out


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["abcdefghijklmnopqrstuvwxyz 0123456789=+.:\nUAser"])


def config(**options: Any) -> RunConfig:
    return RunConfig(method=PreferenceConfig()).replace(**options)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(number: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} is", "chosen": f" {i}", "rejected": " no", **fields} for i in range(number)]


def rated(labels: list[bool]) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} is", "completion": f" {i}", "label": label} for i, label in enumerate(labels)]


def prepare(path: Path, tokenizer: Tokenizer, **options: Any) -> Preferences:
    chosen = config(**options)
    return PreferenceFiles.open(str(path), chosen).prepare(chosen, tokenizer)


def test_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "p.jsonl", pairs(20, margin=0.5))
    data = prepare(path, tokenizer)
    assert (len(data.train), len(data.val)) == (18, 2)
    pair = data.train[0]
    assert isinstance(pair, Pair)
    assert tokenizer.decode(pair.chosen.ids) == "0 is 0"
    assert tokenizer.decode(pair.rejected.ids) == "0 is no"
    assert (pair.margin, pair.place) == (0.5, f"{path}, line 1")
    assert [item.place for item in data.val] == [f"{path}, line {n}" for n in (19, 20)]
    assert "20 pairs of answers (prompt 20), 2 of them held out" in data.summary()
    assert data.record()["train_rows"] == 18
    train, _ = data.pairs()
    marked = [sum(p.chosen.trained) + sum(p.rejected.trained) for p in train]
    assert data.record()["trained_tokens"] == sum(marked)
    batch = packed_batch(train.chosen, [[0], [1]], 16)
    assert int(batch.num_targets) == sum(sum(p.chosen.trained) for p in train[:2])
    assert train[-1] == train[17]


def test_rated_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = prepare(write(tmp_path / "p.jsonl", rated([True, False] * 10)), tokenizer)
    train, val = data.labeled()
    assert [row.desirable for row in train] == [True, False] * 9
    assert (len(val), data.record()["desirable"]) == (2, 9)
    with pytest.raises(UsageError, match="are rated answers .*--loss kto"):
        data.pairs()


def test_pairs_as_rated_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = prepare(write(tmp_path / "p.jsonl", pairs(10)), tokenizer)
    train, _ = data.labeled()
    pair = data.pairs()[0][3]
    assert [(row.example, row.desirable) for row in train[6:8]] == [(pair.chosen, True), (pair.rejected, False)]


@pytest.mark.parametrize("label", [True, False])
def test_one_sided_ratings_are_refused(label: bool, tmp_path: Path, tokenizer: Tokenizer) -> None:
    side = "good" if label else "bad"
    path = write(tmp_path / "p.jsonl", rated([label] * 10))
    for bad_rows in ("error", "skip"):
        with pytest.raises(DataError, match=f"all 9 answers to train on are rated {side} .first: .*line 1"):
            prepare(path, tokenizer, bad_rows=bad_rows)
    write(path, rated([label] * 18 + [not label] * 2))  # sorted: training would have one side
    with pytest.raises(DataError, match="mix its rows"):
        prepare(path, tokenizer)


def test_one_sided_after_long_answers_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = rated([True] * 10)
    rows[3] = {"prompt": "3 is", "completion": "x" * 50, "label": False}
    data = prepare(write(tmp_path / "p.jsonl", rows), tokenizer)
    with pytest.raises(DataError, match="are rated good"):
        data.within(30)


def test_long_answers_are_counted_never_cut(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs(20)
    rows[4]["rejected"] = " no" * 20
    data = prepare(write(tmp_path / "p.jsonl", rows), tokenizer)
    kept = data.within(20)
    assert "1 pairs are longer than the context of 20 tokens and are left out" in capsys.readouterr().err
    assert (len(kept.train), kept.longest <= 20) == (17, True)
    assert [p.place for p in kept.train] == [p.place for p in data.train if "line 5" not in p.place]
    assert data.within(data.longest) is data
    with pytest.raises(DataError, match="1 pairs are longer than --context 20: up to 65 tokens.*--too-long skip"):
        data.within(20, on_long="error")
    with pytest.raises(DataError, match="every one of the pairs is longer than --context 3"):
        data.within(3)


def test_bad_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = pairs(5)
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[3]["chosen"] = "ÄÖÜ"  # unknown to the tokenizer
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError, match=r"line 3: the chosen answer equals"):
        prepare(path, tokenizer)
    data = prepare(path, tokenizer, bad_rows="skip")
    assert len(data.train) + len(data.val) == 3
    assert data.record()["forms"] == {"prompt": 3}
    assert "left out 2 rows: 1: the chosen answer equals" in data.summary()
    with pytest.raises(DataError, match="has no preference to train on"):
        prepare(write(tmp_path / "q.jsonl", rows[2:4]), tokenizer, bad_rows="skip")


def test_held_out_prompts_are_not_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"{i % 10} is", "completions": [" a", f" {i}", " c"], "ranks": [1, 2, 3]} for i in range(20)]
    data = prepare(write(tmp_path / "p.jsonl", rows), tokenizer)
    held = {tuple(p.chosen.ids[:4]) for p in data.val}  # type: ignore[union-attr]
    assert len(data.val) == 6
    assert not held & {tuple(p.chosen.ids[:4]) for p in data.train}  # type: ignore[union-attr]


def test_what_is_held_out() -> None:
    assert hold_out([1, 2, 3, 4], 0.25) == [False, False, False, True]
    assert hold_out([1, 1, 2, 3], 0.5) == [False, False, True, True]
    assert hold_out([3, 1, 2, 1], 0.25) == [False, False, True, False]
    assert hold_out([1, 1, 1, 1], 0.25) == [False, False, False, True]  # all have one prompt
    assert hold_out([1, 2], 0) == [False, False]
    assert hold_out([1], 0.5) == [False]


def test_validation_data_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, val = write(tmp_path / "p.jsonl", pairs(4)), write(tmp_path / "v.jsonl", pairs(2))
    data = prepare(path, tokenizer, val=str(val))
    assert (len(data.train), len(data.val)) == (4, 2)
    write(val, rated([True, False]))
    with pytest.raises(DataError, match="must both be pairs, or both rated"):
        prepare(path, tokenizer, val=str(val))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", pairs(4))
    write(folder / "test.jsonl", pairs(1))
    write(folder / "validation.jsonl", pairs(3))
    assert len(prepare(folder, tokenizer).val) == 3


def test_settings_follow_from_the_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = prepare(write(tmp_path / "p.jsonl", pairs(40)), tokenizer)
    settled = settle_preferences(config(epochs=2, batch_size=8, context=256), {"epochs", "batch_size"}, data)
    assert (settled.loop.context, settled.loop.steps) == (64, 9)
    assert settle_preferences(config(steps=3), {"steps"}, data).loop.steps == 3
    assert settle_preferences(config(batch_size=100), (), data).loop.batch_size == 36


def test_fingerprints_tell_data_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = pairs(10)
    path = tmp_path / "p.jsonl"
    found = {prepare(write(path, rows), tokenizer).fingerprint}
    rows[0]["margin"] = 1
    found.add(prepare(write(path, rows), tokenizer).fingerprint)
    rows[1]["rejected"] = " nope"
    found.add(prepare(write(path, rows), tokenizer).fingerprint)
    found.add(prepare(path, tokenizer, val_fraction=0.2).fingerprint)
    assert len(found) == 4
    assert prepare(path, tokenizer).fingerprint == prepare(path, tokenizer).fingerprint


def test_kinds() -> None:
    assert not Pairs([]).lengths()
    assert not LabeledRows([]).lengths()


@pytest.mark.network
def test_named_data_sets(tokenizer: Tokenizer) -> None:
    """All rows of the demonstration sets of LLaMA-Factory are usable, but for their characters."""
    from gptsmith.tokenizer import gpt2_tokenizer

    for name, number in (("dpo_en_demo", 300), ("kto_en_demo", 300)):
        chosen = config(bad_rows="skip")
        files = PreferenceFiles.open(name, chosen)
        assert files.needs_template()
        data = files.prepare(chosen, gpt2_tokenizer())
        assert len(data.train) + len(data.val) == number
        assert files.places()["spec"] == name
