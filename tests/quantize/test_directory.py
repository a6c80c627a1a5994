"""`gptsmith.quantize`. The command has tests of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import gptsmith
from gptsmith.errors import UsageError
from gptsmith.export.export import write_directory
from gptsmith.loading import load_model
from gptsmith.tokenizer import Tokenizer
from tests.factories import tiny_model


def test_it_writes_what_the_command_writes(tmp_path: Path, bpe: Tokenizer, words: str, run_cli: object) -> None:
    model = tiny_model("qwen3", vocab_size=bpe.vocab_size, hidden_size=64, num_attention_heads=2, intermediate_size=64)
    write_directory(tmp_path / "full", model, bpe)
    text = tmp_path / "words.txt"
    text.write_text(words)
    options = ("--bits", 4, "--calibration", text, "--calibration-tokens", 1024, "--text", text, "--tokens", 256)
    command = ("quantize", tmp_path / "full", "--out", tmp_path / "a", *options, "--json", tmp_path / "a.json")
    assert run_cli(*command)[0] == 0  # type: ignore[operator]
    made = gptsmith.quantize(
        model, bpe, tmp_path / "b", bits=4, calibration=text, calibration_tokens=1024, text=text, tokens=256
    )
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    expected = json.loads((tmp_path / "a.json").read_text())
    assert {**expected, "out": str(tmp_path / "b")} == {"model": str(tmp_path / "full"), **made.record()}
    assert made.comparison is not None
    assert made.bytes < made.bytes_fp32 / 4


def test_wrong_arguments_change_nothing(tmp_path: Path, bpe: Tokenizer) -> None:
    model = tiny_model("qwen3", vocab_size=bpe.vocab_size, hidden_size=64, num_attention_heads=2, intermediate_size=64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    (tmp_path / "there").mkdir()
    for out, options, message in (
        ("there", {}, "already exists"),
        ("new", {"bits": 3}, "bits must be 4, 5, 6 or 8, not 3"),
        ("new", {"tokens": -1}, "must be 0 or more"),
        ("new", {"text": tmp_path / "none.txt"}, "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            gptsmith.quantize(model, bpe, tmp_path / out, **options)
    assert not (tmp_path / "new").exists()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_many_experts_that_stay_whole(tmp_path: Path, bpe: Tokenizer) -> None:
    """Experts whose width does not divide are stored as a stack: fewer tensors than there are experts."""
    sizes = {"num_experts": 64, "num_experts_per_tok": 2, "intermediate_size": 18, "hidden_size": 32, "head_dim": 16}
    model = tiny_model("mixtral", vocab_size=bpe.vocab_size, **sizes)
    gptsmith.quantize(model, bpe, tmp_path / "rounded", bits=4, calibration="none", tokens=0)
    with safe_open(tmp_path / "rounded" / "model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) < 64
    rounded, _ = load_model(tmp_path / "rounded")
    assert rounded.config == model.config
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(rounded(ids), model(ids), atol=1e-5)  # which was quantized in place
