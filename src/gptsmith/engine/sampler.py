"""From logits to the next token, for a batch in which every sequence has its own parameters.

First come the changes that apply however tokens are chosen (`adjust`): penalties, bias, forbidden tokens and grammar.
Then the filters of sampling (`filter_logits`): temperature, top-k, top-p, min-p and typical. Then the draw. The order,
and the effect of each, is that of transformers' logits processors.

Axis letters: R rows of a batch · V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.engine.sampling import SamplingParams

NO_TOKEN_ALLOWED = "no token is allowed next: the grammar, logit_bias and min_tokens together forbid all of them."


class SamplerState:
    """All that the choice of a sequence's next token depends on, besides the logits.

    generated: number of tokens so far. stopped: whether the stop condition is met. offset: the first token draws the
    random number that the seed's token number `offset` would. seen: (V,) bool, tokens of the prompt and the result;
    counts: (V,) float32, occurrences in the result; both only where a penalty needs them.
    Raise UsageError for a constraint that no text satisfies.
    """

    def __init__(
        self, params: SamplingParams, seed: int, prompt: Items[int], vocab_size: int, *, offset: int = 0
    ) -> None:
        self.params, self.seed, self.offset, self.generated = params, seed, offset, 0
        self.seen = self.counts = None
        self.constraint = params.constraint.start() if params.constraint is not None else None
        self.stop_matcher = params.stop_condition.start() if params.stop_condition is not None else None
        self.stopped = False
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[torch.tensor(prompt)] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size)

    def push(self, token: int) -> None:
        """Advance by a token that was chosen."""
        self.generated += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.constraint is not None and token not in self.params.stop_ids:
            self.constraint.push(token)
        if self.stop_matcher is not None:
            self.stopped = self.stop_matcher.push(token)

    def would_stop(self, token: int) -> bool:
        """Return whether the text would end with this token."""
        return token in self.params.stop_ids or (self.stop_matcher is not None and self.stop_matcher.copy().push(token))

    def fork(self, seed: int) -> SamplerState:
        """Return a copy for another sample."""
        child = object.__new__(SamplerState)
        child.params, child.seed, child.offset, child.generated = self.params, seed, self.offset, self.generated
        child.seen = None if self.seen is None else self.seen.clone()
        child.counts = None if self.counts is None else self.counts.clone()
        child.constraint = None if self.constraint is None else self.constraint.copy()
        child.stop_matcher = None if self.stop_matcher is None else self.stop_matcher.copy()
        child.stopped = self.stopped
        return child

    def uniform(self, ahead: int = 0, purpose: int = 0) -> float:
        """Return a random number in [0, 1) that depends only on the seed and the position of the next token.

        ahead: for the token this many positions later. purpose: numbers for different purposes are independent.
        """
        message = b"%d %d %d" % (self.seed, self.offset + self.generated + ahead, purpose)
        return (
            int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"gptsmith").digest(), "little")
            / 2**64
            * (1 - 2**-53)
        )


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen before. logits (R, V), seen (R, V) bool."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def _column(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None]


def _change_rows(logits: Tensor, rows: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to these rows of logits (R, V), and to them only."""
    if len(rows) == len(logits):
        return change(logits)
    index = torch.tensor(rows, device=logits.device)
    return logits.index_copy(0, index, change(logits[index]))


def adjust(logits: Tensor, states: Items[SamplerState]) -> Tensor:
    """Apply penalties, bias, the minimum length and the grammar. logits: (R, V) float32, one row per state."""
    device = logits.device
    rows = [i for i, s in enumerate(states) if s.seen is not None]
    if rows:
        seen = torch.stack([s.seen for s in states if s.seen is not None]).to(device)
        penalties = _column([states[i].params.repetition_penalty for i in rows], device)
        logits = _change_rows(logits, rows, lambda x: penalize_repetition(x, seen, penalties))
    rows = [i for i, s in enumerate(states) if s.counts is not None]
    if rows:
        counts = torch.stack([s.counts for s in states if s.counts is not None]).to(device)
        presence = _column([states[i].params.presence_penalty for i in rows], device)
        frequency = _column([states[i].params.frequency_penalty for i in rows], device)
        logits = _change_rows(logits, rows, lambda x: x - presence * (counts > 0) - frequency * counts)
    added: list[tuple[int, int, float]] = []
    for i, state in enumerate(states):
        added += [(i, token, bias) for token, bias in state.params.logit_bias.items()]
        if state.generated < state.params.min_tokens:
            added += [(i, token, -math.inf) for token in state.params.stop_ids]
    if added:
        at_rows, at_tokens, values = zip(*added, strict=True)
        index = (torch.tensor(at_rows, device=device), torch.tensor(at_tokens, device=device))
        logits = logits.index_put(index, torch.tensor(values, device=device), accumulate=True)
    rows = [i for i, s in enumerate(states) if s.constraint is not None]
    if rows:
        masks = [s.constraint.allowed() for s in states if s.constraint is not None]
        V = logits.shape[-1]
        allowed = torch.stack([F.pad(mask, (0, max(0, V - len(mask))))[:V] for mask in masks]).to(device)
        logits = _change_rows(logits, rows, lambda x: x.masked_fill(~allowed, -torch.inf))
    return logits


