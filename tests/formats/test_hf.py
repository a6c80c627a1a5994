"""Parity with transformers, in both directions, on small random models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import config_to_hf, load_model_weights, load_weights, read_config, save_model, weights_to_hf
from gptsmith.model import families
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.model.transformer import Transformer
from tests.factories import WITH_EXPERTS, WITH_WINDOWS, WITHOUT_GROUPS, examples, tiny_model

TOLERANCE = 1e-4
transformers.utils.logging.disable_progress_bar()


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small configurations of any family, with odd sizes."""
    family = draw(st.sampled_from(sorted(families.FAMILIES)))
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    options: dict[str, Any] = {
        "vocab_size": draw(st.integers(3, 80)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "max_position_embeddings": draw(st.integers(8, 40)),
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": 0.2,
    }
    if family in ("gpt1", "gpt2", "gpt3", "opt"):
        options["hidden_size"] = heads * draw(st.sampled_from([4, 8, 5]))
        if family != "gpt1":
            options["intermediate_size"] = draw(st.sampled_from([16, 37]))
            options["mlp"] = draw(st.sampled_from(["gelu", "gelu_tanh", "relu"]))
        if family == "gpt3":
            options["sliding_window"] = draw(st.integers(1, 12))
            options["window_pattern"] = draw(st.sampled_from([(False, True), (True,), (False,), (True, False)]))
        if family == "opt":
            options["norm_position"] = draw(st.sampled_from(["pre", "post"]))
            options["embedding_size"] = draw(st.sampled_from([None, 3, 7]))
            options["attention_bias"] = options["mlp_bias"] = draw(st.booleans())
        return families.FAMILIES[family](**options)
    if family not in WITHOUT_GROUPS:
        options["num_key_value_heads"] = draw(st.sampled_from([k for k in (1, 2, 3, 6) if heads % k == 0]))
    options["hidden_size"] = heads * draw(st.sampled_from([4, 6]))
    if family not in ("qwen2", "qwen2_moe", "gpt_neox", "stablelm"):  # these have no width of heads of its own
        options["head_dim"] = draw(st.sampled_from([4, 8] if family == "deepseek_v3" else [2, 4, 8]))
    options["intermediate_size"] = draw(st.sampled_from([16, 37]))
    options["rope_theta"] = draw(st.sampled_from([100.0, 10000.0, 1e6]))
    if family in WITH_EXPERTS:
        options["num_experts"] = draw(st.integers(2, 8))
        options["num_experts_per_tok"] = draw(st.integers(1, min(4, options["num_experts"])))
        if family == "qwen2_moe":
            options["shared_expert_intermediate_size"] = draw(st.sampled_from([None, 12, 23]))
        if family not in ("mixtral", "gpt_oss"):
            options["norm_topk_prob"] = draw(st.booleans())
        if family == "deepseek_v3":
            options["q_lora_rank"] = draw(st.sampled_from([None, 5]))
            options["kv_lora_rank"] = draw(st.sampled_from([3, 8]))
            options["v_head_dim"] = draw(st.sampled_from([3, 8]))
            options["first_k_dense_replace"] = draw(st.integers(0, options["num_hidden_layers"]))
            options["shared_expert_intermediate_size"] = options["intermediate_size"] * draw(st.integers(1, 2))
            options["routed_scaling_factor"] = draw(st.sampled_from([1.0, 2.5]))
            options["rope_scaling"] = draw(
                st.sampled_from([None, RopeScaling("yarn", 4.0, 5, attention_factor=1.0, mscale_all_dim=0.7)])
            )
            if options["num_experts"] == 6:
                options |= {"n_group": 3, "topk_group": 2}
    if family in (
        *("llama", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_neox", "olmo2", "stablelm", "smollm3", "gemma3", "gpt_oss"),
        "deepseek_v3",
    ):
        options["attention_bias"] = draw(st.booleans())
    if family in ("llama", "smollm3"):
        options["mlp_bias"] = draw(st.booleans())
    if family in WITH_WINDOWS:
        options["sliding_window"] = draw(st.integers(1, 12))
    patterns = st.sampled_from([(True, False), (False, True), (True, True, False), (False, True, True)])
    if family in ("gemma3", "gpt_oss"):
        options["window_pattern"] = draw(patterns)
    if family == "gemma3":
        options["local_rope_theta"] = draw(st.sampled_from([50.0, 1e4]))
        options["attention_scale"] = draw(st.sampled_from([None, 3**-0.5]))
    if family == "smollm3":
        options["rope_pattern"] = draw(patterns)
    if family == "stablelm":
        options["qk_norm"] = draw(st.booleans())
        options["parallel_residual"] = options["shared_norm"] = draw(st.booleans())
    if family == "gpt_neox":
        options["parallel_residual"] = draw(st.booleans())
    if family == "phi3":
        options["partial_rotary_factor"] = draw(st.sampled_from([1.0, 2 / options["head_dim"]]))
    if family in ("llama", "qwen3", "olmo2", "gpt_oss"):
        context = options["max_position_embeddings"]
        options["rope_scaling"] = draw(
            st.sampled_from(
                [
                    None,
                    RopeScaling("linear", 3.0),
                    RopeScaling("yarn", 4.0, max(4, context // 4)),
                    RopeScaling("yarn", 2.0, max(4, context // 2), beta_fast=8.0, attention_factor=1.25),
                    RopeScaling("llama3", 8.0, max(4, context // 8), low_freq_factor=1.0, high_freq_factor=4.0),
                ]
            )
        )
    return families.FAMILIES[family](**options)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Make norms, biases and buffers that are saved random, too: at their initial values they would hide mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
        for name in model.state_dict().keys() - dict(model.named_parameters()).keys():
            buffer = model.get_buffer(name) if name in dict(model.named_buffers()) else None
            if buffer is not None:
                buffer.copy_(torch.randn_like(buffer) * 0.3)


@settings(max_examples=examples(50), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), seed=st.integers(0, 1000), padding=st.sampled_from([None, "left", "right"]))
def test_logits_and_gradients_equal_transformers(
    config: ModelConfig, seed: int, padding: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Compared at real tokens. The attention mask serves as document ids, so padding is a document of its own."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("model")
    our_model = Transformer(config)
    randomize(our_model, seed)
    save_model(our_model, directory)
    options = {"experts_implementation": "eager"} if config.num_experts else {}
    hf_model: Any = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, **options
    )
    assert sum(p.numel() for p in hf_model.parameters()) == our_model.num_parameters()

    ids = torch.randint(0, config.vocab_size, (2, config.max_position_embeddings))
    real = torch.ones_like(ids)
    if padding is None:
        logits, expected = our_model.eval()(ids), hf_model.eval()(ids).logits
    else:
        length, pad = ids.shape[1], 1 + seed % (ids.shape[1] // 2)
        real[1, slice(0, pad) if padding == "left" else slice(length - pad, length)] = 0
        positions = (real.cumsum(1) - 1).clamp(min=0)
        logits = our_model.eval()(ids, document_ids=real)
        expected = hf_model.eval()(ids, attention_mask=real, position_ids=positions).logits
    torch.testing.assert_close(logits[real == 1], expected[real == 1], atol=TOLERANCE, rtol=1e-4)

    targets = ids[:, 1:].masked_fill(real[:, 1:] * real[:, :-1] == 0, -100).flatten()
    for output in (logits, expected):
        torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), targets).backward()
    # Their gradients, put where their weights were, travel through the same table into our model.
    with torch.no_grad():
        for p in hf_model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    hf_model.save_pretrained(directory / "gradients")
    reference = Transformer(config)
    load_model_weights(reference, directory / "gradients")
    for (name, p), q in zip(our_model.named_parameters(), reference.parameters(), strict=True):
        our_gradient = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        hf_gradient = q.detach().clone()
        if (
            config.attention_scale is not None and config.model_type == "gpt_neo" and "qkv_proj" in name
        ):  # scaled weights: gradients scale the other way
            hf_gradient[: config.hidden_size] *= config.attention_scale**2
        # Relative to the largest; what is nothing but rounding (a router whose one choice has weight 1) is nothing.
        bound = 1e-4 * hf_gradient.abs().max() + 1e-7
        assert (our_gradient - hf_gradient).abs().max() <= bound, name


@settings(max_examples=30, deadline=None)
@given(config=configs(), seed=st.integers(0, 1000))
def test_weights_round_trip_exactly(config: ModelConfig, seed: int) -> None:
    first, second = Transformer(config), Transformer(config)
    randomize(first, seed)
    load_weights(second, weights_to_hf(first), "memory")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    there, back = weights_to_hf(first), weights_to_hf(second)
    assert all(torch.equal(tensor, back[name]) for name, tensor in there.items())


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_models_made_by_transformers_load(family: str, tmp_path: Path) -> None:
    if family == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=50, n_positions=24, n_embd=24, n_layer=2, n_head=3)
        hf_model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.Qwen3Config(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=40,
            max_position_embeddings=24,
        )
        hf_model = transformers.Qwen3ForCausalLM(config)
    randomize(hf_model, 1)
    hf_model.save_pretrained(tmp_path)
    our_model = Transformer(read_config(tmp_path))
    load_model_weights(our_model, tmp_path)
    ids = torch.randint(0, 50, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(our_model.eval()(ids), hf_model.eval()(ids).logits, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("config", [make() for make in families.FAMILIES.values()], ids=lambda c: c.model_type)
def test_config_round_trips(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert read_config(tmp_path) == config


PUBLISHED = {  # parameters, and how exactly that is known
    "gpt1-117m": (117e6, 0.005),
    "gpt2-124m": (124_439_808, 0),
    "gpt2-355m": (354_823_168, 0),
    "gpt2-774m": (774_030_080, 0),
    "gpt2-1.5b": (1_557_611_200, 0),
    "gpt3-125m": (125e6, 0.01),
    "gpt3-350m": (350e6, 0.02),
    "gpt3-760m": (760e6, 0.01),
    "gpt3-1.3b": (1.3e9, 0.02),
    "gpt3-2.7b": (2.7e9, 0.02),
    "gpt3-6.7b": (6.7e9, 0.01),
    "gpt3-13b": (13e9, 0.02),
    "gpt3-175b": (175e9, 0.005),
    "llama-7b": (6_738_415_616, 0),
    "llama3.1-8b": (8_030_261_248, 0),
    "llama3.2-1b": (1_235_814_400, 0),
    "llama3.2-3b": (3_212_749_824, 0),
    "mistral-7b": (7_241_732_096, 0),
    "qwen2-0.5b": (494_032_768, 0),
    "qwen2-1.5b": (1_543_714_304, 0),
    "qwen2-7b": (7_615_616_512, 0),
    "qwen3-0.6b": (596_049_920, 0),
    "qwen3-1.7b": (1_720_574_976, 0),
    "qwen3-4b": (4_022_468_096, 0),
    "qwen3-8b": (8_190_735_360, 0),
    "mixtral-8x7b": (46_702_792_704, 0),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 0),
    "qwen2-57b-a14b": (57.4e9, 0.001),
    "qwen3-30b-a3b": (30_532_122_624, 0),
    "pythia-14m": (14_067_712, 0),
    "pythia-31m": (30_494_720, 0),
    "pythia-70m": (70_426_624, 0),
    "pythia-160m": (162_322_944, 0),
    "pythia-410m": (405_334_016, 0),
    "pythia-1b": (1_011_781_632, 0),
    "pythia-1.4b": (1_414_647_808, 0),
    "pythia-2.8b": (2_775_208_960, 0),
    "pythia-6.9b": (6_857_302_016, 0),
    "pythia-12b": (11_846_072_320, 0),
    "gpt-neox-20b": (20_554_567_680, 0),
    "opt-125m": (125_239_296, 0),
    "opt-350m": (331_196_416, 0),
    "opt-1.3b": (1_315_758_080, 0),
    "opt-2.7b": (2_651_596_800, 0),
    "opt-6.7b": (6_658_473_984, 0),
    "opt-13b": (12_853_473_280, 0),
    "opt-30b": (29_974_540_288, 0),
    "opt-66b": (66e9, 0.005),
    "phi3-mini": (3_821_079_552, 0),
    "phi3-medium": (13_960_238_080, 0),
    "phi4": (14_659_507_200, 0),
    "phi4-mini": (3_836_021_760, 0),
    "olmo2-1b": (1_484_916_736, 0),
    "olmo2-7b": (7_298_617_344, 0),
    "olmo2-13b": (13_716_198_400, 0),
    "olmo2-32b": (32_234_279_936, 0),
    "stablelm-3b-4e1t": (2_795_443_200, 0),
    "stablelm2-1.6b": (1_644_417_024, 1e-4),  # published without the biases of norms
    "stablelm2-12b": (12_143_605_760, 1e-4),
    "smollm3-3b": (3_075_098_624, 0),
    "gemma3-270m": (268_098_176, 0),
    "gemma3-1b": (999_885_952, 0),
    "gemma3-4b": (3.88e9, 0.001),  # without the tower for pictures
    "gemma3-12b": (11.77e9, 0.001),
    "gemma3-27b": (27.01e9, 0.001),
    "gpt-oss-20b": (20_914_757_184, 0),
    "gpt-oss-120b": (116_829_156_672, 0),
    "deepseek-v3": (671_026_404_352, 0),
}


def test_every_published_size_is_checked() -> None:
    assert list(PUBLISHED) == list(families.SIZES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    published, tolerance = PUBLISHED[name]
    family, options = families.SIZES[name]
    config = families.FAMILIES[family](**options)
    with torch.device("meta"):
        counted = Transformer(config).num_parameters()
        values = config_to_hf(config)
        hf_model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    assert counted == hf_model.num_parameters()
    assert counted == pytest.approx(published, rel=tolerance)


def small(tmp_path: Path) -> tuple[Transformer, Path]:
    model = tiny_model(
        "qwen3", vocab_size=11, hidden_size=8, num_hidden_layers=1, intermediate_size=8, max_position_embeddings=8
    )
    save_model(model, tmp_path)
    return model, tmp_path


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    model, directory = small(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.surprise"] = torch.zeros(2)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model_weights(model, directory)
    for part in ("model.norm.weight", "model.surprise", "down_proj.weight is [3, 3], expected [8, 8]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"model_type": "bloom"}', "unknown model_type 'bloom'"),
        ('{"model_type": "qwen3", "vocab_size": null}', "value of the wrong type"),
    ],
)
def test_broken_configurations_are_named(contents: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    model, directory = small(tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model_weights(model, directory)


def test_unsupported_rope_scaling_is_rejected(tmp_path: Path) -> None:
    values = config_to_hf(families.qwen3())
    values["rope_parameters"] = {"rope_type": "su", "rope_theta": 1e6, "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="rope_type='su'"):
        read_config(tmp_path)


def test_model_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        families.gpt2().vocab_size = 3  # type: ignore[misc]
