"""Emoji with names, drawn shapes, and what is held out of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from gptsmith.data import emoji
from gptsmith.data.corpora import CORPORA
from gptsmith.data.images import read_image_part

NAMES = [
    *(f"{who} {role}{tone}" for who in ("man", "woman") for role in ("cook", "judge", "pilot", "singer", "elf")
      for tone in ("", *(f" {tone} skin tone" for tone in emoji.TONES))),
    *(f"thing {i}" for i in range(200)),
    "woman medium skin tone red hair",
    "men holding hands light skin tone dark skin tone",
]  # fmt: skip


def test_held_out_compositions_are_of_what_training_shows() -> None:
    parts = emoji.part_of(NAMES)
    shown = defaultdict(set)
    for name, part in parts.items():
        base, tone = emoji.without_tone(name)
        if part == "train" and tone is not None:
            shown[base].add(tone)
    held_out = [name for name, part in parts.items() if part == "compositions"]
    assert len(held_out) > 5
    for name in held_out:
        base, tone = emoji.without_tone(name)
        assert tone not in shown[base]
        assert len(shown[base]) >= 3
        assert any(tone in tones for tones in shown.values())
    unseen = [name for name, part in parts.items() if part == "unseen"]
    assert unseen
    assert all(name.startswith("thing") for name in unseen)
    assert emoji.part_of(NAMES[::-1]) == parts


def test_tones_are_found_within_names() -> None:
    assert emoji.without_tone("woman medium-dark skin tone red hair") == ("woman red hair", "medium-dark")
    assert emoji.without_tone("man cook light skin tone") == ("man cook", "light")
    assert emoji.without_tone("two hands light skin tone dark skin tone")[1] is None
    assert emoji.without_tone("light bulb") == ("light bulb", None)


def test_shapes_are_drawn_alike_each_time_and_show_what_they_say() -> None:
    rows = list(emoji.shape_rows())
    assert rows == list(emoji.shape_rows())
    assert rows != list(emoji.shape_rows(seed=1))
    assert len(rows) == CORPORA["shapes"].rows
    held_out = {row["answer"] for row in emoji.shape_rows("compositions")}
    named = {row["answer"] for row in rows} | held_out
    assert {"one red cross", "two red crosses", "four blue squares", "a green five"} <= named
    assert not held_out & {row["answer"] for row in rows}
    words = {word for row in rows for word in row["answer"].split()}
    assert all(set(name.split()) <= words for name in held_out)
    area: dict[str, Any] = {}
    for row in rows:
        pixels = read_image_part(row["image"]).pixels.astype(int)
        assert pixels.shape == (72, 72, 3)
        color = next(color for name, color in emoji.COLORS.items() if name in row["answer"].split())
        same = np.abs(pixels - color).sum(axis=-1) == 0
        assert same.sum() > 60, row["answer"]
        assert (same | (pixels.sum(axis=-1) == 3 * 255)).mean() > 0.95
        area.setdefault(row["answer"], []).append(same.sum())
    assert np.mean(area["four red squares"]) > 2 * np.mean(area["one blue square"])


@pytest.mark.network
def test_the_emoji_are_those_that_were_published() -> None:
    content = b"".join(emoji.corpus(emoji.emoji_rows()))
    assert hashlib.sha256(content).hexdigest() == CORPORA["emoji"].sha256
    pictures = emoji.emoji_pictures()
    assert len(pictures) == 3953
    assert all(read_image_part(pictures[name]).pixels.shape == (72, 72, 3) for name in list(pictures)[::200])
    red = read_image_part(pictures["red apple"]).pixels[36, 36].astype(int)
    assert red[0] > 150 > red[2]
