"""`--tokenizer`: every place in which a tokenizer can be, read as models read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptsmith.data.shards import Dataset
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.export.export import export_gguf
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.text import read_text, ready_tokenizer
from tests.factories import tiny_run_config
from tests.foreign import byte_level, write_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tokenizer whose end token only special_tokens_map.json names."""
    place = tmp_path / "tokenizer"
    place.mkdir()
    description = {**json.loads(byte_level().to_str()), "added_tokens": []}
    (place / "tokenizer.json").write_text(json.dumps(description))
    (place / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return place


def test_documents_are_separated_by_the_end_token_of_special_tokens_map(directory: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["the fox", "a house", "the sea"] * 20))
    config = tiny_run_config(tokenizer=str(directory))
    tokenizer, dataset = read_text(str(texts), config)
    assert isinstance(dataset, Dataset)
    assert tokenizer.eos_id == 0
    ids = dataset.train.tokens()
    assert (ids == tokenizer.eos_id).sum() == dataset.train.num_documents > 40
    assert tokenizer.decode(ids[: int((ids == tokenizer.eos_id).argmax())]) == "the fox"


def test_every_form(directory: Path, tmp_path: Path) -> None:
    expected = ready_tokenizer(str(directory))
    assert ready_tokenizer(str(directory / "tokenizer.json")) == expected
    run = tmp_path / "run"
    expected.save(run / "tokenizer")
    assert ready_tokenizer(str(run)) == expected
    model = json.loads(byte_level().to_str())["model"]
    older = tmp_path / "older"
    older.mkdir()
    (older / "vocab.json").write_text(json.dumps(model["vocab"]))
    (older / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    for place in (older, older / "vocab.json", older / "merges.txt"):
        assert ready_tokenizer(str(place)).encode("The quick fox") == expected.encode("The quick fox")
    renamed = tmp_path / "mine.json"
    renamed.write_text(byte_level().to_str())
    assert ready_tokenizer(str(renamed)) == Tokenizer(byte_level().to_str())


def test_a_gguf_file(tmp_path: Path) -> None:

    write_model(tmp_path / "model", "llama", byte_level(), {"eos_token": "<|im_end|>"})
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    ours = ready_tokenizer(str(tmp_path / "model.gguf"))
    assert ours.encode("The quick fox") == ready_tokenizer(str(tmp_path / "model")).encode("The quick fox")
    assert ours.eos_id == 2


def test_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="use char, bpe, gpt2, a run, a model, or a directory or file.*Did you mean 'bpe'"
    ):
        ready_tokenizer("bp")
    (tmp_path / "some.json").write_text("{}")
    for place in (tmp_path, tmp_path / "some.json"):
        with pytest.raises(GptsmithError, match=str(place)):
            ready_tokenizer(str(place))
