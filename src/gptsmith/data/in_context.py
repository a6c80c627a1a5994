"""Families of small tasks that are learned from examples in the context, and text to train on them. No torch.

The families are those of the GPT-3 paper (Brown et al. 2020, section 3.9) that need no data set, and ciphers and symbol
manipulation, whose rule a document never states: it can be found only from the examples before the question.

What is held out is told apart by hashes. Of families with rules, a tenth of the rules never occurs in training text; of
the others, a tenth of the questions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from gptsmith.errors import UsageError, nearest

Split = Literal["train", "shots", "test"]

MOST_SHOTS = 64
_HELD_OUT = 10  # one in so many rules or questions
_ATTEMPTS = 1000  # draws without anything new before a family counts as exhausted
_INSERTED = string.punctuation.replace("=", "") + " "
_UNSCRAMBLE = "Please unscramble the letters into a word, and write that word:\n"


@dataclass(frozen=True)
class Example:
    """A question and its answer. rule: what they follow, "" if there is nothing to be found."""

    question: str
    answer: str
    rule: str = ""


@dataclass(frozen=True)
class Family:
    """Tasks of one kind.

    prompt: how a question is written. separator: between prompt and answer. between: two examples. header: what a
    document begins with. draw: returns a question and its answer, of a rule. draw_rule: returns a rule, None if the
    family has none.
    """

    draw: Callable[[random.Random, str], tuple[str, str]]
    draw_rule: Callable[[random.Random], str] | None = None
    prompt: str = "{} ="
    separator: str = " "
    between: str = "\n"
    header: str = ""

    def text(self, examples: Sequence[Example]) -> str:
        """Return a document."""
        solved = (self.prompt.format(each.question) + self.separator + each.answer for each in examples)
        return self.header + self.between.join(solved)


# Words (GPT-3, section 3.9.2) -----------------------------------------------------------------------------------------


@functools.cache
def words() -> tuple[str, ...]:
    """Return 2,000 English words of 5 to 14 letters, the most frequent ones in the corpus wiki-summaries."""
    return tuple(files("gptsmith.data").joinpath("words.txt").read_text(encoding="utf-8").split())


def _cycle_letters(rng: random.Random, word: str) -> str:
    cut = rng.randrange(1, len(word))
    return word[cut:] + word[:cut]


def _anagram(kept: int) -> Callable[[random.Random, str], str]:
    """Shuffle all letters but the first one and the last `kept`."""

    def scramble(rng: random.Random, word: str) -> str:
        middle = list(word[kept:-kept])
        rng.shuffle(middle)
        return word[:kept] + "".join(middle) + word[-kept:]

    return scramble


def _random_insertion(rng: random.Random, word: str) -> str:
    return "".join(letter + rng.choice(_INSERTED) for letter in word[:-1]) + word[-1]


def _scrambled(scramble: Callable[[random.Random, str], str]) -> Family:
    def draw(rng: random.Random, _: str) -> tuple[str, str]:
        word = rng.choice(words())
        return scramble(rng, word), word

    return Family(draw, header=_UNSCRAMBLE)


# Arithmetic (GPT-3, section 3.9.1) ------------------------------------------------------------------------------------


def _arithmetic(digits: int, sign: str) -> Family:
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]

    def draw(rng: random.Random, _: str) -> tuple[str, str]:
        a, b = rng.randrange(10**digits), rng.randrange(10**digits)
        return f"What is {a} {word} {b}?", str({"+": a + b, "-": a - b, "*": a * b}[sign])

    return Family(draw, prompt="Q: {}\nA:", between="\n\n")


def _composite(rng: random.Random, _: str) -> tuple[str, str]:
    """Three one-digit numbers, the last two in parentheses."""
    a, b, c = (rng.randrange(10) for _ in range(3))
    first, second = rng.choice("+-*"), rng.choice("+-*")
    apply = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}
    return f"What is {a}{first}({b}{second}{c})?", str(apply[first](a, apply[second](b, c)))


# Letters and symbols --------------------------------------------------------------------------------------------------


def _reverse_letters(rng: random.Random, _: str) -> tuple[str, str]:
    text = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))
    return text, text[::-1]


def _substituted(text: str, alphabet: str, image: str) -> str:
    return text.translate(str.maketrans(alphabet, image))


def _shift_rule(rng: random.Random) -> str:
    return str(rng.randrange(1, 26))


def _shift_cipher(rng: random.Random, rule: str) -> tuple[str, str]:
    by, letters = int(rule), string.ascii_lowercase
    word = rng.choice(words())
    return word, _substituted(word, letters, letters[by:] + letters[:by])


def _permutation(letters: str) -> Callable[[random.Random], str]:
    return lambda rng: "".join(rng.sample(letters, len(letters)))


def _substitution_cipher(rng: random.Random, rule: str) -> tuple[str, str]:
    word = rng.choice(words())
    return word, _substituted(word, string.ascii_lowercase, rule)


def symbols(alphabet: int = 10, length: int = 3, *, reorder: bool = True, substitute: bool = True) -> Family:
    """Return the family of rules that reorder the symbols of a text, or substitute them, or both.

    alphabet: how many symbols there are, 2 to 26. length: of a text. A rule is written as the places that the symbols
    of the answer come from and what each symbol becomes: "201:cab".
    """
    if not 2 <= alphabet <= 26 or not 1 <= length <= 10 or not (reorder or substitute):
        raise UsageError(
            f"symbols needs an alphabet of 2 to 26, a length of 1 to 10, and something to do, not alphabet={alphabet}, "
            f"length={length}, reorder={reorder} and substitute={substitute}."
        )
    letters, places = string.ascii_lowercase[:alphabet], string.digits[:length]

    def draw_rule(rng: random.Random) -> str:
        order = "".join(rng.sample(places, length)) if reorder else places
        return order + ":" + ("".join(rng.sample(letters, alphabet)) if substitute else letters)

    def draw(rng: random.Random, rule: str) -> tuple[str, str]:
        order, image = rule.split(":")
        text = "".join(rng.choices(letters, k=length))
        return text, _substituted("".join(text[int(place)] for place in order), letters, image)

    return Family(draw, draw_rule, prompt="{}>", separator="")


FAMILIES: dict[str, Family] = {
    "cycle_letters": _scrambled(_cycle_letters),
    "anagrams_1": _scrambled(_anagram(1)),
    "anagrams_2": _scrambled(_anagram(2)),
    "random_insertion": _scrambled(_random_insertion),
    "reversed_words": _scrambled(lambda rng, word: word[::-1]),
    **{f"addition_{digits}": _arithmetic(digits, "+") for digits in (2, 3, 4, 5)},
    **{f"subtraction_{digits}": _arithmetic(digits, "-") for digits in (2, 3, 4, 5)},
    "multiplication_2": _arithmetic(2, "*"),
    "composite_1": Family(_composite, prompt="Q: {}\nA:", between="\n\n"),
    "reverse_letters": Family(_reverse_letters),
    "shift_cipher": Family(_shift_cipher, _shift_rule),
    "substitution_cipher": Family(_substitution_cipher, _permutation(string.ascii_lowercase)),
    "reorder_symbols": symbols(length=4, substitute=False),
    "substitute_symbols": symbols(reorder=False),
    "manipulate_symbols": symbols(),
}


def find_family(name: str, **options: Any) -> Family:
    """Return a family by its name. Options are those of `symbols`, and only the families of symbols have some.

    Raises UsageError for an unknown name, and for options that the family does not have.
    """
    if name not in FAMILIES:
        raise UsageError(f"there is no family {name!r}.{nearest(name, FAMILIES)} Families: {', '.join(FAMILIES)}.")
    if not options:
        return FAMILIES[name]
    if not name.endswith("_symbols") or not set(options) <= {"alphabet", "length"}:
        raise UsageError(
            f"the family {name} has no option {', '.join(options)}: alphabet and length are those of symbols."
        )
    reorder, substitute = name != "substitute_symbols", name != "reorder_symbols"
    return symbols(**{"length": 4 if not substitute else 3, **options}, reorder=reorder, substitute=substitute)


# Splits ---------------------------------------------------------------------------------------------------------------


def is_held_out(*parts: str) -> bool:
    """Return whether a rule or a question is among the tenth that training text never has."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big") % _HELD_OUT == 0


