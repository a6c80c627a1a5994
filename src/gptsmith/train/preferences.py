"""The preferences of a run, rendered as the model is served: the data of reward models, DPO and its relatives.

    preferences = PreferenceFiles.open("preferences.jsonl", config).prepare(config, tokenizer).within(context)
    preferences.train[0].chosen.ids

Pairs and rated answers are kept as flat arrays; `Pairs.chosen`, `Pairs.rejected` and `LabeledRows.examples` go into
`gptsmith.data.packing.packed_batch` as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

from gptsmith.data.conversations import Counts, Example, RowError, bad_row
from gptsmith.data.packing import Examples
from gptsmith.data.pictures import PictureReader
from gptsmith.data.preferences import Preference, PreferenceRenderer, Rated, read_preferences
from gptsmith.data.rows import Row, Split, row_files
from gptsmith.errors import DataError, UsageError
from gptsmith.log import note, progress
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.config import PreferenceConfig, RunConfig
from gptsmith.train.row_files import RowFiles, hold_out, remind_of_template, with_context, with_epochs


class Pair(NamedTuple):
    """Two answers to one prompt, each with it; masks mark the answer and the tokens that end it."""

    chosen: Example
    rejected: Example
    margin: float | None
    place: str


class Labeled(NamedTuple):
    """An answer with its prompt, and whether it is a good one; the mask is as for `Pair`."""

    example: Example
    desirable: bool
    place: str


class Pairs(Sequence[Pair]):
    """Pairs of answers. places: the file and line of each."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.chosen = Examples(pair.chosen for pair in pairs)
        self.rejected = Examples(pair.rejected for pair in pairs)
        self.margins = [pair.margin for pair in pairs]
        self.places = [pair.place for pair in pairs]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return Pair(self.chosen[index], self.rejected[index], self.margins[index], self.places[index])

    def lengths(self) -> list[int]:
        """Return the number of tokens of the longer answer of each pair, with its prompt."""
        return [max(map(int, both)) for both in zip(self.chosen.lengths, self.rejected.lengths, strict=True)]

    def fingerprint(self) -> str:
        return f"pairs {self.chosen.fingerprint()} {self.rejected.fingerprint()} {self.margins}"


class LabeledRows(Sequence[Labeled]):
    """Rated answers. places: the file and line of each."""

    def __init__(self, rows: Sequence[Labeled]) -> None:
        self.examples = Examples(row.example for row in rows)
        self.desirable = [row.desirable for row in rows]
        self.places = [row.place for row in rows]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Labeled: ...
    @overload
    def __getitem__(self, index: slice) -> list[Labeled]: ...
    def __getitem__(self, index: int | slice) -> Labeled | list[Labeled]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return Labeled(self.examples[index], self.desirable[index], self.places[index])

    def lengths(self) -> list[int]:
        """Return the number of tokens of each answer, with its prompt."""
        return [int(length) for length in self.examples.lengths]

    def fingerprint(self) -> str:
        return f"labeled {self.examples.fingerprint()} {self.desirable}"


Part: TypeAlias = Pairs | LabeledRows


