"""`gptsmith quantize`, and quantized models in the other commands."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptsmith.checkpoint import save_checkpoint
from gptsmith.loading import load_model
from gptsmith.model.quantized import bits_of
from gptsmith.tokenizer import Tokenizer
from tests.factories import tiny_model

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", params=["qwen3", "mixtral"])
def model_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer) -> Path:
    model = tiny_model(
        request.param,
        vocab_size=300,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("models") / request.param
    save_checkpoint(path, model, bpe)
    return path


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_models_work_in_every_command(
    bits: int, model_directory: Path, tmp_path: Path, words: str, run_cli: Cli
) -> None:
    out, text = tmp_path / "small", tmp_path / "text.txt"
    text.write_text(words[:3000])
    code, said, err = run_cli("quantize", model_directory, "--bits", bits, "--out", out, "--text", text)
    assert code == 0, err
    found = re.search(r"perplexity ([\d.]+) before, ([\d.]+) after \(([+-][\d.]+)%\), on ([\d,]+) tokens", said)
    assert found is not None, said
    before, after, change = (float(found[i]) for i in (1, 2, 3))
    assert change == pytest.approx(100 * (after / before - 1), abs=0.02)
    assert abs(change) < (2 if bits == 8 else 30)  # of a model of random weights
    sizes = [sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (model_directory, out)]
    assert sizes[1] < 0.35 * sizes[0]

    model, _ = load_model(out)
    assert bits_of(model) == bits
    assert bits_of(load_model(out, quantize="none")[0]) is None
    assert bits_of(load_model(out, quantize="int4")[0]) == 4
    greedy = ("--prompt", "ba", "--max-tokens", 12, "--temperature", 0, "--device", "cpu")
    code, stored, err = run_cli("generate", out, *greedy)
    assert code == 0, err
    _, quantized, _ = run_cli("generate", model_directory, *greedy, "--quantize", f"int{bits}")
    assert stored == quantized  # quantizing while loading gives the same as quantizing before
    code, _, err = run_cli("export", out, "--out", tmp_path / "plain")
    assert code == 0, err
    with torch.no_grad():
        ids = torch.arange(20)[None]
        theirs, ours = load_model(tmp_path / "plain")[0](ids), load_model(out, quantize="none")[0](ids)
        assert torch.equal(theirs, ours)
    code, _, err = run_cli("export", out, "--to", "gguf", "--dtype", f"q{bits}_0", "--out", tmp_path / "small.gguf")
    assert code == 0, err
    assert bits_of(load_model(tmp_path / "small.gguf")[0]) == bits
    assert run_cli("generate", tmp_path / "small.gguf", *greedy)[0] == 0


def test_wrong_options(model_directory: Path, tmp_path: Path, run_cli: Cli) -> None:
    code, _, err = run_cli("quantize", model_directory, "--out", model_directory)
    assert (code, "already exists" in err) == (2, True)
    code, _, err = run_cli("quantize", model_directory, "--out", tmp_path / "x", "--text", tmp_path / "none.txt")
    assert (code, "cannot be read" in err) == (2, True)
    assert not (tmp_path / "x").exists()
    code, _, err = run_cli("quantize", model_directory, "--out", tmp_path / "x", "--bits", 3)
    assert code == 2
    code, _, err = run_cli("quantize", model_directory, "--out", tmp_path / "x", "--tokens", 0)
    assert code == 0, err


def test_damaged_directories_are_rejected(model_directory: Path, tmp_path: Path, run_cli: Cli) -> None:
    out = tmp_path / "x"
    assert run_cli("quantize", model_directory, "--out", out, "--tokens", 0, "--bits", 4)[0] == 0
    (out / "manifest.json").unlink(missing_ok=True)
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight.packed"))
    save_file({n: t for n, t in tensors.items() if n != name}, out / "model.safetensors")
    code, _, err = run_cli("generate", out)
    assert (code, "has no tensor" in err) == (1, True), err
    save_file(tensors | {name: tensors[name][:1]}, out / "model.safetensors")
    code, _, err = run_cli("generate", out)
    assert (code, f"{name} is" in err) == (1, True), err
    values = json.loads((out / "config.json").read_text())
    values["quantization_config"]["bits"] = 3
    (out / "config.json").write_text(json.dumps(values))
    code, _, err = run_cli("generate", out)
    assert (code, "quantization_config (gptsmith) is not supported" in err) == (1, True), err


def test_the_adapter_option(
    model_directory: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter changes the output of full-precision and quantized models. A wrong directory is rejected."""
    torch.manual_seed(1)
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 64), f"{name}.lora_B.weight": torch.randn(64, 4)}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    greedy = ("--prompt", "ba", "--max-tokens", 12, "--temperature", 0, "--device", "cpu")
    for few in ((), ("--quantize", "int8")):
        code, plain, err = run_cli("generate", model_directory, *greedy, *few)
        assert code == 0, err
        code, adapted, err = run_cli("generate", model_directory, *greedy, *few, "--adapter", adapter)
        assert code == 0, err
        assert adapted != plain
    monkeypatch.setattr(sys, "stdin", io.StringIO("ba\n"))
    code, _, err = run_cli("chat", model_directory, "--device", "cpu", "--max-tokens", 5, "--adapter", adapter)
    assert code == 0, err
    (adapter / "adapter_model.safetensors").unlink()
    for command in ("generate", "chat"):
        code, _, err = run_cli(command, model_directory, "--device", "cpu", "--adapter", adapter)
        assert (code, "adapter_model.safetensors is missing" in err) == (1, True), err
