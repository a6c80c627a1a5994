"""What a request returns: events while its sequences grow, and the result when the last of them has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from gptsmith.engine.sequence import Completion, Event, Request, Result, Sequence, TokenLogprob


class EventQueue:
    """Events that have not been read. A request with an inbox of its own has its events there."""

    def __init__(self) -> None:
        self._unread: list[Event] = []
        self._inboxes: dict[int, deque[Event]] = {}

    def __bool__(self) -> bool:
        """Whether there are events outside the inboxes."""
        return bool(self._unread)

    def add(self, events: list[Event]) -> None:
        if not self._inboxes:
            self._unread += events
            return
        for event in events:
            inbox = self._inboxes.get(event.request)
            (self._unread if inbox is None else inbox).append(event)

    def open_inbox(self, request: int) -> deque[Event]:
        """Return a request's inbox, with its unread events so far."""
        if request not in self._inboxes:
            self._inboxes[request] = deque(event for event in self._unread if event.request == request)
            self._unread = [event for event in self._unread if event.request != request]
        return self._inboxes[request]

    def close_inbox(self, request: int) -> None:
        """Drop an inbox and all that is in it."""
        del self._inboxes[request]

    def take(self) -> list[Event]:
        """Return and remove the events outside the inboxes."""
        events, self._unread = self._unread, []
        return events


def new_events(request: Request) -> list[Event]:
    """Return what is new of a request. If no sequence is live any more, the last event carries the result."""
    params, events = request.params, []
    if not params.returns_only_at_end:
        for sequence in sorted([*request.live, *request.finished], key=lambda s: s.index):
            event = _new_event(sequence)
            if event is not None:
                events.append(event)
    if request.live:
        return events
    result = _result(request)
    if params.returns_only_at_end:
        events = [Event(request.number, c.index, c.ids, c.logprobs, c.finish_reason) for c in result.completions]
    if not events:
        reason = request.finished[0].finish_reason if request.finished else None
        events = [Event(request.number, 0, [], None, reason)]
    events[-1].result = result
    return events


def _new_event(sequence: Sequence) -> Event | None:
    request, params, first = sequence.request, sequence.request.params, sequence.emitted
    generated = sequence.sampler.generated
    if sequence.emitted_end or (first == generated and sequence.finish_reason is None):
        return None
    ids = sequence.tokens[len(request.prompt) + first :]
    logprobs: list[TokenLogprob | None] | None = None
    if params.logprobs is not None:
        logprobs = list(sequence.logprobs[first:])
    if first == 0 and params.echo:
        ids = [*request.prompt, *ids]
        if logprobs is not None:
            logprobs = [*_echoed_logprobs(request), *logprobs]
    sequence.emitted, sequence.emitted_end = generated, sequence.finish_reason is not None
    return Event(request.number, sequence.index, ids, logprobs, sequence.finish_reason)


def _result(request: Request) -> Result:
    params = request.params
    completed = sorted(request.finished, key=lambda s: s.index)
    if params.best_of is not None and params.best_of > params.n:
        completed.sort(key=lambda s: -s.cumulative_logprob / max(1, len(s.generated)))
        completed = completed[: params.n]
    return Result(
        request.number,
        request.prompt,
        [_completion(sequence, index) for index, sequence in enumerate(completed)],
        request.prompt_logprobs if params.prompt_logprobs is not None else None,
        min(request.cached_tokens, len(request.prompt)),
        request.error,
    )


def _completion(sequence: Sequence, index: int) -> Completion:
    request, params = sequence.request, sequence.request.params
    ids, logprobs = sequence.generated, list[TokenLogprob | None](sequence.logprobs)
    if params.echo:
        ids, logprobs = [*request.prompt, *ids], [*_echoed_logprobs(request), *logprobs]
    return Completion(
        index,
        ids,
        logprobs if params.logprobs is not None else None,
        sequence.cumulative_logprob if sequence.logprobs else None,
        sequence.finish_reason,
    )


def _echoed_logprobs(request: Request) -> list[TokenLogprob | None]:
    """Return the log-probabilities of an echoed prompt; None for those that were not asked for."""
    known = request.prompt_logprobs
    return [*known, *[None] * (len(request.prompt) - len(known))]


def token_logprobs(logits: Tensor, chosen: Items[int], top: Items[int | None]) -> list[TokenLogprob | None]:
    """Return the log-probability of the chosen token in each row of logits (R, V).

    top: for each row, how many of the most probable tokens to add; None: the row is not asked for.
    """
    if not len(chosen):
        return []
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0].tolist()
    max_count = max((count or 0 for count in top), default=0)
    best, ids = ([], []) if max_count == 0 else (t.tolist() for t in logprobs.topk(max_count))
    return [
        None
        if count is None
        else TokenLogprob(id, value, tuple(zip(ids[i][:count], best[i][:count], strict=True)) if count else ())
        for i, (id, value, count) in enumerate(zip(chosen, own, top, strict=True))
    ]