@dataclass(frozen=True)
class Preferences:
    """Preferences ready for training: pairs in both parts, or rated answers in both.

    picture_reader: how the model reads pictures.
    """

    train: Part
    val: Part
    counts: Counts
    picture_reader: PictureReader | None = None

    @property
    def are_pairs(self) -> bool:
        return isinstance(self.train, Pairs)

    def pairs(self) -> tuple[Pairs, Pairs]:
        """Return the pairs of training and validation. Raise UsageError for rated answers."""
        if isinstance(self.train, Pairs) and isinstance(self.val, Pairs):
            return self.train, self.val
        raise UsageError(
            f"the data are rated answers (first: {self.train.places[0]}), and this method learns from pairs: prompt, "
            "chosen and rejected. Rated answers are for --loss kto."
        )

    def labeled(self) -> tuple[LabeledRows, LabeledRows]:
        """Return the rated answers of training and validation; of a pair, the chosen one is good, the other bad."""
        train, val = (
            part if isinstance(part, LabeledRows) else LabeledRows(list(_rated(part)))
            for part in (self.train, self.val)
        )
        return train, val

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.train.fingerprint()} {self.val.fingerprint()}".encode()).hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return max(max(part.lengths()) for part in (self.train, self.val) if len(part))

    def record(self) -> dict[str, Any]:
        """Return the sizes, for run.json."""
        sizes = {"train_rows": len(self.train), "val_rows": len(self.val)}
        for name, part in (("train", self.train), ("val", self.val)):
            parts = (part.chosen, part.rejected) if isinstance(part, Pairs) else (part.examples,)
            sizes[f"{name}_tokens"] = sum(int(each.starts[-1]) for each in parts)
            if name == "train":
                sizes["trained_tokens"] = sum(each.num_trained for each in parts)
        record: dict[str, Any] = {"kind": "pairs" if self.are_pairs else "rated", **sizes}
        if isinstance(self.train, LabeledRows):
            record["desirable"] = sum(self.train.desirable)
        return {**record, "forms": dict(+self.counts.forms), "skipped": dict(self.counts.skipped)}

    def summary(self) -> str:
        """Return the sizes in words."""
        rows = len(self.train) + len(self.val)
        forms = ", ".join(f"{form} {number:,}" for form, number in (+self.counts.forms).most_common())
        what = "pairs of answers" if self.are_pairs else "rated answers"
        text = f"{rows:,} {what} ({forms}), {len(self.val):,} of them held out"
        if isinstance(self.train, Pairs):
            chosen, rejected = (part.num_trained / len(self.train) for part in (self.train.chosen, self.train.rejected))
            text += f"; tokens per answer: chosen {chosen:,.0f}, rejected {rejected:,.0f}"
        else:
            good = sum(self.train.desirable)
            text += f"; to train on: {good:,} good and {len(self.train) - good:,} bad ones"
        if self.counts.skipped:
            text += f"; left out {sum(self.counts.skipped.values()):,} rows: {self.counts.describe_skipped()}"
        return text

    def within(self, context: int, *, on_long: str = "skip") -> Preferences:
        """Return those whose answers, with their prompt, have at most `context` tokens.

        on_long: "skip" counts the others and says so, "error" refuses them. Raises DataError where nothing is left.
        """
        train, val = ([length <= context for length in part.lengths()] for part in (self.train, self.val))
        num_long = train.count(False) + val.count(False)
        if not num_long:
            return self
        what = "pairs" if self.are_pairs else "answers"
        if on_long == "error":
            raise DataError(
                f"{num_long:,} {what} are longer than --context {context:,}: up to {self.longest:,} tokens. Set "
                f"--context {self.longest} or more, or leave them out with --too-long skip."
            )
        if not any(train):
            raise DataError(
                f"every one of the {what} is longer than --context {context:,}; the shortest has "
                f"{min(self.train.lengths()):,} tokens. Set a longer --context, if the model allows it."
            )
        note(f"{num_long:,} {what} are longer than the context of {context:,} tokens and are left out")
        kept = replace(self, train=_chosen(self.train, train), val=_chosen(self.val, val))
        check_two_sided(kept.train)
        return kept


def _chosen(part: Part, keep: Sequence[bool]) -> Part:
    if isinstance(part, Pairs):
        return Pairs([part[i] for i, chosen in enumerate(keep) if chosen])
    return LabeledRows([part[i] for i, chosen in enumerate(keep) if chosen])


def _rated(pairs: Pairs) -> Iterator[Labeled]:
    for pair in pairs:
        yield Labeled(pair.chosen, True, pair.place)
        yield Labeled(pair.rejected, False, pair.place)


def check_two_sided(part: Part) -> None:
    """Raise DataError for rated answers that are all good, or all bad: nothing can be learned from them."""
    if isinstance(part, LabeledRows) and len(set(part.desirable)) == 1:
        side = "good" if part.desirable[0] else "bad"
        raise DataError(
            f"all {len(part):,} answers to train on are rated {side} (first: {part.places[0]}): preferences need both "
            "good and bad answers. If the file is sorted by its labels, mix its rows."
        )


