"""Sorting letters: `Sort the letters of dbca:`"""

from __future__ import annotations

from gptsmith.tasks.words import WordTask


class SortLetters(WordTask):
    """The letters of a word in the order of the alphabet."""

    def question(self, i: int) -> str:
        return f"Sort the letters of {self.word(i)}:"

    def answer(self, i: int) -> str:
        return "".join(sorted(self.word(i)))
