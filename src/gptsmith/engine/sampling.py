"""From logits to the next token, for a batch in which every sequence has wishes of its own.

First what changes logits whatever follows (`adjust`): penalties, bias, forbidden tokens, a grammar; then what narrows
the choice (`filter_logits`): temperature, top-k, top-p, min-p, typical; then the draw. The order, and what each does,
is that of transformers' processors.

Axis letters: R rows of a batch · V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.errors import UsageError


class Matcher(Protocol):
    """Where one text stands in a grammar."""

    @property
    def finished(self) -> bool:
        """Nothing can follow."""

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""

    def push(self, token: int) -> None:
        """This one came."""

    def copy(self) -> Matcher:
        """Another that stands at the same place."""


class Constraint(Protocol):
    """A language that the generated tokens must be in."""

    def start(self) -> Matcher:
        """Raises UsageError if nothing can be in it."""


class Reader(Protocol):
    """Reads one text as it is made."""

    def push(self, token: int) -> bool:
        """This one came; whether the text ends with it."""

    def copy(self) -> Reader:
        """Another that has read the same."""


class Ending(Protocol):
    """Where texts end, if that is not for a single token to say."""

    def start(self) -> Reader:
        """For a text that has not begun."""


_WHOLE = ("max_tokens", "min_tokens", "top_k", "seed", "n", "best_of", "beams", "logprobs", "prompt_logprobs")
_REAL = (
    *("temperature", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"),
)


def _are(kind: type, values: Iterable[object]) -> bool:
    """Whether all are of this kind; that True is a whole number is nobody's wish."""
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and how many. Raises UsageError for values out of range or that contradict each other."""

    max_tokens: int = 200
    """Most tokens to generate."""
    min_tokens: int = 0
    """Stop tokens and stop strings do not count before this many."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token every time."""
    top_k: int | None = None
    """Choose among the k most probable tokens."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities add up to p (Holtzman et al. 2019, 1904.09751)."""
    min_p: float | None = None
    """Drop tokens less probable than this share of the most probable one (Nguyen et al. 2024, 2407.01082)."""
    typical_p: float | None = None
    """Choose among the tokens of most nearly average information that add up to p (Meister et al. 2022, 2202.00666)."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens seen before, in the prompt too, less likely (Keskar et al. 2019, 1909.05858)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens generated before (as OpenAI's API has it)."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens generated before, for each time."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to these tokens' logits; -inf forbids one."""
    constraint: Constraint | None = None
    """A grammar that the generated tokens follow; see `engine.grammar`."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop; they are not part of the result. For those who read text: the engine knows only ids."""
    stop_ids: tuple[int, ...] = ()
    """Tokens at which to stop."""
    ending: Ending | None = None
    """Says where else to stop. What `stop` becomes where nothing of a text is told before its end (best_of, beams)."""
    seed: int | None = None
    """The same seed gives the same tokens. Sample i of several uses seed + i. None: a new one each time."""
    n: int = 1
    """How many continuations."""
    best_of: int | None = None
    """How many to make; the `n` with the highest mean log-probability are kept. None: n."""
    beams: int = 1
    """Above 1: beam search, which is not sampled (temperature must be 0); the n best are kept."""
    length_penalty: float = 1.0
    """Beams are compared by their log-probability divided by length to this power."""
    early_stopping: bool = False
    """Whether beam search ends with the first `beams` finished ones, or when no better can come (by the estimate of
    transformers)."""
    logprobs: int | None = None
    """Give the log-probabilities of chosen tokens and of so many most probable ones; 0: of the chosen alone."""
    prompt_logprobs: int | None = None
    """Likewise for the prompt's tokens."""
    echo: bool = False
    """Begin the result with the prompt."""
    overflow: Literal["error", "truncate", "shift"] = "error"
    """What to do where the context ends. error: refuse a prompt that does not fit; stop generating when it is full.
    truncate: cut the prompt's beginning off so that max_tokens fit (but a quarter of the context stays); stop
    generating when it is full. shift: when it is full, go on with its last three quarters, read again."""
    adapter: str | None = None
    """The LoRA adapter to use; None: the model as it is."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            value = getattr(self, name)
            if not ok or (isinstance(value, float) and not math.isfinite(value)):
                raise UsageError(f"--{name.replace('_', '-')} must be {expected}, not {value}.")

        for name in (*_WHOLE, *_REAL):
            value, kind = getattr(self, name), numbers.Integral if name in _WHOLE else numbers.Real
            absent = value is None and getattr(type(self), name) is None
            check(absent or _are(kind, [value]), name, "a whole number" if name in _WHOLE else "a number")
        check(_are(numbers.Integral, self.stop_ids), "stop_ids", "token ids")
        check(_are(numbers.Integral, self.logit_bias), "logit_bias", "numbers by token ids")
        check(_are(numbers.Real, self.logit_bias.values()), "logit_bias", "numbers by token ids")
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"from 0 to max_tokens ({self.max_tokens})")
        check(self.temperature >= 0, "temperature", "0 (greedy) or above")
        check(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(self.typical_p is None or 0 < self.typical_p <= 1, "typical_p", "above 0 and at most 1")
        check(self.repetition_penalty > 0, "repetition_penalty", "above 0")
        check(abs(self.presence_penalty) <= 100, "presence_penalty", "a number of at most 100")
        check(abs(self.frequency_penalty) <= 100, "frequency_penalty", "a number of at most 100")
        check(not any(map(math.isnan, self.logit_bias.values())), "logit_bias", "numbers")
        check(math.inf not in self.logit_bias.values(), "logit_bias", "below infinity")
        texts = not _are(str, [self.stop]) and _are(str, self.stop) and all(self.stop)
        check(texts, "stop", "a tuple of texts that are not empty")
        check(self.n >= 1, "n", "at least 1")
        check(self.best_of is None or self.best_of >= self.n, "best_of", f"at least n ({self.n})")
        check(self.beams >= 1, "beams", "at least 1")
        check(self.logprobs is None or self.logprobs >= 0, "logprobs", "0 or more")
        check(self.prompt_logprobs is None or self.prompt_logprobs >= 0, "prompt_logprobs", "0 or more")
        check(self.overflow in ("error", "truncate", "shift"), "overflow", "error, truncate or shift")
        check(math.isfinite(self.length_penalty), "length_penalty", "a finite number")
        if self.beams > 1:
            check(self.temperature == 0, "temperature", "0 with beam search, which draws nothing")
            check(self.n <= self.beams, "n", f"at most the number of beams ({self.beams})")
            check(self.best_of is None, "best_of", "left out with beam search")
            check(self.constraint is None, "constraint", "left out with beam search")
        check(
            self.temperature > 0 or self.best_of in (None, 1) or self.beams > 1,
            "best_of",
            "left out at temperature 0, where all samples are the same",
        )

    @property
    def samples(self) -> int:
        """How many sequences are sampled."""
        return self.best_of or self.n

    @property
    def returns_only_at_end(self) -> bool:
        """Whether only the end decides which texts there are."""
        return self.beams > 1 or self.samples > self.n

    @property
    def uses_raw_logits(self) -> bool:
        """Whether tokens depend on the logits alone: no penalty, bias, grammar or least length."""
        return not (
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.constraint is not None
            or self.min_tokens
            or self.beams > 1
        )


class SamplerState:
    """What the choice of a sequence's next token depends on, besides the logits. Raises UsageError for a constraint
    that nothing satisfies.

    generated: how many tokens were. ended: whether `ending` says so. offset: at which of the seed's numbers it begins.
    seen: (V,) bool, in prompt or result; counts: (V,) float32, in the result. Both only where a penalty asks for them.
    """

    def __init__(
        self, params: SamplingParams, seed: int, prompt: Items[int], vocab_size: int, *, offset: int = 0
    ) -> None:
        self.params, self.seed, self.offset, self.generated = params, seed, offset, 0
        self.seen = self.counts = None
        self.matcher = params.constraint.start() if params.constraint is not None else None
        self.reader = params.ending.start() if params.ending is not None else None
        self.ended = False
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[torch.tensor(prompt)] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size)

    def push(self, token: int) -> None:
        self.generated += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.matcher is not None and token not in self.params.stop_ids:
            self.matcher.push(token)
        if self.reader is not None:
            self.ended = self.reader.push(token)

    def would_end(self, token: int) -> bool:
        """Whether the text ends if this token comes next."""
        return token in self.params.stop_ids or (self.reader is not None and self.reader.copy().push(token))

    def fork(self, seed: int) -> SamplerState:
        """A copy for another sample."""
        child = object.__new__(SamplerState)
        child.params, child.seed, child.offset, child.generated = self.params, seed, self.offset, self.generated
        child.seen = None if self.seen is None else self.seen.clone()
        child.counts = None if self.counts is None else self.counts.clone()
        child.matcher = None if self.matcher is None else self.matcher.copy()
        child.reader, child.ended = None if self.reader is None else self.reader.copy(), self.ended
        return child

    def uniform(self, ahead: int = 0, purpose: int = 0) -> float:
        """A number in [0, 1) that depends on the seed and on how many tokens come before, and on nothing else.

        ahead: for a token so many places after the next. purpose: several numbers for one token are independent.
        """
        message = b"%d %d %d" % (self.seed, self.offset + self.generated + ahead, purpose)
        return (
            int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"gptsmith").digest(), "little")
            / 2**64
            * (1 - 2**-53)
        )


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen before. logits, seen (bool): (R, V)."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def adjust(logits: Tensor, states: Items[SamplerState]) -> Tensor:
    """Penalties, bias, what is forbidden and what a grammar forbids. logits: (R, V) float32, one row a state."""
    device = logits.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    def on_rows(rows: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
        if len(rows) == len(states):
            return change(logits)
        index = torch.tensor(rows, device=device)
        return logits.index_copy(0, index, change(logits[index]))

    rows = [i for i, s in enumerate(states) if s.seen is not None]
    if rows:
        seen = torch.stack([s.seen for s in states if s.seen is not None]).to(device)
        penalties = column([states[i].params.repetition_penalty for i in rows])
        logits = on_rows(rows, lambda x: penalize_repetition(x, seen, penalties))
    rows = [i for i, s in enumerate(states) if s.counts is not None]
    if rows:
        counts = torch.stack([s.counts for s in states if s.counts is not None]).to(device)
        presence = column([states[i].params.presence_penalty for i in rows])
        frequency = column([states[i].params.frequency_penalty for i in rows])
        logits = on_rows(rows, lambda x: x - presence * (counts > 0) - frequency * counts)
    added: list[tuple[int, int, float]] = []
    for i, state in enumerate(states):
        added += [(i, token, bias) for token, bias in state.params.logit_bias.items()]
        if state.generated < state.params.min_tokens:
            added += [(i, token, -math.inf) for token in state.params.stop_ids]
    if added:
        at_rows, at_tokens, values = zip(*added, strict=True)
        index = (torch.tensor(at_rows, device=device), torch.tensor(at_tokens, device=device))
        logits = logits.index_put(index, torch.tensor(values, device=device), accumulate=True)
    rows = [i for i, s in enumerate(states) if s.matcher is not None]
    if rows:
        masks = [s.matcher.allowed() for s in states if s.matcher is not None]
        V = logits.shape[-1]
        allowed = torch.stack([F.pad(mask, (0, max(0, V - len(mask))))[:V] for mask in masks]).to(device)
        logits = on_rows(rows, lambda x: x.masked_fill(~allowed, -torch.inf))
    return logits


_HEAD = 1024  # the nucleus is nearly always within so many most probable tokens: no need to sort all


def filter_logits(logits: Tensor, params: Items[SamplingParams]) -> Tensor:
    """Temperature, then top-k, top-p, min-p and typical, each row by its own: what is not to be chosen becomes -inf.

    logits: (R, V) float32; temperatures above 0.
    """
    device, V = logits.device, logits.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    def on_rows(rows: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
        if len(rows) == len(params):
            return change(logits)
        index = torch.tensor(rows, device=device)
        return logits.index_copy(0, index, change(logits[index]))

    logits = logits / column([p.temperature for p in params])
    rows = [i for i, p in enumerate(params) if p.top_k is not None and p.top_k < V]
    if rows:
        ks = [params[i].top_k or V for i in rows]
        at = torch.tensor(ks, device=device)[:, None] - 1
        logits = on_rows(rows, lambda x: x.masked_fill(x < x.topk(max(ks)).values.gather(1, at), -torch.inf))
    rows = [i for i, p in enumerate(params) if p.top_p is not None and p.top_p < 1]
    if rows:
        shares = column([params[i].top_p or 1.0 for i in rows])
        logits = on_rows(rows, lambda x: _nucleus(x, shares))
    rows = [i for i, p in enumerate(params) if p.min_p]
    if rows:
        least = column([math.log(params[i].min_p or 1.0) for i in rows])
        logits = on_rows(rows, lambda x: x.masked_fill(x < x.amax(dim=-1, keepdim=True) + least, -torch.inf))
    rows = [i for i, p in enumerate(params) if p.typical_p is not None and p.typical_p < 1]
    if rows:
        masses = column([params[i].typical_p or 1.0 for i in rows])
        logits = on_rows(rows, lambda x: _typical(x, masses))
    return logits


def _nucleus(logits: Tensor, shares: Tensor) -> Tensor:
    """The fewest most probable tokens that add up to `shares` (R, 1); the first of equals first."""
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
    """The tokens whose information is nearest to the entropy that add up to `masses` (R, 1)."""
    logprobs = logits.log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).nansum(dim=-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    cumulative = logprobs.exp().gather(-1, order).cumsum(dim=-1)
    last = (cumulative < masses).sum(dim=-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -torch.inf)


def draw(logits: Tensor, uniforms: Items[float]) -> Tensor:
    """One token a row, with the probabilities softmax(logits): (R, V) -> (R,) int64.

    Inverts the cumulative distribution at `uniforms`, in float64 where there is such: over a large vocabulary float32
    sums lose the tail.
    """
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.softmax(dim=-1, dtype=precise).cumsum(dim=-1)
    at = torch.tensor(uniforms, dtype=precise, device=logits.device)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, at, right=True)[:, 0]
    return chosen.clamp_max(logits.shape[-1] - 1)


def choose(logits: Tensor, states: Items[SamplerState], ahead: Items[int] | None = None) -> Tensor:
    """The next token of each row: (R, V) float32, as `adjust` gave them -> (R,) int64.

    ahead: of each row, how many places after its state's next token it is (0 if not given).
    """
    chosen = logits.argmax(dim=-1)
    rows = [i for i, s in enumerate(states) if s.params.temperature > 0]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        some = logits if len(rows) == len(states) else logits[index]
        filtered = filter_logits(some, [states[i].params for i in rows])
        chosen[index] = draw(filtered, [states[i].uniform(ahead[i] if ahead is not None else 0) for i in rows])
    return chosen
