"""Tasks with pictures: every example's own picture is read."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.data.emoji import QUESTION
from gptsmith.data.images import decode_image
from gptsmith.engine.prompt import Prompt
from gptsmith.engine.text import prepare_image
from gptsmith.errors import UsageError
from gptsmith.evaluate import harness
from gptsmith.loading import load_model
from gptsmith.tasks import emoji
from gptsmith.tasks.emoji import Emoji
from gptsmith.tokenizer.chat import ChatTemplate
from tests.pictures import COLORS, drawn, seer

FILES = {f"a {color} square": drawn(color, "square") for color in COLORS}


def rows(part: str = "train") -> Iterator[dict[str, Any]]:
    for name, file in FILES.items():
        yield {"image": "data:image/png;base64," + base64.b64encode(file).decode(), "answer": name}


def test_every_example_is_asked_about_its_own_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "emoji_rows", rows)
    model, tokenizer = load_model(seer(tmp_path / "seer"))
    asked: list[Prompt] = []

    def answer(engine: Any, tokenizer: Any, prompts: list[Prompt], *rest: Any, **options: Any) -> list[list[str]]:
        asked.extend(prompts)
        names = {tuple(pixels_of(file).flatten().tolist()): name for name, file in FILES.items()}
        return [[names[tuple(prompt.images[0].pixels.flatten().tolist())]] for prompt in prompts]

    def pixels_of(file: bytes) -> torch.Tensor:
        return prepare_image(model, decode_image(file)).pixels

    monkeypatch.setattr(harness, "generate_texts", answer)
    assert harness.evaluate(model, tokenizer, ["emoji"]).tasks[0].score == 1.0
    expected = ChatTemplate(tokenizer).encode(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    )
    for prompt in asked:
        assert [id for id in prompt.ids if id != model.config.image_token_id] == [
            id for id in expected if id != model.config.image_token_id
        ]
        assert list(prompt.ids).count(model.config.image_token_id or 0) == 4


def test_answers_are_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "emoji_rows", rows)
    model, tokenizer = load_model(seer(tmp_path / "seer"))
    found = harness.evaluate(model, tokenizer, ["emoji"]).tasks[0]
    expected = gptsmith.generate(model, tokenizer, QUESTION, images=[FILES["a red square"]], temperature=0)
    assert expected.startswith(found.outcomes[0].answer[:20])
    assert found.score == 0.0


def test_scores_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "emoji_rows", rows)
    task = Emoji()
    assert len(task) == len(FILES)
    assert task.score(0, f" {task.answer(0)}\n") == 1
    assert task.score(0, "a red squar") == 0
    with pytest.raises(UsageError, match="unknown part 'unsen'"):
        Emoji(part="unsen")  # type: ignore[arg-type]


def test_a_model_that_reads_no_pictures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptsmith.tokenizer.char import train_char
    from tests.factories import tiny_model

    monkeypatch.setattr(emoji, "emoji_rows", rows)
    tokenizer = train_char(["what is this?\nuser assistant"])
    with pytest.raises(UsageError, match="reads text only"):
        harness.evaluate(tiny_model("llama", vocab_size=tokenizer.vocab_size), tokenizer, ["emoji"])
