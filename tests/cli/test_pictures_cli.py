"""`gptsmith generate --image` and `/image` in `gptsmith chat`."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.cli import chat
from gptsmith.cli.generate import _write_samples
from gptsmith.data.images import decode_image
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.text import TextChunk, prepare_image, question
from gptsmith.errors import UsageError
from gptsmith.model.config import VisionConfig
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer, train_bpe
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_special_tokens
from tests.factories import tiny_config

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VISION = VisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=12, patch_size=4
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    base = train_bpe(["the quick brown fox jumps over the lazy dog. " * 3], 300)
    return with_special_tokens(base, ("<image>",), {"chat_template": TEMPLATE})[0]


def make_model(tokenizer: Tokenizer, *, reads_pictures: bool = True, context: int = 120) -> Transformer:
    config = tiny_config("qwen3", vocab_size=tokenizer.vocab_size, max_position_embeddings=context)
    if reads_pictures:
        config = dataclasses.replace(config, vision=VISION, image_token_id=tokenizer.added_tokens()["<image>"])
    torch.manual_seed(1)
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with the models `seer` and `text`, and pictures: two good ones, a damaged one and a huge one."""
    place = tmp_path_factory.mktemp("pictures")
    for name in ("seer", "text"):
        save_checkpoint(place / name, make_model(tokenizer, reads_pictures=name == "seer"), tokenizer)
    for i, name in enumerate(("a cat.png", "dog.jpg")):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / name)
    (place / "damaged.png").write_bytes((place / "a cat.png").read_bytes()[:300])
    (place / "words.txt").write_text("no picture")
    return place


def expected(place: Path, tokenizer: Tokenizer, text: str, *pictures: str) -> str:
    model, template = make_model(tokenizer), ChatTemplate(tokenizer)
    images = [prepare_image(model, decode_image((place / name).read_bytes())) for name in pictures]
    prompt = question(model, template, text, images)
    params = SamplingParams(max_tokens=8, temperature=0.0, stop_ids=tokenizer.end_ids)
    (result,) = Engine(model, vocab_size=tokenizer.vocab_size).generate([prompt], params)
    return tokenizer.decode(result.ids)


GREEDY = ("--max-tokens", "8", "--temperature", "0", "--device", "cpu")


def test_generate_answers_about_pictures(place: Path, tokenizer: Tokenizer, run_cli: Run) -> None:
    outputs = []
    for pictures in (("a cat.png",), ("dog.jpg",), ("a cat.png", "dog.jpg")):
        images = [word for name in pictures for word in ("--image", place / name)]
        code, out, err = run_cli("generate", place / "seer", *images, "--prompt", "the fox", *GREEDY)
        assert code == 0, err
        assert out == expected(place, tokenizer, "the fox", *pictures) + "\n"
        outputs.append(out)
    assert len(set(outputs)) == 3
    code, out, _ = run_cli("generate", place / "seer", "--image", place / "dog.jpg", *GREEDY)
    assert (code, out) == (0, expected(place, tokenizer, "", "dog.jpg") + "\n")
    code, out, _ = run_cli(
        "generate", place / "seer", "--image", place / "dog.jpg", "--num-samples", "2", "--max-tokens", "4"
    )
    assert code == 0
    assert "--- sample 2 of 2 ---" in out


@pytest.mark.parametrize("n", [1, 2])
def test_generate_writes_reasoning_to_standard_error(n: int, capfd: pytest.CaptureFixture[str]) -> None:
    pieces = [("", "It is "), ("", "red."), ("Re", ""), ("d", "")]
    chunks = [TextChunk(i, text, reasoning=thought) for text, thought in pieces for i in range(n)]
    out: list[str] = []
    reasons, _, _ = _write_samples([*chunks, *(TextChunk(i, "", "stop") for i in range(n))], "", n, out.append)
    assert reasons == ["stop"] * n
    several = "--- sample 1 of 2 ---\nRed\n\n--- sample 2 of 2 ---\nRed\n"
    assert "".join(out) == ("Red\n" if n == 1 else several)
    assert capfd.readouterr().err == "(thinking) It is red.\n" * n


