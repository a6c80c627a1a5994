"""Continued pretraining by an adapter, and what a run takes over from the model that it starts from."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.checkpoint import load_train_state
from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats.peft import load_adapter
from gptsmith.model.config import ModelConfig
from gptsmith.model.quantized import quantize
from gptsmith.train.config import run_config
from gptsmith.train.forecast.memory import Forecaster
from tests.factories import tiny_config, tiny_run_config

OPTIONS: dict[str, Any] = {"steps": 6, "eval_every": 3, "log_every": 1, "sample_tokens": 0, "device": "cpu"}
NEW = {"family": "qwen3", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    place = tmp_path_factory.mktemp("base")
    (place / "words.txt").write_text(words)
    config = tiny_run_config(steps=40, eval_every=40, context=24, model=NEW)
    return gptsmith.fit(place / "words.txt", config, out=place / "run").directory


def losses(run: gptsmith.Run) -> list[Any]:
    return [row.get("loss") for row in run.metrics]


@pytest.mark.parametrize("options", [{}, {"dora": True, "dropout": 0.1}, {"quantize": "int4"}], ids=str)
def test_only_the_adapter_is_trained_and_saved(
    options: dict[str, Any], base: Path, text_file: Path, tmp_path: Path, run_cli: Any
) -> None:
    run = gptsmith.fit(text_file, init=base, lora={"rank": 4, **options}, out=tmp_path / "run", **OPTIONS)
    assert run.options["lora"] == {**run.options["lora"], "lora": "on", "rank": 4, **options}
    checkpoint = run.directory / "best"
    assert not (checkpoint / "model.safetensors").exists()
    base_size = (base / "best" / "model.safetensors").stat().st_size
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < base_size / 2

    # The run is a model like any other: it loads with the adapter folded in.
    model, tokenizer = gptsmith.load(run)
    live, _ = gptsmith.load(base)
    if "quantize" in options:  # the adapter belongs to the rounded weights; on the exact ones it is close
        quantize(live, 4)
    load_adapter(checkpoint, live)
    ids = torch.tensor([tokenizer.encode("ab ba")])
    with torch.no_grad():
        tolerance = 0.3 if "quantize" in options else 1e-4
        assert torch.allclose(model(ids), live(ids), atol=tolerance)
        assert not torch.allclose(model(ids), gptsmith.load(base)[0](ids), atol=1e-3)
    code, out, err = run_cli("generate", run.directory, "--prompt", "a", "--max-tokens", 5)
    assert code == 0, err
    assert out
    if "quantize" not in options:  # the run as an adapter of its base
        arguments = ("--prompt", "a", "--max-tokens", 5, "--temperature", 0)
        whole = run_cli("generate", run.directory, *arguments)
        assert run_cli("generate", base, "--adapter", run.directory, *arguments)[:2] == whole[:2]
    assert run_cli("export", run.directory, "--out", tmp_path / "exported")[0] == 0
    with torch.no_grad():
        assert torch.equal(gptsmith.load(tmp_path / "exported")[0](ids), model(ids))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_resumed_bit_for_bit(quantize: str, base: Path, text_file: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "dropout": 0.1, "quantize": quantize}
    whole = gptsmith.fit(text_file, init=base, lora=lora, out=tmp_path / "whole", save_every=2, **OPTIONS)
    last = whole.directory / "checkpoints" / "step-00000006"
    out = Path(shutil.copytree(whole.directory, tmp_path / "run", symlinks=True))
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    (out / "run.json").write_text(json.dumps({**whole.info, "status": "running"}))
    again = gptsmith.fit(resume=out)
    assert losses(again) == losses(whole)
    name = "adapter_model.safetensors"
    assert (out / "checkpoints" / "step-00000006" / name).read_bytes() == (last / name).read_bytes()


def test_peft_loads_a_checkpoint(base: Path, text_file: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run = gptsmith.fit(text_file, init=base, lora={"rank": 4}, out=tmp_path / "run", **OPTIONS)
    model, _ = gptsmith.load(run)
    warnings.simplefilter("ignore")  # of transformers about PEFT
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base / "best", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, run.directory / "best").eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_new_tokens_are_trained_and_saved_whatever_the_weights_are_held_in(
    quantize: str, base: Path, words: str, tmp_path: Path
) -> None:
    """The base has no chat template: its tokens are new, and start as the mean of the others."""
    prompt, answer = words.split()[:2]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 12)
    run = gptsmith.sft(base, chats, out=tmp_path / "run", **{"lora.quantize": quantize, "lora.rank": 2}, **OPTIONS)
    before, _ = gptsmith.load(base)
    after, _ = gptsmith.load(run)
    known = before.config.vocab_size
    new = after.embed_tokens.weight.detach()[known:]
    assert len(new)
    mean = before.embed_tokens.weight.detach().mean(dim=0)
    assert all(float((row - mean).abs().max()) > 1e-4 for row in new)


def test_the_model_has_gone(base: Path, text_file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base", symlinks=True))
    run = gptsmith.fit(text_file, init=copy, lora={"rank": 4}, out=tmp_path / "run", **OPTIONS)
    shutil.rmtree(copy)
    with pytest.raises(CheckpointError, match=r"is an adapter for .*: there is no model at"):
        gptsmith.load(run)


def test_an_adapter_of_an_adapter(base: Path, text_file: Path, tmp_path: Path) -> None:
    first = gptsmith.fit(text_file, init=base, lora={"rank": 2}, out=tmp_path / "first", **OPTIONS)
    second = gptsmith.fit(text_file, init=first, lora={"rank": 2}, out=tmp_path / "second", **OPTIONS)
    assert losses(second)[0] == pytest.approx(first.metrics[-1]["val_loss"], abs=0.4)
    gptsmith.load(second)


def test_optimizer_by_provenance_and_its_state(base: Path, text_file: Path, tmp_path: Path) -> None:
    """A whole model is trained further by the optimizer that pretrained it, with its momentum; an adapter by AdamW."""
    whole = gptsmith.fit(text_file, init=base, out=tmp_path / "whole", **OPTIONS)
    assert whole.options["optim"]["name"] == "muon"
    cold = gptsmith.fit(text_file, init=base, out=tmp_path / "cold", warm_start=False, **OPTIONS)
    assert losses(cold)[0] == losses(whole)[0]
    assert losses(cold)[-2] != losses(whole)[-2]
    adapter = gptsmith.fit(text_file, init=base, lora="on", out=tmp_path / "adapter", **OPTIONS)
    assert adapter.options["optim"] == {**adapter.options["optim"], "name": "adamw", "lr": pytest.approx(0.001)}
    shutil.copytree(base / "best", tmp_path / "alone", ignore=shutil.ignore_patterns("train", "manifest.json"))
    alone = gptsmith.fit(text_file, init=tmp_path / "alone", out=tmp_path / "from", **OPTIONS)
    assert alone.options["optim"] == {**alone.options["optim"], "name": "adamw", "lr": pytest.approx(0.0001)}
    state = load_train_state(adapter.directory / "best").tensors
    assert all(".lora." in name for name in state if name.startswith("optimizer/"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"rank": 4}}, "an adapter changes an existing model"),
        ({"init": True, "lora": "off", "lora.rank": 4}, "--lora.rank has no effect with --lora off"),
        ({"init": True, "lora": {"targets": ["nothing"]}}, "--lora.targets nothing matches no linear layer"),
        ({"init": True, "lora": {"rang": 4}}, "unknown configuration key 'lora.rang'. Did you mean 'rank'"),
    ],
)
def test_refused(options: dict[str, Any], message: str, base: Path, text_file: Path, tmp_path: Path) -> None:
    init = base if options.pop("init", False) else None
    with pytest.raises(UsageError, match=message):
        gptsmith.fit(text_file, init=init, out=tmp_path / "run", **OPTIONS, **options)
    assert not (tmp_path / "run").exists()


def test_memory_forecast() -> None:
    """An adapter needs neither gradients nor optimizer state of the frozen weights; QLoRA not even their float32."""
    model: ModelConfig = tiny_config(
        "llama", vocab_size=2000, hidden_size=256, num_hidden_layers=12, head_dim=64, intermediate_size=1024
    )
    plain, adapter, quantized = (
        sum(size for part, size in forecast.parts.items() if part != "process")
        for forecast in (
            Forecaster(
                run_config(steps=2, batch_size=2, context=16, optim={"name": "adamw"}, **lora),
                model,
                device=torch.device("cpu"),
                precision="fp32",
                process=0,
            ).at(2)
            for lora in (
                {},
                {"lora": {"lora": "on", "rank": 4}},
                {"lora": {"lora": "on", "rank": 4, "quantize": "int4"}},
            )
        )
    )
    assert adapter < 0.5 * plain
    assert quantized < 0.6 * adapter
