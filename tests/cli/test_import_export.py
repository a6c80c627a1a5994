"""`gptsmith import` and `gptsmith export`, and round trips through both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptsmith.checkpoint import save_checkpoint
from gptsmith.export.export import export_directory, write_directory
from gptsmith.formats.hf import LAYOUTS
from gptsmith.loading import load_model
from gptsmith.tokenizer import Tokenizer, train_bpe
from tests.factories import tiny_model

Cli = Callable[..., tuple[int, str, str]]
VOCABULARY, CONTEXT = 300, 24


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer) -> Callable[[str], Path]:
    """Return a small random model of a family as transformers writes it. Do not change it."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            from transformers import AutoConfig, AutoModelForCausalLM

            if model_type in ("openai-gpt", "gpt2"):
                values: dict[str, Any] = {"n_positions": CONTEXT, "n_embd": 24, "n_layer": 2, "n_head": 3}
            elif model_type == "gpt_neo":
                values = {
                    "max_position_embeddings": CONTEXT,
                    "hidden_size": 24,
                    "num_layers": 2,
                    "num_heads": 3,
                    "attention_types": [[["global", "local"], 1]],
                    "window_size": 8,
                }
            else:
                values = {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "max_position_embeddings": CONTEXT,
                }
            if model_type in ("mixtral", "qwen2_moe", "qwen3_moe"):
                values |= {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
                values |= {"num_experts": 4, "shared_expert_intermediate_size": 24}
            if model_type in ("phi3", "smollm3"):
                values["pad_token_id"] = 0  # theirs is beyond this vocabulary
            if model_type == "deepseek_v3":
                values |= {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
                values |= {"topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "kv_lora_rank": 16}
                values |= {"q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
            config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **values)
            torch.manual_seed(0)
            hf_model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for p in hf_model.parameters():
                    p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
            directory = tmp_path_factory.mktemp(model_type)
            hf_model.generation_config.max_length = 77
            hf_model.save_pretrained(directory)
            bpe.save(directory)
            made[model_type] = directory
        return made[model_type]

    return get


@pytest.fixture
def source(models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model directory that a test can damage."""
    return Path(shutil.copytree(models("qwen3"), tmp_path / "source"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def set_in(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("model_type", sorted(LAYOUTS))
def test_import_export_import_is_exact(
    model_type: str, models: Callable[[str], Path], tmp_path: Path, run_cli: Cli
) -> None:
    first, out, second = tmp_path / "first", tmp_path / "out", tmp_path / "second"
    code, text, err = run_cli("import", models(model_type), "--out", first)
    assert code == 0, err
    assert f"{model_type}, context {CONTEXT}, {VOCABULARY} tokens; fp32" in text
    assert run_cli("export", first, "--to", "hf", "--dtype", "fp32", "--out", out)[0] == 0
    assert run_cli("import", out, "--out", second, "--dtype", "fp32")[0] == 0
    a, b, c = weights(first), weights(out), weights(second)
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (out / name).read_bytes() == (second / name).read_bytes(), name
    hf_model = weights(models(model_type))
    assert all(torch.equal(a[name], hf_model[name]) for name in a.keys() & hf_model.keys())


@pytest.mark.parametrize("model_type", sorted(LAYOUTS))
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", None), ("fp16", None)])
def test_exported_models_load_in_transformers(
    model_type: str, dtype: str, tolerance: float | None, models: Callable[[str], Path], tmp_path: Path, run_cli: Cli
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    code, _, err = run_cli("export", models(model_type), "--dtype", dtype, "--out", out)
    assert code == 0, err
    hf_model = AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=False)
    assert hf_model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    our_model, tokenizer = load_model(out)
    # Seeded, because two experts can have exactly the same router logit for some tokens, and then the choice is open.
    ids = torch.randint(0, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Gemma's class rounds the factor of its embeddings to the dtype that it was loaded in.
        close = 5e-3 if model_type == "gemma3_text" and dtype != "fp32" else 1e-4
        torch.testing.assert_close(our_model(ids), hf_model.float().eval()(ids).logits, atol=close, rtol=close)
    text = "bako mi tensha"
    assert AutoTokenizer.from_pretrained(out)(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_precision_is_kept_by_default(source: Path, tmp_path: Path, run_cli: Cli) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    assert "bf16" in run_cli("import", source, "--out", tmp_path / "same")[1]
    assert all(torch.equal(half[name], tensor) for name, tensor in weights(tmp_path / "same").items())
    assert "fp32" in run_cli("import", source, "--out", tmp_path / "wide", "--dtype", "fp32")[1]
    assert all(torch.equal(half[name].float(), tensor) for name, tensor in weights(tmp_path / "wide").items())


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("method", [None, "linear", "ntk", "llama3"])
def test_a_longer_context(
    command: str, method: str | None, models: Callable[[str], Path], tmp_path: Path, run_cli: Cli
) -> None:
    from transformers import AutoModelForCausalLM

    chosen = () if method is None else ("--rope-scaling", method)
    code, text, err = run_cli(command, models("qwen3"), "--out", tmp_path / "out", "--context", 4 * CONTEXT, *chosen)
    assert code == 0, err
    assert f"context {4 * CONTEXT}" in text
    our_model, _ = load_model(tmp_path / "out")
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, VOCABULARY, (1, 4 * CONTEXT))
    with torch.no_grad():
        torch.testing.assert_close(our_model(ids), hf_model(ids).logits, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"extended to {4 * CONTEXT} tokens ({method or 'yarn'})" in card


def test_upcycling(models: Callable[[str], Path], tmp_path: Path, run_cli: Cli) -> None:
    from transformers import AutoModelForCausalLM

    dense = models("qwen3")
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        code, text, err = run_cli("import", dense, "--out", out, "--upcycle", 3, "--experts-per-tok", 1)
        assert code == 0, err
        assert "qwen3_moe" in text
    assert all(torch.equal(tensor, weights(outs[1])[name]) for name, tensor in weights(outs[0]).items())
    ids = torch.randint(0, VOCABULARY, (2, CONTEXT))
    hf_model = AutoModelForCausalLM.from_pretrained(outs[0]).eval()
    with torch.no_grad():
        expected = load_model(dense)[0](ids)
        torch.testing.assert_close(load_model(outs[0])[0](ids), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(hf_model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert "upcycled to 3 experts, 1 per token" in (outs[0] / "README.md").read_text()
    assert run_cli("export", dense, "--to", "gguf", "--upcycle", 2, "--out", tmp_path / "x.gguf")[0] == 0
    assert load_model(tmp_path / "x.gguf")[0].config.num_experts == 2


@pytest.mark.parametrize(
    ("model_type", "arguments", "message"),
    [
        (
            "gpt2",
            ("--context", "99"),
            "learned positions of this model end at 64; only rotary positions can be extended",
        ),
        ("qwen3", ("--context", "10"), "the context is already 64"),
        ("qwen3", ("--context", "99999999"), "limit of 2,097,152 tokens"),
        ("qwen3", ("--rope-scaling", "ntk"), "requires --context"),
        ("qwen3", ("--experts-per-tok", "2"), "requires --upcycle"),
        ("qwen3", ("--upcycle", "0"), "must be at least 1"),
        ("qwen3", ("--upcycle", "2", "--experts-per-tok", "3"), "num_experts_per_tok (3) must be between 1 and 2"),
        ("gpt2", ("--upcycle", "2"), "a gpt2 model cannot be upcycled; these can: llama, mistral, qwen3"),
    ],
)
def test_unsupported_transforms_are_reported(
    model_type: str,
    arguments: tuple[str, ...],
    message: str,
    models: Callable[[str], Path],
    tmp_path: Path,
    run_cli: Cli,
) -> None:
    code, out, err = run_cli("import", models(model_type), "--out", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert message.replace("64", str(CONTEXT)) in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_settings_template_ids_card_and_license_are_copied(source: Path, tmp_path: Path, run_cli: Cli) -> None:
    set_in(source / "config.json", bos_token_id=3, eos_token_id=[0, 5], pad_token_id=4)
    set_in(source / "tokenizer_config.json", pad_token="<|endoftext|>")
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 5], "top_k": 20}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (source / "LICENSE").write_text("MIT")
    (source / "run_me.py").write_text("1/0")
    for place, command in ((tmp_path / "one", "import"), (tmp_path / "two", "export")):
        assert run_cli(command, source, "--out", place)[0] == 0
        config = json.loads((place / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (3, [0, 5], 4)
        assert json.loads((place / "generation_config.json").read_text()) == {"eos_token_id": [0, 5], "top_k": 20}
        tokenizer = json.loads((place / "tokenizer_config.json").read_text())
        assert tokenizer["chat_template"] == "{{ messages }}"
        assert tokenizer["pad_token"] == "<|endoftext|>"
        assert (place / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"
        assert len({path.stat().st_mode for path in place.iterdir()}) == 1
        assert names(place) == [
            "LICENSE",
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        source = place
    assert run_cli("export", source, "--out", tmp_path / "three", "--license", "apache-2.0")[0] == 0
    assert 'license: "apache-2.0"' in (tmp_path / "three" / "README.md").read_text()


def test_a_run_is_exported_with_its_card(finished: Path, tmp_path: Path, run_cli: Cli) -> None:
    code, _, err = run_cli("export", finished, "--out", tmp_path / "out", "--license", "mit")
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ('license: "mit"', "## Data", "words.txt", "## Recipe", "## Results", "nats/token", "## A sample"):
        assert part in card
    assert str(finished.parent) not in card
    assert "train" not in names(tmp_path / "out")  # nothing of the optimizer
    our_model, again = load_model(finished)[0], load_model(tmp_path / "out")[0]
    assert all(torch.equal(a, b) for a, b in zip(our_model.parameters(), again.parameters(), strict=True))


def test_large_models_are_split_into_shards(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model(source)
    write_directory(tmp_path / "out", model, tokenizer, shard_bytes=30_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 50_000 for path in shards)
    again, _ = load_model(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_existing_outputs_are_rejected(source: Path, tmp_path: Path, run_cli: Cli) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    for command in ("import", "export"):
        code, out, err = run_cli(command, source, "--out", tmp_path / "out")
        assert (code, out) == (2, "")
        assert "exists already" in err
    assert names(tmp_path / "out") == ["file"]
    (tmp_path / "empty").mkdir()
    assert run_cli("import", source, "--out", tmp_path / "empty")[0] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_rejected(value: float, source: Path, tmp_path: Path, run_cli: Cli) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for arguments in (("import",), ("export",), ("export", "--to", "gguf")):
        out = tmp_path / "out.gguf"
        code, _, err = run_cli(arguments[0], source, *arguments[1:], "--out", out)
        assert code == 1
        for part in ("NaN or infinite", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"):
            assert part in err
        assert not out.exists()
    load_model(source)  # not looked for at every load


def test_weights_beyond_fp16_are_rejected(source: Path, tmp_path: Path, run_cli: Cli) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run_cli("export", source, "--dtype", "fp16", "--out", tmp_path / "out")
    assert code == 1
    assert "beyond the range of fp16" in err
    assert "model.norm.weight" in err
    assert not (tmp_path / "out").exists()
    assert run_cli("export", source, "--dtype", "bf16", "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "hf", "--dtype", "q8_0"), "--to hf writes fp32, bf16 or fp16, not --dtype q8_0"),
        (
            ("--to", "gguf", "--dtype", "bf16"),
            "--to gguf writes f16, f32, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, mxfp4, not --dtype bf16",
        ),
        (("--to", "gguf"), "must end in .gguf"),
        (("--license", "a b"), "not a license identifier"),
        (("--to", "onnx"), "invalid choice"),
    ],
)
def test_wrong_options_are_reported(
    arguments: tuple[str, ...], message: str, source: Path, tmp_path: Path, run_cli: Cli
) -> None:
    code, out, err = run_cli("export", source, "--out", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_its_model_is_rejected(source: Path, tmp_path: Path, run_cli: Cli, words: str) -> None:
    train_bpe([words], VOCABULARY + 10).save(source)
    code, _, err = run_cli("import", source, "--out", tmp_path / "out")
    assert code == 1
    assert "the model only 300" in err


def test_a_full_disk_is_reported(source: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    code, _, err = run_cli("import", source, "--out", tmp_path / "out")
    assert code == 1
    assert "no space left" in err
    assert names(tmp_path) == ["source"]


def test_a_checkpoint_round_trips(tmp_path: Path, bpe: Tokenizer) -> None:
    model = tiny_model("gpt2", vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1)
    save_checkpoint(tmp_path / "model", model, bpe)
    export_directory(tmp_path / "model", tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_gguf_round_trips(dtype: str, models: Callable[[str], Path], tmp_path: Path, run_cli: Cli) -> None:
    pytest.importorskip("gguf")
    source, file = models("qwen3"), tmp_path / "model.gguf"
    code, text, err = run_cli("export", source, "--to", "gguf", "--dtype", dtype, "--out", file)
    assert code == 0, err
    assert dtype in text
    code, text, err = run_cli("import", file, "--out", tmp_path / "back")
    assert code == 0, err
    before, after = weights(source), weights(tmp_path / "back")
    tolerance = {"f32": 0.0, "f16": 1e-3, "q8_0": 2e-2}[dtype]
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], atol=tolerance, rtol=0)
    tokenizers = load_model(source)[1], load_model(file)[1]
    assert tokenizers[0].encode("bako mi tensha é") == tokenizers[1].encode("bako mi tensha é")
    code, out, err = run_cli("generate", file, "--prompt", "ba", "--max-tokens", "5", "--temperature", "0")
    assert code == 0, err
    assert out.startswith("ba")


@pytest.mark.parametrize("model_type", ["openai-gpt", "gpt_neo"])
def test_gguf_rejects_unsupported_families(
    model_type: str, models: Callable[[str], Path], tmp_path: Path, run_cli: Cli
) -> None:
    pytest.importorskip("gguf")
    code, out, err = run_cli("export", models(model_type), "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert (code, out) == (2, "")
    assert f"no architecture for a {model_type} model" in err
    assert names(tmp_path) == []


@pytest.mark.slow
@pytest.mark.network
def test_the_named_model_generates_text(run_cli: Cli) -> None:
    pytest.importorskip("gguf")
    prompt = "The capital of Italy is"
    code, out, err = run_cli(
        "generate", "smollm2-135m", "--prompt", prompt, "--max-tokens", "8", "--temperature", "0", "--device", "cpu"
    )
    assert code == 0, err
    assert out.startswith(f"{prompt} Rome")
