"""Public reports about adapters, replayed. Each docstring names the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.evaluate.classifier import Classifier
from gptsmith.formats.hf import load_model_weights, save_model
from gptsmith.formats.peft import adapter_layout
from gptsmith.model.config import LoraConfig
from gptsmith.model.lora import add_lora, lora_parts, merge_lora
from gptsmith.model.quantized import quantize
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import train_char
from tests.factories import tiny_model

LETTERS = "".join(map(chr, range(32, 127))) + "\n"
QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "compile": "off", "eval_every": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of characters with tied embeddings, without a chat template."""
    tokenizer = train_char([LETTERS])
    directory = tmp_path_factory.mktemp("base") / "model"
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=96, hidden_size=32)
    save_checkpoint(directory, model, tokenizer)
    return directory


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"question": f"Say {i}", "answer": f"It is {i}."} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def randomize(model: Transformer) -> None:
    """Give an adapter weights that change something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in lora_parts(model).values():
            part.B.normal_(0, 0.5, generator=generator)


def adapted(model: Transformer, **options: Any) -> Transformer:
    add_lora(model, LoraConfig(rank=2, **options), adapter_layout(model))
    randomize(model)
    return model.eval()


IDS = torch.arange(1, 21).view(2, 10)


@pytest.fixture(scope="module")
def run(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> gptsmith.Run:
    out = tmp_path_factory.mktemp("run") / "run"
    return gptsmith.sft(base, chats, out=out, steps=4, **{"lora.rank": 4, "optim.lr": 0.05}, **QUIET)


def test_D1_an_adapter_has_the_embeddings_of_new_tokens(base: Path, run: gptsmith.Run) -> None:
    """peft #838, #1300, #2898: the trained embeddings of new tokens are lost, or do not fit the model when loaded."""
    model, tokenizer = gptsmith.load(run)
    old = gptsmith.load(base)[0].config.vocab_size
    assert tokenizer.vocab_size > old
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.special_tokens().values())
    (stored,) = [
        tensor
        for name, tensor in load_file(run.directory / "best" / "adapter_model.safetensors").items()
        if "embed_tokens" in name
    ]
    torch.testing.assert_close(model.embed_tokens.weight, stored)
    other, _ = gptsmith.load(run.directory / "best")  # by itself: it knows its model
    assert torch.equal(other(IDS), model(IDS))


@torch.no_grad()
def test_D2_merging_leaves_tied_embeddings_alone(tmp_path: Path) -> None:
    """peft #2018, #2777, transformers #45156: merging changes a tied embedding, or unties it while the configuration
    says otherwise. unsloth #9331: merged and trained heads differed by 5.895."""
    model = adapted(tiny_model("llama", tie_word_embeddings=True))
    embeddings, live = model.embed_tokens.weight.clone(), model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), live, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.embed_tokens.weight, embeddings)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    again = tiny_model("llama", seed=5, tie_word_embeddings=True)
    load_model_weights(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_D3_the_head_of_a_task_is_trained_and_saved_with_an_adapter(quantize: str, base: Path, tmp_path: Path) -> None:
    """peft #310, #577, #876, #1070: the head that was trained with an adapter is not saved, and a random one is loaded.
    peft #2027: an adapter is put on the new head."""
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "ab"[i % 2]} for i in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {**QUIET, "lora": "on", "lora.rank": 2, "lora.quantize": quantize, "context": 32, "val": str(data)}
    del options["sample_tokens"]
    short, long = (
        gptsmith.classify(base, data, out=tmp_path / str(steps), steps=steps, **options) for steps in (1, 12)
    )
    heads = [load_file(run.directory / "last" / "model.safetensors")["score.weight"] for run in (short, long)]
    assert heads[0].shape == (2, 32)
    assert not torch.equal(*heads)
    found = Classifier.load(str(long.directory / "last")).label([(row["text"],) for row in rows])
    right = [
        each["probability"] if each["label"] == row["label"] else 1 - each["probability"]
        for each, row in zip(found, rows, strict=True)
    ]
    loss = -sum(map(math.log, right)) / len(right)
    assert loss == pytest.approx([row["val_loss"] for row in long.metrics if "val_loss" in row][-1], abs=0.01)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_D4_merging_an_adapter_of_quantized_weights_changes_little(bits: Any, tmp_path: Path) -> None:
    """transformers #31293, peft #2321, unsloth-zoo #810: the adapter is merged into other weights than those that it
    was trained on."""
    model = quantize(tiny_model(hidden_size=64, head_dim=32, intermediate_size=96, num_hidden_layers=2), bits)
    adapted(model)
    live = model(IDS)
    merged = merge_lora(model)(IDS)
    without = quantize(tiny_model(hidden_size=64, head_dim=32, intermediate_size=96, num_hidden_layers=2), bits)(IDS)
    assert (merged - live).abs().max() < 0.05 * (without - live).abs().max()


def test_D5_adapters_learn_with_ten_times_the_rate_in_all_linear_layers(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    """TRL #2872: an adapter learns nothing at the learning rate of the whole model; litgpt adapts q and v only."""
    rates = {}
    for lora in ("on", "off"):
        made = gptsmith.sft(base, chats, out=tmp_path / lora, steps=1, lora=lora, **QUIET)
        rates[lora] = made.config["optim"]["lr"]
        if lora == "on":
            names = list(load_file(made.directory / "best" / "adapter_model.safetensors"))
    assert rates["on"] == pytest.approx(10 * rates["off"])
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert sum(f".{layer}.lora_A" in name for name in names) == 2


def greedy(model: Transformer, prompt: Sequence[int], length: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_D6_generation_has_the_adapter_that_is_trained(tmp_path: Path) -> None:
    """verl #7495 ("two months on that wrong trail"), TRL #2698: rollouts come from the model without its adapter."""
    model = tiny_model(max_position_embeddings=64)

    params = SamplingParams(max_tokens=16, temperature=0.0)
    prompt = [3, 1, 4, 1, 5]
    before = Engine(model).generate([prompt], params)[0].completions[0].ids
    adapted(model)
    for scale in (1.0, 3.0):  # the weights go on changing
        with torch.no_grad():
            for part in lora_parts(model).values():
                part.B.mul_(scale)
        after = Engine(model).generate([prompt], params)[0].completions[0].ids
        assert after == greedy(model, prompt, 16)
        assert after != before
