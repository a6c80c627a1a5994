"""Spelling backwards: `Spell dbca backwards:`"""

from __future__ import annotations

from gptsmith.tasks.words import WordTask


class SpellBackwards(WordTask):
    """The letters of a word from the last to the first."""

    def question(self, i: int) -> str:
        return f"Spell {self.word(i)} backwards:"

    def answer(self, i: int) -> str:
        return self.word(i)[::-1]
