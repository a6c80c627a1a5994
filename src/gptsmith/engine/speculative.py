"""Speculative decoding: propose several tokens cheaply and check them in one step of the model (Leviathan et al. 2023,
2211.17192; prompt lookup: Saxena 2023).

The generated text does not change. The model chooses each token as it would without drafts, with the same random number
(`SamplerState.uniform`), and a draft is accepted where it equals the chosen token. So a draft is right as often as the
model gives it probability.

Checking pays only where drafts are often right. `Speculator` measures, for each number of sequences in a step, what
steps with and without drafts cost and how many tokens they yield, and stops proposing where that is slower.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from typing import Protocol
from weakref import WeakKeyDictionary

from gptsmith.engine.sequence import Sequence
from gptsmith.errors import UsageError
from gptsmith.log import note


class Drafter(Protocol):
    """Proposes the next tokens of sequences."""

    def propose(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        """Return up to `count` tokens for each sequence."""


class PromptLookup:
    """Proposes what followed the last tokens where they occurred before. longest, shortest: how many must agree."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(f"prompt lookup needs 1 ≤ shortest ≤ longest, not {shortest} and {longest}.")
        self.longest, self.shortest = longest, shortest
        # For each sequence: how many of its tokens are indexed, and n-gram -> position after its last occurrence.
        self._indexes: WeakKeyDictionary[Sequence, tuple[int, dict[tuple[int, ...], int]]] = WeakKeyDictionary()

    def propose(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        proposals = []
        for sequence in sequences:
            indexed, index = self._indexes.get(sequence, (0, {}))
            tokens = sequence.tokens
            for end in range(indexed, len(tokens)):
                for size in range(self.shortest, self.longest + 1):
                    if end >= size:
                        index[tuple(tokens[end - size : end])] = end
            self._indexes[sequence] = (len(tokens), index)
            proposals.append(self._continuation(tokens, index, count))
        return proposals

    def _continuation(self, tokens: list[int], index: dict[tuple[int, ...], int], count: int) -> list[int]:
        for size in range(min(self.longest, len(tokens)), self.shortest - 1, -1):
            after = index.get(tuple(tokens[-size:]))
            if after is not None:
                return tokens[after : after + count]
        return []


class Speculator:
    """Decides when to propose drafts: at most `max_drafts` tokens per sequence and step. Belongs to one engine.

    For each number of sequences in a step, it compares the seconds per token of steps with and without drafts (by the
    median of recent steps, since single measurements are noisy). The slower mode is tried again from time to time, in
    case the text has become predictable, or ceased to be; the more rarely, the more often that failed.

    Trials are paid from an allowance: a fraction of the time that steps without drafts take, plus what right drafts
    saved. So all of it together costs no more than that fraction of plain decoding, and one trial.
    """

    ALLOWANCE = 0.05  # of the time of steps without drafts
    MAX_ALLOWANCE = 25  # steps without drafts that the allowance can save, or owe, at most

    def __init__(self, drafter: Drafter, max_drafts: int = 4) -> None:
        if max_drafts < 1:
            raise UsageError(f"speculation needs at least 1 draft token, not {max_drafts}.")
        self.drafter, self.max_drafts = drafter, max_drafts
        self.drafted = self.accepted = 0
        self.failure: Exception | None = None
        """What the drafter raised; nothing is proposed from then on."""
        self._stats: dict[int, _ModeStats] = {}
        self._allowance = 0.0

    @property
    def acceptance_rate(self) -> float:
        """The fraction of drafts that were right."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def add_drafts(self, sequences: Items[Sequence], *, context: int, vocab_size: int) -> None:
        """Give drafts to decoding sequences, if that pays. Tokens beyond the vocabulary or the context are dropped."""
        eligible = [s for s in sequences if s.speculation_enabled and s.request.params.uses_raw_logits]
        if not eligible or self.failure is not None or not self.should_speculate(len(sequences)):
            return
        try:
            proposals = self.drafter.propose(eligible, self.max_drafts)
        except Exception as failure:  # speculation is optional: decoding continues without it
            self.failure = failure
            note(f"note: speculative decoding failed and is off from now on: {type(failure).__name__}: {failure}")
            return
        for sequence, proposal in zip(eligible, proposals, strict=True):
            room = min(sequence.request.params.max_tokens - sequence.sampler.generated - 1, context - sequence.length)
            sequence.drafts = [id for id in proposal[: max(0, room)] if 0 <= id < vocab_size]

    def count_accepted(self, drafts: list[int], chosen: list[int]) -> None:
        """Count the drafts of a sequence, and those that equal the tokens that were chosen."""
        self.drafted += len(drafts)
        self.accepted += next(
            (i for i, (draft, token) in enumerate(zip(drafts, chosen, strict=False)) if draft != token), len(drafts)
        )

    def should_speculate(self, batch: int) -> bool:
        """Return whether to propose drafts in the next step, of `batch` sequences."""
        stats = self._stats.get(batch)
        return stats is not None and stats.prefers_drafts() and self._allowance >= stats.expected_loss

    def record(self, batch: int, drafted: bool, seconds: float, tokens: int, drafting: float = 0.0) -> None:
        """Record what a step of `batch` sequences took and yielded. drafting: the part of the seconds that the drafter
        took, whether it proposed something or not."""
        stats = self._stats.setdefault(batch, _ModeStats())
        stats.steps_in_mode += 1
        if drafted:
            gain = tokens * stats.plain.seconds_per_token - seconds
            stats.speculative.add(seconds, tokens)
        else:
            stats.plain.add(seconds - drafting, tokens)
            gain = self.ALLOWANCE * stats.plain.seconds - drafting
        limit = self.MAX_ALLOWANCE * stats.plain.seconds
        self._allowance = max(-limit, min(limit, self._allowance + gain))


class _ModeStats:
    """Steps with and without drafts, for one number of sequences."""

    TRIAL = 4  # steps per trial of a mode
    TRIAL_EVERY = 128  # steps between trials of the slower mode, at first
    TRIAL_EVERY_MAX = 1024

    def __init__(self) -> None:
        self.speculative, self.plain = _RunningStats(), _RunningStats()
        self.steps_in_mode, self.trial_after = 0, self.TRIAL_EVERY

    def prefers_drafts(self) -> bool:
        """Return whether drafts are faster, or are due for a trial."""
        if self.plain.count < self.TRIAL:
            return False
        if self.speculative.count < self.TRIAL:
            return True
        faster = self.speculative.seconds_per_token < self.plain.seconds_per_token
        if self.steps_in_mode >= self.trial_after + self.TRIAL:
            self.steps_in_mode = 0
            self.trial_after = self.TRIAL_EVERY if faster else min(2 * self.trial_after, self.TRIAL_EVERY_MAX)
        in_trial = self.steps_in_mode >= self.trial_after
        return faster != in_trial

    @property
    def expected_loss(self) -> float:
        """The seconds that a step with drafts is expected to lose. Before the first such step: as if it took two."""
        if not self.speculative.count:
            return self.plain.seconds
        return max(0.0, self.speculative.seconds - self.speculative.tokens * self.plain.seconds_per_token)


class _RunningStats:
    """The last 16 steps of a mode: the median of their seconds and the mean of their tokens. count: of all steps."""

    def __init__(self) -> None:
        self.count, self.seconds, self.tokens = 0, 0.0, 0.0
        self._recent = deque[tuple[float, int]](maxlen=16)

    def add(self, seconds: float, tokens: int) -> None:
        self._recent.append((seconds, tokens))
        self.count += 1
        self.seconds = sorted(seconds for seconds, _ in self._recent)[len(self._recent) // 2]
        self.tokens = sum(tokens for _, tokens in self._recent) / len(self._recent)

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(self.tokens, 1e-9)
