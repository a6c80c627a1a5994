"""A real pretrained model from its GGUF file: here and in transformers the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.formats.named import named_model_path
from gptsmith.tokenizer import Tokenizer

PROMPTS = [
    "The capital of Italy is",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
    "Water boils at",
    "1, 2, 3, 5, 8, 13,",
]

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer, Any]:
    """Our model and tokenizer, and transformers' model, which reads the same file with its own code."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("gguf", reason="the optional package gguf is not installed")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with the package accelerate only")
    path = Path(shutil.copy(named_model_path("smollm2-135m"), tmp_path_factory.mktemp("smollm2") / "model.gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return (*gptsmith.load(path), theirs)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_equal(prompt: str, both: tuple[Any, Tokenizer, Any]) -> None:
    ours, tokenizer, theirs = both
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals(prompt: str, both: tuple[Any, Tokenizer, Any]) -> None:
    from transformers import GenerationConfig

    ours, tokenizer, theirs = both
    ids = torch.tensor([tokenizer.encode(prompt)])
    greedy = GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_id, pad_token_id=0)
    with torch.no_grad():
        continued = theirs.generate(ids, generation_config=greedy)[0, ids.shape[1] :].tolist()
    expected = tokenizer.decode([id for id in continued if id != tokenizer.eos_id])
    assert gptsmith.generate(ours, tokenizer, prompt, max_tokens=64, temperature=0) == expected
    assert len(continued) == 64 or continued[-1] == tokenizer.eos_id
