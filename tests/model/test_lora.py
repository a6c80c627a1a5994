"""Training with adapters: equal to PEFT, to the merged model, and to the exported one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats.hf import save_model
from gptsmith.formats.peft import adapter_layout, load_adapter, read_adapter, save_adapter
from gptsmith.formats.source import open_model
from gptsmith.loading import source_of
from gptsmith.model.config import LoraConfig
from gptsmith.model.lora import add_lora, applied, lora_parts, merge_lora
from gptsmith.model.loss import token_loss_sum
from gptsmith.model.parameters import parameter_info
from gptsmith.model.quantized import dequantize, quantize
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_model

FAMILIES = ["gpt1", "gpt2", "gpt3", "llama", "mistral", "qwen2", "qwen3", "qwen2_moe"]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True, "alpha": 3.0}, "dora": {"dora": True}}


def base_model(family: str, **options: Any) -> Transformer:
    model = tiny_model(family, **({"intermediate_size": None} if family == "gpt1" else {}) | options)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    return model


def adapted_model(family: str, config: LoraConfig, *, train_fully: tuple[str, ...] = (), **options: Any) -> Transformer:
    """Return a model with an adapter that is not zero any more."""
    model = base_model(family, **options)
    add_lora(model, config, adapter_layout(model), train_fully=train_fully)
    shake(model)
    return model


def shake(model: Transformer) -> None:
    torch.manual_seed(2)
    for part in lora_parts(model).values():
        torch.nn.init.normal_(part.B, std=0.3)
        if part.magnitude is not None:
            part.magnitude.data *= 1 + 0.2 * torch.rand_like(part.magnitude)
    for p in (model.embed_tokens.weight, model.lm_head.weight):
        if isinstance(p, Tensor) and p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)


def logits(model: Transformer, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def ids_of(count: int = 12) -> Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 30, (2, count))


def places(directory: Path) -> tuple[Path, Path]:
    for name in ("base", "adapter"):
        (directory / name).mkdir()
    return directory / "base", directory / "adapter"


def peft_model(base: Path, adapter: Path) -> Any:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_live_equals_peft_merged_and_exported(family: str, kind: str, tmp_path: Path) -> None:
    config = LoraConfig(rank=3, **KINDS[kind])
    base, adapter = places(tmp_path)
    save_model(base_model(family), base)
    model, ids = adapted_model(family, config), ids_of()
    live = logits(model, ids)
    assert not torch.allclose(live, logits(base_model(family), ids), atol=1e-3)
    save_adapter(model, adapter, str(base))

    theirs = peft_model(base, adapter)
    assert torch.allclose(theirs(ids).logits, live, atol=1e-4)

    read_back = open_model(base).model()
    load_adapter(adapter, read_back)
    assert torch.equal(logits(read_back, ids), live)

    plain = open_model(base).model()
    served = read_adapter(adapter, plain)
    with torch.no_grad(), applied(plain, [(served, range(ids.shape[1]))]):
        assert torch.allclose(plain(ids[:1]), live[:1], atol=1e-4)

    merged = merge_lora(copy.deepcopy(model))
    assert not lora_parts(merged)
    assert dict(merged.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert torch.allclose(logits(merged, ids), live, atol=1e-4)
    assert torch.allclose(logits(source_of(adapter).model(), ids), live, atol=1e-4)
    save_model(merged, base)
    assert torch.allclose(logits(open_model(base).model(), ids), live, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "gpt3", "qwen3"])
def test_gradients_equal_pefts(family: str, kind: str, tmp_path: Path) -> None:
    base, adapter = places(tmp_path)
    save_model(base_model(family), base)
    model, ids = adapted_model(family, LoraConfig(rank=3, **KINDS[kind])), ids_of()
    save_adapter(model, adapter, "base")
    theirs = peft_model(base, adapter)
    token_loss_sum(model, ids[:, :-1], ids[:, 1:]).backward()
    scores = theirs(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    compared = 0
    for name, part in lora_parts(model).items():
        for key, own in (("lora_A", part.A), ("lora_B", part.B), ("lora_magnitude_vector", part.magnitude)):
            if own is not None:
                (their,) = (g for n, g in gradients.items() if f".{name}.{key}.default" in n)
                assert torch.allclose(gradient(own), their, rtol=1e-3, atol=1e-4), (name, key)
                compared += 1
    assert compared == len(gradients)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    """PEFT writes it, with ranks and alphas by pattern and new embeddings; we read it, and write it back the same."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    warnings.simplefilter("ignore")  # of transformers about PEFT
    save_model(base_model("qwen3", tie_word_embeddings=False), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 4},
        alpha_pattern={"down_proj": 9},
        use_rslora=True,
        modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    for name, p in theirs.named_parameters():
        if "modules_to_save" in name:
            p.data += 0.3
    theirs.save_pretrained(tmp_path / "adapter")
    model, ids = open_model(tmp_path / "base").model(), ids_of()
    with pytest.raises(CheckpointError, match="has embeddings of its own"):
        read_adapter(tmp_path / "adapter", model)
    load_adapter(tmp_path / "adapter", model)
    with torch.no_grad():
        assert torch.allclose(logits(model, ids), theirs(ids).logits, atol=1e-4)
    (tmp_path / "again").mkdir()
    save_adapter(model, tmp_path / "again", "base")
    again = peft_model(tmp_path / "base", tmp_path / "again")
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_trained_whole(tied: bool, tmp_path: Path) -> None:
    base, adapter = places(tmp_path)
    save_model(base_model("llama", tie_word_embeddings=tied), base)
    whole = ("embed_tokens", "lm_head")
    model, ids = adapted_model("llama", LoraConfig(rank=2), train_fully=whole, tie_word_embeddings=tied), ids_of()
    assert (model.lm_head.weight is model.embed_tokens.weight) is tied
    save_adapter(model, adapter, "base")
    read_back = open_model(base).model()
    load_adapter(adapter, read_back)
    assert torch.equal(logits(read_back, ids), logits(model, ids))
    assert (read_back.lm_head.weight is read_back.embed_tokens.weight) is tied
    theirs = peft_model(base, adapter)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, logits(model, ids), atol=1e-4)


