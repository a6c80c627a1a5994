"""Learning from preferences without a reward model: DPO and its relatives.

The policy is compared with a reference, by default the model that training starts from. The reference's
log-probabilities never change, so they are computed once, before the first update, and saved in every checkpoint: a
resumed run does not need the reference any more.

Axis letters: N pairs or rated answers · S answers of a batch · R rows · T tokens of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gptsmith.checkpoint import TrainState
from gptsmith.data.conversations import Example
from gptsmith.data.loader import RowLoader
from gptsmith.data.packing import Examples, packed_batch
from gptsmith.data.pictures import PictureReader
from gptsmith.distributed.context import ALONE, DistributedContext
from gptsmith.errors import TrainingError, UsageError
from gptsmith.evaluate.forgetting import text_bits_per_byte
from gptsmith.loading import load_model, source_of
from gptsmith.log import note, progress
from gptsmith.model.config import IGNORED, ModelConfig
from gptsmith.model.documents import is_fake
from gptsmith.model.flops import count_parameters
from gptsmith.model.loss import head_logprobs
from gptsmith.model.transformer import Transformer
from gptsmith.model.vision import Images
from gptsmith.run_directory import PLAIN_TEXT_METRIC, Selection
from gptsmith.runtime import autocast_dtype, choose_device, choose_precision
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.chats import with_template
from gptsmith.train.config import DpoConfig, RunConfig
from gptsmith.train.init import Init, absolute_spec
from gptsmith.train.objectives.base import LossHistory, LossOutput, Models, Objective, Sum
from gptsmith.train.objectives.preference_losses import (
    WITHOUT_REFERENCE,
    LossOptions,
    PairLogprobs,
    kto_baseline,
    kto_loss,
    mismatched,
    nll_loss,
    pair_loss,
    rewards,
)
from gptsmith.train.objectives.pretrain import EVAL_TOKENS_AT_ONCE, LARGEST_EXAMPLE_ID
from gptsmith.train.preferences import LabeledRows, Pairs, Preferences, settle_preferences

LR_FACTOR = 0.1  # learning rates relative to those of fine-tuning
SHOWN = 3  # prompts that are answered in previews
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Answers:
    """Prompts with an answer, packed into rows. The tensors are those of a `TokenBatch`.

    owner: (R, T) int64, the number of the answer that each token belongs to; padding belongs to `count`.
    images: the pictures of the prompts.
    """

    ids: Tensor
    targets: Tensor
    document_ids: Tensor
    owner: Tensor
    count: int
    images: Images | None = None

    @classmethod
    def of(cls, examples: Examples, most: int, picture_reader: PictureReader | None = None) -> Answers:
        """Pack all of them into rows of at most `most` tokens, which the longest must fit into."""
        lengths = examples.lengths - 1
        rows = _balanced_rows(lengths.tolist(), most)
        batch = packed_batch(examples, rows, max(int(lengths[row].sum()) for row in rows), picture_reader)
        assert batch.document_ids is not None
        owner = torch.full_like(batch.ids, len(examples))
        for r, row in enumerate(rows):
            at = 0
            for index in row:
                owner[r, at : (at := at + int(lengths[index]))] = index
        return cls(batch.ids, batch.targets, batch.document_ids, owner, len(examples), batch.images)

    @classmethod
    def of_equal_length(cls, ids: Tensor) -> Answers:
        """Make them of ids (S, T + 1), whose first token alone is the prompt."""
        documents = torch.zeros_like(ids[:, 1:], dtype=torch.int32)
        owner = torch.arange(len(ids), device=ids.device)[:, None].expand(-1, ids.shape[1] - 1)
        return cls(ids[:, :-1], ids[:, 1:], documents, owner, len(ids))

    def logprobs(self, model: Transformer) -> Tensor:
        """Return log p(answer | prompt) of each, in nats, (S,) float32. Differentiable."""
        device = next(model.parameters()).device
        ids, targets, documents, owner = (
            part.to(device) for part in (self.ids, self.targets, self.document_ids, self.owner)
        )
        pixels = None if self.images is None else self.images.pixels.to(device)
        hidden = model.hidden_states(ids, pixels=pixels, document_ids=documents).flatten(0, 1)
        targets, owner = targets.flatten(), owner.flatten()
        if not is_fake(hidden):  # logits of the answers alone
            trained = targets != IGNORED
            hidden, targets, owner = hidden[trained], targets[trained], owner[trained]
        tokens = head_logprobs(model.lm_head, hidden[None], targets[None], model.config.vocab_size)[0]
        return tokens.new_zeros(self.count + 1).index_add(0, owner, tokens)[:-1]


def _balanced_rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return which examples share a row of at most `most` tokens, so that there is little padding.

    For a given number of rows, the longest first, each into the emptiest row; of a few numbers, that with the least
    padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best: list[list[int]] = [[i] for i in order]
    size, tried = len(lengths) * max(lengths), 0
    for count in range(-(-sum(lengths) // most), len(lengths)):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for index in order:
            row = filled.index(min(filled))
            rows[row].append(index)
            filled[row] += lengths[index]
        if max(filled) > most:
            continue
        if count * max(filled) < size:
            best, size = rows, count * max(filled)
        tried += 1
        if tried == 4:
            break
    return best


@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs, or rated answers, of one update. They become tensors of tokens when the loss needs them, so that every
    micro-batch is packed on its own.

    examples: two for each pair, chosen and rejected in turn; one for each rated answer. For forecasts, ids of equal
    length, (n or 2n, T). reference: (n or 2n,), what the reference gives them; zeros where the loss has none.
    desirable, baseline: (n,), for rated answers.
    """

    examples: Sequence[Example] | Tensor
    reference: Tensor
    desirable: Tensor | None = None
    baseline: Tensor | None = None

    @property
    def per_row(self) -> int:
        return 2 if self.desirable is None else 1

    @property
    def num_rows(self) -> int:
        return len(self.examples) // self.per_row

    def slice(self, start: int, stop: int) -> Self:
        part, rows = slice(start * self.per_row, stop * self.per_row), slice(start, stop)
        return dataclasses.replace(
            self,
            examples=self.examples[part],
            reference=self.reference[part],
            desirable=None if self.desirable is None else self.desirable[rows],
            baseline=None if self.baseline is None else self.baseline[rows],
        )

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(
            self,
            reference=self.reference.to(device),
            desirable=None if self.desirable is None else self.desirable.to(device),
            baseline=None if self.baseline is None else self.baseline.to(device),
        )

    def answers(self, most: int, picture_reader: PictureReader | None = None) -> Answers:
        """Return all answers, packed into rows of at most `most` tokens."""
        if isinstance(self.examples, Tensor):
            return Answers.of_equal_length(self.examples)
        return Answers.of(Examples(self.examples), most, picture_reader)

    def answer_tokens(self) -> Tensor:
        """Return the number of tokens of each answer, (n,) or (2n,)."""
        if isinstance(self.examples, Tensor):
            return torch.full_like(self.reference, self.examples.shape[1] - 1)
        counts = [sum(example.trained) for example in self.examples]
        return torch.tensor(counts, dtype=torch.float32, device=self.reference.device)

    def num_tokens(self) -> int:
        if isinstance(self.examples, Tensor):
            return self.examples[:, 1:].numel()
        return sum(len(example.ids) - 1 for example in self.examples)