def test_generate_in_python(place: Path, tokenizer: Tokenizer) -> None:
    model, own = gptsmith.load(place / "seer")
    answer = gptsmith.generate(
        model,
        own,
        "the fox",
        images=[place / "a cat.png", (place / "dog.jpg").read_bytes()],
        max_tokens=8,
        temperature=0,
    )
    assert answer == expected(place, tokenizer, "the fox", "a cat.png", "dog.jpg")
    with pytest.raises(UsageError, match="reads text only"):
        gptsmith.generate(*gptsmith.load(place / "text"), "the fox", images=[place / "dog.jpg"])


@pytest.mark.parametrize(
    ("model", "picture", "message"),
    [
        ("seer", "missing.png", "there is no picture at"),
        ("seer", "damaged.png", "incomplete"),
        ("seer", "words.txt", "not a picture in a supported format"),
        ("seer", ".", "there is no picture at"),
        ("text", "dog.jpg", "reads text only"),
    ],
)
def test_generate_refuses(place: Path, run_cli: Run, model: str, picture: str, message: str) -> None:
    code, out, err = run_cli("generate", place / model, "--image", place / picture, "--prompt", "x", *GREEDY)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_placeholder_in_the_prompt_is_text(place: Path, tokenizer: Tokenizer, run_cli: Run) -> None:
    code, out, err = run_cli(
        "generate", place / "seer", "--image", place / "dog.jpg", "--prompt", "<image> <image>", *GREEDY
    )
    assert (code, out) == (0, expected(place, tokenizer, "<image> <image>", "dog.jpg") + "\n"), err


# chat


def say(place: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch, model: str, *lines: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run_cli("chat", place / model, *GREEDY)


def test_chat_about_a_picture(
    place: Path, tokenizer: Tokenizer, run_cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    lines = (f"/image {place}/a cat.png", "the fox", "the dog", f"/save {saved}")
    code, out, err = say(place, run_cli, monkeypatch, "seer", *lines)
    assert code == 0
    assert "(the next message shows" in err
    assert "30×20, 9 tokens" in err
    assert out.startswith(expected(place, tokenizer, "the fox", "a cat.png").lstrip())
    first, answer, second = json.loads(saved.read_text())["messages"][:3]
    url = first["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == (place / "a cat.png").read_bytes()
    assert first["content"][1] == {"type": "text", "text": "the fox"}
    assert (answer["role"], second["content"]) == ("assistant", "the dog")


def test_chat_goes_on_after_bad_pictures(place: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("/image", "/image missing.png", f"/image {place}/damaged.png", "the fox")
    code, out, err = say(place, run_cli, monkeypatch, "seer", *lines)
    assert (code, err.count("error:")) == (0, 3)
    assert out.strip()
    code, _, err = say(place, run_cli, monkeypatch, "text", f"/image {place}/dog.jpg", "the fox")
    assert code == 0
    assert "reads text only" in err


def test_pictures_go_with_the_oldest_turns(place: Path, tokenizer: Tokenizer, capsys: Any) -> None:
    model = make_model(tokenizer, context=60)
    engine = Engine(model, vocab_size=tokenizer.vocab_size)
    talk = chat.Conversation(engine, tokenizer, SamplingParams(max_tokens=6, seed=0))
    talk.show(place / "dog.jpg")
    for text in ("the fox", "the dog", "the quick", "jumps over", "lazy"):
        list(talk.answer(text))
    assert "dropped" in capsys.readouterr().err
    talk.show(place / "dog.jpg")
    with pytest.raises(UsageError, match="too long"):
        list(talk.answer("word " * 60))
    assert len(talk.next_pictures) == 1  # it is shown with the next message instead
    talk.reset()
    assert not talk.pictures
    assert not talk.next_pictures
