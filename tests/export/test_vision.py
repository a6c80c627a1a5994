"""A text model gets a vision tower: what it knew stays, and transformers opens what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith import add_vision
from gptsmith.errors import UsageError
from gptsmith.export.export import write_directory
from gptsmith.loading import load_model
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer.bpe import train_bpe
from gptsmith.tokenizer.char import train_char
from gptsmith.tokenizer.chat import ChatTemplate

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2}
TEXT = 'user\nassistant\nsystem what is this? a red apple, a green pear. <|>{}:",/#\n' * 30


def text_model(directory: Path, family: str = "llama", tokenizer: str = "bpe", context: int = 64) -> Path:
    made = train_char(TEXT) if tokenizer == "char" else train_bpe([TEXT], vocab_size=300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = FAMILIES[family](
        vocab_size=made.vocab_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        head_dim=8,
        **({"intermediate_size": 128} if family.startswith("gpt") else {}),
        **sizes,
    )
    write_directory(directory, Transformer(config), made)
    return directory


@pytest.mark.parametrize(("family", "kind"), [("llama", "bpe"), ("qwen3", "char"), ("gpt2", "bpe")])
def test_the_text_model_stays_as_it_is(family: str, kind: str, tmp_path: Path) -> None:
    text, text_tokenizer = load_model(text_model(tmp_path / "text", family, kind))
    seeing, tokenizer = load_model(add_vision(tmp_path / "text", tmp_path / "seer", **SMALL))
    ids = torch.tensor([text_tokenizer.encode("a red apple, a green pear.")])
    with torch.no_grad():
        assert torch.equal(seeing(ids)[..., : text.config.vocab_size], text(ids))
    assert tokenizer.encode("a red apple") == text_tokenizer.encode("a red apple")
    assert seeing.config.image_token_id == tokenizer.added_tokens()["<image>"]
    assert seeing.config.vision is not None
    assert seeing.config.vision.tokens == 4

    reference = pytest.importorskip("transformers").AutoModelForImageTextToText.from_pretrained(tmp_path / "seer")
    pixels = torch.randn(1, 3, 16, 16)
    with_image = torch.tensor([[*ids[0, :3], *[seeing.config.image_token_id] * 4, *ids[0, 3:]]])
    with torch.no_grad():
        expected = reference.eval()(input_ids=with_image, pixel_values=pixels).logits
        assert (seeing(with_image, pixels=pixels) - expected).abs().max() < 1e-4
        features = seeing.image_features(pixels)
        assert 0.2 < float(features.std() / seeing.embed_tokens.weight.std()) < 5


def test_the_chat_template_writes_a_token_for_each_picture_and_never_for_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    add_vision(text_model(tmp_path / "text"), tmp_path / "seer", **SMALL)
    _, tokenizer = load_model(tmp_path / "seer")
    template, image = ChatTemplate(tokenizer), tokenizer.added_tokens()["<image>"]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "an <image>?"}, {"type": "image"}]},
        {"role": "assistant", "content": "a pear"},
        {"role": "user", "content": "and <image>?"},
    ]
    ids = template.encode(messages)
    assert ids.count(image) == 2
    assert ids.index(image) < len(ids) // 2
    plain = [dict(message, content="x") for message in messages]
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "seer")
    case: list[dict[str, Any]]
    for case in (plain, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]):
        written = theirs.apply_chat_template(case, add_generation_prompt=True, tokenize=True)
        assert list(written["input_ids"] if hasattr(written, "keys") else written) == template.encode(case)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    text = text_model(tmp_path / "text", context=32)
    with pytest.raises(UsageError, match="36 tokens, and the context"):
        add_vision(text, tmp_path / "seer")
    with pytest.raises(UsageError, match="not a multiple of --patch-size"):
        add_vision(text, tmp_path / "seer", **{**SMALL, "patch_size": 5})
    with pytest.raises(UsageError, match="hidden_size"):
        add_vision(text, tmp_path / "seer", **{**SMALL, "num_attention_heads": 3})
    seer = add_vision(text, tmp_path / "seer", **SMALL)
    with pytest.raises(UsageError, match="reads pictures already"):
        add_vision(seer, tmp_path / "other", **SMALL)
    with pytest.raises(UsageError, match="exists already"):
        add_vision(text, seer, **SMALL)


def test_the_seed_decides_the_new_weights(tmp_path: Path) -> None:
    text = text_model(tmp_path / "text")
    models = [
        load_model(add_vision(text, tmp_path / str(i), seed=seed, **SMALL))[0] for i, seed in enumerate((0, 0, 1))
    ]
    weights = [model.vision.patch_embedding.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gptsmith.cli import main

    text = text_model(tmp_path / "text")
    out = tmp_path / "seer"
    assert main(["vision", "init", str(text), "--image-size", "24", "--patch-size", "12", "--out", str(out)]) == 0
    assert "24×24 pixels, 4 tokens each" in capsys.readouterr().out
    assert load_model(out)[0].config.vision is not None
    for wrong in (["vision"], ["vision", "train"], ["vision", "init", str(text)]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["vision", "--help"])
    assert stopped.value.code == 0
    assert "init" in capsys.readouterr().out