class _Loader(RowLoader[list[int]]):
    """Batches of row numbers; `identity` is the data that a position is valid for."""

    def __init__(self, num_rows: int, identity: str, *, batch_size: int, seed: int) -> None:
        super().__init__(num_rows, batch_size=batch_size, seed=seed)
        self.identity = identity

    def batch_of(self, rows: Sequence[int]) -> list[int]:
        return list(rows)

    def _identity(self) -> dict[str, Any]:
        return {"preferences": self.identity, "seed": self.seed, "batch_size": self.batch_size}


class _Part:
    """Training or validation data with what the reference gives it.

    examples: as in `PreferenceBatch`, and for rated answers also, from `mismatched` on, every prompt with the answer of
    the next row.
    """

    def __init__(self, part: Pairs | LabeledRows, context: int, *, has_reference: bool) -> None:
        self.num_rows = len(part)
        self.desirable: Tensor | None = None
        self.mismatched = 0
        if isinstance(part, Pairs):
            self.examples = Examples(each for pair in part for each in (pair.chosen, pair.rejected))
        else:
            self.desirable = torch.tensor(part.desirable, dtype=torch.bool)
            self.mismatched = len(part)
            self.examples = Examples([*(row.example for row in part), *_mismatched(part, context)])
        self.reference = torch.full((len(self.examples),), torch.nan if has_reference else 0.0)
        """What the reference gives each example; NaN where it is not known yet."""

    def batch(self, rows: Sequence[int], baseline: Tensor | None = None) -> PreferenceBatch:
        if self.desirable is None:
            chosen = [i for row in rows for i in (2 * row, 2 * row + 1)]
            return PreferenceBatch([self.examples[i] for i in chosen], self.reference[chosen])
        assert baseline is not None
        index = list(rows)
        desirable, baselines = self.desirable[index], baseline.expand(len(index))
        return PreferenceBatch([self.examples[i] for i in index], self.reference[index], desirable, baselines)


