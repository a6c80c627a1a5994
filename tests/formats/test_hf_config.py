"""Configurations as other programs write them: what transformers computes for one, or a refusal that names the key."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats import hf_config
from gptsmith.formats.gguf import write_gguf
from gptsmith.formats.gguf_weights import ARCHITECTURES
from gptsmith.formats.hf import LAYOUTS, config_from_hf, config_to_hf, save_model
from gptsmith.formats.source import open_model
from gptsmith.model.activations import FUNCTIONS
from gptsmith.model.config import ACTIVATIONS
from gptsmith.model.transformer import Transformer
from tests.factories import examples, tiny_config, tiny_model

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

KINDS = sorted(LAYOUTS)
BASE = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_transformers_is_accounted_for(kind: str) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    own = LAYOUTS[kind].fields
    assert fields.keys() == (own.keys() | hf_config.HARMLESS | hf_config.REFUSED.keys()) & fields.keys()
    assert own == {name: fields[name] for name in own}
    assert not own.keys() & hf_config.HARMLESS
    assert dict(LAYOUTS[kind].aliases).items() <= (
        CONFIG_MAPPING[kind].attribute_map.items() | {("num_local_experts", "num_experts")}
    )


def test_every_key_of_a_rope_dictionary_is_accounted_for() -> None:
    from transformers.modeling_rope_utils import RopeParameters

    assert RopeParameters.__annotations__.keys() | {"type", "finetuned"} == hf_config._ROPE_KEYS


def test_activations_equal_transformers() -> None:
    assert FUNCTIONS.keys() == set(ACTIVATIONS)
    assert hf_config.ACTIVATIONS.keys() == ACT2CLS.keys() - {"prelu", "xielu"}  # which have weights
    x = torch.linspace(-12, 12, 1001)
    for theirs, ours in hf_config.ACTIVATIONS.items():
        torch.testing.assert_close(FUNCTIONS[ours](x), ACT2FN[theirs](x), atol=2e-6, rtol=1e-5)


# Random configurations ------------------------------------------------------------------------------------------------


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


seldom = st.sampled_from(range(16)).map(lambda number: number == 11)


@st.composite
def rope_dictionaries(draw: st.DrawFn, head_dim: int, context: int) -> dict[str, Any]:
    """A RoPE dictionary of any type, mostly valid, with keys that its type does not read."""
    kinds = ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]
    kind = draw(st.sampled_from([*kinds, "yarn", "longrope", "su"]))
    original = draw(st.sampled_from([4, context // 2, context, 2 * context]))
    factors = st.lists(st.floats(0.5, 20), min_size=head_dim // 2, max_size=head_dim // 2)
    options: dict[str, Any] = {
        "factor": st.sampled_from([0.5, 1.0, 2.0, 8, 40.0]),
        "attention_factor": maybe(st.sampled_from([0.0, 0.5, 1.3])),
        "beta_fast": maybe(st.sampled_from([0, 4, 16.0, 32, 100])),
        "beta_slow": maybe(st.sampled_from([0, 0.5, 1, 8])),
        "mscale": maybe(st.sampled_from([0, 0.707, 1.0, 2])),
        "mscale_all_dim": maybe(st.sampled_from([0, 0.5, 1.0])),
        "truncate": st.sampled_from([True, False, None]),
        "short_factor": factors,
        "long_factor": factors,
        "low_freq_factor": st.sampled_from([0.5, 1.0, 1]),
        "high_freq_factor": st.sampled_from([2.0, 4]),
        "original_max_position_embeddings": st.just(original),
        "partial_rotary_factor": st.sampled_from([0.25, 0.5, 1.0]),
    }
    needed = {
        "linear": {"factor"},
        "dynamic": {"factor"},
        "yarn": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
        "longrope": {"short_factor", "long_factor"},
    }.get(kind, set())
    chosen = draw(st.sets(st.sampled_from(sorted(options.keys() - {"partial_rotary_factor"}))))
    if draw(seldom) or kind == "proportional":
        chosen.add("partial_rotary_factor")
    rope: dict[str, Any] = {draw(st.sampled_from(["rope_type", "rope_type", "type"])): kind}
    rope |= {key: draw(options[key]) for key in sorted(needed | chosen)}
    if draw(st.booleans()):
        rope["rope_theta"] = draw(st.sampled_from([100.0, 10000, 5e5]))
    return rope


@st.composite
def hf_configs(draw: st.DrawFn, kinds: list[str] = KINDS) -> dict[str, Any]:
    """The contents of a config.json of any family."""
    kind = draw(st.sampled_from(kinds))
    heads = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 8]))
    context = draw(st.sampled_from([12, 24]))
    activation = st.sampled_from([*hf_config.ACTIVATIONS, "silu", "silu", "silu", "prelu"])
    values: dict[str, Any] = {"model_type": kind, "vocab_size": 31, "tie_word_embeddings": draw(st.booleans())}
    if kind in LATER:
        return values | draw(later_configs(kind, heads, layers, head_dim, context))
    optional: dict[str, Any] = {}
    if kind in ("openai-gpt", "gpt2", "gpt_neo"):
        sizes = {
            "hidden_size": heads * head_dim,
            "max_position_embeddings": context,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        names = draw(st.sampled_from([{}, LAYOUTS[kind].aliases]))
        values |= {names.get(key, key): value for key, value in sizes.items()}
        if names or kind == "gpt_neo":
            values |= {LAYOUTS[kind].aliases.get(key, key): value for key, value in sizes.items()}
        optional["layer_norm_epsilon"] = st.sampled_from([1e-5, 1e-2])
        if kind == "openai-gpt":
            optional["afn"] = st.sampled_from(["gelu", "relu", "silu", "swish", "gelu_new"])
        else:
            optional["activation_function"] = activation
        if kind == "gpt2":
            flags = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
            optional |= {flag: st.booleans() for flag in flags}
            optional["n_inner"] = maybe(st.just(20))
        if kind == "gpt_neo":
            types = [draw(st.sampled_from(["global", "local"])) for _ in range(layers)]
            values["attention_types"] = [[types, 1]]
            optional["intermediate_size"] = maybe(st.just(20))
            optional["window_size"] = st.integers(1, 12)
            optional["attention_layers"] = st.lists(
                st.sampled_from(["global", "local"]), min_size=layers, max_size=layers
            )
    else:
        values |= {
            "hidden_size": heads * head_dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
            "max_position_embeddings": context,
            "intermediate_size": 20,
        }
        if draw(st.booleans()) or kind == "qwen3":
            values["head_dim"] = head_dim = draw(st.sampled_from([4, 8]))
        rope = rope_dictionaries(head_dim, context)
        layer_types = st.lists(
            st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers
        )
        optional |= {
            "hidden_act": activation,
            "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
            "rope_theta": st.sampled_from([50.0, 1e4]),
            "rope_scaling": maybe(rope),
            "rope_parameters": maybe(rope),
            "original_max_position_embeddings": st.sampled_from([6, context, 2 * context]),
            "attention_bias": st.booleans(),
        }
        if kind != "llama" or draw(seldom):
            optional["sliding_window"] = maybe(st.integers(1, 30))
        if kind in ("mistral", "qwen2", "qwen3", "qwen2_moe") or draw(seldom):
            optional["layer_types"] = layer_types
        if draw(seldom):
            optional["partial_rotary_factor"] = st.sampled_from([0.5, 1.0])
        if kind == "llama":
            optional["mlp_bias"] = st.booleans()
        if kind.startswith("qwen"):
            optional["use_sliding_window"] = st.booleans()
            optional["max_window_layers"] = st.integers(0, 3)
        if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
            values[draw(st.sampled_from(["num_experts", "num_local_experts"]))] = 4
            if kind == "qwen2_moe":
                values |= {"num_experts": 4, "shared_expert_intermediate_size": 12}
            values |= {"num_experts_per_tok": draw(st.integers(1, 3)), "moe_intermediate_size": 12}
            optional |= {"norm_topk_prob": st.booleans(), "qkv_bias": st.booleans()}
            if draw(seldom):
                optional |= {
                    "decoder_sparse_step": st.integers(1, 2),
                    "mlp_only_layers": st.sampled_from([None, [], [0]]),
                }
    for key in sorted(optional):
        if draw(st.booleans()):
            values[key] = draw(optional[key])
    if draw(seldom):
        values[draw(st.sampled_from(["is_causal", "add_cross_attention"]))] = draw(st.booleans())
    return values


LATER = ("gpt_neox", "opt", "phi3", "olmo2", "stablelm", "smollm3", "gemma3_text", "gpt_oss", "deepseek_v3")


@st.composite
def later_configs(draw: st.DrawFn, kind: str, heads: int, layers: int, head_dim: int, context: int) -> dict[str, Any]:
    """The contents of a config.json of a family in `formats.layouts`, but for vocabulary and tied embeddings."""
    activation = st.sampled_from([*hf_config.ACTIVATIONS, "silu", "silu", "silu", "prelu"])
    values: dict[str, Any] = {
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "pad_token_id": None,
    }
    optional: dict[str, Any] = {"attention_bias": st.booleans(), "hidden_act": activation}
    layer_types = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
    if kind == "opt":
        values["ffn_dim"] = 20
        optional = {
            "activation_function": activation,
            "do_layer_norm_before": st.booleans(),
            "word_embed_proj_dim": maybe(st.sampled_from([5, heads * head_dim])),
            "enable_bias": st.booleans(),
            "_remove_final_layer_norm": seldom,
            "layer_norm_elementwise_affine": st.just(True),
        }
    else:
        values["intermediate_size"] = 20
        if kind not in ("gpt_neox", "deepseek_v3"):
            values["num_key_value_heads"] = draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0]))
        if kind in ("gemma3_text", "gpt_oss") or (kind in ("phi3", "olmo2", "smollm3") and draw(st.booleans())):
            values["head_dim"] = head_dim = draw(st.sampled_from([4, 8]))
        rotary = {"deepseek_v3": 4}.get(kind, head_dim)
        if kind in ("gpt_neox", "phi3", "stablelm"):
            part = draw(st.sampled_from([0.5, 1.0]))
            values[{"gpt_neox": "rotary_pct"}.get(kind, "partial_rotary_factor")] = part
            rotary = int(part * head_dim)
        rope = rope_dictionaries(rotary, context)
        eps = "layer_norm_eps" if kind in ("gpt_neox", "stablelm") else "rms_norm_eps"
        optional |= {eps: st.sampled_from([1e-6, 1e-2])}
        optional[{"gpt_neox": "rotary_emb_base"}.get(kind, "rope_theta")] = st.sampled_from([50.0, 1e4])
        if kind != "gemma3_text":
            optional |= {"rope_scaling": maybe(rope), "rope_parameters": maybe(rope)}
    if kind in ("gpt_neox", "stablelm"):
        optional["use_parallel_residual"] = st.booleans()
    if kind == "phi3":
        values["original_max_position_embeddings"] = draw(st.sampled_from([6, context]))
        optional["sliding_window"] = maybe(st.integers(1, 30))
    if kind == "stablelm":
        optional |= {"use_qkv_bias": st.booleans(), "qk_layernorm": st.booleans()}
    if kind == "smollm3":
        optional |= {
            "mlp_bias": st.booleans(),
            "use_sliding_window": st.booleans(),
            "sliding_window": maybe(st.integers(1, 30)),
            "no_rope_layers": st.lists(st.integers(0, 1), min_size=layers, max_size=layers + 1),
            "no_rope_layer_interval": st.integers(1, 4),
        }
    if kind in ("smollm3", "gemma3_text", "gpt_oss"):
        optional["layer_types"] = layer_types
    if kind == "gemma3_text":
        values |= {"sliding_window": draw(st.integers(1, 30))}
        nested = st.fixed_dictionaries(
            {},
            optional={
                "full_attention": st.sampled_from(
                    [
                        {"rope_type": "default", "rope_theta": 300.0},
                        {"rope_type": "linear", "factor": 2.0},
                        {"rope_type": "linear", "factor": 2.0, "rope_theta": 70.0},
                    ]
                ),
                "sliding_attention": st.sampled_from([{"rope_type": "default", "rope_theta": 20.0}]),
            },
        )
        optional |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": st.integers(1, 20),
            "sliding_window_pattern": st.integers(1, 4),
            "rope_local_base_freq": st.sampled_from([30.0, 1e4]),
            "rope_scaling": maybe(st.just({"rope_type": "linear", "factor": 4.0})),
            "rope_parameters": maybe(nested),
            "final_logit_softcapping": maybe(st.just(30.0)) if draw(seldom) else st.none(),
            "attn_logit_softcapping": maybe(st.just(30.0)) if draw(seldom) else st.none(),
        }
    if kind == "gpt_oss":
        values |= {"num_local_experts": 4, "num_experts_per_tok": draw(st.integers(1, 3))}
        values["sliding_window"] = draw(st.integers(1, 30))
        optional |= {
            "hidden_act": st.just("silu"),
            "swiglu_alpha": st.sampled_from([1.0, 1.702]),
            "swiglu_limit": st.sampled_from([0.5, 7.0]),
        }
    if kind == "deepseek_v3":
        values |= {
            "num_key_value_heads": heads,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": draw(st.integers(1, 6)),
            "v_head_dim": draw(st.integers(1, 6)),
            "kv_lora_rank": draw(st.integers(1, 6)),
            "q_lora_rank": draw(maybe(st.integers(1, 6))),
            "moe_intermediate_size": 12,
            draw(st.sampled_from(["n_routed_experts", "num_local_experts"])): 4,
            "num_experts_per_tok": draw(st.integers(1, 2)),
            "first_k_dense_replace": draw(st.integers(0, layers)),
        }
        values |= draw(st.sampled_from([{"n_group": 1, "topk_group": 1}, {"n_group": 2, "topk_group": 1}]))
        optional |= {
            "n_shared_experts": st.integers(1, 2),
            "norm_topk_prob": st.booleans(),
            "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
            "rope_interleave": st.booleans() if draw(seldom) else st.just(True),
        }
    for key in sorted(optional):
        if draw(st.booleans()):
            values[key] = draw(optional[key])
    return values


MAY_BE_REFUSED = {  # what transformers computes and we do not
    "_remove_final_layer_norm", "rope_interleave", "softcapping", "rope_type",
    "decoder_sparse_step", "mlp_only_layers", "is_causal", "add_cross_attention", "layer_types", "sliding_window",
    "partial_rotary_factor", "prelu",
}  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """Make norms and biases random, too: at their initial values they would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-4, rtol=0)


