"""Merged models: equal to live adapters, to PEFT, to transformers, and to the formulas."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.errors import CheckpointError, UsageError
from gptsmith.export.merge import config_differences, merge_models, slerp
from gptsmith.formats.peft import adapter_layout, save_adapter
from gptsmith.loading import load_model
from gptsmith.model.config import LoraConfig
from gptsmith.model.lora import add_lora, lora_parts
from gptsmith.model.quantized import bits_of, dequantize, quantize
from gptsmith.model.resize import resize_embeddings
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer, train_bpe
from tests.factories import tiny_model

FAMILIES = ["gpt1", "gpt2", "gpt3", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe"]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"dora": True}) for family in FAMILIES),
    *((family, {}) for family in ("gpt2", "qwen3")),
    *((family, {"rslora": True, "alpha": 3.0}) for family in ("gpt2", "qwen3")),
]
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
}  # a multiple of 32 columns, as quantized matrices have


def model_of(family: str = "qwen3", seed: int = 0, **options: Any) -> Transformer:
    defaults = {"vocab_size": 300} | ({"intermediate_size": None} if family == "gpt1" else {})
    model = tiny_model(family, seed=seed, **defaults | options)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    return model


def saved(model: Transformer, directory: Path, tokenizer: Tokenizer) -> Path:
    save_checkpoint(directory, model, tokenizer)
    return directory


def adapter_of(
    base: Path, directory: Path, seed: int = 1, *, train_fully: tuple[str, ...] = (), tokens: int = 0, **options: Any
) -> tuple[Path, Transformer]:
    """Write an adapter that changes much. Return it and the model with it, live."""
    model, _ = load_model(base, quantize="none")
    if tokens:
        resize_embeddings(model, tokens)
    add_lora(model, LoraConfig(**{"rank": 3} | options), adapter_layout(model), train_fully=train_fully)
    torch.manual_seed(seed)
    for part in lora_parts(model).values():
        torch.nn.init.normal_(part.B, std=0.2)
        if part.magnitude is not None:
            part.magnitude.data *= 1 + 0.2 * torch.rand_like(part.magnitude)
    if train_fully:
        model.embed_tokens.weight.data += 0.1 * torch.randn_like(model.embed_tokens.weight)
    directory.mkdir()
    save_adapter(model, directory, str(base))
    return directory, model


def logits(model: Transformer, rows: int = 300) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return model(torch.randint(0, rows, (2, 12)))


def loaded(directory: Path) -> Transformer:
    return load_model(directory)[0]


def state(model: Transformer) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_folded_adapter_is_the_live_one(family: str, options: dict[str, Any], tmp_path: Path, bpe: Tokenizer) -> None:
    base = saved(model_of(family), tmp_path / "base", bpe)
    adapter, live = adapter_of(base, tmp_path / "adapter", **options)
    merged = loaded(gptsmith.merge([base, adapter], tmp_path / "merged"))
    assert (logits(merged) - logits(live)).abs().max() < 1e-4
    assert (logits(merged) - logits(loaded(base))).abs().max() > 1e-2
    assert {p.name for p in (tmp_path / "merged").iterdir()} >= {
        "tokenizer.json",
        "generation_config.json",
        "README.md",
    }
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_and_peft_compute_the_same(tied: bool, tmp_path: Path, bpe: Tokenizer) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = saved(model_of(tie_word_embeddings=tied), tmp_path / "base", bpe)
    adapter, _ = adapter_of(base, tmp_path / "adapter", train_fully=("embed_tokens",), dora=True)
    gptsmith.merge([base, adapter], tmp_path / "merged")
    ids = torch.arange(12)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert (theirs(ids).logits - merged(ids).logits).abs().max() < 1e-4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    is_one = merged.lm_head.weight is merged.get_input_embeddings().weight
    assert is_one is tied


def test_several_adapters_add_up_and_can_be_weighted(tmp_path: Path, bpe: Tokenizer) -> None:
    base = saved(model_of(), tmp_path / "base", bpe)
    a, _ = adapter_of(base, tmp_path / "a", seed=1)
    b, _ = adapter_of(base, tmp_path / "b", seed=2)
    both = state(loaded(gptsmith.merge([base, a, b], tmp_path / "ab", weights=[0.5, -2])))
    turned = state(loaded(gptsmith.merge([base, b, a], tmp_path / "ba", weights=[-2, 0.5])))
    plain = state(loaded(base))
    only = [state(loaded(gptsmith.merge([base, x], tmp_path / f"only_{x.name}"))) for x in (a, b)]
    for name, p in plain.items():
        expected = p + 0.5 * (only[0][name] - p) - 2 * (only[1][name] - p)
        assert torch.allclose(both[name], expected, atol=1e-5), name
        assert torch.allclose(both[name], turned[name], atol=1e-6), name
    # An adapter alone is folded into the model that it names, and a second one added to that.
    alone = state(loaded(gptsmith.merge([a], tmp_path / "alone")))
    assert all(torch.equal(alone[name], only[0][name]) for name in alone)
    summed = state(loaded(gptsmith.merge([a, b], tmp_path / "a_and_b")))
    assert torch.allclose(
        summed["layers.0.mlp.up_proj.weight"], sum_of(plain, only, "layers.0.mlp.up_proj.weight"), atol=1e-5
    )


def sum_of(plain: dict[str, Tensor], others: list[dict[str, Tensor]], name: str) -> Tensor:
    return plain[name] + sum((other[name] - plain[name] for other in others), torch.zeros(()))


def test_adapters_are_averaged_as_models(tmp_path: Path, bpe: Tokenizer) -> None:
    base = saved(model_of(), tmp_path / "base", bpe)
    places = [adapter_of(base, tmp_path / str(seed), seed=seed, dora=True)[0] for seed in (1, 2)]
    wholes = [state(loaded(gptsmith.merge([place], tmp_path / f"whole{place.name}"))) for place in places]
    mean = state(loaded(gptsmith.merge(places, tmp_path / "mean", method="linear", weights=[3, 1])))
    for name, p in mean.items():
        assert torch.allclose(p, 0.75 * wholes[0][name] + 0.25 * wholes[1][name], atol=1e-6), name


@pytest.mark.parametrize("family", ["gpt2", "gpt3", "qwen2_moe"])
def test_linear(family: str, tmp_path: Path, bpe: Tokenizer) -> None:
    places = [saved(model_of(family, seed), tmp_path / str(seed), bpe) for seed in range(3)]
    mean = state(loaded(gptsmith.merge(places, tmp_path / "mean", weights=[1, 2, 5])))
    states = [state(loaded(place)) for place in places]
    for name, p in mean.items():
        assert torch.allclose(p, states[0][name] / 8 + states[1][name] / 4 + states[2][name] * 5 / 8, atol=1e-6), name
    first = state(loaded(gptsmith.merge(places, tmp_path / "first", weights=[1, 0, 0])))
    assert all(torch.equal(first[name], states[0][name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_slerp_of_models(family: str) -> None:
    first, second = model_of(family, 0), model_of(family, 1)
    ends = [{name: p.detach().clone() for name, p in state(model).items()} for model in (first, second)]
    merged = state(merge_models([first, second], [0.75, 0.25], "slerp"))
    for name in ("layers.0.attention.o_proj.weight", "embed_tokens.weight"):
        u, v = (end[name].double().flatten() for end in ends)
        angle = math.acos(float(u @ v / u.norm() / v.norm()))
        expected = (math.sin(0.75 * angle) * u + math.sin(0.25 * angle) * v) / math.sin(angle)
        assert torch.allclose(merged[name].double().flatten(), expected, atol=1e-5), name


def test_slerp_on_the_circle() -> None:
    """Between unit vectors the length stays 1 and the angle grows in proportion."""
    u, v = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(2.0), math.sin(2.0)])
    for share in (0.0, 0.3, 0.5, 1.0):
        expected = torch.tensor([math.cos(2 * share), math.sin(2 * share)])
        assert torch.allclose(slerp(u, v, share), expected, atol=1e-6)
    for other in (u, -u, 3 * u, 0 * u, u + torch.tensor([0.0, 1e-9])):  # a line where the arc is not defined
        assert torch.allclose(slerp(u, other, 0.25), 0.75 * u + 0.25 * other, atol=1e-6)


def test_a_quantized_base_is_folded_in_full_precision(
    tmp_path: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(quantize(model_of(**WIDE), 4), tmp_path / "base", bpe)
    adapter, live = adapter_of(base, tmp_path / "adapter")
    merged = loaded(gptsmith.merge([base, adapter], tmp_path / "merged"))
    assert f"{base} is quantized" in capsys.readouterr().err
    assert bits_of(merged) is None
    assert (logits(merged) - logits(live)).abs().max() < 1e-4
    rounded = dequantize(load_model(base)[0])
    assert torch.equal(merged.embed_tokens.weight, rounded.embed_tokens.weight)


def test_new_tokens_come_along(tmp_path: Path, bpe: Tokenizer) -> None:
    """The merged model has the adapter's embeddings, tokenizer and chat template."""
    base = saved(model_of(), tmp_path / "base", bpe)
    adapter, live = adapter_of(base, tmp_path / "adapter", train_fully=("embed_tokens",), tokens=301)
    description = json.loads(bpe.to_json())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    description["added_tokens"].append({"id": 300, "content": "<|new|>", "special": True, **flags})
    Tokenizer(json.dumps(description), bpe.config() | {"eos_token": "<|new|>", "chat_template": "{{ messages }}"}).save(
        adapter
    )
    merged = gptsmith.merge([base, adapter], tmp_path / "merged")
    model, tokenizer = load_model(merged)
    assert json.loads((merged / "config.json").read_text()).get("eos_token_id") == tokenizer.eos_id
    assert (logits(model, 301) - logits(live, 301)).abs().max() < 1e-4
    assert tokenizer.special_tokens()[300] == "<|new|>"
    assert tokenizer.config()["chat_template"] == "{{ messages }}"


