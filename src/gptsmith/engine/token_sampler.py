"""Chooses the next tokens of sequences whose logits have been computed, and appends them."""

from __future__ import annotations

import torch
from torch import Tensor

from gptsmith.engine.beam import BeamSearch
from gptsmith.engine.lifecycle import Lifecycle
from gptsmith.engine.output import token_logprobs
from gptsmith.engine.runner import LogitRows, joined
from gptsmith.engine.sampler import NO_TOKEN_ALLOWED, adjust, choose, filter_logits
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import FinishReason, Request, Sequence, TokenLogprob
from gptsmith.engine.speculative import Speculator
from gptsmith.errors import UsageError


class TokenSampler:
    """Samples the tokens of all sequences of a step together. Sequences of a beam search go to `beam_search`."""

    def __init__(self, lifecycle: Lifecycle, beam_search: BeamSearch, speculator: Speculator | None) -> None:
        self._lifecycle, self._beam_search, self._speculator = lifecycle, beam_search, speculator

    def sample(self, ready: list[tuple[Sequence, LogitRows]]) -> None:
        """Choose and append the next tokens of these sequences. Each has 1 + drafts rows of logits, which predict the
        first draft, ..., and the token after the last draft. A failure ends the request that caused it."""
        beams: dict[Request, list[tuple[Sequence, Tensor]]] = {}
        sampled: list[tuple[Sequence, LogitRows]] = []
        for sequence, logits in ready:
            request = sequence.request
            if request.params.prompt_only:
                self._finish_empty(sequence)
                continue
            if request.params.beams > 1:
                beams.setdefault(request, []).append((sequence, logits.tensor()))
                continue
            try:  # the drafts are the parent's: siblings take only its first row
                sampled.append((sequence, logits))
                if not request.forked and request.params.samples > 1:
                    sampled += [(child, logits.first()) for child in self._fork_samples(sequence)]
            except Exception as failure:  # out of memory, or a grammar that cannot be copied
                self._lifecycle.fail(request, failure)
        for request, beams_of_request in beams.items():
            try:
                self._beam_search.advance(request, beams_of_request)
            except Exception as failure:
                self._lifecycle.fail(request, failure)
        sampled = [(sequence, logits) for sequence, logits in sampled if sequence.finish_reason is None]
        if sampled:
            self._sample_batch(sampled)

    def _finish_empty(self, sequence: Sequence) -> None:
        """End all samples of a prompt before their first token."""
        request = sequence.request
        for i in range(1, request.params.samples):
            child = sequence.fork(i, request.seed + i)
            child.finish_reason = "length"
            request.finished.append(child)
        self._lifecycle.finish(sequence, "length")

    def _fork_samples(self, sequence: Sequence) -> list[Sequence]:
        """Return the other samples of a prompt that has just been computed; they share its blocks."""
        request = sequence.request
        request.forked = True
        children = [sequence.fork(i, request.seed + i) for i in range(1, request.params.samples)]
        for child in children:
            self._lifecycle.admit_fork(sequence, child)
        return children

    def _sample_batch(self, batch: list[tuple[Sequence, LogitRows]]) -> None:
        """Sample all together. If that fails, retry one by one to isolate the failing sequence."""
        positions = [(sequence, ahead) for sequence, logits in batch for ahead in range(len(logits))]
        raw = joined([logits for _, logits in batch])
        try:
            states = [sequence.sampler for sequence, _ in positions]
            adjusted = adjust(raw, states)
            _check_tokens_left(adjusted, [sequence for sequence, _ in positions])
            chosen = choose(adjusted, states, [ahead for _, ahead in positions]).tolist()
        except Exception as failure:
            if len(batch) == 1:
                self._lifecycle.fail(batch[0][0].request, failure)
            else:
                for each in batch:
                    if each[0].finish_reason is None:  # its request may have failed with an earlier sequence
                        self._sample_batch([each])
            return
        all_params = [sequence.request.params for sequence, _ in positions]
        top = [params.logprobs if params.best_of is None else 0 for params in all_params]
        logprobs: list[TokenLogprob | None] = [None] * len(chosen)
        if any(count is not None for count in top):
            logprobs = token_logprobs(_scored(raw, adjusted, all_params), chosen, top)
        tokens, start = list(zip(chosen, logprobs, strict=True)), 0
        for sequence, logits in batch:
            its_tokens = tokens[start : start + len(logits)]
            start += len(logits)
            if sequence.finish_reason is None:
                try:
                    self._append(sequence, its_tokens)
                except Exception as failure:  # of a grammar
                    self._lifecycle.fail(sequence.request, failure)

    def _append(self, sequence: Sequence, chosen: list[tuple[int, TokenLogprob | None]]) -> None:
        """Append the chosen tokens as far as the drafts agree with them, and the token after."""
        drafts, sequence.drafts = sequence.drafts, []
        if self._speculator is not None:
            self._speculator.count_accepted(drafts, [token for token, _ in chosen])
        for i, (token, logprob) in enumerate(chosen):
            self._lifecycle.append(sequence, token, logprob)
            reason = _finish_reason(sequence, token, self._lifecycle.context)
            if reason is not None:
                self._lifecycle.finish(sequence, reason)
                return
            if i < len(drafts):
                if drafts[i] != token:
                    break
                sequence.computed += 1  # the draft was right, so its keys and values are those of the token
        self._lifecycle.blocks.commit(sequence)
        self._lifecycle.shift_if_full(sequence)


def _finish_reason(sequence: Sequence, token: int, context: int) -> FinishReason | None:
    """Return why the sequence ends with this last token; None if it does not."""
    params, sampler = sequence.request.params, sequence.sampler
    if token in params.stop_ids and sampler.generated > params.min_tokens:
        return "stop"
    if sampler.stopped or (sampler.constraint is not None and sampler.constraint.finished):
        return "stop"
    if sampler.generated >= params.max_tokens:
        return "length"
    if sequence.length > context and params.overflow != "shift":
        return "context"
    return None


def _scored(raw: Tensor, adjusted: Tensor, params: list[SamplingParams]) -> Tensor:
    """Return the logits that log-probabilities are of, (R, V): the model's, or those that tokens are drawn from."""
    rows = [i for i, each in enumerate(params) if each.sampled_logprobs]
    if not rows:
        return raw
    if len(rows) == len(params):
        return filter_logits(adjusted, params)
    index = torch.tensor(rows, device=raw.device)
    return raw.index_copy(0, index, filter_logits(adjusted[index], [params[i] for i in rows]))


def _check_tokens_left(adjusted: Tensor, sequences: list[Sequence]) -> None:
    """Raise UsageError if a row of the adjusted logits (R, V) forbids every token."""
    if all(sequence.sampler.params.uses_raw_logits for sequence in sequences):
        return
    if bool((adjusted.amax(dim=-1) == -torch.inf).any()):
        raise UsageError(NO_TOKEN_ALLOWED)