def test_a_new_adapter_changes_nothing_and_leaves_names() -> None:
    for options in KINDS.values():
        model, ids = base_model("qwen3"), ids_of()
        before, names = logits(model, ids), dict(model.named_parameters()).keys()
        add_lora(model, LoraConfig(rank=4, **options), adapter_layout(model))
        assert torch.allclose(logits(model, ids), before, atol=1e-5)
        assert names <= dict(model.named_parameters()).keys()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if ".lora." in name}
        kinds = {parameter_info(model, name).kind for name in trained}
        assert kinds == ({"matrix", "vector"} if options.get("dora") else {"matrix"})


def test_targets() -> None:
    model = base_model("qwen3")
    add_lora(model, LoraConfig(rank=2, targets=("q_proj", "*.layers.1.mlp.*")), adapter_layout(model))
    assert sorted(lora_parts(model)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    with pytest.raises(UsageError, match=r"--lora.targets q_pro matches no linear layer. Did you mean 'q_proj'"):
        add_lora(base_model("qwen3"), LoraConfig(targets=("q_pro",)), adapter_layout(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base(bits: Any, tmp_path: Path) -> None:
    """The gradient is that beside the dequantized weights; the forward pass differs by the kernel's rounding."""
    wide: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    model, ids = quantize(base_model("qwen3", **wide), bits), ids_of()
    plain = dequantize(copy.deepcopy(model))
    for each in (model, plain):
        torch.manual_seed(4)
        add_lora(each, LoraConfig(rank=4), adapter_layout(each))
        shake(each)
        token_loss_sum(each, ids[:, :-1], ids[:, 1:]).backward()
    difference = logits(model, ids) - logits(plain, ids)
    assert difference.norm() < 0.06 * logits(plain, ids).norm()
    for ours, theirs in zip(lora_parts(model).values(), lora_parts(plain).values(), strict=True):
        pair = gradient(ours.A).flatten(), gradient(theirs.A).flatten()
        assert torch.nn.functional.cosine_similarity(*pair, dim=0) > 0.97
    save_adapter(model, tmp_path, "base")
    merged = merge_lora(model)
    assert torch.allclose(logits(merged, ids), logits(plain, ids), atol=1e-4)


def test_dropout_in_training_only() -> None:
    model, ids = adapted_model("llama", LoraConfig(rank=4, dropout=0.5)), ids_of()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    torch.manual_seed(0)
    first = logits(model, ids)
    torch.manual_seed(0)
    assert torch.equal(logits(model, ids), first)
    assert not torch.equal(logits(model, ids), first)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_engine_sees_a_live_adapter(family: str, bits: Any) -> None:
    wide: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    model = base_model(family, **wide)
    if bits:
        quantize(model, bits)
    add_lora(model, LoraConfig(rank=4), adapter_layout(model))
    shake(model)
    merged = merge_lora(copy.deepcopy(model))
    prompt = ids_of()[0, :5].tolist()
    params = SamplingParams(max_tokens=8, temperature=0.0)
    expected = Engine(merged).generate([prompt], params)[0].completions[0].ids
    assert Engine(model).generate([prompt], params)[0].completions[0].ids == expected


def test_wrong_options() -> None:
    for options, message in (
        ({"rank": 0}, "--lora.rank must be at least 1"),
        ({"alpha": 0.0}, "--lora.alpha must be above 0"),
        ({"dropout": 1.0}, "--lora.dropout must be at least 0 and below 1"),
    ):
        with pytest.raises(UsageError, match=message):
            LoraConfig(**options)
