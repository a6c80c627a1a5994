"""The conversations of a run, rendered as the model is served: the data of fine-tuning."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptsmith.data.conversations import Conversation, Counts, Example, Renderer, RowError, bad_row, read_conversations
from gptsmith.data.packing import Examples
from gptsmith.data.pictures import PictureReader
from gptsmith.data.rows import Split, row_files
from gptsmith.errors import DataError
from gptsmith.log import note, progress
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_chat_template
from gptsmith.train.budget import tuning
from gptsmith.train.config import PreferenceConfig, RunConfig, SftConfig
from gptsmith.train.init import Init, with_tokens
from gptsmith.train.row_files import RowFiles, num_held_out, with_context, with_epochs

SHOWN = 3  # held-out conversations that are kept whole, to be answered in previews


@dataclass(frozen=True)
class Chats:
    """Conversations ready for training. shown: some held-out ones without pictures, whose prompts the model answers in
    previews. picture_reader: how the model reads pictures."""

    train: Examples
    val: Examples
    counts: Counts
    shown: tuple[Conversation, ...] = ()
    picture_reader: PictureReader | None = None

    @property
    def num_images(self) -> int:
        """The number of pictures to train on."""
        return sum(map(len, self.train.images))

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
            **({"train_images": self.num_images} if self.num_images else {}),
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
        if self.num_images:
            text += f"; {self.num_images:,} pictures"
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
class ChatFiles(RowFiles):
    """Files of conversations, opened but not yet read."""

    def prepare(self, config: RunConfig, tokenizer: Tokenizer) -> Chats:
        """Read and render all conversations. Raise DataError for the first bad row, or as the options say."""
        method = config.method
        assert isinstance(method, SftConfig)
        picture_reader, counts = self.picture_reader(tokenizer), Counts()
        renderer = Renderer(tokenizer, train_on=method.train_on, picture_reader=picture_reader)
        conversations: list[Conversation] = []  # of the last rows: some are shown

        def examples(path: Path, split: Split = "train") -> Iterator[Example]:
            size = sum(file.stat().st_size for file in row_files(path, split))
            with progress(size, f"Reading {path.name}", "B") as bar:
                for row, conversation in read_conversations(
                    path, on_bad=method.bad_rows, counts=counts, advance=bar.advance, split=split
                ):
                    try:
                        example = renderer.render(conversation, row.folder)
                    except RowError as error:
                        counts.forms[conversation.form] -= 1
                        bad_row(error, row.where, method.bad_rows, counts)
                        continue
                    if not conversation.images:  # previews show texts
                        conversations.append(conversation)
                        del conversations[:-SHOWN]
                    yield example

        found = list(examples(self.path))
        if not found:
            raise DataError(f"{self.spec} has no conversation to train on. {counts.describe_skipped()}".strip())
        if self.val is not None:
            val = list(examples(self.val, self.val_split))
        else:
            held_out = num_held_out(len(found), config.data.val_fraction)
            found, val = found[: len(found) - held_out], found[len(found) - held_out :]
        shown = tuple(conversations[-min(SHOWN, max(1, len(val))) :])
        return Chats(Examples(found), Examples(val), counts, shown, picture_reader)

    def needs_template(self) -> bool:
        """Return whether any row is a conversation, and not a prompt with its completion as plain text."""
        return any(not conversation.is_text for _, conversation in read_conversations(self.path, on_bad="skip"))


def with_template(init: Init, config: RunConfig, data: Any) -> Init:
    """Return the model with a chat template, if it has none and the data has conversations.

    It gets ChatML and its special tokens, whose embeddings start as the mean of the others.
    """
    if not ChatTemplate(init.tokenizer).plain or not _needs_template(config, data):
        return init
    tokenizer, new = with_chat_template(init.tokenizer)
    tokens = ", ".join(tokenizer.token_text(id) for id in new)
    note(f"chat template: the model has none and gets ChatML{f' with the new tokens {tokens}' if new else ''}")
    return with_tokens(init, tokenizer)


def _needs_template(config: RunConfig, data: Any) -> bool:
    form = config.method.prompt_form if isinstance(config.method, PreferenceConfig) else "auto"
    return form != "text" and (form == "chat" or not isinstance(data, RowFiles) or data.needs_template())


def settle(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration with the context that the conversations need, and the steps that the epochs take."""
    from gptsmith.data.packing import pack

    assert isinstance(prepared, Chats)
    method = config.method
    assert isinstance(method, SftConfig)
    config = with_context(config, overrides, prepared.longest)
    chats = prepared.within(config.loop.context, on_long=method.too_long)
    rows = len(pack(chats.train.lengths - 1, config.loop.context)) if method.packing else len(chats.train)
    if "batch_size" not in overrides and tuning.has_rules(config):
        config = config.replace(batch_size=tuning.batch_for(rows))
    return with_epochs(config, overrides, method.epochs, rows)


def shown_prompts(chats: Chats, tokenizer: Tokenizer, model: Transformer) -> list[tuple[str, list[int]]]:
    """Return what previews answer: text and ids of the prompts of some held-out conversations."""
    renderer = Renderer(tokenizer)
    found = []
    for conversation in chats.shown:
        ids = renderer.prompt(conversation)
        if len(ids) < model.config.max_position_embeddings:
            found.append((tokenizer.decode(ids, skip_special_tokens=False), ids))
    return found
