"""The engine: token ids and sampling parameters in, token ids out. All generation of the package goes through it.

    engine = Engine(model)
    results = engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=50))     # results[0].ids
    for event in engine.stream([1, 2, 3], SamplingParams(n=2)): ...                   # event.index, event.ids

Requests join and leave between passes (`add_request`, `step`, `abort`); a pass computes what the scheduler chose, of as
many requests as there are. What goes wrong with one request is that request's error; the others go on.
"""

from __future__ import annotations

import operator
import os
import secrets
import time
from collections import deque
from collections.abc import Generator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptsmith.engine.beam import Finished, Step, extend_beams
from gptsmith.engine.block_manager import BlockManager
from gptsmith.engine.cpu_runner import make_runner
from gptsmith.engine.runner import Rows
from gptsmith.engine.sampler import SamplerState, adjust, choose
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.scheduler import Scheduled, Scheduler
from gptsmith.engine.sequence import Completion, Event, FinishReason, Request, Result, Sequence, TokenLogprob
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.formats.peft import read_adapter
from gptsmith.log import note
from gptsmith.model.cache import PagedCache, windows_of
from gptsmith.model.config import ModelConfig
from gptsmith.model.lora import Adapter
from gptsmith.model.transformer import Transformer

if TYPE_CHECKING:
    from gptsmith.engine.speculative import Speculator