def _mismatched(part: LabeledRows, context: int) -> Iterator[Example]:
    """Yield every prompt with the answer of another row, which is cut where the two are longer than the context."""
    examples = [row.example for row in part]
    starts = [example.trained.index(True) for example in examples]
    prompts = [tuple(example.ids[:start]) for example, start in zip(examples, starts, strict=True)]
    pictures = [example.images for example in examples]  # of the prompts
    for prompt, other, images in zip(prompts, mismatched(prompts), pictures, strict=True):
        answer = examples[other].ids[starts[other] :][: max(1, context - len(prompt))]
        mask = [False] * len(prompt) + [True] * len(answer)
        yield Example([*prompt, *answer], mask, images)


def _first(part: Pairs | LabeledRows, tokens: int | None) -> Pairs | LabeledRows:
    """Return the rows from the start that have so many tokens; one pair or two rated answers at least."""
    if tokens is None:
        return part
    if isinstance(part, Pairs):
        lengths = part.chosen.lengths + part.rejected.lengths
        return Pairs(part[: max(1, int(np.searchsorted(np.cumsum(lengths), tokens, side="right")))])
    return LabeledRows(part[: max(2, int(np.searchsorted(np.cumsum(part.lengths()), tokens, side="right")))])


def _chunks(examples: Examples) -> list[list[int]]:
    """Return which examples to compute together: about equally long ones, up to `EVAL_TOKENS_AT_ONCE` tokens."""
    chunks: list[list[int]] = []
    room = 0
    for index in np.argsort(-examples.lengths, kind="stable").tolist():
        length = int(examples.lengths[index])
        if room < length:
            chunks.append([])
            room = max(length, EVAL_TOKENS_AT_ONCE)
        chunks[-1].append(index)
        room -= length
    return chunks


def _is_above(one: Tensor, other: Tensor) -> Tensor:
    """Return 1 where one is greater, 0 where the other is, and a half where they are equal."""
    return (one > other).float() + (one == other).float() / 2


