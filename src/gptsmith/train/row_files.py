"""Files of rows as the data of a run: where they are, where validation is, and what is held out."""

from __future__ import annotations

import abc
import collections
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from gptsmith.data.corpora import CORPORA, corpus_path
from gptsmith.data.pictures import PictureReader
from gptsmith.data.prompts import PromptForm
from gptsmith.data.rows import Split, row_files
from gptsmith.data.sources import Spec
from gptsmith.errors import UsageError, nearest
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.train.config import RunConfig

MOST_CONTEXT = 1024  # default sequence length, where rows are long and the model allows more
_CONTEXT_STEP = 64  # default sequence lengths are a multiple of it


@dataclass(frozen=True)
class RowFiles(abc.ABC):
    """Files of rows, opened but not yet read.

    val: those of validation, if they are apart, either a data set of their own (`val_spec`) or a split of `path`.
    model: what is trained on them, which decides how pictures are read; None: pictures are refused.
    """

    spec: str
    path: Path
    val_spec: str | None = None
    val: Path | None = None
    val_split: Split = "train"
    model: ModelConfig | None = None

    def for_model(self, model: ModelConfig) -> Self:
        """Return the files as data for a model."""
        return replace(self, model=model)

    def picture_reader(self, tokenizer: Tokenizer) -> PictureReader | None:
        """Return how the model reads pictures, None if it does not."""
        return None if self.model is None else PictureReader.of(self.model, tokenizer)

    @classmethod
    def open(cls, spec: Spec, config: RunConfig) -> Self:
        """Find the data and the validation data. Raise UsageError if it is missing, DataError if it is not a table."""
        if not isinstance(spec, str | Path):
            raise UsageError("fine-tuning takes one file or folder of rows: put the files into a folder.")
        path, val_spec = rows_path(str(spec)), config.data.val
        val = rows_path(val_spec) if val_spec else path
        if val.is_dir() and row_files(val, "validation"):
            if not val_spec:
                note(f"{spec}: holding out its own split for validation, no part of the training split")
            return cls(str(spec), path, val_spec, val, "validation")
        return cls(str(spec), path, val_spec, val if val_spec else None)

    @property
    def name(self) -> str:
        return self.path.name.split(".")[0] or "chat"

    def make_tokenizer(self, config: RunConfig, overrides: Collection[str]) -> tuple[RunConfig, Tokenizer]:
        raise UsageError("fine-tuning starts from a model and its tokenizer.")

    def places(self) -> dict[str, Any]:
        named = self.spec in CORPORA
        return {
            "spec": self.spec if named else str(self.path.resolve()),
            "val": None if self.val is None or self.val_spec is None else str(self.val.resolve()),
        }

    @abc.abstractmethod
    def prepare(self, config: RunConfig, tokenizer: Tokenizer) -> Any:
        """Read and render all rows. Raise DataError for the first bad row, or as the options say."""

    @abc.abstractmethod
    def needs_template(self) -> bool:
        """Return whether any row is a conversation, and not plain text."""


def rows_path(spec: str) -> Path:
    """Return the file or folder of rows that a name or path stands for. Raise UsageError where there is none."""
    path = existing_path(spec)
    row_files(path)
    return path


def existing_path(spec: str) -> Path:
    """Return the file or folder that a path or the name of a data set stands for. Raise UsageError."""
    path = Path(spec).expanduser()
    if spec in CORPORA and not path.exists():
        path = corpus_path(spec)
    if not path.exists():
        raise UsageError(f"no such file, folder or named data set: {spec!r}.{nearest(spec, CORPORA)}")
    return path


def num_held_out(size: int, fraction: float) -> int:
    """Return how many of `size` rows are held out for validation: at least one, if any, and never all."""
    return min(max(math.floor(size * fraction), 1 if fraction else 0), size - 1)


def hold_out(keys: Sequence[Hashable], fraction: float) -> list[bool]:
    """Return which rows are held out, from the end, so that rows with equal keys (prompts) are all on one side.

    Keys with more rows than are to be held out stay in training. Where all are such, the last rows are held out.
    """
    target, numbers = num_held_out(len(keys), fraction), collections.Counter(keys)
    chosen: set[Hashable] = set()
    left = target
    for key in dict.fromkeys(reversed(keys)):
        if numbers[key] <= left:
            chosen.add(key)
            left -= numbers[key]
    if not chosen:
        return [i >= len(keys) - target for i in range(len(keys))]
    return [key in chosen for key in keys]


def remind_of_template(tokenizer: Tokenizer, form: PromptForm, num_texts: int) -> None:
    """Say that prompts are plain text although the model has a chat template."""
    if form == "auto" and num_texts and not ChatTemplate(tokenizer).plain:
        note(
            f"{num_texts:,} prompts are plain text and do not go through the model's chat template; --prompt-form chat "
            "makes each a message of the user"
        )


def with_context(config: RunConfig, overrides: Collection[str], longest: int) -> RunConfig:
    """Return the configuration with the context that rows of up to `longest` tokens need, unless it is set."""
    if "context" in overrides:
        return config
    needed = -(-longest // _CONTEXT_STEP) * _CONTEXT_STEP
    return config.replace(context=max(1, min(config.loop.context, MOST_CONTEXT, needed)))


def with_epochs(config: RunConfig, overrides: Collection[str], epochs: float, rows: int) -> RunConfig:
    """Return the configuration with the batch size, steps and evaluations that suit so many rows."""
    if "batch_size" not in overrides:
        config = config.replace(batch_size=min(config.loop.batch_size, rows))
    if "steps" not in overrides:
        steps = max(1, math.ceil(epochs * rows / config.loop.batch_size))
        config = config.replace(steps=steps)
        if "eval_every" not in overrides:
            config = config.replace(eval_every=max(1, min(config.loop.eval_every, math.ceil(steps / 4))))
    return config