def test_the_type_is_kept(tmp_path: Path, bpe: Tokenizer) -> None:
    base = saved(model_of(), tmp_path / "base", bpe)
    adapter, _ = adapter_of(base, tmp_path / "adapter")
    half = gptsmith.merge([base, adapter], tmp_path / "half", dtype="bf16")
    again = gptsmith.merge([half, half], tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    full = loaded(gptsmith.merge([base, adapter], tmp_path / "full"))
    assert all(torch.equal(p.bfloat16().float(), state(loaded(again))[name]) for name, p in state(full).items())


def test_the_license_comes_along(tmp_path: Path, bpe: Tokenizer) -> None:
    base = saved(model_of(), tmp_path / "base", bpe)
    (base / "LICENSE").write_text("Copy it.")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    adapter, _ = adapter_of(base, tmp_path / "adapter")
    for number, models in enumerate([(base, adapter), (adapter,), (base, base)]):
        merged = gptsmith.merge(models, tmp_path / str(number))
        assert (merged / "LICENSE").read_text() == "Copy it."
        assert 'license: "mit"' in (merged / "README.md").read_text()
    other = saved(model_of(), tmp_path / "other", bpe)
    mixed = gptsmith.merge([base, other], tmp_path / "mixed")
    assert 'license: "unknown"' in (mixed / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 and 3"),
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is True and False"),
        ({"family": "llama"}, "norm_eps"),
        ({"vocab_size": 301}, "vocab_size is 300 and 301"),
    ],
)
def test_another_architecture_is_refused(
    options: dict[str, Any], difference: str, tmp_path: Path, bpe: Tokenizer
) -> None:
    a = saved(model_of(tie_word_embeddings=True), tmp_path / "a", bpe)
    b = saved(model_of(**{"tie_word_embeddings": True} | options), tmp_path / "b", bpe)
    with pytest.raises(UsageError, match="different architectures") as refused:
        gptsmith.merge([a, b], tmp_path / "out")
    assert difference in str(refused.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="different architectures"):
        merge_models([loaded(a), loaded(b)], [1, 1])