def hf_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


@settings(
    max_examples=examples(120),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(values=hf_configs())
def test_random_configurations_compute_what_transformers_does(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("model")
    path = directory / "config.json"
    path.write_text(json.dumps(values))
    try:
        theirs: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(directory), attn_implementation="eager"
        ).eval()
        ids = torch.randint(0, 31, (2, 12))
        with torch.no_grad():
            theirs(ids[:, :2])
    except Exception as error:
        event(f"transformers: {type(error).__name__}")
        with contextlib.suppress(CheckpointError):  # nothing to compare with; but no other error
            config_from_hf(values, str(path))
        return
    randomize(theirs)
    theirs.save_pretrained(directory)
    path.write_text(json.dumps(values))
    refusal = None
    try:
        ours = open_model(directory).model()
    except CheckpointError as error:
        refusal = str(error)
    if refusal is not None:
        named = {key for key in MAY_BE_REFUSED if key in refusal}
        assert named, refusal
        assert str(path) in refusal
        event(f"refused: {sorted(named)}")
        return
    event(f"compared: {values['model_type']}")
    event(f"compared: {ours.config.rope_scaling and ours.config.rope_scaling.kind}")
    ids = ids[:, : ours.config.max_position_embeddings]
    with torch.no_grad():
        logits = ours(ids)
        assert_equal(logits, theirs(ids).logits)
    exported = tmp_path_factory.mktemp("exported")
    save_model(ours, exported)
    assert config_from_hf(json.loads((exported / "config.json").read_text()), "it") == ours.config
    assert_equal(logits, hf_logits(exported, ids))


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=hf_configs([kind for kind in KINDS if kind in ARCHITECTURES]))
def test_random_configurations_in_gguf(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A GGUF file computes the same, or it is not written and the message says why."""
    try:
        config = config_from_hf(values, "config.json")
    except CheckpointError:
        return
    model = Transformer(config).eval()
    randomize(model)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    refusal = None
    try:
        write_gguf(model, {"tokenizer.ggml.model": "none"}, path, "f32")
    except UsageError as error:
        refusal = str(error)
    if refusal is not None:
        assert "llama.cpp" in refusal or "GGUF" in refusal, refusal
        assert not path.exists()
        event("refused")
        return
    try:
        source = open_model(path)
    except CheckpointError as error:  # divisors of which the settings cannot be recovered
        if "are not those of Llama 3's scaling" not in str(error):
            raise
        event("not read back")
        return
    ids = torch.randint(0, 31, (1, min(12, source.config.max_position_embeddings)))
    with torch.no_grad():
        logits = model(ids)
        assert_equal(source.model()(ids), logits)
    event(f"compared: {config.rope_scaling and config.rope_scaling.kind}")


# Single settings ------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, values: dict[str, Any]) -> tuple[Any, Path]:
    """Return transformers' model for a config.json, saved into a directory with that file."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="eager")
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    return model, tmp_path


SMALL = {
    "model_type": "qwen3",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


def test_longrope_ends_at_the_original_context_or_is_extended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.5, 2.0],
        "long_factor": [1.0, 3.0, 7.0, 20.0],
        "original_max_position_embeddings": 8,
    }
    theirs, directory = saved(tmp_path, {**SMALL, "rope_scaling": rope})
    ours = open_model(directory).model()
    assert ours.config.max_position_embeddings == 8
    assert "other rotary positions for more than 8 tokens" in capsys.readouterr().err
    ids = torch.randint(0, 31, (1, 32))
    with torch.no_grad():
        assert_equal(ours(ids[:, :8]), theirs(ids[:, :8]).logits)
        ours.extend_context(32)
        for length in (9, 32):
            assert_equal(ours(ids[:, :length]), theirs(ids[:, :length]).logits)
        exported = tmp_path / "exported"
        exported.mkdir()
        save_model(ours, exported)
        for length in (8, 32):
            assert_equal(ours(ids[:, :length]), hf_logits(exported, ids[:, :length]))
    with pytest.raises(UsageError, match="already been extended"):
        ours.extend_context(64)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["LlamaForCausalLM"], "llama"),
        (["LLaMAForCausalLM"], "llama"),
        (["GPT2LMHeadModel"], "gpt2"),
        (["GPT2Model"], "gpt2"),
        (["OpenAIGPTLMHeadModel"], "openai-gpt"),
        (["GPTNeoForCausalLM"], "gpt_neo"),
        (["Qwen3MoeForCausalLM"], "qwen3_moe"),
        (["Qwen2ForSequenceClassification"], "qwen2"),
        (["BloomForCausalLM"], None),
        (["LlamaForCausalLM", "GPT2LMHeadModel"], None),
        ([], None),
        (None, None),
    ],
)
def test_architectures_name_the_model_type(names: list[str] | None, kind: str | None) -> None:
    if kind is None:
        with pytest.raises(CheckpointError, match="unknown model_type None"):
            config_from_hf({"architectures": names}, "config.json")
    else:
        assert config_from_hf({"architectures": names}, "config.json").model_type == kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"is_causal": False}, "is_causal=False"),
        ({"per_layer_config": {"0": {"num_attention_heads": 1}}}, "per_layer_config"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "surprise": 1}}, "RoPE options surprise"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE options full_attention"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type='su'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
            "short_factor of 4 numbers",
        ),
        ({"layer_types": ["full_attention"]}, "1 layer_types, but num_hidden_layers=2"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types='linear_attention'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no sliding window"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window=8"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"model_type": "qwen3_moe", "num_experts": 0}, "without experts"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        config_from_hf({**SMALL, **changes}, "models/it/config.json")
    assert "models/it/config.json" in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"sliding_window": 4, "window_pattern": (True,)}, "no sliding window"),
        ("qwen3_moe", {"sliding_window": 4, "window_pattern": (True, False)}, "in only some layers"),
        ("qwen3", {"mlp": "relu"}, "with a gate"),
        ("qwen3", {"attention_scale": 1.0}, "attention_scale"),
        ("gpt2", {"attention_scale": 0.7}, "attention_scale"),
        ("gpt3", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt1", {"mlp": "gelu"}, "openai-gpt layout"),
        ("gpt2", {"mlp": "gated_relu"}, "without a gate"),
    ],
)
def test_what_a_layout_cannot_hold_is_not_written(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_to_hf(tiny_config(family, **{"intermediate_size": 64, **changes}))


@pytest.mark.parametrize(("family", "options"), [("qwen3", {"mlp": "gated_relu2"}), ("gpt2", {"mlp": "silu"})])
def test_the_compiled_program_leaves_other_models_to_the_general_one(family: str, options: dict[str, Any]) -> None:
    from gptsmith.engine.cpu_runner import is_supported

    sizes = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 32}
    assert is_supported(tiny_model(family, **sizes))
    assert not is_supported(tiny_model(family, **sizes, **options))


def test_settings_of_gguf_files_that_change_the_result_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "model.gguf", tiny_model("llama")
    for key, value in (("llama.logit_scale", 2.0), ("llama.attention.causal", False)):
        write_gguf(model, {"tokenizer.ggml.model": "none", key: value}, path, "f32")
        with pytest.raises(CheckpointError, match=re.escape(key)):
            open_model(path)
    write_gguf(model, {"tokenizer.ggml.model": "none", "llama.logit_scale": 1.0}, path, "f32")
    open_model(path)


def test_unknown_feed_forward_layers_are_named() -> None:
    with pytest.raises(UsageError, match="unknown mlp 'swigelu'"):
        tiny_config("qwen3", mlp="swigelu")
    assert tiny_config("qwen3", mlp="gated_gelu").activation == "gelu"
