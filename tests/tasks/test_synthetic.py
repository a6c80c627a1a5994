"""The synthetic tasks: prompts as in training text, shots of the same rule, nothing graded in either."""

from __future__ import annotations

import random

import pytest

from gptsmith.data.in_context import FAMILIES, Example, is_held_out
from gptsmith.evaluate.harness import prompt_text, solved, split_items
from gptsmith.tasks.definition import load_definition
from gptsmith.tasks.scorers import find_scorer
from gptsmith.tasks.synthetic import records


@pytest.mark.parametrize("name", FAMILIES)
def test_definition_prompts_are_written_as_training_text(name: str) -> None:
    definition = load_definition(name)
    split = split_items(definition, 64)
    assert len(split.graded) == definition.size
    for item in random.Random(0).sample(split.graded, 5):
        shots = split.shots(item.group, 64, 0, name)
        document = [Example(shot.record["question"], shot.record["answer"]) for shot in [*shots, item]]
        text = prompt_text(definition, item, shots) + definition.separator + item.answer_text
        assert text == FAMILIES[name].text(document)
        assert {shot.record["rule"] for shot in shots} == {item.record["rule"]}
        assert item.record["question"] not in {shot.record["question"] for shot in shots}
        rule = item.record["rule"]
        assert is_held_out(name, rule) if rule else is_held_out(name, "", item.record["question"])
        assert solved(definition, item).endswith(item.answer_text)
        if definition.kind == "generation":
            assert len(item.answer_text) < definition.max_tokens
            scorer = find_scorer(definition.metric or "")
            assert scorer(" " + item.answer_text, item) == 1
            assert scorer(item.answer_text + "0", item) == 0


def test_rules_share_the_examples_and_follow_the_seed() -> None:
    rows = records("substitute_symbols", examples=40, rules=8, alphabet=6, length=3)
    rules = [row["rule"] for row in rows]
    assert len(set(rules)) == 8
    assert all(rules.count(rule) == 5 for rule in rules)
    shots = records("substitute_symbols", split="shots", examples=80, rules=8, alphabet=6, length=3)
    assert {row["rule"] for row in shots} == set(rules)
    assert {row["rule"] for row in records("substitute_symbols", rules=8, seed=1)} != set(rules)
