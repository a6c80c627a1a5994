"""The conversations of a run, rendered as the model is served: the data of fine-tuning."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptsmith.data.conversations import Conversation, Counts, Example, Renderer, RowError, bad_row, read_conversations
from gptsmith.data.corpora import CORPORA, corpus_path
from gptsmith.data.packing import Examples
from gptsmith.data.rows import Split, row_files
from gptsmith.data.sources import Spec
from gptsmith.errors import DataError, UsageError, nearest
from gptsmith.log import note, progress
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_chat_template
from gptsmith.train.config import RunConfig, SftConfig
from gptsmith.train.init import Init, with_tokens

MOST_CONTEXT = 1024  # default sequence length, where conversations are long and the model allows more
_STEP = 64  # contexts are a multiple of it
SHOWN = 3  # held-out conversations that are kept whole, to be answered in previews


@dataclass(frozen=True)
class Chats:
    """Conversations ready for training. shown: some held-out ones, whose prompts the model answers in previews."""

    train: Examples
    val: Examples
    counts: Counts
    shown: tuple[Conversation, ...] = ()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.train.fingerprint()} {self.val.fingerprint()}".encode()).hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation, without its last one, which is only predicted."""
        return max(int(part.lengths.max()) - 1 for part in (self.train, self.val) if len(part))

    def record(self) -> dict[str, Any]:
        """Return the sizes, for run.json."""
        return {
            "train_tokens": int(self.train.starts[-1]),
            "val_tokens": int(self.val.starts[-1]),
            "train_rows": len(self.train),
            "val_rows": len(self.val),
            "trained_tokens": self.train.num_trained,
            "forms": dict(self.counts.forms),
            "skipped": dict(self.counts.skipped),
        }

    def summary(self) -> str:
        """Return the sizes in words."""
        total, rows = int(self.train.starts[-1]), len(self.train) + len(self.val)
        forms = ", ".join(f"{form} {number:,}" for form, number in self.counts.forms.most_common())
        text = (
            f"{rows:,} conversations ({forms}), {len(self.val):,} of them held out; {total:,} tokens to train on, of "
            f"which {self.train.num_trained:,} ({self.train.num_trained / total:.0%}) count in the loss"
        )
        if self.counts.skipped:
            text += f"; left out {sum(self.counts.skipped.values()):,} rows: {self.counts.describe_skipped()}"
        return text

    def within(self, seq_len: int, *, on_long: str) -> Chats:
        """Return those that fit into rows of `seq_len` tokens. on_long: "skip" counts the others, "error" refuses them.

        Raises DataError where nothing is left.
        """
        longer = [i for i, length in enumerate(self.train.lengths) if length - 1 > seq_len]
        val = [i for i, length in enumerate(self.val.lengths) if length - 1 > seq_len]
        if not longer and not val:
            return self
        advice = f"Set --context {self.longest} or more, or leave them out with --too-long skip."
        if on_long == "error":
            raise DataError(
                f"{len(longer) + len(val):,} conversations are longer than --context {seq_len:,}: up to "
                f"{self.longest:,} tokens. {advice}"
            )
        if len(longer) == len(self.train):
            raise DataError(
                f"every conversation is longer than --context {seq_len:,}; the shortest has "
                f"{int(self.train.lengths.min()) - 1:,} tokens. Set a longer --context, if the model allows it."
            )
        lost = sum(int(self.train.lengths[i]) for i in longer) / int(self.train.starts[-1])
        note(
            f"{len(longer) + len(val):,} conversations are longer than the context of {seq_len:,} and are left out: "
            f"{lost:.1%} of the tokens"
        )
        keep, keep_val = set(range(len(self.train))) - set(longer), set(range(len(self.val))) - set(val)
        return replace(
            self,
            train=Examples(self.train[i] for i in sorted(keep)),
            val=Examples(self.val[i] for i in sorted(keep_val)),
        )


