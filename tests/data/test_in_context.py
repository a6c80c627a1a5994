"""Tasks that are learned from the context: answers that follow from the question and the rule, and what is held out."""

from __future__ import annotations

import json
import operator
import random
import re
import string
from collections import Counter
from itertools import islice

import pytest

from gptsmith.data.in_context import (
    FAMILIES,
    Example,
    documents,
    draw_examples,
    draw_rules,
    find_family,
    in_context_corpus,
    is_held_out,
    words,
)
from gptsmith.errors import UsageError

OPERATORS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
ORDERED = ("reversed_words", "reverse_letters")


def examples_of(name: str, split: str = "train", count: int = 40, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    rule = draw_rules(name, 1, rng, held_out=split != "train")[0]
    return draw_examples(name, rule, count, rng, split)  # type: ignore[arg-type]


def is_right(name: str, question: str, answer: str, rule: str) -> bool:
    """Check an answer without the code that made it."""
    if name in ORDERED:
        return question == "".join(reversed(answer))
    if name in ("cycle_letters", "anagrams_1", "anagrams_2", "random_insertion"):
        letters = re.sub(r"[^a-z]", "", question) if name == "random_insertion" else question
        kept = {"anagrams_1": 1, "anagrams_2": 2}.get(name, 0)
        same_ends = (
            question[:kept] == answer[:kept] and question[len(question) - kept :] == answer[len(answer) - kept :]
        )
        rotated = name != "cycle_letters" or question in answer * 2
        return Counter(letters) == Counter(answer) and same_ends and rotated and answer in words()
    if found := re.fullmatch(r"What is (\d+) (plus|minus|times) (\d+)\?", question):
        return OPERATORS[found[2]](int(found[1]), int(found[3])) == int(answer)
    if found := re.fullmatch(r"What is (\d[-+*]\(\d[-+*]\d\))\?", question):
        return eval(found[1]) == int(answer)  # noqa: S307 - digits, signs and parentheses
    if name == "shift_cipher":
        return {(ord(b) - ord(a)) % 26 for a, b in zip(question, answer, strict=True)} == {int(rule)}
    if name == "substitution_cipher":
        return all(rule[ord(a) - ord("a")] == b for a, b in zip(question, answer, strict=True))
    order, image = rule.split(":")
    return all(image[ord(question[int(place)]) - ord("a")] == b for place, b in zip(order, answer, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("split", ["train", "shots", "test"])
def test_answers_follow_from_question_and_rule(name: str, split: str) -> None:
    examples = examples_of(name, split)
    assert len(examples) == 40
    assert len({example.question for example in examples}) == 40
    assert all(is_right(name, example.question, example.answer, example.rule) for example in examples)
    assert examples == examples_of(name, split), "the same seed gives the same examples"
    assert examples != examples_of(name, split, seed=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_graded_questions_are_neither_shots_nor_training_text(name: str) -> None:
    rng = random.Random(0)
    held_out = draw_rules(name, 5, rng, held_out=True)
    known = draw_rules(name, 5, rng, held_out=False)
    if FAMILIES[name].draw_rule:
        assert not set(held_out) & set(known)
    for rule in held_out:
        graded = {example.question for example in draw_examples(name, rule, 20, random.Random(1), "test")}
        shots = {example.question for example in draw_examples(name, rule, 200, random.Random(2), "shots")}
        assert graded
        assert not graded & shots
        if not rule:
            trained = {example.question for example in draw_examples(name, rule, 200, random.Random(3), "train")}
            assert not graded & trained


def test_documents_hold_nothing_that_is_held_out() -> None:
    texts = list(documents(60, families=["addition_2", "shift_cipher"], most_characters=600))
    assert all(len(text) <= 600 for text in texts)
    shifts = set()
    for text in texts:
        if text.startswith("Q: "):
            solved = re.findall(r"Q: (.*)\nA: (-?\d+)", text)
            assert solved
            for question, answer in solved:
                assert is_right("addition_2", question, answer, "")
                assert not is_held_out("addition_2", "", question)
        else:
            pairs = [line.split(" = ") for line in text.split("\n")]
            shift = {(ord(b) - ord(a)) % 26 for word, image in pairs for a, b in zip(word, image, strict=True)}
            assert len(shift) == 1, "a document has one rule"
            shifts |= shift
    assert len(shifts) > 5
    assert not any(is_held_out("shift_cipher", str(shift)) for shift in shifts)
    assert any(is_held_out("shift_cipher", str(shift)) for shift in range(1, 26))


def test_about_a_tenth_is_held_out() -> None:
    share = sum(is_held_out("family", str(i)) for i in range(10_000)) / 10_000
    assert 0.09 < share < 0.11


def test_documents_have_all_families_and_lengths_and_follow_the_seed() -> None:
    texts = list(documents(300, families=["substitute_symbols"]))
    lengths = Counter(text.count("\n") + 1 for text in texts)
    assert min(lengths) == 1
    assert max(lengths) == 65
    assert len(lengths) > 55
    assert texts[:5] == list(documents(5, families=["substitute_symbols"]))
    assert texts[:5] != list(documents(5, families=["substitute_symbols"], seed=1))
    assert {"Q", "P"} < {text[0] for text in documents(40)}


def test_corpus_is_lines_of_json() -> None:
    lines = list(islice(in_context_corpus(), 3))
    assert [json.loads(line)["text"] for line in lines] == list(documents(3))
    assert all(line.endswith(b"\n") for line in lines)


def test_options_change_the_symbols() -> None:
    rng = random.Random(0)
    rule = draw_rules("substitute_symbols", 1, rng, held_out=False, alphabet=4, length=2)[0]
    examples = draw_examples("substitute_symbols", rule, 100, rng, "train", alphabet=4, length=2)
    assert {example.question for example in examples} == {a + b for a in "abcd" for b in "abcd"}, "all that there are"
    assert sorted(rule.split(":")[1]) == list("abcd")


def test_words_are_different_english_words() -> None:
    assert len(words()) == len(set(words())) == 2000
    assert all(5 <= len(word) <= 14 and set(word) <= set(string.ascii_lowercase) for word in words())


def test_unknown_family_and_option_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"no family 'adition_2'.*Did you mean 'addition_2'"):
        find_family("adition_2")
    with pytest.raises(UsageError, match="addition_2 has no option alphabet"):
        find_family("addition_2", alphabet=3)
    with pytest.raises(UsageError, match="no option size"):
        find_family("manipulate_symbols", size=3)
    with pytest.raises(UsageError, match="alphabet of 2 to 26"):
        find_family("manipulate_symbols", alphabet=40)
