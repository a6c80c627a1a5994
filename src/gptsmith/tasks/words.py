"""The base of tasks about the letters of random words."""

from __future__ import annotations

import abc
import random
import re
import string

from gptsmith.errors import UsageError
from gptsmith.tasks.base import Conversation


class WordTask(abc.ABC):
    """A question about a random word of small letters. Its answer is a word: the last one of a text counts.

    letters: the most letters of a word, of which `alphabet` are different at most. seed: other seeds give other words.
    """

    def __init__(self, *, num_examples: int = 1000, letters: int = 5, alphabet: int = 26, seed: int = 0) -> None:
        if num_examples < 1 or letters < 2 or not 2 <= alphabet <= 26:
            raise UsageError(
                "tasks about words need at least one example, two letters in a word, and an alphabet of 2 to 26 "
                f"letters, not num_examples={num_examples}, letters={letters} and alphabet={alphabet}."
            )
        self.num_examples, self.letters, self.alphabet, self.seed = num_examples, letters, alphabet, seed

    def __len__(self) -> int:
        return self.num_examples

    def rng(self, i: int) -> random.Random:
        """Return the random numbers of example `i`."""
        if not 0 <= i < self.num_examples:
            raise IndexError(f"there is no example {i} of {self.num_examples}")
        return random.Random(f"{self.seed} {i}")

    def word(self, i: int) -> str:
        rng = self.rng(i)
        length = rng.randint(2, self.letters)
        return "".join(rng.choices(string.ascii_lowercase[: self.alphabet], k=length))

    @abc.abstractmethod
    def question(self, i: int) -> str:
        """Return the text of example `i`."""

    @abc.abstractmethod
    def answer(self, i: int) -> str:
        """Return the right answer to example `i`."""

    def example(self, i: int) -> Conversation:
        return [{"role": "user", "content": self.question(i)}]

    def score(self, i: int, answer: str) -> float:
        found = re.findall(r"[^\W_]+", answer.lower())
        return float(bool(found) and found[-1] == self.answer(i))
