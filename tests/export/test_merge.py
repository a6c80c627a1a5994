"""Merging: adapters folded in, models averaged, and what does not fit refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.errors import UsageError
from gptsmith.export.merge import slerp
from gptsmith.formats.hf import weights_to_hf
from gptsmith.formats.peft import adapter_layout, save_adapter
from gptsmith.model.config import LoraConfig
from gptsmith.model.lora import add_lora, lora_parts
from gptsmith.tokenizer import train_char
from tests.factories import tiny_model

TOKENIZER = train_char(["abcdefghijklmnopqrstuvwxyz .\n"])
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def save(place: Path, seed: int = 0, **options: Any) -> Path:
    save_checkpoint(place, tiny_model("llama", seed=seed, vocab_size=TOKENIZER.vocab_size, **options), TOKENIZER)
    return place


def adapter(place: Path, base: Path, seed: int) -> Path:
    model, _ = gptsmith.load(base)
    add_lora(model, LoraConfig(rank=2), adapter_layout(model))
    torch.manual_seed(seed)
    for part in lora_parts(model).values():
        torch.nn.init.normal_(part.B, std=0.2)
    place.mkdir()
    save_adapter(model, place, str(base))
    return place


def logits(spec: Path) -> torch.Tensor:
    with torch.no_grad():
        return gptsmith.load(spec)[0](IDS)


def test_adapters_are_folded_in(tmp_path: Path, run_cli: Any) -> None:
    base = save(tmp_path / "base")
    one, two = adapter(tmp_path / "one", base, 1), adapter(tmp_path / "two", base, 2)
    code, out, err = run_cli("merge", base, one, "--out", tmp_path / "merged")
    assert code == 0, err
    assert "merged" in out
    assert torch.equal(logits(tmp_path / "merged"), logits(one))
    assert torch.equal(logits(gptsmith.merge([one], tmp_path / "alone")), logits(one))
    both = gptsmith.load(gptsmith.merge([base, one, two], tmp_path / "both"))[0]
    start, first, second = (gptsmith.load(each)[0] for each in (base, one, two))
    name = "layers.0.mlp.down_proj.weight"
    expected = first.get_parameter(name) + second.get_parameter(name) - start.get_parameter(name)
    assert torch.allclose(both.get_parameter(name), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_models_are_averaged(method: Any, tmp_path: Path, run_cli: Any) -> None:
    a, b = save(tmp_path / "a", 0), save(tmp_path / "b", 1)
    options = ("--method", method, "--weights", 1, "--weights", 3, "--out", tmp_path / "merged")
    code, _, err = run_cli("merge", a, b, *options)
    assert code == 0, err
    merged, one, other = (weights_to_hf(gptsmith.load(each)[0]) for each in (tmp_path / "merged", a, b))
    for name, value in merged.items():
        mean = 0.25 * one[name] + 0.75 * other[name]
        expected = slerp(one[name], other[name], 0.75) if method == "slerp" else mean
        assert torch.allclose(value, expected, atol=1e-6)


def test_slerp() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([0.5**0.5, 0.5**0.5]))
    assert torch.allclose(slerp(a, b, 0.0), a)
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "--weights has 1 numbers for 2 models"),
        ({"weights": [1.0, -1.0]}, "whose sum is not 0"),
        ({"other": {"num_hidden_layers": 3}}, r"different architectures \(num_hidden_layers\)"),
        ({"third": True, "method": "slerp"}, "between two models, not 3"),
        ({"out": True}, "exists already"),
    ],
)
def test_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    models = [save(tmp_path / "a"), save(tmp_path / "b", **options.pop("other", {}))]
    if options.pop("third", False):
        models.append(save(tmp_path / "c"))
    out = models[0] if options.pop("out", False) else tmp_path / "merged"
    with pytest.raises(UsageError, match=message):
        gptsmith.merge(models, out, **options)


def test_different_tokenizers(tmp_path: Path) -> None:
    other = train_char(["abcdefghijklmnopqrstuvwxyz .!"])
    save_checkpoint(tmp_path / "b", tiny_model("llama", vocab_size=other.vocab_size), other)
    with pytest.raises(UsageError, match="have different tokenizers"):
        gptsmith.merge([save(tmp_path / "a"), tmp_path / "b"], tmp_path / "merged")
