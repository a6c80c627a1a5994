"""Distillation: a student learns the next-token distributions of a teacher with the same vocabulary.

On given text it minimizes the forward KL divergence Σ p_teacher log(p_teacher / p_student) of every trained token
(Hinton et al. 2015, 1503.02531). On-policy, the student answers the prompts itself and minimizes the reverse divergence
Σ p_student log(p_student / p_teacher) on what it wrote (Agarwal et al. 2023, 2306.13649; Gu et al. 2023, 2306.08543),
so it learns from its own mistakes. The samples count as given text: there is no gradient through the sampling.

Axis letters: B rows · T tokens · V vocabulary · N = B·T.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptsmith.data.conversations import Example
from gptsmith.data.loader import TokenBatch
from gptsmith.data.packing import Examples, packed_batch
from gptsmith.data.pictures import PictureReader
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import UsageError
from gptsmith.loading import load_model
from gptsmith.model.config import IGNORED
from gptsmith.model.documents import is_fake
from gptsmith.model.loss import MAX_LOGITS
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.chats import Chats, settle
from gptsmith.train.config import DistillConfig, RunConfig
from gptsmith.train.init import Init, absolute_spec, with_tokens
from gptsmith.train.objectives.base import LossOutput, Models, Sum
from gptsmith.train.objectives.sft import Sft


def kl_sum(
    student: nn.Module,
    student_hidden: Tensor,
    teacher: nn.Module,
    teacher_hidden: Tensor,
    mask: Tensor,
    vocab_size: int,
    *,
    reverse: bool,
) -> Tensor:
    """Return the KL divergence between two output layers' distributions, in nats, summed over the tokens in `mask`.

    student, teacher: compute logits (N, V) from hidden states (N, C). student_hidden, teacher_hidden: (B, T, C) of
    each. mask: (B, T) bool. vocab_size: tokens that both know; further rows are left out. reverse: the divergence of
    the student from the teacher, instead of that of the teacher from the student.
    Logits are computed chunk by chunk, and again in the backward pass.
    """

    def part(student_part: Tensor, teacher_part: Tensor) -> Tensor:
        ours = student(student_part)[:, :vocab_size].float().log_softmax(dim=-1)
        with torch.no_grad():
            theirs = teacher(teacher_part)[:, :vocab_size].float().log_softmax(dim=-1)
        p, q = (ours, theirs) if reverse else (theirs, ours)
        divergence: Tensor = (p.exp() * (p - q)).sum()
        return divergence

    chosen = mask.flatten()
    if is_fake(student_hidden):  # a forecast: as if all counted
        chosen = torch.ones_like(chosen)
        ours, theirs = student_hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
    else:
        ours, theirs = student_hidden.flatten(0, 1)[chosen], teacher_hidden.flatten(0, 1)[chosen]
    rows = max(1, MAX_LOGITS // (4 * vocab_size))  # four matrices of that size at once
    total = student_hidden.new_zeros((), dtype=torch.float32)
    for s, t in zip(torch.split(ours, rows), torch.split(theirs, rows), strict=True):
        total = total + (checkpoint(part, s, t, use_reentrant=False) if torch.is_grad_enabled() else part(s, t))
    return total


class Distill(Sft):
    """Distillation over packed conversations, or over the student's own answers to their prompts."""

    def __init__(
        self, *arguments: Any, teacher: Transformer, on_policy: bool, answer_tokens: int, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.teacher = teacher.requires_grad_(False).eval()
        self.on_policy, self.answer_tokens = on_policy, answer_tokens
        self.batch_size, self.seed = options["batch_size"], options["seed"]
        if on_policy:
            # One prompt per row, in the order of unpacked rows.
            self.loader = type(self.loader)(
                self.chats.train, batch_size=self.batch_size, seq_len=self.seq_len, seed=self.seed, packing=False
            )

    def models(self, policy: Transformer) -> Models:
        teacher = self.teacher
        if is_fake(next(policy.parameters())):  # in a forecast
            teacher = Transformer(teacher.config, initialize=False).requires_grad_(False)
        else:
            teacher.to(next(policy.parameters()).device)
        return Models(policy, reference=teacher)

    def next_batch(self, models: Models, step: int) -> TokenBatch:
        if not self.on_policy:
            return super().next_batch(models, step)
        rows = [self.loader.rows[index] for index in self._indices()]
        prompts = [_prompt(self.chats.train[row[0]]) for row in rows]
        limit = min(self.seq_len, models.policy.config.max_position_embeddings)
        params = [
            SamplingParams(
                max_tokens=max(1, min(self.answer_tokens, limit - len(prompt))),
                temperature=1.0,
                seed=(self.seed + 1_000_003 * step + number) % (1 << 62),
                stop_ids=self.tokenizer.end_ids,
            )
            for number, prompt in enumerate(prompts)
        ]
        engine = Engine(models.policy, vocab_size=self.tokenizer.vocab_size)
        results = engine.generate(prompts, params)
        written = []
        for prompt, result in zip(prompts, results, strict=True):
            if result.error is not None:
                raise result.error
            ids = result.completions[0].ids  # the token that ended it is among them
            written.append(Example([*prompt, *ids], [False] * len(prompt) + [True] * len(ids)))
        return packed_batch(
            Examples(written), [[i] for i in range(len(written))], self.seq_len, self.chats.picture_reader
        )

    def _indices(self) -> list[int]:
        order = self.loader.order_at(self.loader.position)
        self.loader.position += self.loader.batch_size
        return order

    def loss(self, models: Models, batch: TokenBatch) -> LossOutput:
        assert models.reference is not None
        mask = batch.targets != IGNORED
        pixels = None if batch.images is None else batch.images.pixels
        hidden = models.policy.hidden_states(batch.ids, pixels=pixels, document_ids=batch.document_ids)
        with torch.no_grad():
            theirs = models.reference.hidden_states(batch.ids, pixels=pixels, document_ids=batch.document_ids)
        heads = models.policy.lm_head, models.reference.lm_head
        loss = kl_sum(heads[0], hidden, heads[1], theirs, mask, self.vocab_size, reverse=self.on_policy)
        return LossOutput(loss, {"answer_tokens": Sum(mask.sum(), float(len(mask)))} if self.on_policy else {})


def _prompt(example: Example) -> list[int]:
    """Return the ids before the last answer."""
    last = len(example.trained) - 1
    while not example.trained[last]:
        last -= 1
    while last and example.trained[last - 1]:
        last -= 1
    return example.ids[:last]


def same_vocabulary(init: Init, tokenizer: Tokenizer, teacher: str) -> Init:
    """Return the student with the teacher's tokenizer. The student's tokens must be the first of the teacher's.

    Raises UsageError where they are not.
    """
    own = init.tokenizer
    alike = own.vocab_size <= tokenizer.vocab_size and all(
        own.token_text(id) == tokenizer.token_text(id) for id in range(own.vocab_size)
    )
    if not alike:
        raise UsageError(
            f"the student and its teacher {teacher} have different vocabularies, so their distributions cannot be "
            "compared. Train on the teacher's answers instead: gptsmith sft."
        )
    return with_tokens(init, tokenizer)


def adapt_to_teacher(init: Init, config: Any, data: Any) -> Init:
    """Return the student with its teacher's tokenizer and chat template."""
    from gptsmith.loading import source_of

    method = config.method
    assert isinstance(method, DistillConfig)
    return same_vocabulary(init, source_of(method.teacher_model()).checked_tokenizer(), method.teacher_model())


def settle_with_teacher(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration as for fine-tuning, with the teacher's path in full, so that resuming finds it."""
    method = config.method
    assert isinstance(method, DistillConfig)
    return settle(config, overrides, prepared).replace(teacher=absolute_spec(method.teacher_model()))


def distill(context: Any) -> Distill:
    """Make the objective of an `ObjectiveContext`."""
    config, method, chats = context.config, context.config.method, context.dataset
    if not isinstance(method, DistillConfig) or not isinstance(chats, Chats):
        raise UsageError("distillation needs conversations: gptsmith distill STUDENT DATA --teacher MODEL.")
    teacher, _ = load_model(method.teacher_model(), quantize="none")
    if teacher.config.max_position_embeddings < config.loop.context:
        raise UsageError(
            f"--context {config.loop.context} is longer than the teacher's {teacher.config.max_position_embeddings}."
        )
    if chats.num_images and method.on_policy:
        raise UsageError("--on-policy: a student answers texts alone, and the data has pictures.")
    if chats.num_images and chats.picture_reader != PictureReader.of(teacher.config, context.tokenizer):
        raise UsageError(f"the data has pictures, and the teacher {method.teacher_model()} reads none, or others.")
    return Distill(
        chats.within(config.loop.context, on_long=method.too_long),
        context.tokenizer,
        teacher=teacher,
        on_policy=method.on_policy,
        answer_tokens=method.answer_tokens,
        batch_size=config.loop.batch_size,
        seq_len=config.loop.context,
        seed=config.loop.seed,
        vocab_size=context.tokenizer.vocab_size,
        packing=method.packing,
        eval_tokens=method.eval_tokens,
        augment=config.vision.augment,
        should_stop=context.should_stop,
    )