def draw_rules(name: str, count: int, rng: random.Random, *, held_out: bool, **options: Any) -> list[str]:
    """Return up to `count` different rules of a family, fewer if it has no more; [""] if it has none."""
    draw = find_family(name, **options).draw_rule
    if draw is None:
        return [""]
    return _different(lambda: draw(rng), lambda rule: is_held_out(name, rule) == held_out, count)


def draw_examples(name: str, rule: str, count: int, rng: random.Random, split: Split, **options: Any) -> list[Example]:
    """Return up to `count` different examples of a rule.

    split: "test" is graded, "shots" is not. Both are of the same rules if there are some, with different questions.
    "train" takes all questions of a rule, and without rules those of "shots".
    """
    draw = find_family(name, **options).draw

    def belongs(question: str) -> bool:
        return (split == "train" and bool(rule)) or is_held_out(name, rule, question) == (split == "test")

    answers: dict[str, str] = {}

    def one() -> str:
        question, answer = draw(rng, rule)
        answers.setdefault(question, answer)
        return question

    return [Example(question, answers[question], rule) for question in _different(one, belongs, count)]


def _different(draw: Callable[[], str], wanted: Callable[[str], bool], count: int) -> list[str]:
    """Return up to `count` different drawn values that are wanted, in the order of drawing."""
    found: dict[str, None] = {}
    in_vain = 0
    while len(found) < count and in_vain < _ATTEMPTS:
        value = draw()
        if wanted(value) and value not in found:
            found[value] = None
            in_vain = 0
        else:
            in_vain += 1
    return list(found)


# Training text --------------------------------------------------------------------------------------------------------


def documents(
    count: int, *, seed: int = 0, families: Sequence[str] | None = None, most_characters: int = 1024, **options: Any
) -> Iterator[str]:
    """Yield documents of examples of one family and one rule each. Families have equal shares; nothing is held out.

    A document has 1 to 65 examples, as many of these as fit into `most_characters`.
    """
    names = list(FAMILIES) if families is None else list(families)
    for number in range(count):
        rng = random.Random(f"in-context {seed} {number}")
        name = rng.choice(names)
        family = find_family(name, **options)
        rule = draw_rules(name, 1, rng, held_out=False, **options)[0]
        examples = draw_examples(name, rule, rng.randint(1, MOST_SHOTS + 1), rng, "train", **options)
        while len(examples) > 1 and len(family.text(examples)) > most_characters:
            examples = examples[: max(1, len(examples) * most_characters // len(family.text(examples)))]
        yield family.text(examples)


def in_context_corpus() -> Iterator[bytes]:
    """Yield the lines of the corpus in-context."""
    for text in documents(10_000):
        yield json.dumps({"text": text}).encode() + b"\n"
