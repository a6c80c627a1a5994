"""Labeled texts as token ids, in the shapes that a task head reads, and batches of them.

    tokenizer, new = with_task_tokens(tokenizer)                       # new: ids that the model has no embedding for
    examples, lengths = task_inputs(data, tokenizer, seq_len=512)
    loader = LabeledLoader(examples, batch_size=8, seed=0)
    batch = next(loader)                                               # the head reads position lengths - 1

The shapes are those of GPT-1 (Radford et al. 2018, section 3.2 and figure 1):

| task | sequences of a row |
|---|---|
| classification, regression | start · text · extract |
| entailment | start · premise · delimiter · hypothesis · extract |
| similarity | start · one · delimiter · other · extract, and the same in the other order |
| multiple-choice | start · context · delimiter · choice · extract, for each choice |

The texts are encoded apart, so no token spans two of them, and a text that spells a special token does not become it.
Where a tokenizer begins texts with a token of its own (<s>), that is the start.

Axis letters: B rows · C sequences of a row · T tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptsmith.data.conversations import RowError, bad_row
from gptsmith.data.labels import LabeledData, OnBad, Task
from gptsmith.data.loader import RowLoader, permuted, seed_key
from gptsmith.errors import DataError, TokenizerError, UsageError
from gptsmith.model.config import IGNORED
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chatml import with_special_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

START, DELIMITER, EXTRACT = "<|start|>", "<|delimiter|>", "<|extract|>"
OnLong = Literal["truncate", "skip", "error"]

_ROWS_AT_ONCE = 256  # rows that are tokenized together
_WIDTH_STEP = 32  # batches are padded to a multiple of this


def with_task_tokens(tokenizer: Tokenizer) -> tuple[Tokenizer, tuple[int, ...]]:
    """Return the tokenizer with the special tokens of task inputs, and the ids of those that are new."""
    return with_special_tokens(tokenizer, (DELIMITER, EXTRACT) if tokenizer.prefix_ids else (START, DELIMITER, EXTRACT))


class TaskInput:
    """Turns the texts of a row into sequences of token ids of at most `seq_len`.

    Raises TokenizerError if the tokenizer lacks the special tokens; see `with_task_tokens`.
    """

    def __init__(self, tokenizer: Tokenizer, task: Task, *, seq_len: int, on_long: OnLong = "truncate") -> None:
        added = tokenizer.added_tokens()
        needed = [DELIMITER, EXTRACT] if tokenizer.prefix_ids else [START, DELIMITER, EXTRACT]
        if missing := [token for token in needed if token not in added]:
            raise TokenizerError(f"the tokenizer lacks the tokens {', '.join(missing)} of task inputs.")
        self.tokenizer, self.task, self.seq_len, self.on_long = tokenizer, task, seq_len, on_long
        self.start = list(tokenizer.prefix_ids) or [added[START]]
        self.delimiter, self.extract = added[DELIMITER], added[EXTRACT]
        self.num_parts = 1 if task in ("classification", "regression") else 2
        self.room = seq_len - len(self.start) - self.num_parts  # for texts: each is followed by a special token
        if self.room < self.num_parts:
            raise UsageError(f"a context of {seq_len} tokens is too short for the task {task}.")

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the sequences of a row. Raise RowError for a row that cannot be encoded or is too long."""
        return self.sequences([self._encode(text) for text in texts])[0]

    def sequences(self, parts: Sequence[Sequence[int]]) -> tuple[list[list[int]], int]:
        """Return the sequences of a row whose texts have these ids, and how many ids of its texts were cut off.

        Of two texts the longer one is cut first, at its end. Of a choice nothing is cut: its context is, equally for
        all choices of the row. Raises RowError for a row that is too long, as `on_long` says.
        """
        if not all(parts):
            raise RowError("the tokenizer has no token for a text of the row.")
        kept = self._cut(parts)
        removed = sum(map(len, parts)) - sum(map(len, kept))
        if self.num_parts == 1:
            pairs = [tuple(kept)]
        elif self.task == "similarity":
            pairs = [(kept[0], kept[1]), (kept[1], kept[0])]
        elif self.task == "entailment":
            pairs = [(kept[0], kept[1])]
        else:
            pairs = [(kept[0], choice) for choice in kept[1:]]
        return [self._joined(pair) for pair in pairs], removed

    def _joined(self, parts: Sequence[Sequence[int]]) -> list[int]:
        ids = [*self.start, *parts[0]]
        for part in parts[1:]:
            ids += [self.delimiter, *part]
        return [*ids, self.extract]

    def _cut(self, parts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        lengths = [len(part) for part in parts]
        if self.task == "multiple-choice":
            length = lengths[0] + max(lengths[1:])
        else:
            length = sum(lengths)
        if length <= self.room:
            return list(parts)
        if self.on_long != "truncate":
            needed = length + self.seq_len - self.room
            raise _LongRowError(f"the row has {needed:,} tokens, more than the context of {self.seq_len:,}.")
        if self.task == "multiple-choice":
            left = self.room - max(lengths[1:])
            if left < 1:
                raise RowError(f"a choice leaves no room for its context in {self.seq_len:,} tokens.")
            return [parts[0][:left], *parts[1:]]
        if len(parts) == 1:
            return [parts[0][: self.room]]
        short = min(min(lengths), self.room // 2)
        limits = [short, self.room - short] if lengths[0] <= lengths[1] else [self.room - short, short]
        return [part[:limit] for part, limit in zip(parts, limits, strict=True)]

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except TokenizerError as error:
            raise RowError(str(error)) from None

    def encode_all(self, texts: Sequence[str]) -> list[list[int] | RowError]:
        """Return the ids of each text, or why it has none."""
        try:
            return list(self.tokenizer.encode_batch(texts))
        except TokenizerError:
            return [self._encode_or_error(text) for text in texts]

    def _encode_or_error(self, text: str) -> list[int] | RowError:
        try:
            return self._encode(text)
        except RowError as error:
            return error


class _LongRowError(RowError):
    """A row that does not fit into the context, where nothing is to be cut."""


class LabeledExamples:
    """Sequences and labels in flat arrays.

    ids: (N,) int32, of all sequences. starts: where each sequence begins, and N. rows: the first sequence of each row,
    and their number. labels: (rows,) float64, a number or the index of a class or choice.
    """

    def __init__(
        self, rows: Iterable[tuple[Sequence[Sequence[int] | NDArray[np.int32]], float]], *, has_numbers: bool
    ) -> None:
        ids: list[NDArray[np.int32]] = []
        per_row: list[int] = []
        labels: list[float] = []
        for sequences, label in rows:
            ids += [np.array(sequence, dtype=np.int32) for sequence in sequences]
            per_row.append(len(sequences))
            labels.append(label)
        self.has_numbers = has_numbers
        self.ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.starts: NDArray[np.int64] = np.cumsum([0, *(len(part) for part in ids)], dtype=np.int64)
        self.rows: NDArray[np.int64] = np.cumsum([0, *per_row], dtype=np.int64)
        self.labels = np.array(labels, dtype=np.float64)
        self.longest = max(map(len, ids), default=0)  # tokens

    def __len__(self) -> int:
        return len(self.labels)

    def sequences(self, row: int) -> list[NDArray[np.int32]]:
        """Return the sequences of a row."""
        return [self.ids[self.starts[s] : self.starts[s + 1]] for s in range(self.rows[row], self.rows[row + 1])]

    def select(self, indices: Iterable[int]) -> LabeledExamples:
        """Return the examples with these indices."""
        chosen = ((self.sequences(i), float(self.labels[i])) for i in indices)
        return LabeledExamples(chosen, has_numbers=self.has_numbers)

    def split(self, fraction: float, *, seed: int, stratify: bool) -> tuple[LabeledExamples, LabeledExamples]:
        """Return training and validation examples, chosen at random: files are often sorted by label.

        stratify: take the fraction of each label, so that rare classes are in both. At least one row is held out if
        the fraction is not 0, and at least one is left to train on. Raises UsageError for other fractions than [0, 1).
        """
        if not 0 <= fraction < 1:
            raise UsageError(f"the validation fraction must be at least 0 and less than 1, not {fraction}.")
        order = self._order(seed)
        groups = [order[self.labels[order] == label] for label in np.unique(self.labels)] if stratify else [order]
        held_out = {int(i) for group in groups for i in group[: math.floor(len(group) * fraction)]}
        if not held_out and fraction and len(self) > 1:
            held_out = {int(max(groups, key=len)[0])}
        kept = [i for i in range(len(self)) if i not in held_out]
        return self.select(kept), self.select(sorted(held_out))

    def _order(self, seed: int) -> NDArray[np.int64]:
        """Return all indices in an order that depends on the seed."""
        index = np.arange(len(self), dtype=np.uint64)
        if len(index) > 1:
            index = permuted(index, len(index), seed_key(seed)(np.zeros(len(index), np.uint64)))
        return index.astype(np.int64)

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of ids, lengths and labels."""
        digest = hashlib.sha256(b"labeled examples\n")
        for array in (self.ids, self.starts, self.rows, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass
class Lengths:
    """What the context made of the rows. rows_cut: rows that lost some of their tokens."""

    rows: int = 0
    rows_cut: int = 0
    tokens: int = 0
    tokens_cut: int = 0

    def summary(self, seq_len: int) -> str:
        """Return in words what was cut off; "" for nothing."""
        if not self.rows_cut:
            return ""
        return (
            f"{self.rows_cut:,} of {self.rows:,} rows are longer than the context of {seq_len:,} and were cut: "
            f"{self.tokens_cut / self.tokens:.1%} of all tokens"
        )


def task_inputs(
    data: LabeledData,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    on_long: OnLong = "truncate",
    on_bad: OnBad = "error",
    advance: Callable[[int], None] | None = None,
) -> tuple[LabeledExamples, Lengths]:
    """Return the rows of `data` as token ids, and what was cut off.

    on_long: cut rows that are longer than `seq_len`, leave them out and count them in `data.counts`, or stop.
    on_bad: what to do with a row that the tokenizer cannot encode. advance: called with the number of rows done.
    Raises DataError, which names the row, and where no row is left.
    """
    inputs, lengths = TaskInput(tokenizer, data.task, seq_len=seq_len, on_long=on_long), Lengths()
    rows = _rendered(data, inputs, lengths, on_bad, advance)
    examples = LabeledExamples(rows, has_numbers=data.has_numbers)
    if not len(examples):
        raise DataError(f"no row is left to train on: {data.counts.describe_skipped()}.")
    if data.task != "multiple-choice" and len(examples) < len(data.rows) and len(np.unique(examples.labels)) == 1:
        raise DataError(f"all rows that are left have the same label: {data.counts.describe_skipped()}.")
    return examples, lengths


def _rendered(
    data: LabeledData, inputs: TaskInput, lengths: Lengths, on_bad: OnBad, advance: Callable[[int], None] | None
) -> Iterator[tuple[list[list[int]], float]]:
    for first in range(0, len(data.rows), _ROWS_AT_ONCE):
        rows = data.rows[first : first + _ROWS_AT_ONCE]
        encoded = iter(inputs.encode_all([text for row in rows for text in row.texts]))
        for row in rows:
            parts = [next(encoded) for _ in row.texts]
            try:
                sequences, removed = inputs.sequences(_without_errors(parts))
            except _LongRowError as error:
                if inputs.on_long == "error":
                    raise DataError(f"{row.where}: {error} Use a longer context, or cut or skip such rows.") from None
                data.counts.skip(f"longer than the context of {inputs.seq_len:,}", row.where)
                continue
            except RowError as error:
                bad_row(error, row.where, on_bad, data.counts)
                continue
            lengths.rows += 1
            lengths.rows_cut += removed > 0
            lengths.tokens += sum(len(part) for part in parts if isinstance(part, list))
            lengths.tokens_cut += removed
            yield sequences, row.label
        if advance is not None:
            advance(len(rows))


def _without_errors(parts: Sequence[list[int] | RowError]) -> list[list[int]]:
    found = []
    for part in parts:
        if isinstance(part, RowError):
            raise part
        found.append(part)
    return found


@dataclass(frozen=True)
class LabeledBatch:
    """A batch of rows.

    ids: (B, C, T) int64, zeros after the end of a sequence. lengths: (B, C) int64, 0 where a row has fewer than C
    sequences. labels: (B,) int64, or float32 for numbers. The head reads position lengths - 1, the extract token.
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor

    @property
    def num_rows(self) -> int:
        """B."""
        return self.ids.shape[0]

    @property
    def targets(self) -> Tensor:
        """The token after each one, for the auxiliary language-model loss: (B, C, T) int64, -100 at the end."""
        import torch

        targets = torch.full_like(self.ids, IGNORED)
        targets[..., :-1] = self.ids[..., 1:]
        position = torch.arange(self.ids.shape[2], device=self.ids.device)
        return targets.masked_fill(position + 1 >= self.lengths[..., None], IGNORED)

    def slice(self, start: int, stop: int) -> LabeledBatch:
        """Return rows [start, stop), without copying."""
        return LabeledBatch(self.ids[start:stop], self.lengths[start:stop], self.labels[start:stop])

    def to(self, device: torch.device) -> LabeledBatch:
        """Return the batch on `device`."""
        return LabeledBatch(self.ids.to(device), self.lengths.to(device), self.labels.to(device))


class LabeledLoader(RowLoader[LabeledBatch]):
    """Endless batches: every row once in each epoch, in an order that depends on the seed."""

    def __init__(self, examples: LabeledExamples, *, batch_size: int, seed: int) -> None:
        if not len(examples):
            raise DataError("there is no labeled row to train on.")
        self.examples = examples
        super().__init__(len(examples), batch_size=batch_size, seed=seed)

    def batch_of(self, rows: Sequence[int]) -> LabeledBatch:
        return labeled_batch(self.examples, rows)

    def _identity(self) -> dict[str, Any]:
        return {"examples": self.examples.fingerprint(), "seed": self.seed, "batch_size": self.batch_size}


def labeled_batch(examples: LabeledExamples, rows: Sequence[int]) -> LabeledBatch:
    """Return these rows as a batch, padded on the right to the longest sequence."""
    import torch

    sequences = [examples.sequences(row) for row in rows]
    longest = max(len(sequence) for row in sequences for sequence in row)
    C, T = max(map(len, sequences)), min(-(-longest // _WIDTH_STEP) * _WIDTH_STEP, examples.longest)
    ids, lengths = np.zeros((len(rows), C, T), np.int64), np.zeros((len(rows), C), np.int64)
    for b, row in enumerate(sequences):
        for c, sequence in enumerate(row):
            ids[b, c, : len(sequence)] = sequence
            lengths[b, c] = len(sequence)
    labels = torch.from_numpy(examples.labels[list(rows)])
    labels = labels.float() if examples.has_numbers else labels.long()
    return LabeledBatch(torch.from_numpy(ids), torch.from_numpy(lengths), labels)