def test_settings_of_training_alone_do_not_matter() -> None:
    assert config_differences(model_of().config, model_of(initializer_range=0.1).config) == ""


def test_another_vocabulary_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    """Models of one size whose ids mean different tokens."""
    a = saved(model_of(), tmp_path / "a", bpe)
    b = saved(model_of(), tmp_path / "b", train_bpe(["zzyzx qwert plugh xyzzy " * 99, "0123456789" * 9], 300))
    with pytest.raises(UsageError, match=r"different tokenizers: token \d+ is"):
        gptsmith.merge([a, b], tmp_path / "out")


def test_wrong_requests(tmp_path: Path, bpe: Tokenizer) -> None:
    a = saved(model_of(), tmp_path / "a", bpe)
    lora, _ = adapter_of(a, tmp_path / "lora")
    dora, _ = adapter_of(a, tmp_path / "dora", dora=True)
    whole, _ = adapter_of(a, tmp_path / "whole", train_fully=("embed_tokens",))
    other, _ = adapter_of(a, tmp_path / "other", train_fully=("embed_tokens",))
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([a], {}, "nothing to merge"),
        ([lora], {"method": "slerp"}, "nothing to merge"),
        ([a, lora, a], {}, "whole model, and others are adapters"),
        ([a, a], {"method": "fold"}, "not an adapter"),
        ([a, a, a], {"method": "slerp"}, "between two models, not 3"),
        ([a, lora], {"weights": [1, 2]}, "2 numbers for 1 adapters"),
        ([a, a], {"weights": [1]}, "1 numbers for 2 models"),
        ([a, a], {"weights": [1, -1]}, "sum is not 0"),
        ([a, a], {"weights": [2, -1], "method": "slerp"}, "0 or more"),
        ([a, a], {"weights": [0, 0]}, "sum is not 0"),
        ([a, lora], {"weights": [math.nan]}, "must be finite numbers"),
        ([a, dora], {"weights": [0.5]}, "DoRA"),
        ([a, whole], {"weights": [0.5]}, "embeddings of its own"),
        ([a, whole, other], {}, "both have embeddings"),
        ([whole, other], {}, "both have embeddings"),
    ]
    for models, options, message in cases:
        with pytest.raises(UsageError, match=message):
            gptsmith.merge(models, tmp_path / "out", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        gptsmith.merge([a, lora], tmp_path / "full")
    narrow = saved(model_of(hidden_size=32), tmp_path / "narrow", bpe)
    with pytest.raises(CheckpointError, match="another model"):
        gptsmith.merge([narrow, lora], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="weights"):
        merge_models([loaded(a)], [1, 1])
    with pytest.raises(UsageError, match="weights"):
        merge_models([loaded(a), loaded(a)], [1])


def test_an_adapter_of_another_model_is_pointed_out(
    tmp_path: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (saved(model_of(seed=seed), tmp_path / name, bpe) for seed, name in enumerate("ab"))
    lora, _ = adapter_of(a, tmp_path / "lora")
    gptsmith.merge([a, lora], tmp_path / "right")
    assert "was trained on" not in capsys.readouterr().err
    gptsmith.merge([b, lora], tmp_path / "other")
    assert f"{lora} was trained on {a}" in capsys.readouterr().err


def test_damaged_weights_are_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    a, model = saved(model_of(), tmp_path / "a", bpe), model_of()
    model.embed_tokens.weight.data[0, 0] = math.nan
    b = saved(model, tmp_path / "b", bpe)
    with pytest.raises(CheckpointError, match="NaN"):
        gptsmith.merge([a, b], tmp_path / "out")


def test_command(tmp_path: Path, bpe: Tokenizer, run_cli: Any) -> None:
    base = saved(model_of(), tmp_path / "base", bpe)
    adapter, live = adapter_of(base, tmp_path / "adapter")
    code, out, err = run_cli("merge", base, adapter, "--out", tmp_path / "merged")
    assert code == 0, err
    assert "merged" in out
    assert (logits(loaded(tmp_path / "merged")) - logits(live)).abs().max() < 1e-4
    code, _, err = run_cli(
        "merge", base, tmp_path / "merged", "--weights", 1, "--weights", 3, "--method", "slerp", "--out", tmp_path / "m"
    )
    assert code == 0, err
    assert (tmp_path / "m" / "model.safetensors").exists()
    code, _, err = run_cli("merge", base, "--out", tmp_path / "none")
    assert code == 2, err
    assert "nothing to merge" in err
    code, _, err = run_cli("merge", base, tmp_path / "absent", "--out", tmp_path / "none")
    assert code == 1, err
    assert "there is no model at" in err