_HEAD = 1024  # the nucleus nearly always lies within this many most probable tokens, which saves sorting all


def filter_logits(logits: Tensor, params: Items[SamplingParams]) -> Tensor:
    """Apply temperature, top-k, top-p, min-p and typical, each row with its own parameters.

    logits: (R, V) float32; filtered tokens become -inf. Temperatures must be above 0.
    """
    device, V = logits.device, logits.shape[-1]
    logits = logits / _column([p.temperature for p in params], device)
    rows = [i for i, p in enumerate(params) if p.top_k is not None and p.top_k < V]
    if rows:
        ks = [params[i].top_k or V for i in rows]
        at = torch.tensor(ks, device=device)[:, None] - 1
        logits = _change_rows(
            logits, rows, lambda x: x.masked_fill(x < x.topk(max(ks)).values.gather(1, at), -torch.inf)
        )
    rows = [i for i, p in enumerate(params) if p.top_p is not None and p.top_p < 1]
    if rows:
        shares = _column([params[i].top_p or 1.0 for i in rows], device)
        logits = _change_rows(logits, rows, lambda x: _nucleus(x, shares))
    rows = [i for i, p in enumerate(params) if p.min_p]
    if rows:
        threshold = _column([math.log(params[i].min_p or 1.0) for i in rows], device)
        logits = _change_rows(
            logits, rows, lambda x: x.masked_fill(x < x.amax(dim=-1, keepdim=True) + threshold, -torch.inf)
        )
    rows = [i for i, p in enumerate(params) if p.typical_p is not None and p.typical_p < 1]
    if rows:
        masses = _column([params[i].typical_p or 1.0 for i in rows], device)
        logits = _change_rows(logits, rows, lambda x: _typical(x, masses))
    return logits


def _nucleus(logits: Tensor, shares: Tensor) -> Tensor:
    """Keep the fewest most probable tokens whose probabilities sum to `shares` (R, 1)."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    head = min(_HEAD, logits.shape[-1])
    ordered, order = logits.topk(head, dim=-1)
    cumulative = (ordered - total).exp().cumsum(dim=-1)
    if head < logits.shape[-1] and bool((cumulative[:, -1:] < shares).any()):
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        cumulative = (ordered - total).exp().cumsum(dim=-1)
    before = cumulative - (ordered - total).exp()
    drop = torch.ones_like(logits, dtype=torch.bool).scatter(-1, order, before >= shares)
    return logits.masked_fill(drop, -torch.inf)


def _typical(logits: Tensor, masses: Tensor) -> Tensor:
    """Keep the tokens whose information is closest to the entropy and whose probabilities sum to `masses` (R, 1)."""
    logprobs = logits.log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).nansum(dim=-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    cumulative = logprobs.exp().gather(-1, order).cumsum(dim=-1)
    last = (cumulative < masses).sum(dim=-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -torch.inf)


def draw(logits: Tensor, uniforms: Items[float]) -> Tensor:
    """Draw one token per row with the probabilities softmax(logits): (R, V) -> (R,) int64.

    Inverts the cumulative distribution at `uniforms`, in float64 where the device has it: over a large vocabulary,
    float32 sums lose the tail.
    """
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.softmax(dim=-1, dtype=precise).cumsum(dim=-1)
    at = torch.tensor(uniforms, dtype=precise, device=logits.device)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, at, right=True)[:, 0]
    return chosen.clamp_max(logits.shape[-1] - 1)


def choose(logits: Tensor, states: Items[SamplerState], ahead: Items[int] | None = None) -> Tensor:
    """Choose the next token of each row: adjusted logits (R, V) float32 -> (R,) int64.

    ahead: for each row, how many positions after its state's next token it is (default 0).
    """
    rows = [i for i, s in enumerate(states) if s.params.temperature > 0]
    if len(rows) == len(states):
        filtered = filter_logits(logits, [s.params for s in states])
        return draw(filtered, [s.uniform(ahead[i] if ahead is not None else 0) for i, s in enumerate(states)])
    chosen = logits.argmax(dim=-1)
    if rows:
        index = torch.tensor(rows, device=logits.device)
        filtered = filter_logits(logits[index], [states[i].params for i in rows])
        chosen[index] = draw(filtered, [states[i].uniform(ahead[i] if ahead is not None else 0) for i in rows])
    return chosen
