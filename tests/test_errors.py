"""Suggestions for misspelled names, and lists in messages."""

from __future__ import annotations

import pytest

from gptsmith.cli import COMMANDS
from gptsmith.errors import first_few, nearest

MODELS = ("smollm2-135m", "tinyshakespeare", "bard")


@pytest.mark.parametrize(
    ("name", "choices", "suggestion"),
    [
        ("trian", COMMANDS, "train"),  # two letters swapped
        ("tran", COMMANDS, "train"),  # one left out
        ("trainn", COMMANDS, "train"),
        ("Train", COMMANDS, "train"),
        ("training", COMMANDS, "train"),
        ("gen", COMMANDS, "generate"),
        ("genrate", COMMANDS, "generate"),
        ("chta", COMMANDS, "chat"),
        ("find_lr", COMMANDS, "find-lr"),
        ("findlr", COMMANDS, "find-lr"),
        ("tokenize", COMMANDS, "tokenizer"),
        ("tokeniser", COMMANDS, "tokenizer"),
        ("quantise", COMMANDS, "quantize"),
        ("exprot", COMMANDS, "export"),
        ("server", COMMANDS, "serve"),
        ("smollm2", MODELS, "smollm2-135m"),
        ("shakespeare", MODELS, "tinyshakespeare"),
        ("tiny_shakespear", MODELS, "tinyshakespeare"),
        ("brad", MODELS, "bard"),
        ("lrr", ("lr", "steps"), "lr"),
        ("bep", ("char", "bpe", "gpt2"), "bpe"),
        ("gpt", ("gpt2", "llama"), "gpt2"),
    ],
)
def test_a_near_match_is_suggested(name: str, choices: tuple[str, ...], suggestion: str) -> None:
    assert nearest(name, choices) == f" Did you mean {suggestion!r}?"


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("finetune", COMMANDS),
        ("fine-tune", COMMANDS),
        ("lora", COMMANDS),
        ("help", COMMANDS),
        ("evolve", COMMANDS),
        ("run", COMMANDS),
        ("ls", COMMANDS),
        ("", COMMANDS),
        ("benchmark", COMMANDS),
        ("llama", MODELS),
        ("gpt2", MODELS),
        ("x" * 100_000, MODELS),
        ("r", ("lr",)),
        ("train", ()),
    ],
)
def test_no_suggestion_without_a_near_match(name: str, choices: tuple[str, ...]) -> None:
    assert nearest(name, choices) == ""


def test_the_nearest_of_several_matches_is_suggested() -> None:
    assert nearest("char-smal", ("char-large", "char-small", "char")) == " Did you mean 'char-small'?"
    assert nearest("generat", ("generator", "generate")) == " Did you mean 'generate'?"


def test_long_lists_are_shortened() -> None:
    assert first_few(["a", "b"]) == "a, b"
    assert first_few(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert first_few(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"
