"""Counting letters: `How many times is a in banana?`"""

from __future__ import annotations

from gptsmith.tasks.words import WordTask


class CountLetters(WordTask):
    """How often a letter occurs in a word. Words have few different letters by default, so that many occur twice."""

    def __init__(self, *, num_examples: int = 1000, letters: int = 8, alphabet: int = 5, seed: int = 0) -> None:
        super().__init__(num_examples=num_examples, letters=letters, alphabet=alphabet, seed=seed)

    def letter(self, i: int) -> str:
        return self.rng(i).choice(self.word(i))

    def question(self, i: int) -> str:
        return f"How many times is {self.letter(i)} in {self.word(i)}?"

    def answer(self, i: int) -> str:
        return str(self.word(i).count(self.letter(i)))
