"""Model sizes from their depth alone."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gptsmith.errors import UsageError
from gptsmith.model import families
from gptsmith.model.transformer import Transformer

FAMILIES_PAGE = Path(__file__).parents[2] / "docs" / "reference" / "families.md"


def non_embedding_parameters(depth: int, family: str = "qwen3") -> int:
    """Count on the meta device all parameters but the embedding, which is also the head here."""
    config = families.FAMILIES[family](
        **families.by_depth(depth, family), vocab_size=64, max_position_embeddings=8, tie_word_embeddings=True
    )
    with torch.device("meta"):
        model = Transformer(config, initialize=False)
    return model.num_parameters() - config.vocab_size * config.hidden_size


def in_words(number: int) -> str:
    """Format with two or three significant digits: 0.60M, 85M, 5.6B."""
    scaled, unit = (number / 1e9, "B") if number >= 1e9 else (number / 1e6, "M")
    return f"{scaled:.{2 if scaled < 1 else 1 if scaled < 10 else 0}f}{unit}"


def table_row(depth: int) -> str:
    size = families.by_depth(depth)
    heads = f"{size['num_attention_heads']} of {size['head_dim']}"
    if size["num_key_value_heads"] != size["num_attention_heads"]:
        heads += f", {size['num_key_value_heads']} for keys"
    cells = [str(depth), f"{size['hidden_size']:,}", heads, f"{size['intermediate_size']:,}"]
    return f"| {' | '.join([*cells, in_words(non_embedding_parameters(depth))])} |"


def test_the_table_of_depths_is_right() -> None:
    rows = re.findall(r"^\| \d+ \| [\d,]+ \| \d+ of .*$", FAMILIES_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 8
    assert rows == [table_row(int(row.split()[1])) for row in rows]


@pytest.mark.parametrize(
    ("depth", "width"),
    [(1, 128), (3, 128), (4, 128), (5, 192), (6, 256), (8, 384), (10, 576), (12, 768), (16, 1280), (32, 4096)],
)
def test_width_by_depth(depth: int, width: int) -> None:
    assert families.by_depth(depth)["hidden_size"] == width


@pytest.mark.parametrize("family", families.DEPTH_SCALED)
def test_every_depth_is_a_model_larger_than_the_one_before(family: str) -> None:
    sizes = [families.by_depth(depth, family) for depth in range(1, 49)]
    for size in sizes:
        families.FAMILIES[family](**size)  # heads fit together, or it would refuse
        assert size["hidden_size"] % size["head_dim"] == 0
        assert abs(size["num_attention_heads"] * size["head_dim"] / size["hidden_size"] - 1) <= 0.2
        grouped = size["num_key_value_heads"] < size["num_attention_heads"]
        assert grouped == (size["hidden_size"] >= 2048)
    assert all(a["hidden_size"] <= b["hidden_size"] for a, b in pairwise(sizes))


def test_parameters_from_half_a_million_to_eight_billion() -> None:
    counts = {depth: non_embedding_parameters(depth) for depth in (2, 3, 12, 24, 32, 34, 35)}
    assert list(counts.values()) == sorted(counts.values())
    assert 0.4e6 < counts[2] < 0.5e6 < counts[3] < 0.7e6
    assert 8e7 < counts[12] < 9e7  # GPT-2 small's blocks have 85M
    assert 7e9 < counts[34] < 8e9 < counts[35] < 9e9


def test_refused_depths_and_families() -> None:
    with pytest.raises(UsageError, match="not of gpt2"):
        families.by_depth(12, "gpt2")
    with pytest.raises(UsageError, match="at least 1"):
        families.by_depth(0)
