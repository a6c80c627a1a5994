"""Guessing ahead: several tokens are guessed cheaply and checked in one pass of the model (Leviathan et al. 2023,
2211.17192; prompt lookup: Saxena 2023).

Exact, and more: the model chooses each token as it would have without a guess, with the same random number
(`SamplerState.uniform`), and a guess counts where it is what was chosen. So the text is the very text that plain
decoding writes, sampled or greedy, and a guess is right as often as the model gives it probability.

Checking pays only where guesses are often right. `Speculator` measures, for each number of sequences in a pass, what a
pass costs with and without guesses and how many tokens either yields, and does without where guessing is slower.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Sequence
from gptsmith.errors import UsageError
from gptsmith.model.transformer import Transformer


class Drafter(Protocol):
    """Guesses what follows."""

    def guess(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        """For each sequence up to `count` tokens that may come next."""


class PromptLookup:
    """Where the last tokens occurred before, what followed them then. longest, shortest: how many tokens must agree."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(f"prompt lookup needs 1 ≤ shortest ≤ longest, not {shortest} and {longest}.")
        self.longest, self.shortest = longest, shortest
        self._places: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def guess(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        known, self._places = self._places, {}
        guesses = []
        for sequence in sequences:
            upto, places = known.get(id(sequence), (0, {}))
            tokens = sequence.tokens
            for end in range(upto, len(tokens)):  # each run of tokens -> where what follows its last occurrence begins
                for size in range(self.shortest, self.longest + 1):
                    if end >= size:
                        places[tuple(tokens[end - size : end])] = end
            self._places[id(sequence)] = (len(tokens), places)
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

    def guess(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
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
        numbers = []
        for i, prompt, wish in zip(places, prompts, wishes, strict=True):
            sampler = sequences[i].sampler
            numbers.append(self.engine.add_request(prompt, wish, offset=sampler.offset + sampler.generated))
        results = self.engine.drain(numbers)
        for i, result in zip(places, results, strict=True):
            guesses[i] = result.ids
        return guesses


class Speculator:
    """Decides whether to guess, and how many tokens. most: at a time.

    The costs are moving averages of seconds a pass; every so often it tries what it does not do at present, so that it
    notices when a text becomes predictable, or stops to be.
    """

    TRIAL = 4  # passes of each kind to learn from
    EVERY = 128  # passes until the other way is tried again

    def __init__(self, drafter: Drafter, most: int = 4) -> None:
        if most < 1:
            raise UsageError(f"speculation needs to guess at least 1 token, not {most}.")
        self.drafter, self.most = drafter, most
        self.drafted = self.accepted = 0
        self._kinds: dict[tuple[int, bool], _Average] = {}
        self._since: dict[int, int] = {}

    @property
    def acceptance_rate(self) -> float:
        """The share of guesses that were right."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def worthwhile(self, batch: int) -> bool:
        """Whether to guess in the next pass, of `batch` sequences."""
        guessing, plain = (self._kinds.setdefault((batch, kind), _Average()) for kind in (True, False))
        if plain.count < self.TRIAL:
            return False
        if guessing.count < self.TRIAL:
            return True
        better = guessing.seconds_a_token < plain.seconds_a_token
        since = self._since.get(batch, 0)
        if since >= self.EVERY:  # a short trial of the other way
            if since >= self.EVERY + self.TRIAL:
                self._since[batch] = 0
            return not better
        return better

    def learn(self, batch: int, guessed: bool, seconds: float, tokens: int) -> None:
        """A pass of `batch` sequences took so long (guessing included) and yielded so many tokens."""
        self._kinds.setdefault((batch, guessed), _Average()).add(seconds, tokens)
        self._since[batch] = self._since.get(batch, 0) + 1


class _Average:
    """Seconds a token, of the last passes."""

    def __init__(self) -> None:
        self.count, self.seconds, self.tokens = 0, 0.0, 0.0

    def add(self, seconds: float, tokens: int) -> None:
        keep = min(self.count, 15) / 16 if self.count else 0.0
        self.seconds = self.seconds * keep + seconds
        self.tokens = self.tokens * keep + tokens
        self.count += 1

    @property
    def seconds_a_token(self) -> float:
        return self.seconds / max(self.tokens, 1e-9)
