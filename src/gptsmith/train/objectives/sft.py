"""Supervised fine-tuning: predict what the assistant says."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

from gptsmith.checkpoint import TrainState
from gptsmith.data.loader import TokenBatch, TokenLoader
from gptsmith.data.packing import PackedLoader
from gptsmith.data.pictures import PictureReader
from gptsmith.data.shards import Dataset
from gptsmith.distributed.context import ALONE, DistributedContext
from gptsmith.errors import UsageError
from gptsmith.evaluate.forgetting import text_bits_per_byte
from gptsmith.evaluate.validation import split_loss
from gptsmith.model.config import IGNORED
from gptsmith.run_directory import PLAIN_TEXT_METRIC
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.chats import Chats, shown_prompts
from gptsmith.train.config import SftConfig
from gptsmith.train.objectives.base import Models
from gptsmith.train.objectives.pretrain import NextToken, evaluation_rows
from gptsmith.train.text import Text


class Sft(NextToken):
    """Next-token prediction over packed conversations; only tokens that the mask marks count.

    replay: plain text and its share of each batch's rows, against forgetting. augment: vary the pictures.
    """

    evaluates_start = True
    shares_evaluation = True

    def __init__(
        self,
        chats: Chats,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        vocab_size: int,
        packing: bool = True,
        eval_tokens: int | None = None,
        replay: tuple[Dataset, float] | None = None,
        augment: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
        ranks: DistributedContext = ALONE,
    ) -> None:
        super().__init__(seq_len=seq_len, vocab_size=vocab_size, mask_documents=True)
        self.ranks = ranks
        self.chats, self.tokenizer, self.eval_tokens, self.should_stop = chats, tokenizer, eval_tokens, should_stop
        self.replay: TokenLoader | None = None
        rows = batch_size
        if replay is not None:
            text, share = replay
            replayed = min(batch_size - 1, max(1, round(share * batch_size)))
            if batch_size < 2:
                raise UsageError("--replay needs a --batch-size of at least 2: it fills whole rows.")
            rows -= replayed
            self.replay = TokenLoader(text.train, batch_size=replayed, seq_len=seq_len, seed=seed, mask_documents=True)
        shape: dict[str, Any] = {"batch_size": rows, "seq_len": seq_len, "seed": seed, "packing": packing}
        self.loader = PackedLoader(chats.train, picture_reader=chats.picture_reader, augment=augment, **shape)
        self.val = PackedLoader(chats.val, picture_reader=chats.picture_reader, **shape) if len(chats.val) else None

    def next_batch(self, models: Models, step: int) -> TokenBatch:
        batch = next(self.loader)
        return batch if self.replay is None else _stacked(batch, next(self.replay))

    def example_batch(self, rows: int) -> TokenBatch:
        """Return a batch with as many pictures per row as there are on average, rounded up."""
        batch = super().example_batch(rows)
        per_row = math.ceil(self.chats.num_images / len(self.loader.rows))
        return (
            batch
            if self.chats.picture_reader is None
            else with_example_images(batch, self.chats.picture_reader, per_row)
        )

    def normalizer(self, batch: TokenBatch) -> tuple[float, int]:
        """Return the number of trained tokens, and that of all tokens but padding."""
        assert batch.document_ids is not None
        return float(batch.num_targets), int((batch.document_ids >= 0).sum())

    def evaluate(self, models: Models, rows: int) -> dict[str, float] | None:
        """Return `val_loss`, mean nats per trained token of held-out conversations, and the loss on plain text."""
        found = {}
        if self.val is not None:
            size = evaluation_rows(rows, self.seq_len)
            batches = islice(self.val.whole(size), self.ranks.data_rank, None, self.ranks.data_size)
            value = split_loss(models.policy, batches, should_stop=self.should_stop, ranks=self.ranks)
            if value is None:
                return None
            found["val_loss"] = value
        plain = text_bits_per_byte(models.policy, self.tokenizer)
        if plain is not None:
            found[PLAIN_TEXT_METRIC] = plain
        return found if "val_loss" in found else None

    def sample_prompts(self, models: Models) -> list[tuple[str, list[int]]]:
        return shown_prompts(self.chats, self.tokenizer, models.policy)

    def state(self) -> TrainState:
        values: dict[str, Any] = {"loader": self.loader.state_dict()}
        if self.replay is not None:
            values["replay"] = self.replay.state_dict()
        return TrainState(values, {})

    def load_state(self, state: TrainState) -> None:
        self.loader.load_state_dict(state.values["loader"])
        if self.replay is not None:
            self.replay.load_state_dict(state.values["replay"])


def _stacked(one: TokenBatch, other: TokenBatch) -> TokenBatch:
    """Return the rows of two batches; narrower rows are padded."""
    import torch
    import torch.nn.functional as F

    width = max(one.ids.shape[1], other.ids.shape[1])

    def stack(a: Any, b: Any, fill: int) -> Any:
        return torch.cat([F.pad(part, (0, width - part.shape[1]), value=fill) for part in (a, b)])

    return TokenBatch(
        stack(one.ids, other.ids, 0),
        stack(one.targets, other.targets, IGNORED),
        stack(one.document_ids, other.document_ids, -1),
        one.images,  # plain text has none
    )


def with_example_images(batch: TokenBatch, picture_reader: PictureReader, per_row: int) -> TokenBatch:
    """Return a batch of arbitrary tokens that begins with `per_row` arbitrary pictures in each row, as far as they
    fit, for forecasts and timing."""
    import torch

    from gptsmith.model.vision import Images

    rows, length = batch.ids.shape
    count, size = picture_reader.processor.tokens, picture_reader.processor.size
    per_row = min(per_row, length // count)
    if not per_row:
        return batch
    positions = torch.arange(length, device=batch.ids.device).expand(rows, -1)
    other = 0 if picture_reader.token_id else 1  # by chance, an arbitrary token may be that of pictures
    ids = batch.ids.masked_fill(batch.ids == picture_reader.token_id, other)
    ids = ids.masked_fill(positions < per_row * count, picture_reader.token_id)
    pixels = torch.rand(rows * per_row, 3, size, size)
    numbers = tuple(row for row in range(rows) for _ in range(per_row))
    return batch._replace(ids=ids, images=Images(pixels, numbers))


def sft(context: Any) -> Sft:
    """Make the objective of an `ObjectiveContext`."""
    config, method, chats = context.config, context.config.method, context.dataset
    if not isinstance(method, SftConfig) or not isinstance(chats, Chats):
        raise UsageError("fine-tuning needs conversations: gptsmith sft MODEL DATA.")
    replay = None
    if (replayed := method.replayed()) is not None:
        corpus, share = replayed
        replay = (
            Text.open(corpus, config.replace(val=None)).prepare(config, context.tokenizer, allow_unknown=True),
            share,
        )
    return Sft(
        chats.within(config.loop.context, on_long=method.too_long),
        context.tokenizer,
        batch_size=config.loop.batch_size,
        seq_len=config.loop.context,
        seed=config.loop.seed,
        vocab_size=context.tokenizer.vocab_size,
        packing=method.packing,
        eval_tokens=method.eval_tokens,
        replay=replay,
        augment=config.vision.augment,
        should_stop=context.should_stop,
        ranks=context.ranks,
    )
