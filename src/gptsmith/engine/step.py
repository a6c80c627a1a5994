"""One step of the engine: propose drafts, schedule, run the model, sample."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from gptsmith.engine.lifecycle import Lifecycle
from gptsmith.engine.output import token_logprobs
from gptsmith.engine.runner import LogitRows, Runner, SequenceLogits
from gptsmith.engine.scheduler import Scheduled
from gptsmith.engine.sequence import Request, Sequence
from gptsmith.engine.speculative import Speculator
from gptsmith.engine.token_sampler import TokenSampler


class StepExecutor:
    """Executes steps. A failure ends the request that caused it; other requests continue."""

    def __init__(
        self,
        runner: Runner,
        lifecycle: Lifecycle,
        sampler: TokenSampler,
        speculator: Speculator | None,
        *,
        vocab_size: int,
    ) -> None:
        self.runner, self.speculator = runner, speculator
        self.num_steps = 0
        self._lifecycle, self._scheduler, self._sampler = lifecycle, lifecycle.scheduler, sampler
        self._vocab_size = vocab_size

    def step(self) -> list[Request]:
        """Execute one step. Return the requests that failed, then those that the step computed something of."""
        if self.speculator is None:
            changed = self._execute(self._scheduler.schedule())
        else:
            changed = self._speculative_step(self.speculator)
        failed, self._lifecycle.failed = self._lifecycle.failed, []
        return [*failed, *changed]

    def _speculative_step(self, speculator: Speculator) -> list[Request]:
        """Execute a step with drafts where they pay, and tell the speculator what it cost."""
        began, generated = time.perf_counter(), self._lifecycle.generated_tokens
        running = self._scheduler.running
        if not self._scheduler.waiting and all(sequence.remaining == 1 for sequence in running):
            speculator.add_drafts(running, context=self._lifecycle.context, vocab_size=self._vocab_size)
        drafting = time.perf_counter() - began
        batch = self._scheduler.schedule()
        only_decodes = all(each.sequence.remaining == 1 for each in batch)
        has_drafts = any(each.sequence.drafts for each in batch)
        changed = self._execute(batch)
        if batch and only_decodes:
            tokens = self._lifecycle.generated_tokens - generated
            speculator.record(len(batch), has_drafts, time.perf_counter() - began, tokens, drafting=drafting)
        return changed

    @torch.inference_mode()
    def _execute(self, batch: list[Scheduled]) -> list[Request]:
        if not batch:
            return []
        self.num_steps += 1
        ready: list[tuple[Sequence, LogitRows]] = []
        changed: dict[Request, None] = {}
        for output in self._run_model(batch):
            sequence, count = output.scheduled.sequence, output.scheduled.count
            request = sequence.request
            changed[request] = None
            if not output.finite:
                if sequence.drafts:
                    self._recompute_without_drafts(sequence)
                else:
                    self._lifecycle.fail_non_finite(sequence)
                continue
            first = sequence.start + sequence.computed
            sequence.computed += count - len(sequence.drafts)
            if request.reads_prompt:
                _add_prompt_logprobs(request, first, output.logits.tensor())
            if sequence.remaining == 0:
                ready.append((sequence, output.logits.last(1 + len(sequence.drafts))))
            else:
                self._lifecycle.blocks.commit(sequence)
        self._sampler.sample(ready)
        return list(changed)

    def _run_model(self, batch: list[Scheduled]) -> list[SequenceLogits]:
        """Run the model over all together. If that fails, retry one by one to isolate the failing sequence."""
        try:
            return self.runner.run(batch)
        except Exception as failure:  # whatever the model, a kernel or the allocator raises
            if len(batch) == 1:
                self._lifecycle.fail(batch[0].sequence.request, failure)
                return []
        outputs = []
        for each in batch:
            if each.sequence.finish_reason is None:  # its request may have failed with an earlier sequence
                outputs += self._run_model([each])
        return [output for output in outputs if output.scheduled.sequence.finish_reason is None]

    def _recompute_without_drafts(self, sequence: Sequence) -> None:
        """Drop the drafts of a sequence whose logits are NaN or infinite, since they can be the cause, and propose none
        any more. Only whole blocks can be cleared, so all tokens of the last block are computed again."""
        if self.speculator is not None:
            self.speculator.drafted += len(sequence.drafts)
        sequence.drafts, sequence.speculation_enabled = [], False
        full_blocks = sequence.computed // self._lifecycle.blocks.block_size
        for group, table in enumerate(sequence.tables):
            self.runner.cache.clear(group, table[full_blocks:])
        sequence.computed = full_blocks * self._lifecycle.blocks.block_size


def _add_prompt_logprobs(request: Request, first: int, logits: Tensor) -> None:
    """Add the log-probabilities of the prompt's tokens first + 1, first + 2, ..., which the rows of logits predict."""
    known = request.prompt_logprobs
    skipped = len(known) - 1 - first
    targets = request.prompt[len(known) : first + 1 + len(logits)]
    top = [request.params.prompt_logprobs] * len(targets)
    known += token_logprobs(logits[skipped : skipped + len(targets)], targets, top)
