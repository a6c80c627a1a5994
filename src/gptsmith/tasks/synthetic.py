"""The examples of the synthetic tasks, for the `source` of their definitions. `data/in_context.py` makes them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from gptsmith.data.in_context import Split, draw_examples, draw_rules


def records(
    family: str, *, split: Split = "test", examples: int = 500, rules: int = 100, seed: int = 0, **options: Any
) -> list[dict[str, Any]]:
    """Return up to so many examples of a family: records with question, answer and rule.

    split: "test" or "shots"; no question of a rule is in both. rules: how many, with equal shares of the examples. They
    are rules that the corpus in-context never follows. seed: other seeds give other rules and examples. options: of a
    family of symbols, alphabet and length.
    """
    chosen = draw_rules(family, rules, random.Random(f"rules {family} {seed}"), held_out=True, **options)
    share = max(1, examples // len(chosen))
    return [
        dataclasses.asdict(example)
        for rule in chosen
        for example in draw_examples(family, rule, share, random.Random(f"{split} {seed} {rule}"), split, **options)
    ]