@dataclass(frozen=True)
class ChatFiles:
    """Files of conversations, opened but not yet read.

    val: those of validation, if they are apart, either a data set of their own (`val_spec`) or a split of `path`.
    """

    spec: str
    path: Path
    val_spec: str | None = None
    val: Path | None = None
    val_split: Split = "train"

    @classmethod
    def open(cls, spec: Spec, config: RunConfig) -> ChatFiles:
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

    def prepare(self, config: RunConfig, tokenizer: Tokenizer) -> Chats:
        """Read and render all conversations. Raise DataError for the first bad row, or as the options say."""
        method = config.method
        assert isinstance(method, SftConfig)
        renderer, counts = Renderer(tokenizer, train_on=method.train_on), Counts()
        conversations: list[Conversation] = []  # of the last rows: some are shown

        def examples(path: Path, split: Split = "train") -> Iterator[Example]:
            size = sum(file.stat().st_size for file in row_files(path, split))
            with progress(size, f"Reading {path.name}", "B") as bar:
                for row, conversation in read_conversations(
                    path, on_bad=method.bad_rows, counts=counts, advance=bar.advance, split=split
                ):
                    try:
                        example = renderer.render(conversation)
                    except RowError as error:
                        counts.forms[conversation.form] -= 1
                        bad_row(error, row.where, method.bad_rows, counts)
                        continue
                    conversations.append(conversation)
                    del conversations[:-SHOWN]
                    yield example

        found = list(examples(self.path))
        if not found:
            raise DataError(f"{self.spec} has no conversation to train on. {counts.describe_skipped()}".strip())
        if self.val is not None:
            val = list(examples(self.val, self.val_split))
        else:
            held_out = math.floor(len(found) * config.data.val_fraction)
            held_out = min(max(held_out, 1 if config.data.val_fraction else 0), len(found) - 1)
            found, val = found[: len(found) - held_out], found[len(found) - held_out :]
        shown = tuple(conversations[-min(SHOWN, max(1, len(val))) :])
        return Chats(Examples(found), Examples(val), counts, shown)

    def places(self) -> dict[str, Any]:
        named = self.spec in CORPORA
        return {
            "spec": self.spec if named else str(self.path.resolve()),
            "val": None if self.val is None or self.val_spec is None else str(self.val.resolve()),
        }

    def needs_template(self) -> bool:
        """Return whether any row is a conversation, and not a prompt with its completion as plain text."""
        return any(not conversation.is_text for _, conversation in read_conversations(self.path, on_bad="skip"))


def rows_path(spec: str) -> Path:
    """Return the file or folder of rows that a name or path stands for. Raise UsageError where there is none."""
    path = Path(spec).expanduser()
    if spec in CORPORA and not path.exists():
        path = corpus_path(spec)
    if not path.exists():
        raise UsageError(f"no such file, folder or named data set: {spec!r}.{nearest(spec, CORPORA)}")
    row_files(path)
    return path


def with_template(init: Init, config: RunConfig, data: Any) -> Init:
    """Return the model with a chat template, if it has none and the data has conversations.

    It gets ChatML and its special tokens, whose embeddings start as the mean of the others.
    """
    if not ChatTemplate(init.tokenizer).plain or (isinstance(data, ChatFiles) and not data.needs_template()):
        return init
    tokenizer, new = with_chat_template(init.tokenizer)
    tokens = ", ".join(tokenizer.token_text(id) for id in new)
    note(f"chat template: the model has none and gets ChatML{f' with the new tokens {tokens}' if new else ''}")
    return with_tokens(init, tokenizer)


def settle(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration with the context that the conversations need, and the steps that the epochs take."""
    from gptsmith.data.packing import pack

    assert isinstance(prepared, Chats)
    method, most = config.method, config.loop.context
    assert isinstance(method, SftConfig)
    if "context" not in overrides:
        needed = -(-prepared.longest // _STEP) * _STEP
        config = config.replace(context=max(1, min(most, MOST_CONTEXT, needed)))
    chats = prepared.within(config.loop.context, on_long=method.too_long)
    rows = len(pack(chats.train.lengths - 1, config.loop.context)) if method.packing else len(chats.train)
    if "batch_size" not in overrides:
        config = config.replace(batch_size=min(config.loop.batch_size, rows))
    if "steps" not in overrides:
        steps = max(1, math.ceil(method.epochs * rows / config.loop.batch_size))
        config = config.replace(steps=steps)
        if "eval_every" not in overrides:
            config = config.replace(eval_every=max(1, min(config.loop.eval_every, math.ceil(steps / 4))))
    return config


def shown_prompts(chats: Chats, tokenizer: Tokenizer, model: Transformer) -> list[tuple[str, list[int]]]:
    """Return what previews answer: text and ids of the prompts of some held-out conversations."""
    renderer = Renderer(tokenizer)
    found = []
    for conversation in chats.shown:
        ids = renderer.prompt(conversation)
        if len(ids) < model.config.max_position_embeddings:
            found.append((tokenizer.decode(ids, skip_special_tokens=False), ids))
    return found
