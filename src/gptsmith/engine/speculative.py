"""Guessing ahead: several tokens are guessed cheaply and checked in one pass of the model (Leviathan et al. 2023,
2211.17192; prompt lookup: Saxena 2023).

Exact, and more: the model chooses each token as it would have without a guess, with the same random number
(`SamplerState.uniform`), and a guess counts where it is what was chosen. So the text is the very text that plain
decoding writes, sampled or greedy, and a guess is right as often as the model gives it probability.

Checking pays only where guesses are often right. `Speculator` measures, for each number of sequences in a pass, what a
pass costs with and without guesses and how many tokens either yields, and does without where guessing is slower.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence as Items
from typing import Protocol
from weakref import WeakKeyDictionary

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Sequence
from gptsmith.errors import UsageError
from gptsmith.model.transformer import Transformer


class Drafter(Protocol):
    """Guesses what follows."""

    def propose(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        """For each sequence up to `count` tokens that may come next."""


class PromptLookup:
    """Where the last tokens occurred before, what followed them then. longest, shortest: how many tokens must agree."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(f"prompt lookup needs 1 ≤ shortest ≤ longest, not {shortest} and {longest}.")
        self.longest, self.shortest = longest, shortest
        self._places: WeakKeyDictionary[Sequence, tuple[int, dict[tuple[int, ...], int]]] = WeakKeyDictionary()

    def propose(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        guesses = []
        for sequence in sequences:
            upto, places = self._places.get(sequence, (0, {}))
            tokens = sequence.tokens
            for end in range(upto, len(tokens)):  # each run of tokens -> where what follows its last occurrence begins
                for size in range(self.shortest, self.longest + 1):
                    if end >= size:
                        places[tuple(tokens[end - size : end])] = end
            self._places[sequence] = (len(tokens), places)
            guesses.append(self._after(tokens, places, count))
        return guesses

    def _after(self, tokens: list[int], places: dict[tuple[int, ...], int], count: int) -> list[int]:
        for size in range(min(self.longest, len(tokens)), self.shortest - 1, -1):
            place = places.get(tuple(tokens[-size:]))
            if place is not None:
                return tokens[place : place + count]
        return []


class DraftModel:
    """A smaller model of the same vocabulary. It draws with the sequence's own random numbers: where it gives tokens
    about the same probabilities as the large one does, it draws the same tokens."""

    def __init__(self, model: Transformer, *, vocab_size: int | None = None, max_batch: int = 32) -> None:
        # Small blocks: what the last guess computed is found again but for a few tokens.
        budget = max(256, max_batch)
        self.engine = Engine(model, vocab_size=vocab_size, max_batch=max_batch, max_batch_tokens=budget, block_size=8)

    def propose(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        context = self.engine.context
        wishes, prompts, places = [], [], []
        for i, sequence in enumerate(sequences):
            room = min(count, context - sequence.length)
            if room >= 1:
                params = sequence.request.params
                prompts.append(sequence.tokens[sequence.start :])
                wishes.append(
                    SamplingParams(
                        max_tokens=room,
                        temperature=params.temperature,
                        top_k=params.top_k,
                        top_p=params.top_p,
                        min_p=params.min_p,
                        typical_p=params.typical_p,
                        seed=sequence.sampler.seed,
                    )
                )
                places.append(i)
        guesses: list[list[int]] = [[] for _ in sequences]
        numbers: dict[int, int] = {}
        for i, prompt, wish in zip(places, prompts, wishes, strict=True):
            sampler = sequences[i].sampler
            with contextlib.suppress(UsageError):  # a token it does not have, or too long a text: it has no guess
                numbers[i] = self.engine.add_request(prompt, wish, offset=sampler.offset + sampler.generated)
        for i, result in zip(numbers, self.engine.drain(list(numbers.values())), strict=True):
            guesses[i] = result.ids
        return guesses


class Speculator:
    """Decides when to guess, and how many tokens: at most `most` at a time. Belongs to one engine.

    For each number of sequences in a pass, passes with guesses and without are compared by the seconds they take for a
    token (the median of the last ones: a computer has its moments). What is not done at present is tried again every so
    often, to notice when a text becomes predictable, or stops to be; the more rarely, the longer that was in vain.
    Guessing is paid for out of an allowance: a share of the time that plain passes took, and what right guesses saved.
    So all of it, trials included, costs no more than that share of plain decoding and one guess.
    """

    SHARE = 0.05  # of the time of plain passes
    MOST = 25  # plain passes' time: the most that the allowance comes to, and the most that is owed

    def __init__(self, drafter: Drafter, most: int = 4) -> None:
        if most < 1:
            raise UsageError(f"speculation needs to guess at least 1 token, not {most}.")
        self.drafter, self.most = drafter, most
        self.drafted = self.accepted = 0
        self.failure: Exception | None = None
        """What the drafter raised; there are no guesses from then on."""
        self._known: dict[int, _ModeStats] = {}
        self._allowance = 0.0

    @property
    def acceptance_rate(self) -> float:
        """The share of guesses that were right."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def should_speculate(self, batch: int) -> bool:
        """Whether to guess in the next pass, of `batch` sequences."""
        known = self._known.get(batch)
        return known is not None and known.wants_to_guess() and self._allowance >= known.loss

    def record(self, batch: int, guessed: bool, seconds: float, tokens: int, guessing: float = 0.0) -> None:
        """A pass of `batch` sequences took so long and yielded so many tokens; `guessing`: how much of the time went to
        the drafter, whether it had a guess or not."""
        known = self._known.setdefault(batch, _ModeStats())
        known.since += 1
        if guessed:
            gain = tokens * known.plain.seconds_a_token - seconds
            known.guessing.add(seconds, tokens)
        else:
            known.plain.add(seconds - guessing, tokens)
            gain = self.SHARE * known.plain.seconds - guessing
        most = self.MOST * known.plain.seconds
        self._allowance = max(-most, min(most, self._allowance + gain))


class _ModeStats:
    """What is known of passes with one number of sequences."""

    TRIAL = 4  # passes of a kind to learn from
    EVERY = 128  # passes until the other kind is tried again, and how many at most
    RARELY = 1024

    def __init__(self) -> None:
        self.guessing, self.plain = _RunningStats(), _RunningStats()
        self.since, self.until = 0, self.EVERY
        """Passes since the other kind was tried, and how many there are to be."""

    def wants_to_guess(self) -> bool:
        if self.plain.count < self.TRIAL:
            return False
        if self.guessing.count < self.TRIAL:
            return True
        better = self.guessing.seconds_a_token < self.plain.seconds_a_token
        if self.since >= self.until + self.TRIAL:
            self.since, self.until = 0, self.EVERY if better else min(2 * self.until, self.RARELY)
        return better != (self.since >= self.until)

    @property
    def loss(self) -> float:
        """The seconds that a pass with guesses will probably lose; as long as there was none, as if it took two."""
        if not self.guessing.count:
            return self.plain.seconds
        return max(0.0, self.guessing.seconds - self.guessing.tokens * self.plain.seconds_a_token)


class _RunningStats:
    """The last passes of a kind: the median of their seconds, the mean of their tokens. count: of all there were."""

    def __init__(self) -> None:
        self.count, self.seconds, self.tokens = 0, 0.0, 0.0
        self._steps = deque[tuple[float, int]](maxlen=16)

    def add(self, seconds: float, tokens: int) -> None:
        self._steps.append((seconds, tokens))
        self.count += 1
        self.seconds = sorted(seconds for seconds, _ in self._steps)[len(self._steps) // 2]
        self.tokens = sum(tokens for _, tokens in self._steps) / len(self._steps)

    @property
    def seconds_a_token(self) -> float:
        return self.seconds / max(self.tokens, 1e-9)