class Dpo(Objective[PreferenceBatch]):
    """Preference optimization of the policy, by the loss that `method` names.

    reference: makes the reference model where it is not the policy at the start of training. It is called at most once.
    """

    selection = Selection("val_accuracy", "max")
    evaluates_start = True
    shares_evaluation = True
    fixed_shapes = False

    def __init__(
        self,
        preferences: Preferences,
        tokenizer: Tokenizer,
        method: DpoConfig,
        *,
        batch_size: int,
        context: int,
        seed: int,
        reference: Callable[[], Transformer] | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        should_stop: Stop = lambda: False,
        ranks: DistributedContext = ALONE,
    ) -> None:
        self.method, self.tokenizer, self.context, self.picture_reader = (
            method,
            tokenizer,
            context,
            preferences.picture_reader,
        )
        self.make_reference, self.autocast = reference, autocast
        self.should_stop, self.ranks = should_stop, ranks
        self.options = LossOptions(method.scale, method.label_smoothing, method.gamma)
        self.is_paired = method.loss != "kto"
        train, val = preferences.pairs() if self.is_paired else preferences.labeled()
        if not self.is_paired and min(len(train), batch_size) < 2:
            raise UsageError("--loss kto compares answers with those to other prompts: it needs a --batch-size of 2.")
        self.train = _Part(train, context, has_reference=self.has_reference)
        self.val = None
        if len(val) >= (1 if self.is_paired else 2):
            self.val = _Part(_first(val, method.eval_tokens), context, has_reference=self.has_reference)
        self.loader = _Loader(len(train), preferences.fingerprint, batch_size=batch_size, seed=seed)

    @property
    def has_reference(self) -> bool:
        return self.method.loss not in WITHOUT_REFERENCE

    @property
    def has_reference_pass(self) -> bool:  # type: ignore[override]
        return self.has_reference

    @property
    def per_row(self) -> int:
        return 2 if self.is_paired else 1

    # The reference ---------------------------------------------------------------------------------------------------

    def _reference_is_known(self, models: Models) -> bool:
        """Compute what the reference gives all answers, where that has not been done. Return False on a stop.

        What has been done until then is kept.
        """
        todo = [part for part in (self.train, self.val) if part is not None and part.reference.isnan().any()]
        if not todo:
            return True
        # Before the first update the policy is the model that training starts from: a new adapter adds exactly nothing.
        model = models.policy if self.make_reference is None else self.make_reference().to(models.device)
        with progress(sum(len(part.examples) for part in todo), "Log-probabilities of the reference", "answers") as bar:
            for part in todo:
                if not self._answer_logprobs(model, part.examples, part.reference, bar.advance):
                    return False
                if part.reference.isnan().any():
                    raise TrainingError("the reference gives answers of the data a probability that is not a number.")
        return True

    @torch.no_grad()
    def _answer_logprobs(
        self,
        model: Transformer,
        examples: Examples,
        found: Tensor,
        advance: Callable[[int], None] = lambda amount: None,
    ) -> bool:
        """Replace the NaNs in `found`, (len(examples),), by log-probabilities of the answers. Return False on a stop.

        The processes share the work, some thousand tokens at a time, so that memory is bounded.
        """
        chunks = [chunk for chunk in _chunks(examples) if found[chunk].isnan().any()]
        mine, done = torch.zeros(len(found), dtype=torch.float64), list[int]()
        was_training, stopped = model.training, False
        model.eval()
        try:
            rank, size = self.ranks.data_rank, self.ranks.data_size
            for start in range(0, len(chunks), size):
                if stopped := self.ranks.any(self.should_stop()):
                    break
                together = chunks[start : start + size]
                if rank < len(together) or self.ranks.layout.divides_model:  # then all run each pass together
                    chunk = together[min(rank, len(together) - 1)]
                    with self.autocast():
                        values = Answers.of(
                            Examples(examples[i] for i in chunk), self.context, self.picture_reader
                        ).logprobs(model)
                    if rank < len(together):
                        mine[chunk] = values.cpu().double()
                done += [index for chunk in together for index in chunk]
                advance(sum(map(len, together)))
        finally:
            model.train(was_training)
        self.ranks.sum(mine)
        found[done] = mine[done].float()
        return not stopped

    # Training --------------------------------------------------------------------------------------------------------

    def next_batch(self, models: Models, step: int) -> PreferenceBatch:
        if not self._reference_is_known(models):
            return PreferenceBatch([], torch.zeros(0))
        rows = next(self.loader)
        return self.train.batch(rows, None if self.is_paired else self._baseline(models, rows))

    def _baseline(self, models: Models, rows: Sequence[int]) -> Tensor:
        """Return KTO's estimate of the divergence from the reference for a whole batch, however it is divided."""
        index = [self.train.mismatched + row for row in rows]
        examples = Examples(self.train.examples[i] for i in index)
        ours = torch.empty(len(index))
        with torch.no_grad(), self.autocast():
            for chunk in _chunks(examples):
                ours[chunk] = (
                    Answers.of(Examples(examples[i] for i in chunk), self.context, self.picture_reader)
                    .logprobs(models.policy)
                    .float()
                    .cpu()
                )
        return kto_baseline(ours - self.train.reference[index])

    def normalizer(self, batch: PreferenceBatch) -> tuple[float, int]:
        """Return the number of pairs or rated answers, and that of all tokens."""
        return float(batch.num_rows), batch.num_tokens()

    def loss(self, models: Models, batch: PreferenceBatch) -> LossOutput:
        ours = batch.answers(self.context, self.picture_reader).logprobs(models.policy)
        loss, metrics = self._loss_of(ours, batch)
        return LossOutput(loss.sum(), {name: Sum(value.sum(), float(len(value))) for name, value in metrics.items()})

    def _loss_of(self, ours: Tensor, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each pair or rated answer, (n,), and metrics, one value for each that they apply to.

        ours: log-probabilities of the answers under the policy, (n,) or (2n,).
        """
        method, tokens = self.method, batch.answer_tokens()
        if batch.desirable is not None:
            assert batch.baseline is not None
            return self._kto_of(ours, tokens, batch.reference, batch.desirable, batch.baseline)
        reference = batch.reference if self.has_reference else None
        pairs = PairLogprobs(
            ours[::2],
            ours[1::2],
            tokens[::2],
            tokens[1::2],
            ref_chosen=None if reference is None else reference[::2],
            ref_rejected=None if reference is None else reference[1::2],
        )
        assert method.loss != "kto"
        loss = pair_loss(method.loss, pairs, self.options, sft_weight=method.sft_weight)
        chosen, rejected = rewards(method.loss, pairs, self.options.beta)
        return loss, {
            "chosen_logprob": pairs.chosen.detach(),
            "rejected_logprob": pairs.rejected.detach(),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": _is_above(chosen, rejected),
        }

    def _kto_of(
        self, ours: Tensor, tokens: Tensor, reference: Tensor, desirable: Tensor, baseline: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        method, ratio = self.method, ours - reference
        loss = kto_loss(
            ratio,
            desirable,
            baseline,
            beta=self.options.beta,
            desirable_weight=method.desirable_weight,
            undesirable_weight=method.undesirable_weight,
        )
        if method.sft_weight:
            loss = loss + torch.where(desirable, method.sft_weight * nll_loss(ours, tokens), 0.0)
        ours, reward = ours.detach(), self.options.beta * ratio.detach()
        good, bad = desirable, ~desirable
        right = torch.where(desirable, _is_above(ratio, baseline), _is_above(baseline, ratio)).detach()
        return loss, {
            "chosen_logprob": ours[good],
            "rejected_logprob": ours[bad],
            "chosen_reward": reward[good],
            "rejected_reward": reward[bad],
            "reward_accuracy": right,
            "kl": baseline,
        }

    def diverged(self, history: LossHistory) -> str | None:
        """The losses begin at very different values, such as ln 2 and 25: twice the first one is far."""
        first = history.first
        if first is not None and history.recent > first + max(1.0, first):
            return f"has risen to {history.recent:.2f}, from {first:.2f}"
        return None

    def evaluate(self, models: Models, rows: int) -> dict[str, float] | None:
        """Return the loss and the accuracy on held-out preferences, both log-probabilities, and the loss on plain text.

        Accuracy: the share of pairs whose chosen answer has the higher reward; of rated answers, of those that are on
        their side of the KL estimate.
        """
        if self.val is None or not self._reference_is_known(models):
            return None
        part, ours = self.val, torch.full((len(self.val.examples),), torch.nan)
        if not self._answer_logprobs(models.policy, part.examples, ours):
            return None
        baseline = None if self.is_paired else kto_baseline((ours - part.reference)[part.mismatched :])
        batch = part.batch(range(part.num_rows), baseline)
        loss, metrics = self._loss_of(ours[: len(batch.examples)], batch)
        values = {"val_loss": float(loss.mean()), "val_accuracy": float(metrics["reward_accuracy"].mean())}
        for name in ("chosen_logprob", "rejected_logprob"):
            if len(metrics[name]):
                values[f"val_{name}"] = float(metrics[name].mean())
        plain = text_bits_per_byte(models.policy, self.tokenizer)
        return values if plain is None else {**values, PLAIN_TEXT_METRIC: plain}

    def sample_prompts(self, models: Models) -> list[tuple[str, list[int]]]:
        """Return some prompts, held out where possible."""
        part = self.train if self.val is None else self.val
        found: dict[tuple[int, ...], str] = {}
        for row in range(part.num_rows):
            example = part.examples[row * self.per_row]
            if example.images:  # previews show texts
                continue
            prompt = example.ids[: example.trained.index(True)]
            if len(found) < SHOWN and len(prompt) < models.policy.config.max_position_embeddings:
                found[tuple(prompt)] = self.tokenizer.decode(prompt, skip_special_tokens=False)
        return [(text, list(ids)) for ids, text in found.items()]

    def example_batch(self, rows: int) -> PreferenceBatch:
        count = rows * self.per_row
        longest = np.sort(self.train.examples.lengths)[-count:]  # together: the most tokens of a batch
        length = max(2, min(self.context, int(np.ceil(longest.mean()))))
        ids = torch.randint(min(self.tokenizer.vocab_size, LARGEST_EXAMPLE_ID), (count, length))
        if self.is_paired:
            return PreferenceBatch(ids, torch.zeros(count))
        return PreferenceBatch(ids, torch.zeros(rows), torch.ones(rows, dtype=torch.bool), torch.zeros(rows))

    def other_moments(self, model: ModelConfig) -> Mapping[str, Mapping[str, float]]:
        """The model of --reference is there until it has read all answers; it is taken to be as large as the policy."""
        if self.make_reference is None or not self.has_reference:
            return {}
        return {"reference": {"weights": 4.0 * count_parameters(model).total}}

    # Saving ----------------------------------------------------------------------------------------------------------

    def state(self) -> TrainState:
        parts = {"train": self.train, "val": self.val} if self.has_reference else {}
        return TrainState(
            self.loader.state_dict(),
            {f"reference_{name}": part.reference for name, part in parts.items() if part is not None},
        )

    def load_state(self, state: TrainState) -> None:
        self.loader.load_state_dict(state.values)
        for name, part in (("train", self.train), ("val", self.val)):
            saved = state.tensors.get(f"reference_{name}")
            if part is not None and saved is not None and len(saved) == len(part.examples):
                part.reference = saved


def adapt_to_reference(init: Init, config: RunConfig, data: Any) -> Init:
    """Return the policy with a chat template, if it needs one.

    Raises UsageError for a reference with another vocabulary.
    """
    init = with_template(init, config, data)
    method = config.method
    assert isinstance(method, DpoConfig)
    if method.reference is not None:
        theirs, ours = source_of(method.reference).checked_tokenizer(), init.tokenizer
        if [theirs.token_text(id) for id in range(theirs.vocab_size)] != [
            ours.token_text(id) for id in range(ours.vocab_size)
        ]:
            raise UsageError(
                f"the policy and its reference {method.reference} have different vocabularies, so the probabilities "
                "of their answers cannot be compared. Without --reference it is the policy at the start of training."
            )
    return init


def settle_dpo(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration as for preferences, with lower learning rates, and the reference's path in full.

    Raises UsageError for dropout, which would make policy and reference differ before they do, and for a reference
    with a context that is too short.
    """
    method = config.method
    assert isinstance(method, DpoConfig)
    for option, value in (("--dropout", config.loop.dropout), ("--lora.dropout", config.adapter.dropout)):
        if value:
            raise UsageError(
                f"{option} {value}: with dropout, answers would differ from the reference's by chance. Leave it out."
            )
    config = settle_preferences(config, overrides, prepared)
    optim = {name: getattr(config.optim, name) * LR_FACTOR for name in ("lr", "embedding_lr")}
    config = config.replace(optim={name: value for name, value in optim.items() if f"optim.{name}" not in overrides})
    if method.reference is None:
        return config
    most = source_of(method.reference).config.max_position_embeddings
    if config.loop.context > most:
        raise UsageError(f"--context {config.loop.context} is longer than the reference's {most}.")
    return config.replace(reference=absolute_spec(method.reference))


def dpo(context: Any) -> Dpo:
    """Make the objective of an `ObjectiveContext`."""
    config, method, preferences = context.config, context.config.method, context.dataset
    if not isinstance(method, DpoConfig) or not isinstance(preferences, Preferences):
        raise UsageError("this method needs preferences: gptsmith dpo MODEL PREFERENCES.")
    with_margin = 0
    if isinstance(preferences.train, Pairs):
        with_margin = sum(margin is not None for margin in preferences.train.margins)
    if with_margin:
        note(f"{with_margin:,} pairs have a margin, which is for reward models: --loss {method.loss} does not use it")
    device = choose_device(config.loop.device)
    dtype = autocast_dtype(choose_precision(config.loop.precision, device))

    def reference() -> Transformer:
        model, _ = load_model(str(method.reference), quantize="none")
        return model

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)

    return Dpo(
        preferences.within(config.loop.context, on_long=method.too_long),
        context.tokenizer,
        method,
        batch_size=config.loop.batch_size,
        context=config.loop.context,
        seed=config.loop.seed,
        reference=None if method.reference is None else reference,
        autocast=autocast,
        should_stop=context.should_stop,
        ranks=context.ranks,
    )