@dataclass(frozen=True)
class PreferenceFiles(RowFiles):
    """Files of preferences, opened but not yet read."""

    def prepare(self, config: RunConfig, tokenizer: Tokenizer) -> Preferences:
        """Read and render all preferences. Raise DataError for the first bad row, or as the options say.

        What is held out has prompts of its own, if validation is not a data set of its own.
        """
        method = config.method
        assert isinstance(method, PreferenceConfig)
        picture_reader, counts = self.picture_reader(tokenizer), Counts()
        renderer = PreferenceRenderer(tokenizer, form=method.prompt_form, picture_reader=picture_reader)
        num_texts = 0

        def read(path: Path, split: Split = "train") -> Iterator[tuple[Row, Preference | Rated]]:
            size = sum(file.stat().st_size for file in row_files(path, split))
            with progress(size, f"Reading {path.name}", "B") as bar:
                yield from read_preferences(
                    path,
                    on_bad=method.bad_rows,
                    counts=counts,
                    advance=bar.advance,
                    split=split,
                    score_margins=method.score_margins,
                )

        def rendered(path: Path, split: Split = "train") -> list[Pair] | list[Labeled]:
            pairs: list[Pair] = []
            labeled: list[Labeled] = []
            nonlocal num_texts
            for row, preference in read(path, split):
                try:
                    if isinstance(preference, Rated):
                        example = renderer.render(preference.conversation, preference.start, row.folder)
                        labeled.append(Labeled(example, preference.desirable, row.where))
                    else:
                        pairs.append(Pair(*renderer.pair(preference, row.folder), preference.margin, row.where))
                except RowError as error:
                    counts.forms[preference.form] -= 1
                    bad_row(error, row.where, method.bad_rows, counts)
                    continue
                num_texts += preference.start == 0
            return pairs or labeled

        found = rendered(self.path)
        if not found:
            raise DataError(f"{self.spec} has no preference to train on. {counts.describe_skipped()}".strip())
        if self.val is not None:
            train, val = _part(found), _part(rendered(self.val, self.val_split), like=found)
        else:
            held_out = hold_out([_prompt(item) for item in found], config.data.val_fraction)
            train, val = (
                _part([item for item, is_out in zip(found, held_out, strict=True) if is_out is part], like=found)
                for part in (False, True)
            )
        if type(train) is not type(val):
            raise DataError(f"{self.spec} and its validation data must both be pairs, or both rated answers.")
        check_two_sided(train)
        remind_of_template(tokenizer, method.prompt_form, num_texts)
        return Preferences(train, val, counts, picture_reader)

    def needs_template(self) -> bool:
        """Return whether any row is a conversation, and not plain text."""
        return any(
            not (preference.conversation if isinstance(preference, Rated) else preference.chosen).is_text
            for _, preference in read_preferences(self.path, on_bad="skip")
        )


def _part(items: Sequence[Any], *, like: Sequence[Any] = ()) -> Part:
    kind = (items or like)[0]
    return Pairs(items) if isinstance(kind, Pair) else LabeledRows(items)


def _prompt(item: Pair | Labeled) -> bytes:
    """Return the ids of the prompt and its pictures, compactly."""
    example = item.chosen if isinstance(item, Pair) else item.example
    start = example.trained.index(True)
    pictures = [picture.key.encode() for picture in example.images]
    return b" ".join([*(b"%d" % id for id in example.ids[:start]), *pictures])


def settle_preferences(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration with the context that the answers need, and the steps that the epochs take.

    A batch has --batch-size pairs (or rated answers).
    """
    assert isinstance(prepared, Preferences)
    method = config.method
    assert isinstance(method, PreferenceConfig)
    config = with_context(config, overrides, prepared.longest)
    rows = len(prepared.within(config.loop.context, on_long=method.too_long).train)
    return with_epochs(config, overrides, method.epochs, rows)
