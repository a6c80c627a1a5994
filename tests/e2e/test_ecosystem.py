"""What is trained here loads in transformers and answers the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith


@pytest.mark.parametrize(
    "options",
    [
        ["--model.family", "gpt2", "--optim.name", "adamw", "--optim.lr", "0.003"],
        ["--model.num-key-value-heads", "2", "--model.head-dim", "10", "--tokenizer", "bpe", "--vocab-size", "300"],
        ["--model.no-tie-word-embeddings", "--unknown"],
    ],
    ids=["gpt2-char", "qwen3-bpe", "qwen3-untied-char"],
)
def test_transformers_gives_the_same(
    options: list[str], text_file: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    small = ["--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--context", "32", "--batch-size", "8"]
    small += ["--steps", "20", "--eval-every", "20", "--sample-tokens", "0", "--compile", "off", "--device", "cpu"]
    code, _, errors = run_cli("train", text_file, "--out", tmp_path / "run", *small, *options)
    assert code == 0, errors

    directory = tmp_path / "run" / "best"
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory)
    their_tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model, tokenizer = gptsmith.load(tmp_path / "run")

    text = text_file.read_text()[:60]
    ids = tokenizer.encode(text)
    assert their_tokenizer(text)["input_ids"] == ids
    assert their_tokenizer.decode(ids) == tokenizer.decode(ids) == text
    assert their_tokenizer.eos_token_id == tokenizer.eos_id == theirs.config.eos_token_id

    prompt = torch.tensor([ids[:16]])
    with torch.no_grad():
        torch.testing.assert_close(model(prompt), theirs(prompt).logits, atol=1e-4, rtol=1e-4)
        greedy = GenerationConfig(do_sample=False, max_new_tokens=16, eos_token_id=tokenizer.eos_id, pad_token_id=0)
        continued = theirs.generate(prompt, generation_config=greedy)[0, 16:].tolist()
    ours = gptsmith.generate(model, tokenizer, tokenizer.decode(ids[:16]), max_tokens=16, temperature=0)
    assert ours == their_tokenizer.decode([i for i in continued if i != tokenizer.eos_id])
