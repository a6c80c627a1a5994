"""The prompts of a run, rendered as the model is served: the data of methods that learn from the model's own answers.

    prompts = PromptFiles.open("task:arithmetic?digits=2", config).prepare(config, tokenizer)
    prompts.train[0].ids, prompts.train[0].columns        # columns: what a reward function is given besides

DATA is a file or folder of rows, a text file with a prompt on each line, a named data set, or a task: `task:NAME`, or
`reasoning-gym:NAME`, both with options (`?digits=2&seed=1`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gptsmith.data.conversations import Counts, RowError, bad_row
from gptsmith.data.corpora import CORPORA
from gptsmith.data.prompts import PromptRenderer, PromptRow, is_text_file, read_prompts
from gptsmith.data.rows import Split, row_files
from gptsmith.data.sources import Spec
from gptsmith.errors import DataError, UsageError
from gptsmith.log import note, progress
from gptsmith.tasks.specs import is_task, open_task, task_rows
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.config import PromptConfig, RunConfig
from gptsmith.train.row_files import existing_path, hold_out, remind_of_template


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered.

    ids: as serving renders it, the beginning of the answer included. prompt: the text, or the messages. columns: the
    other fields of its row. place: the file and line, or the task and the number. tools: that the prompt was given.
    """

    ids: list[int]
    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any]
    place: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Prompts:
    """Prompts ready for training."""

    train: list[Prompt]
    val: list[Prompt]
    counts: Counts

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.val):
            for prompt in part:
                digest.update(json.dumps([prompt.ids, prompt.columns], sort_keys=True, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in [*self.train, *self.val])

    def record(self) -> dict[str, Any]:
        """Return the sizes, for run.json."""
        return {
            "train_rows": len(self.train),
            "val_rows": len(self.val),
            "train_tokens": sum(len(prompt.ids) for prompt in self.train),
            "val_tokens": sum(len(prompt.ids) for prompt in self.val),
            "forms": dict(+self.counts.forms),
            "skipped": dict(self.counts.skipped),
        }

    def summary(self) -> str:
        """Return the sizes in words."""
        forms = ", ".join(f"{form} {number:,}" for form, number in (+self.counts.forms).most_common())
        text = (
            f"{len(self.train) + len(self.val):,} prompts ({forms}), {len(self.val):,} of them held out; up to "
            f"{self.longest:,} tokens"
        )
        if columns := dict.fromkeys(name for prompt in self.train[:100] for name in prompt.columns):
            text += f"; columns: {', '.join(columns)}"
        if self.counts.skipped:
            text += f"; left out {sum(self.counts.skipped.values()):,} rows: {self.counts.describe_skipped()}"
        return text

    def within(self, context: int, *, answer_tokens: int = 1, on_long: str = "skip") -> Prompts:
        """Return those that leave room for an answer of `answer_tokens` tokens in a context of `context`.

        on_long: "skip" counts the others and says so, "error" refuses them. Raises DataError where nothing is left.
        """
        most = context - answer_tokens
        train, val = ([prompt for prompt in part if len(prompt.ids) <= most] for part in (self.train, self.val))
        num_long = len(self.train) + len(self.val) - len(train) - len(val)
        if not num_long:
            return self
        room = f"room for an answer of {answer_tokens:,} tokens in the context of {context:,}"
        if on_long == "error":
            raise DataError(
                f"{num_long:,} prompts leave no {room}: the longest has {self.longest:,} tokens. Leave them out with "
                "--too-long skip, or allow shorter answers."
            )
        if not train:
            shortest = min(len(prompt.ids) for prompt in self.train)
            raise DataError(f"no prompt leaves {room}: the shortest has {shortest:,} tokens. Allow shorter answers.")
        note(f"{num_long:,} prompts leave no {room} and are left out")
        return replace(self, train=train, val=val)


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: a file, a folder, or (path None) a task."""

    spec: str
    path: Path | None
    split: Split = "train"

    @classmethod
    def open(cls, spec: str) -> PromptSource:
        """Find the prompts. Raise UsageError or DataError where there are none."""
        if is_task(spec):
            open_task(spec)
            return cls(spec, None)
        path = existing_path(spec)
        if not is_text_file(path):
            row_files(path)
        return cls(spec, path)

    def has_validation(self) -> bool:
        return self.path is not None and self.path.is_dir() and bool(row_files(self.path, "validation"))

    def rows(self, on_bad: Literal["error", "skip"], counts: Counts) -> Iterator[tuple[str, PromptRow]]:
        """Yield the prompts, each with its place; see `read_prompts`."""
        if self.path is None:
            for number, (messages, columns) in enumerate(task_rows(self.spec)):
                counts.forms["task"] += 1
                yield f"{self.spec}, number {number}", PromptRow("task", messages, (), columns)
            return
        files = [self.path] if is_text_file(self.path) else row_files(self.path, self.split)
        with progress(sum(file.stat().st_size for file in files), f"Reading {self.path.name}", "B") as bar:
            yield from read_prompts(self.path, on_bad=on_bad, counts=counts, advance=bar.advance, split=self.split)

    @property
    def place(self) -> str:
        return self.spec if self.path is None or self.spec in CORPORA else str(self.path.resolve())


@dataclass(frozen=True)
class PromptFiles:
    """Prompts of a run, opened but not yet read.

    val: those of validation, if they are apart. val_given: whether the user chose them.
    """

    source: PromptSource
    val: PromptSource | None = None
    val_given: bool = False

    @classmethod
    def open(cls, spec: Spec, config: RunConfig) -> PromptFiles:
        """Find the prompts and those of validation. Raise UsageError or DataError where there are none."""
        if not isinstance(spec, str | Path):
            raise UsageError("prompts are one file, folder or task: put the files into a folder.")
        source, given = PromptSource.open(str(spec)), config.data.val
        val = PromptSource.open(given) if given else source
        if val.has_validation():
            if not given:
                note(f"{spec}: holding out its own split for validation, no part of the training split")
            return cls(source, replace(val, split="validation"), given is not None)
        return cls(source, val if given else None, given is not None)

    @property
    def name(self) -> str:
        if self.source.path is None:
            return self.source.spec.partition(":")[2].partition("?")[0]
        return self.source.path.name.split(".")[0] or "prompts"

    def make_tokenizer(self, config: RunConfig, overrides: Collection[str]) -> tuple[RunConfig, Tokenizer]:
        raise UsageError("answers are trained starting from a model and its tokenizer.")

    def prepare(self, config: RunConfig, tokenizer: Tokenizer) -> Prompts:
        """Read and render all prompts. Raise DataError for the first bad row, or as the options say.

        Equal prompts are either all held out or all trained on, if validation is not a data set of its own.
        """
        method = config.method
        assert isinstance(method, PromptConfig)
        renderer, counts = PromptRenderer(tokenizer, form=method.prompt_form), Counts()
        num_texts = 0

        def rendered(source: PromptSource) -> list[Prompt]:
            nonlocal num_texts
            found = []
            for place, row in source.rows(method.bad_rows, counts):
                try:
                    written, ids = renderer.render(row)
                except RowError as error:
                    counts.forms[row.form] -= 1
                    bad_row(error, place, method.bad_rows, counts)
                    continue
                num_texts += isinstance(row.prompt, str)
                text = written.prompt
                prompt = text if isinstance(text, str) else [dict(message) for message in text]
                found.append(Prompt(ids, prompt, row.columns, place, written.tools))
            return found

        found = rendered(self.source)
        if not found:
            raise DataError(f"{self.source.spec} has no prompt to train on. {counts.describe_skipped()}".strip())
        if self.val is not None:
            train, val = found, rendered(self.val)
        else:
            held_out = hold_out([tuple(prompt.ids) for prompt in found], config.data.val_fraction)
            train, val = (
                [prompt for prompt, is_out in zip(found, held_out, strict=True) if is_out is part]
                for part in (False, True)
            )
        remind_of_template(tokenizer, method.prompt_form, num_texts)
        return Prompts(train, val, counts)

    def places(self) -> dict[str, Any]:
        return {"spec": self.source.place, "val": self.val.place if self.val is not None and self.val_given else None}
