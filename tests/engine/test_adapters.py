"""LoRA adapters: equal to merged weights, a different one for each row, read from PEFT's files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import load_weights, save_model, weight_mappings, weights_to_hf
from gptsmith.formats.peft import read_adapter
from gptsmith.model.families import FAMILIES
from gptsmith.model.lora import applied
from gptsmith.model.quantized import quantize
from gptsmith.model.transformer import Transformer
from tests.factories import WITH_EXPERTS, tiny_model

DENSE = [family for family in FAMILIES if family not in WITH_EXPERTS]


def make_model(family: str) -> Transformer:
    return tiny_model(
        family,
        vocab_size=40,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=None if family == "gpt1" else 96,
        max_position_embeddings=32,
        initializer_range=0.2,
    )


def write(
    directory: Path, model: Transformer, *, seed: int = 0, rank: int = 4, **changes: Any
) -> dict[str, torch.Tensor]:
    """Write an adapter with random numbers for every projection in PEFT's format; return its weight deltas."""
    torch.manual_seed(seed)
    tensors, added = {}, {}
    for mapping in weight_mappings(model.config):
        if "proj.weight" not in mapping.local:
            continue
        for name in mapping.hf:
            weight = weights_to_hf(model)[name]
            rows, columns = weight.shape[::-1] if mapping.transposed else weight.shape
            A, B = torch.randn(rank, columns) * 0.1, torch.randn(rows, rank) * 0.1
            base = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{base}.lora_A.weight"], tensors[f"{base}.lora_B.weight"] = A, B
            delta = 8 / rank * B @ A
            added[name] = delta.T if mapping.transposed else delta
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "target_modules": ["x"], **changes}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return added


def merged(model: Transformer, added: dict[str, torch.Tensor]) -> Transformer:
    other = copy.deepcopy(model)
    reference = {name: tensor + added.get(name, 0) for name, tensor in weights_to_hf(model).items()}
    load_weights(other, reference, "here")
    return other


@pytest.mark.parametrize("family", DENSE)
def test_equals_merged_weights(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    with_it = merged(model, write(tmp_path, model))
    adapter, ids = read_adapter(tmp_path, model), torch.randint(0, 40, (1, 12))
    with torch.no_grad():
        plain = model(ids)
        with applied(model, [(adapter, range(12))]):
            torch.testing.assert_close(model(ids), with_it(ids), atol=1e-4, rtol=1e-4)
        assert torch.equal(model(ids), plain)  # the adapter leaves no trace
    assert not torch.allclose(plain, with_it(ids), atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe"])
def test_requests_of_one_batch_use_different_adapters(family: str, tmp_path: Path, naive: Any) -> None:
    """Requests with either adapter and with none run in the same steps and share no blocks."""
    model = make_model(family)
    models = {
        None: model,
        "a": merged(model, write(tmp_path / "a", model, seed=1)),
        "b": merged(model, write(tmp_path / "b", model, seed=2)),
    }
    engine = Engine(model, block_size=4, max_batch=5, max_batch_tokens=12, cache_tokens=90)
    for name in ("a", "b"):
        engine.add_adapter(name, tmp_path / name)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9]] * 9
    names = [None, "a", "b"] * 3
    for _ in range(2):
        results = engine.generate(prompts, [SamplingParams(max_tokens=8, temperature=0, adapter=n) for n in names])
        assert [r.ids for r in results] == [naive(models[n], p, 8) for n, p in zip(names, prompts, strict=True)]
    assert engine.stats.prefix_hit_rate > 0
    engine.add_adapter("a", tmp_path / "b")  # replaced: no block of the old adapter is found
    (result,) = engine.generate(prompts[:1], SamplingParams(max_tokens=8, temperature=0, adapter="a"))
    assert result.ids == naive(models["b"], prompts[0], 8)
    engine.remove_adapter("a")
    (result,) = engine.generate(prompts[:1], SamplingParams(adapter="a"))
    assert "no adapter 'a'. Known adapters: b" in str(result.error)


def test_adapters_on_quantized_weights(tmp_path: Path) -> None:
    model = make_model("llama")
    write(tmp_path, model)
    quantize(model, 8)
    adapter, ids = read_adapter(tmp_path, model), torch.randint(0, 40, (1, 5))
    with torch.no_grad():
        plain = model(ids)
        with applied(model, [(adapter, [0, 1, 2, 3, 4])]):
            assert not torch.allclose(model(ids), plain, atol=1e-2)


def test_rejects_files_that_are_no_adapter_of_the_model(tmp_path: Path) -> None:
    model = make_model("llama")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        read_adapter(tmp_path, model)
    for change, expected in (
        ({"peft_type": "IA3"}, "not a LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "biases"),
        ({"r": 0}, "r a positive integer"),
        ({"r": 5}, "another model"),
    ):
        write(tmp_path, model)
        config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=expected):
            read_adapter(tmp_path, model)
    write(tmp_path, model)
    with pytest.raises(CheckpointError, match="is not supported"):
        read_adapter(tmp_path, make_model("gpt2"))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="damaged"):
        read_adapter(tmp_path, model)


def test_rank_stabilized(tmp_path: Path) -> None:
    model = make_model("gpt2")
    write(tmp_path / "plain", model)
    write(tmp_path / "rs", model, use_rslora=True)
    plain, rs = (read_adapter(tmp_path / name, model) for name in ("plain", "rs"))
    name = "layers.0.attention.o_proj"
    torch.testing.assert_close(rs.updates[name][0].B, 2 * plain.updates[name][0].B)  # 8 / √4 instead of 8 / 4


def test_rejects_adapters_that_are_not_finite_or_for_experts(tmp_path: Path) -> None:
    model = make_model("llama")
    write(tmp_path, model)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, file)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        read_adapter(tmp_path, model)
    mixtral = make_model("mixtral")
    base = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    tensors = {f"{base}.lora_A.weight": torch.zeros(4, 64), f"{base}.lora_B.weight": torch.zeros(96, 4)}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"adapting .*experts\.0.*not supported"):
        read_adapter(tmp_path, mixtral)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # from PEFT, which uses deprecated parts of transformers
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("stabilized", [False, True])
def test_equals_peft(family: str, stabilized: bool, tmp_path: Path) -> None:
    """PEFT itself creates the adapter and computes the expected logits."""
    peft: Any = pytest.importorskip("peft", reason="the package peft is not installed")
    from transformers import AutoModelForCausalLM

    model = make_model(family)
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    wanted = (
        ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    )
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=wanted,
        use_rslora=stabilized,
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    reference = peft.get_peft_model(reference, config).eval()
    reference.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, 40, (1, 12))
    adapter = read_adapter(tmp_path / "adapter", model)
    with torch.no_grad(), applied(model, [(adapter, range(12))]):
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=1e-4)
