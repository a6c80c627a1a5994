"""The labeled texts of a run, as token ids: the data of task heads."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptsmith.data.labels import LabeledData, read_labeled
from gptsmith.data.rows import Split, row_files
from gptsmith.data.task_inputs import LabeledExamples, Lengths, task_inputs, with_task_tokens
from gptsmith.errors import UsageError
from gptsmith.log import note, progress
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.config import ClassifyConfig, RunConfig
from gptsmith.train.init import Init, with_tokens
from gptsmith.train.row_files import RowFiles, with_epochs

_STEP = 32  # contexts are a multiple of it


@dataclass(frozen=True)
class Labels:
    """Labeled texts ready for training. seq_len: what they were cut to."""

    train: LabeledExamples
    val: LabeledExamples
    data: LabeledData
    lengths: Lengths
    seq_len: int

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.train.fingerprint()} {self.val.fingerprint()}".encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return the sizes, for run.json."""
        return {
            "train_tokens": len(self.train.ids),
            "val_tokens": len(self.val.ids),
            "train_rows": len(self.train),
            "val_rows": len(self.val),
            "labels": list(self.data.names),
            "forms": dict(self.data.counts.forms),
            "skipped": dict(self.data.counts.skipped),
            "rows_cut": self.lengths.rows_cut,
        }

    def summary(self) -> str:
        """Return the sizes in words."""
        text = f"{self.data.summary()}; {len(self.val):,} rows held out"
        cut = self.lengths.summary(self.seq_len)
        return f"{text}; {cut}" if cut else text


@dataclass(frozen=True)
class LabelFiles(RowFiles):
    """Files of labeled texts, opened but not yet read."""

    def prepare(self, config: RunConfig, tokenizer: Tokenizer) -> Labels:
        """Read and encode all rows. Raise DataError for the first bad row, or as the options say."""
        method = config.method
        assert isinstance(method, ClassifyConfig)

        def read(path: Path, split: Split, **options: Any) -> LabeledData:
            size = sum(file.stat().st_size for file in row_files(path, split))
            with progress(size, f"Reading {path.name}", "B") as bar:
                return read_labeled(
                    path, method.task, on_bad=method.bad_rows, advance=bar.advance, split=split, **options
                )

        def encode(data: LabeledData) -> tuple[LabeledExamples, Lengths]:
            return task_inputs(
                data, tokenizer, seq_len=config.loop.context, on_long=method.too_long, on_bad=method.bad_rows
            )

        data = read(self.path, "train", labels=method.labels)
        train, lengths = encode(data)
        if self.val is not None:
            numbers = data.has_numbers if method.task == "similarity" else None
            val, _ = encode(read(self.val, self.val_split, labels=data.names, numbers=numbers, needs_variety=False))
        else:
            train, val = train.split(config.data.val_fraction, seed=config.loop.seed, stratify=bool(data.names))
        return Labels(train, val, data, lengths, config.loop.context)

    def needs_template(self) -> bool:
        return False


def with_task_tokens_of(init: Init, config: RunConfig, data: Any) -> Init:
    """Return the model with the tokens of task inputs, whose embeddings start as the mean of the others."""
    tokenizer, new = with_task_tokens(init.tokenizer)
    if new:
        note(f"task tokens: the model gets {', '.join(tokenizer.token_text(id) for id in new)}")
    return with_tokens(init, tokenizer)


def settle_labels(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration with the context that the rows need, and the steps that the epochs take."""
    assert isinstance(prepared, Labels)
    method = config.method
    assert isinstance(method, ClassifyConfig)
    config = without_samples(config, overrides)
    if "context" not in overrides:
        longest = max(prepared.train.longest, prepared.val.longest)
        config = config.replace(context=min(config.loop.context, -(-longest // _STEP) * _STEP))
    return with_epochs(config, overrides, method.epochs, len(prepared.train))


def without_samples(config: RunConfig, overrides: Collection[str]) -> RunConfig:
    """Return the configuration without samples. Raise UsageError where some were asked for."""
    if "sample_prompt" in overrides or ("sample_tokens" in overrides and config.loop.sample_tokens):
        raise UsageError("a model with a task head writes no text: leave out --sample-tokens and --sample-prompt.")
    return config.replace(sample_tokens=0)