_SHARE_OF_MEMORY = {"cpu": 0.25, "cuda": 0.8}  # that the cache may take, where nobody says how much
_NOTHING_ALLOWED = "no token is allowed here: the grammar, logit_bias and min_tokens leave none."


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and what is the case now (running, waiting, blocks)."""

    requests: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    preemptions: int
    prefix_tokens: int
    """Prompt tokens that were looked for among known ones."""
    prefix_hits: int
    """And found."""
    running: int
    waiting: int
    blocks_used: int
    blocks: int
    drafted: int = 0
    """Tokens that were guessed ahead."""
    accepted: int = 0
    """And rightly so."""

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hits / self.prefix_tokens if self.prefix_tokens else 0.0

    @property
    def cache_use(self) -> float:
        """The share of blocks that sequences hold."""
        return self.blocks_used / self.blocks


class Engine:
    """One model at work on any number of requests. Not to be used from several threads at once: see `AsyncEngine`.

    vocab_size: only ids below it are read and chosen (default: the model's; a tokenizer's is often smaller).
    max_batch: most sequences at a time. max_batch_tokens: most tokens of one pass; a prompt is read in chunks of at
    most so many. cache_tokens: room for so many tokens' keys and values (default: what `max_batch` sequences can need,
    up to a quarter of a computer's memory or four fifths of a GPU's). block_size: tokens of a block.
    speculator: guesses ahead where that is faster (`engine.speculative`); what is generated stays the same.
    Raises UsageError for values that make no sense together.

    If the model's weights change, call `on_weights_updated`.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        vocab_size: int | None = None,
        max_batch: int = 32,
        max_batch_tokens: int = 256,
        cache_tokens: int | None = None,
        block_size: int = 16,
        prefix_caching: bool = True,
        speculator: Speculator | None = None,
    ) -> None:
        config = model.config
        for name, value in (("max_batch", max_batch), ("block_size", block_size)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}.")
        if max_batch_tokens < max_batch:
            raise UsageError(f"max_batch_tokens must be at least max_batch ({max_batch}), not {max_batch_tokens}.")
        self.model, self.config, self.speculator = model, config, speculator
        self.context = config.max_position_embeddings
        self.vocab_size = min(config.vocab_size, vocab_size or config.vocab_size)
        weight: Tensor = next(p for name, p in model.named_parameters() if name.endswith("norm.weight"))
        if cache_tokens is None:
            cache_tokens = _affordable_tokens(config, max_batch, block_size, weight)
        if cache_tokens < 1:
            raise UsageError(f"cache_tokens must be at least 1, not {cache_tokens}.")
        windows = windows_of(config)
        sizes = [_pool_size(w, cache_tokens, max_batch, max_batch_tokens, block_size) for w in windows]
        cache = PagedCache(config, sizes, block_size, device=weight.device, dtype=weight.dtype)
        self.blocks = BlockManager(windows, sizes, block_size, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_batch=max_batch, max_batch_tokens=max_batch_tokens)
        self.runner = make_runner(model, cache, self.vocab_size)
        self._requests: dict[int, Request] = {}
        self._beams: dict[int, Finished] = {}
        self._count = self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._undelivered: list[Event] = []
        self._streams: dict[int, deque[Event]] = {}
        self._adapters: dict[str, tuple[bytes, Adapter]] = {}
        self._adapters_added = 0

    # requests ---------------------------------------------------------------------------------------------------------

    def add_request(self, prompt: Items[int], params: SamplingParams, *, offset: int = 0) -> int:
        """Queue a prompt; returns the request's number. Raises UsageError for one that cannot be served.

        offset: its first token draws the random number that the seed's token number `offset` would.
        """
        return self._enqueue(self._prepare(prompt, params, offset))

    def _prepare(self, prompt: Items[int], params: SamplingParams, offset: int = 0) -> Request:
        prompt = self._checked(prompt, params)
        seed = params.seed if params.seed is not None else secrets.randbits(48)
        salt, adapter = (b"", None) if params.adapter is None else self._adapters[params.adapter]
        request = Request(self._count, prompt, params, seed, salt, adapter)
        self._count += 1
        sampler = SamplerState(params, seed, prompt, self.vocab_size, offset=offset)
        sequence = Sequence(request, 0, sampler, len(self.blocks.pools))
        if len(prompt) > self.context:
            sequence.shift(self._shifted_length)
        request.live.append(sequence)
        return request

    def _enqueue(self, request: Request) -> int:
        params = request.params
        if params.beams > 1:
            self._beams[request.number] = Finished(params.beams, params.length_penalty, params.early_stopping)
        self._requests[request.number] = request
        self._prompt_tokens += len(request.prompt)
        self.scheduler.add(request.live[0])
        return request.number

    def cut(self, length: int, params: SamplingParams) -> int:
        """How many of a prompt's first tokens are cut off: none, unless `overflow="truncate"` asks for it."""
        if params.overflow != "truncate":
            return 0
        return max(0, length - max(self.context - params.max_tokens, self.context // 4, 1))

    def abort(self, request: int) -> None:
        """Cancel a request; its blocks are free at once. What it had made comes with its last event. Unknown or
        finished: nothing happens."""
        if request in self._requests:
            self._undelivered += self._end(self._requests[request], "cancelled")

    def stop(self, request: int, index: int) -> None:
        """End one sample as if it had come to a stop token. Unknown or finished: nothing happens."""
        known = self._requests.get(request)
        for sequence in list(known.live) if known is not None else ():
            if sequence.index == index and known is not None:
                self._finish(sequence, "stop")
                self._undelivered += self._news(known)

    def add_adapter(self, name: str, adapter: Adapter | Path | str) -> None:
        """Have requests with `params.adapter == name` use a LoRA adapter: one that was read, or its directory. One of
        the same name is replaced, for new requests. Raises CheckpointError if it is none, or is of another model."""
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(Path(adapter), self.model)
        self._adapters_added += 1
        self._adapters[name] = (f"{self._adapters_added} {name}".encode(), adapter)

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those that use it go on. Unknown: nothing happens."""
        self._adapters.pop(name, None)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._requests or self._undelivered)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            requests=self._count,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            preemptions=self.scheduler.preemptions,
            prefix_tokens=self.blocks.prefix_tokens,
            prefix_hits=self.blocks.prefix_hits,
            running=len(self.scheduler.running) + len(self.scheduler.waiting_for_beams),
            waiting=len(self.scheduler.waiting),
            blocks_used=self.blocks.used(),
            blocks=sum(pool.size for pool in self.blocks.pools),
            drafted=self.speculator.drafted if self.speculator is not None else 0,
            accepted=self.speculator.accepted if self.speculator is not None else 0,
        )

    def on_weights_updated(self) -> None:
        """Forget what was computed with the weights as they were; running requests go on with the new ones."""
        for pool in self.blocks.pools:
            pool.evict_all()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting_for_beams]:
            sequence.num_hashed_blocks = 0
            self.blocks.release(sequence)

    # generation -------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Items[Items[int]], params: SamplingParams | Items[SamplingParams] | None = None
    ) -> list[Result]:
        """Continue all prompts (each with its own params, if there are as many); results in their order.

        A prompt that cannot be served has an `error` in its result, and no completions.
        """
        params = params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"there are {len(prompts)} prompts and {len(each)} SamplingParams; give one, or as many.")
        results: dict[int, Result] = {}
        numbers: dict[int, int] = {}
        for i, (prompt, wishes) in enumerate(zip(prompts, each, strict=True)):
            try:
                numbers[i] = self.add_request(prompt, wishes)
            except Exception as failure:  # whatever is wrong with it, the others go on
                results[i] = Result(-1, list(prompt), error=as_error(failure))
        results |= zip(numbers, self.drain(list(numbers.values())), strict=True)
        return [results[i] for i in range(len(prompts))]

    def drain(self, requests: Items[int]) -> list[Result]:
        """Work until these requests are finished; their results. Left early (by Ctrl-C), it cancels them."""
        results: dict[int, Result] = {}
        inboxes = {number: self._streams.setdefault(number, deque()) for number in requests}
        try:
            while len(results) < len(inboxes):
                self._advance()
                for inbox in inboxes.values():
                    while inbox:
                        event = inbox.popleft()
                        if event.result is not None:
                            results[event.request] = event.result
        finally:
            for number in inboxes:
                self.abort(number)
                del self._streams[number]
            self._undelivered = [event for event in self._undelivered if event.request not in inboxes]
        return [results[number] for number in requests]

    def stream(self, prompt: Items[int], params: SamplingParams) -> Generator[Event]:
        """Continue a prompt; its events as they come. Whoever leaves off reading cancels it.

        Raises UsageError, before anything is computed, for a prompt that cannot be served.
        """
        return self._events(self._prepare(prompt, params))

    def _events(self, request: Request) -> Generator[Event]:
        number, inbox = self._enqueue(request), deque[Event]()
        self._streams[number] = inbox
        try:
            while number in self._requests or inbox:
                while inbox:
                    yield inbox.popleft()
                if number in self._requests:
                    self._advance()
        finally:
            self.abort(number)
            del self._streams[number]
            self._undelivered = [event for event in self._undelivered if event.request != number]

    def step(self) -> list[Event]:
        """One pass over the model (if there is anything to compute), and what is new."""
        self._advance()
        events, self._undelivered = self._undelivered, []
        return events

    def _advance(self) -> None:
        events = self._pass()
        self._undelivered += events
        if self._streams:
            for event in self._undelivered:
                if event.request in self._streams:
                    self._streams[event.request].append(event)
            self._undelivered = [event for event in self._undelivered if event.request not in self._streams]

    # a pass -----------------------------------------------------------------------------------------------------------

    def _pass(self) -> list[Event]:
        speculator = self.speculator
        if speculator is None:
            return self._compute(self.scheduler.schedule())
        began, generated = time.perf_counter(), self._generated_tokens
        self._guess(speculator)
        guessed = time.perf_counter()
        batch = self.scheduler.schedule()
        decoding = all(each.sequence.remaining == 1 for each in batch)
        drafted = any(each.sequence.drafts for each in batch)
        events = self._compute(batch)
        if batch and decoding:
            made = self._generated_tokens - generated
            speculator.record(len(batch), drafted, time.perf_counter() - began, made, guessing=guessed - began)
        return events

    def _guess(self, speculator: Speculator) -> None:
        """Give sequences that only decode drafts, if that pays."""
        running = self.scheduler.running
        if self.scheduler.waiting or not all(s.remaining == 1 for s in running):
            return
        able = [s for s in running if s.speculation_enabled and s.request.params.uses_raw_logits]
        if not able or speculator.failure is not None or not speculator.should_speculate(len(running)):
            return
        try:
            guesses = speculator.drafter.propose(able, speculator.most)
        except Exception as failure:  # a drafter's, which nobody needs: all goes on without
            speculator.failure = failure
            note(f"note: guessing ahead failed and is off from now on: {type(failure).__name__}: {failure}")
            return
        for sequence, guess in zip(able, guesses, strict=True):
            params = sequence.request.params
            room = min(params.max_tokens - sequence.sampler.generated - 1, self.context - sequence.length)
            sequence.drafts = [id for id in guess[: max(0, room)] if 0 <= id < self.vocab_size]

    @torch.inference_mode()
    def _compute(self, batch: list[Scheduled]) -> list[Event]:
        if not batch:
            return []
        self._steps += 1
        ready: list[tuple[Sequence, Tensor]] = []
        touched: dict[int, Request] = {}
        for rows in self._run(batch):
            sequence, count = rows.scheduled.sequence, rows.scheduled.count
            request = sequence.request
            touched[request.number] = request
            past = sequence.start + sequence.computed
            if not rows.finite:
                if sequence.drafts:
                    self._forget_guesses(sequence)
                else:
                    self._fail_damaged(sequence)
                continue
            sequence.computed += count - len(sequence.drafts)
            if request.reads_prompt:
                self._read_prompt(request, past, rows.logits)
            if sequence.remaining == 0:
                ready.append((sequence, rows.logits[-1 - len(sequence.drafts) :]))
            else:
                self.blocks.commit(sequence)
        self._sample(ready)
        events = []
        for request in touched.values():
            events += self._news(request)
        return events

    def _run(self, batch: list[Scheduled]) -> list[Rows]:
        """Run a pass. If it fails, each sequence alone: who fails again is at fault (or memory is short even so)."""
        try:
            return self.runner.run(batch)
        except Exception as failure:  # whatever the model, a kernel or the allocator raises
            if len(batch) == 1:
                self._fail(batch[0].sequence.request, failure)
                return []
        rows = []
        for each in batch:
            if each.sequence.finish_reason is None:  # its request may have failed with an earlier one
                rows += self._run([each])
        return [each for each in rows if each.scheduled.sequence.finish_reason is None]

    def _sample(self, ready: list[tuple[Sequence, Tensor]]) -> None:
        """Choose the next token of sequences that are computed to their end; logits: (1 + drafts, V) each."""
        beams: dict[Request, list[tuple[Sequence, Tensor]]] = {}
        sampled: list[tuple[Sequence, Tensor]] = []
        for sequence, logits in ready:
            request = sequence.request
            if request.params.beams > 1:
                beams.setdefault(request, []).append((sequence, logits))
                continue
            try:  # a sibling has no guesses: of its parent's rows only the first is after what both have
                sampled += [(sequence, logits), *((child, logits[:1]) for child in self._siblings(sequence))]
            except Exception as failure:  # memory's, or a grammar's that cannot be copied
                self._fail(request, failure)
        for request, its in beams.items():
            try:
                self._beam_search(its)
            except Exception as failure:
                self._fail(request, failure)
        sampled = [(s, logits) for s, logits in sampled if s.finish_reason is None]
        if sampled:
            self._sample_all(sampled)

    def _sample_all(self, sampled: list[tuple[Sequence, Tensor]]) -> None:
        """Sample, all together; if that fails, each alone: who fails again is at fault."""
        places = [(s, ahead) for s, logits in sampled for ahead in range(len(logits))]
        raw = sampled[0][1] if len(sampled) == 1 else torch.cat([logits for _, logits in sampled])
        try:
            adjusted = adjust(raw, [s.sampler for s, _ in places])
            self._refuse_nothing(adjusted, [s for s, _ in places])
            chosen = choose(adjusted, [s.sampler for s, _ in places], [ahead for _, ahead in places]).tolist()
        except Exception as failure:
            if len(sampled) == 1:
                self._fail(sampled[0][0].request, failure)
            else:
                for each in sampled:
                    if each[0].finish_reason is None:  # its request may have failed with an earlier one
                        self._sample_all([each])
            return
        wishes = [s.request.params.logprobs if s.request.params.best_of is None else 0 for s, _ in places]
        logprobs: list[TokenLogprob | None] = [None] * len(chosen)
        if any(wish is not None for wish in wishes):
            logprobs = _logprobs(raw, chosen, wishes)
        tokens = iter(list(zip(chosen, logprobs, strict=True)))
        for sequence, logits in sampled:
            its = [next(tokens) for _ in range(len(logits))]
            if sequence.finish_reason is None:
                try:
                    self._take(sequence, its)
                except Exception as failure:  # a grammar's, that cannot follow
                    self._fail(sequence.request, failure)

    def _take(self, sequence: Sequence, chosen: list[tuple[int, TokenLogprob | None]]) -> None:
        """Append what was chosen: as many tokens as drafts were right, and the one after."""
        drafts, sequence.drafts = sequence.drafts, []
        if self.speculator is not None:
            made = [token for token, _ in chosen]
            right = next((i for i, (a, b) in enumerate(zip(drafts, made, strict=False)) if a != b), len(drafts))
            self.speculator.drafted += len(drafts)
            self.speculator.accepted += right
        for i, (token, logprob) in enumerate(chosen):
            sequence.push(token, logprob)
            self._generated_tokens += 1
            reason = self._ended(sequence, token)
            if reason is not None:
                self._finish(sequence, reason)
                return
            if i < len(drafts):
                if drafts[i] != token:
                    break
                sequence.computed += 1  # the draft was right: what was computed of it holds
        self.blocks.commit(sequence)
        self._shift(sequence)

    def _shift(self, sequence: Sequence) -> None:
        """Where the context is full, read the last of it again."""
        if sequence.length > self.context:
            self.blocks.release(sequence)
            sequence.shift(self._shifted_length)

    def _siblings(self, sequence: Sequence) -> list[Sequence]:
        """The other samples of a prompt that has just been read to its end; they share its blocks."""
        request = sequence.request
        if request.forked or request.params.samples == 1:
            return []
        request.forked = True
        children = [sequence.fork(i, request.seed + i) for i in range(1, request.params.samples)]
        for child in children:
            self._enter(sequence, child)
        return children

    def _enter(self, parent: Sequence, child: Sequence) -> None:
        parent.request.live.append(child)  # first: should copying fail, its blocks go with the request
        for group, source, target in self.blocks.fork(parent, child):
            self.runner.cache.copy(group, source, target)
        self.scheduler.admit(child)

    def _forget_guesses(self, sequence: Sequence) -> None:
        """A pass with guesses gave no numbers: it is computed again without them, for it may be their fault.

        Only whole blocks can be cleared, so all tokens of the last one are computed again.
        """
        if self.speculator is not None:
            self.speculator.drafted += len(sequence.drafts)
        Z, sequence.drafts, sequence.speculation_enabled = self.blocks.block_size, [], False
        for group, table in enumerate(sequence.tables):
            self.runner.cache.clear(group, table[sequence.computed // Z :])
        sequence.computed = sequence.computed // Z * Z

    def _ended(self, sequence: Sequence, token: int) -> FinishReason | None:
        params, sampler = sequence.request.params, sequence.sampler
        if token in params.stop_ids and sampler.generated > params.min_tokens:
            return "stop"
        if sampler.stopped or (sampler.constraint is not None and sampler.constraint.finished):
            return "stop"
        if sampler.generated >= params.max_tokens:
            return "length"
        if sequence.length > self.context and params.overflow != "shift":
            return "context"
        return None

    def _refuse_nothing(self, adjusted: Tensor, sequences: list[Sequence]) -> None:
        """Raise if a row forbids every token."""
        if all(s.sampler.params.uses_raw_logits for s in sequences):
            return
        if bool((adjusted.amax(dim=-1) == -torch.inf).any()):
            raise GptsmithError(_NOTHING_ALLOWED)

    def _read_prompt(self, request: Request, past: int, logits: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens past + 1 ..., which the logits predict."""
        known = request.prompt_logprobs
        skipped = len(known) - 1 - past
        targets = request.prompt[len(known) : past + 1 + len(logits)]
        known += _logprobs(
            logits[skipped : skipped + len(targets)], targets, [request.params.prompt_logprobs] * len(targets)
        )

    # beam search ------------------------------------------------------------------------------------------------------

    def _beam_search(self, ready: list[tuple[Sequence, Tensor]]) -> None:
        """Note the candidates of beams of one request; once all its beams have theirs, extend_beams them."""
        # What is adjusted are log-probabilities, as in transformers: there is nothing to draw that must add up to 1.
        logprobs = torch.cat([logits for _, logits in ready]).log_softmax(dim=-1)
        logprobs = adjust(logprobs, [s.sampler for s, _ in ready])
        for (sequence, _), row in zip(ready, logprobs, strict=True):
            params = sequence.request.params
            width = min(params.beams * (1 + max(1, len(params.stop_ids))), self.vocab_size)
            best, ids = row.topk(width)
            top = tuple(zip(ids.tolist(), best.tolist(), strict=True))
            sequence.candidates = [
                (sequence.cumulative_logprob + value, id, TokenLogprob(id, value, top[: params.logprobs or 0]))
                for id, value in top
            ]
            self.blocks.commit(sequence)
            self.scheduler.hold_beam(sequence)
        request = ready[0][0].request
        if all(s.candidates is not None for s in request.live):
            self._extend_beams(request)

    def _extend_beams(self, request: Request) -> None:
        params, finished = request.params, self._beams[request.number]
        steps = extend_beams(request.live, finished)
        if not steps and not finished.best:
            raise GptsmithError(_NOTHING_ALLOWED)
        length = len(request.live[0].generated) + 1
        reason: FinishReason | None = None
        if length >= params.max_tokens:
            reason = "length"
        elif request.live[0].length >= self.context and params.overflow != "shift":
            reason = "context"
        self._generated_tokens += len(steps)
        if reason is not None or not steps or finished.complete(steps[0].total, length):
            for step in steps if reason is not None else ():
                finished.add(step, reason)  # type: ignore[arg-type]
            self._end_beams(request, finished)
            return
        chosen: dict[Sequence, list[Step]] = {}
        for step in steps:
            chosen.setdefault(step.parent, []).append(step)
        used = {s.index for s in request.live}
        free = iter(i for i in range(2 * params.beams) if i not in used)
        for parent in list(request.live):
            if parent not in chosen:
                request.live.remove(parent)
                self.scheduler.remove(parent)
        for parent, its_steps in chosen.items():
            parent.candidates = None
            for step in its_steps[1:]:
                child = parent.fork(next(free), request.seed)
                child.push(step.token.id, step.token)
                self._enter(parent, child)
            parent.push(its_steps[0].token.id, its_steps[0].token)
            self.scheduler.resume_beam(parent)
        for sequence in request.live:
            self._shift(sequence)

    def _end_beams(self, request: Request, finished: Finished) -> None:
        done = []
        for index, (_, _, step, reason) in enumerate(finished.best[: request.params.n]):
            sequence = step.parent.fork(index, request.seed)
            sequence.push(step.token.id, step.token)
            sequence.finish_reason = reason
            done.append(sequence)
        for sequence in list(request.live):
            self.scheduler.remove(sequence)
        request.live, request.finished = [], done

    # ends -------------------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        request = sequence.request
        request.live.remove(sequence)
        request.finished.append(sequence)
        self.scheduler.remove(sequence)

    def _fail_damaged(self, sequence: Sequence) -> None:
        for group, blocks in self.blocks.evict(sequence):
            self.runner.cache.clear(group, blocks)
        self._fail(
            sequence.request,
            GptsmithError("the model gives NaN or infinite logits; its weights are damaged or it diverged."),
        )

    def _fail(self, request: Request, failure: Exception) -> None:
        if request.error is not None:
            return
        request.error = as_error(failure)
        self._undelivered += self._end(request, "error")

    def _end(self, request: Request, reason: FinishReason) -> list[Event]:
        for sequence in list(request.live):
            self._finish(sequence, reason)
        return self._news(request)

    def _news(self, request: Request) -> list[Event]:
        """Events of a request's sequences, and its end once none is live."""
        if request.number not in self._requests:
            return []
        params = request.params
        ended = not request.live
        events = []
        if not params.returns_only_at_end:
            for sequence in sorted([*request.live, *request.finished], key=lambda s: s.index):
                event = self._event(sequence, sequence.index)
                if event is not None:
                    events.append(event)
        if not ended:
            return events
        completions = sorted(request.finished, key=lambda s: s.index)
        if params.best_of is not None and params.best_of > params.n:
            completions.sort(key=lambda s: -s.cumulative_logprob / max(1, len(s.generated)))
            completions = completions[: params.n]
        result = Result(
            request.number,
            request.prompt,
            [self._completion(s, i) for i, s in enumerate(completions)],
            request.prompt_logprobs if params.prompt_logprobs is not None else None,
            min(request.cached_tokens, len(request.prompt)),
            request.error,
        )
        if params.returns_only_at_end:
            events = [Event(request.number, c.index, c.ids, c.logprobs, c.finish_reason) for c in result.completions]
        if not events:
            events = [
                Event(request.number, 0, [], None, request.finished[0].finish_reason if request.finished else None)
            ]
        events[-1].result = result
        del self._requests[request.number]
        self._beams.pop(request.number, None)
        return events

    def _event(self, sequence: Sequence, index: int) -> Event | None:
        """What is new of a sequence; None if nothing is."""
        request, params, first = sequence.request, sequence.request.params, sequence.emitted
        made = sequence.sampler.generated
        if sequence.emitted_end or (first == made and sequence.finish_reason is None):
            return None
        ids = sequence.tokens[len(request.prompt) + first :]
        logprobs: list[TokenLogprob | None] | None = None
        if params.logprobs is not None:
            logprobs = list(sequence.logprobs[first:])
        if first == 0 and params.echo:
            ids = [*request.prompt, *ids]
            if logprobs is not None:
                logprobs = [*self._echoed(request), *logprobs]
        sequence.emitted, sequence.emitted_end = made, sequence.finish_reason is not None
        return Event(request.number, index, ids, logprobs, sequence.finish_reason)

    def _completion(self, sequence: Sequence, index: int) -> Completion:
        request, params = sequence.request, sequence.request.params
        ids, logprobs = sequence.generated, list[TokenLogprob | None](sequence.logprobs)
        if params.echo:
            ids, logprobs = [*request.prompt, *ids], [*self._echoed(request), *logprobs]
        return Completion(
            index,
            ids,
            logprobs if params.logprobs is not None else None,
            sequence.cumulative_logprob if sequence.logprobs else None,
            sequence.finish_reason,
        )

    @staticmethod
    def _echoed(request: Request) -> list[TokenLogprob | None]:
        """The prompt's log-probabilities for an echo: as far as they were asked for."""
        known = request.prompt_logprobs
        return [*known, *[None] * (len(request.prompt) - len(known))]

    # checks -----------------------------------------------------------------------------------------------------------

    @property
    def _shifted_length(self) -> int:
        """How many tokens are read again when the context is full and shifts."""
        return max(1, self.context * 3 // 4)

    def _checked(self, prompt: Items[int], params: SamplingParams) -> list[int]:
        """The prompt as it will be read. Raises UsageError."""
        try:
            ids = [operator.index(id) for id in prompt]
        except TypeError:
            raise UsageError("the prompt must be token ids, which are whole numbers.") from None
        if not ids:
            raise UsageError("the prompt is empty; give at least one token to continue.")

        def in_range(values: Items[int]) -> bool:
            return min(values, default=0) >= 0 and max(values, default=0) < self.vocab_size

        if not in_range(ids):
            raise UsageError(f"the prompt has a token id outside 0..{self.vocab_size - 1}.")
        if not in_range(list(params.logit_bias)):
            raise UsageError(f"logit_bias has a token id outside 0..{self.vocab_size - 1}.")
        if not in_range(params.stop_ids):
            raise UsageError(f"stop_ids has a token id outside 0..{self.vocab_size - 1}.")
        if params.adapter is not None and params.adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise UsageError(f"there is no adapter {params.adapter!r}. There are: {known}.")
        if params.stop:
            raise UsageError("stop strings are for those who read text (engine.text); the engine knows stop_ids.")
        if 2 * params.beams > self.vocab_size:
            raise UsageError(f"beams must be at most half of the vocabulary ({self.vocab_size}), not {params.beams}.")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocab_size:
                raise UsageError(f"--{name.replace('_', '-')} must be at most {self.vocab_size}, the vocabulary.")
        ids = ids[self.cut(len(ids), params) :]
        if len(ids) > self.context:
            if params.overflow == "error":
                raise UsageError(
                    f"the prompt has {len(ids):,} tokens, more than the context of {self.context:,}. Shorten it, or "
                    "choose what to do beyond the context: overflow truncate or shift."
                )
            if params.prompt_logprobs is not None:
                raise UsageError("prompt_logprobs needs a prompt within the context.")
        needed = min(self.context, len(ids) + params.max_tokens)
        if needed > self.blocks.capacity():
            raise UsageError(
                f"the request needs room for {needed:,} tokens, and the cache holds {self.blocks.capacity():,}. "
                "Ask for fewer tokens, or give the engine a larger cache."
            )
        return ids


def as_error(failure: Exception) -> GptsmithError:
    """What to say of a failure, whoever raised it."""
    if isinstance(failure, GptsmithError):
        return failure
    if isinstance(failure, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(failure):
        error = GptsmithError("out of memory: give the engine fewer tokens a pass, or a smaller cache.")
    else:
        error = GptsmithError(f"generation failed: {type(failure).__name__}: {failure}.")
    error.__cause__ = failure
    return error


def _logprobs(logits: Tensor, chosen: Items[int], wishes: Items[int | None]) -> list[TokenLogprob | None]:
    """For each row of logits (R, V), the chosen token's log-probability and the most probable ones; None: not asked."""
    if not len(chosen):
        return []
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0].tolist()
    most = max((wish or 0 for wish in wishes), default=0)
    best, ids = ([], []) if most == 0 else (t.tolist() for t in logprobs.topk(most))
    return [
        None
        if wish is None
        else TokenLogprob(id, value, tuple(zip(ids[i][:wish], best[i][:wish], strict=True)) if wish else ())
        for i, (id, value, wish) in enumerate(zip(chosen, own, wishes, strict=True))
    ]


def _pool_size(window: int | None, cache_tokens: int, max_batch: int, max_batch_tokens: int, block_size: int) -> int:
    """Blocks of a group's pool: for all tokens; of a banded group, for the windows of a full batch and a pass."""
    blocks = -(-cache_tokens // block_size)
    if window is None:
        return blocks
    alone = -(-(window + max_batch_tokens) // block_size) + 2  # what one sequence may hold in the course of a pass
    return max(alone, min(blocks, max_batch * (-(-window // block_size) + 2) + -(-max_batch_tokens // block_size)))


def _affordable_tokens(config: ModelConfig, max_batch: int, block_size: int, weight: Tensor) -> int:
    """How many tokens the cache holds by default: what a full batch can need, if that is a fair share of memory."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
    if weight.device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(weight.device)
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        memory = 8 << 30
    affordable = int(memory * _SHARE_OF_MEMORY.get(weight.device.type, 0.25)) // per_token
    most = -(-config.max_position_embeddings // block_size) * block_size
    return max(1, min(max_batch * most, affordable))
