"""Inputs of task heads: the shapes of GPT-1, what is cut, and batches that can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.data.conversations import Counts, RowError
from gptsmith.data.labels import Labeled, LabeledData, Task
from gptsmith.data.task_inputs import (
    DELIMITER,
    EXTRACT,
    START,
    LabeledExamples,
    LabeledLoader,
    TaskInput,
    labeled_batch,
    task_inputs,
    with_task_tokens,
)
from gptsmith.errors import CheckpointError, DataError, TokenizerError, UsageError
from gptsmith.model.config import IGNORED
from gptsmith.tokenizer import Tokenizer, train_bpe
from tests.factories import tiny_model
from tests.foreign import sentencepiece

TEXT = "It rains, so the street is wet. The film was good, and the acting bad. <|extract|>\n" * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_task_tokens(train_bpe([TEXT], 300))[0]


def data_of(task: Task, rows: list[tuple[tuple[str, ...], float]]) -> LabeledData:
    labeled = [Labeled(f"rows.jsonl, line {i}", texts, label) for i, (texts, label) in enumerate(rows, 1)]
    names = () if task in ("regression", "multiple-choice") else ("no", "yes")
    return LabeledData(task, labeled, names, Counts())


@pytest.mark.parametrize(
    ("task", "texts", "expected"),
    [
        ("classification", ("It rains",), [(0,)]),
        ("regression", ("It rains",), [(0,)]),
        ("entailment", ("It rains", "wet"), [(0, 1)]),
        ("similarity", ("It rains", "wet"), [(0, 1), (1, 0)]),
        ("multiple-choice", ("It rains", "wet", "dry"), [(0, 1), (0, 2)]),
    ],
)
def test_shapes(tokenizer: Tokenizer, task: Task, texts: tuple[str, ...], expected: list[tuple[int, ...]]) -> None:
    tokens = tokenizer.added_tokens()
    sequences = []
    for order in expected:
        ids = [tokens[START]]
        for number, text in enumerate(order):
            ids += [tokens[DELIMITER]] * (number > 0) + tokenizer.encode(texts[text])
        sequences.append([*ids, tokens[EXTRACT]])
    assert TaskInput(tokenizer, task, seq_len=64)(texts) == sequences


def test_special_tokens_in_texts_stay_text(tokenizer: Tokenizer) -> None:
    (ids,) = TaskInput(tokenizer, "classification", seq_len=64)([f"a{EXTRACT}{START}b{DELIMITER}"])
    special = {tokenizer.added_tokens()[token] for token in (START, DELIMITER, EXTRACT)}
    assert [i for i, id in enumerate(ids) if id in special] == [0, len(ids) - 1]


def test_task_tokens_are_added_once(tokenizer: Tokenizer) -> None:
    plain = train_bpe([TEXT], 300)
    extended, new = with_task_tokens(plain)
    assert new == tuple(range(plain.vocab_size, plain.vocab_size + 3))
    assert with_task_tokens(extended) == (extended, ())
    assert (extended.eos_id, extended.encode(TEXT)) == (plain.eos_id, plain.encode(TEXT))
    with pytest.raises(TokenizerError, match="lacks the tokens <|start|>"):
        TaskInput(plain, "classification", seq_len=64)


def test_a_tokenizer_with_a_beginning_of_its_own_starts_with_it() -> None:
    own = Tokenizer(sentencepiece().to_str(), {"eos_token": "</s>", "bos_token": "<s>"})
    tokenizer, new = with_task_tokens(own)
    assert [tokenizer.token_text(id) for id in new] == [DELIMITER, EXTRACT]
    (ids,) = TaskInput(tokenizer, "entailment", seq_len=64)(["a<s>", "b"])
    assert ids == [own.bos_id, *own.encode("a<s>"), new[0], *own.encode("b"), new[1]]
    assert own.bos_id not in ids[1:]


TASKS: list[Task] = ["classification", "entailment", "similarity", "multiple-choice"]


@settings(deadline=None)
@given(st.sampled_from(TASKS), st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(8, 40))
def test_cut_rows_fit_and_keep_their_form(tokenizer: Tokenizer, task: Task, lengths: list[int], seq_len: int) -> None:
    """Every part keeps its beginning, no part vanishes, and no room is wasted where something was cut."""
    if task != "multiple-choice":
        lengths = lengths[: 1 if task == "classification" else 2]
    parts = [[1000 * (n + 1) + i for i in range(length)] for n, length in enumerate(lengths)]
    inputs = TaskInput(tokenizer, task, seq_len=seq_len)
    if task == "multiple-choice" and sum(lengths[:1]) + max(lengths[1:]) > inputs.room <= max(lengths[1:]):
        with pytest.raises(RowError, match="leaves no room"):
            inputs.sequences(parts)
        return
    sequences, removed = inputs.sequences(parts)
    assert all(len(sequence) <= seq_len for sequence in sequences)
    assert not removed or max(map(len, sequences)) == seq_len
    for number, part in enumerate(parts):
        found = [[id for id in sequence if id in part] for sequence in sequences]
        assert any(found)
        for ids in filter(None, found):
            assert ids == part[: len(ids)]
            assert len(ids) == len(part) or not (task == "multiple-choice" and number)
    kept = {id for sequence in sequences for id in sequence if id >= 1000}
    assert removed == sum(lengths) - len(kept)


def data_with_long_row() -> LabeledData:
    return data_of("classification", [(("good",), 1), (("It rains " * 30,), 0), (("bad",), 0)])


def test_what_was_cut_is_counted(tokenizer: Tokenizer) -> None:
    examples, lengths = task_inputs(data_with_long_row(), tokenizer, seq_len=20)
    assert len(examples) == 3
    assert len(examples.sequences(1)[0]) == examples.longest == 20
    assert (lengths.rows_cut, lengths.rows) == (1, 3)
    assert lengths.tokens_cut == len(tokenizer.encode("It rains " * 30)) - 18
    assert lengths.summary(20).startswith("1 of 3 rows are longer than the context of 20 and were cut: ")
    assert not task_inputs(data_with_long_row(), tokenizer, seq_len=400)[1].summary(400)


def test_long_rows_are_left_out_or_refused(tokenizer: Tokenizer) -> None:
    data = data_with_long_row()
    assert len(task_inputs(data, tokenizer, seq_len=20, on_long="skip")[0]) == 2
    assert data.counts.describe_skipped() == "1: longer than the context of 20 (first: rows.jsonl, line 2)"
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: the row has \d+ tokens, more than the context of 20"):
        task_inputs(data_with_long_row(), tokenizer, seq_len=20, on_long="error")
    with pytest.raises(DataError, match="no row is left to train on: 1: longer than the context of 20"):
        task_inputs(data_of("classification", [(("It rains " * 30,), 0)]), tokenizer, seq_len=20, on_long="skip")
    data = data_of("classification", [(("good",), 1), (("It rains " * 30,), 0), (("bad",), 1)])
    with pytest.raises(DataError, match="all rows that are left have the same label"):
        task_inputs(data, tokenizer, seq_len=20, on_long="skip")
    with pytest.raises(UsageError, match="a context of 2 tokens is too short"):
        TaskInput(tokenizer, "classification", seq_len=2)


def test_a_choice_is_never_cut(tokenizer: Tokenizer) -> None:
    data = data_of("multiple-choice", [(("It rains", "wet", "The film was good, " * 9), 0)])
    with pytest.raises(DataError, match="line 1: a choice leaves no room for its context in 20 tokens"):
        task_inputs(data, tokenizer, seq_len=20)


def test_texts_without_tokens_are_named() -> None:
    tokenizer = with_task_tokens(Tokenizer.from_json(_characters("abc")))[0]
    data = data_of("classification", [(("ab",), 1), (("xyz",), 0), (("c",), 0)])
    with pytest.raises(DataError, match="rows.jsonl, line 2: .*'x'"):
        task_inputs(data, tokenizer, seq_len=20)
    assert len(task_inputs(data, tokenizer, seq_len=20, on_bad="skip")[0]) == 2
    assert sum(data.counts.skipped.values()) == 1


def _characters(alphabet: str) -> str:
    from gptsmith.tokenizer import train_char

    return train_char([alphabet]).to_json()


def examples_of(per_row: list[list[int]], *, labels: list[float] | None = None) -> LabeledExamples:
    random = np.random.default_rng(0)
    found = [[random.integers(1, 30, n).tolist() for n in row] for row in per_row]
    values = labels or [float(i % 2) for i in range(len(found))]
    return LabeledExamples(zip(found, values, strict=True), has_numbers=False)


def test_batches() -> None:
    examples = examples_of([[5, 7], [3], [9, 4, 2]])
    batch = labeled_batch(examples, [2, 1, 0])
    assert batch.ids.shape == (3, 3, 9)
    assert batch.lengths.tolist() == [[9, 4, 2], [3, 0, 0], [5, 7, 0]]
    assert batch.labels.tolist() == [0, 1, 0]
    assert batch.labels.dtype == torch.int64
    for b, row in enumerate([2, 1, 0]):
        for c, sequence in enumerate(examples.sequences(row)):
            n = len(sequence)
            assert batch.ids[b, c, :n].tolist() == sequence.tolist()
            assert batch.targets[b, c].tolist() == [*sequence[1:].tolist(), *[IGNORED] * (9 - n + 1)]
    assert (batch.targets[batch.lengths == 0] == IGNORED).all()
    part = batch.slice(1, 3)
    assert part.num_rows == 2
    assert torch.equal(part.ids, batch.ids[1:3])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_head_reads_the_last_token_of_each_row_whatever_its_ids(family: str) -> None:
    """Padding is told from tokens by lengths: texts may have the id of padding anywhere
    (huggingface/transformers#35352 takes the first pad id, an end-of-text token inside the prompt, as the end)."""
    model = tiny_model(family)
    rows = [[[4, 0, 0, 9, 0]], [[1, 2, 3, 4, 5, 6, 7, 0, 0]], [[0, 0]]]
    examples = LabeledExamples(((row, float(i % 2)) for i, row in enumerate(rows)), has_numbers=False)
    batch = labeled_batch(examples, range(3))
    with torch.no_grad():
        logits = model(batch.ids[:, 0])
        for b, (sequence,) in enumerate(rows):
            alone = model(torch.tensor([sequence]))[0, -1]
            assert torch.allclose(logits[b, batch.lengths[b, 0] - 1], alone, atol=1e-5)


@pytest.mark.parametrize("longest", [5, 40, 90])
def test_batches_are_not_wider_than_the_context(longest: int) -> None:
    assert labeled_batch(examples_of([[3], [longest]]), [0, 1]).ids.shape[2] <= longest


def test_the_position_is_the_only_state() -> None:
    examples = examples_of([[n] for n in range(2, 13)])
    loader = LabeledLoader(examples, batch_size=2, seed=3)
    batches = [next(loader) for _ in range(11)]
    again = LabeledLoader(examples, batch_size=2, seed=3)
    again.load_state_dict({**loader.state_dict(), "position": 8})
    assert torch.equal(next(again).ids, batches[4].ids)
    seen = [int(n) for batch in batches for n in batch.lengths[:, 0]]
    assert sorted(seen[:11]) == sorted(seen[11:]) == list(range(2, 13))
    assert seen[:11] != seen[11:]
    assert [int(n) for batch in loader.whole(4) for n in batch.lengths[:, 0]] == list(range(2, 13))
    for other in (
        LabeledLoader(examples, batch_size=2, seed=4),
        LabeledLoader(examples.select(range(10)), batch_size=2, seed=3),
    ):
        with pytest.raises(CheckpointError, match="cannot resume"):
            other.load_state_dict(loader.state_dict())


def test_the_label_is_part_of_the_fingerprint() -> None:
    one, other = (examples_of([[3], [4]], labels=labels) for labels in ([0.0, 1.0], [1.0, 0.0]))
    assert one.fingerprint() != other.fingerprint()


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.floats(0, 0.9), st.integers(0, 3), st.booleans())
def test_split(labels: list[int], fraction: float, seed: int, stratify: bool) -> None:
    examples = examples_of([[2]] * len(labels), labels=[float(label) for label in labels])
    examples.ids = np.arange(len(examples.ids), dtype=np.int32)
    train, val = examples.split(fraction, seed=seed, stratify=stratify)
    first = [int(part.sequences(i)[0][0]) for part in (train, val) for i in range(len(part))]
    assert sorted(first) == list(range(0, 2 * len(labels), 2))
    assert len(train) >= 1
    assert bool(len(val)) == (fraction > 0 and len(labels) > 1)
    if stratify and len(val) > 1:
        for label in set(labels):
            assert (val.labels == label).sum() == int(labels.count(label) * fraction)


def test_split_of_files_sorted_by_label() -> None:
    examples = examples_of([[2]] * 100, labels=[0.0] * 50 + [1.0] * 50)
    train, val = examples.split(0.2, seed=0, stratify=True)
    assert [int((part.labels == label).sum()) for part in (train, val) for label in (0, 1)] == [40, 40, 10, 10]
    with pytest.raises(UsageError, match="validation fraction"):
        examples.split(1.0, seed=0, stratify=True)


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    rows: list[Any] = [([[1, 2]], 0.5), ([[3, 4]], 2.25)]
    batch = labeled_batch(LabeledExamples(rows, has_numbers=True), [1, 0])
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [2.25, 0.5]
