"""Opening models: directories that transformers wrote, shards, legacy files, the hub, and hostile files."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import gptsmith
from gptsmith.download import PackageFile
from gptsmith.errors import CheckpointError, GptsmithError, TokenizerError, UsageError
from gptsmith.formats import hf
from gptsmith.formats import named as named_models
from gptsmith.formats.hf import LAYOUTS, read_config
from gptsmith.formats.hub import is_hub_id
from gptsmith.formats.named import NamedModel, named_model_path
from gptsmith.formats.safetensors import SafetensorsFiles
from gptsmith.formats.source import open_model
from gptsmith.loading import load_model, resolve_model
from gptsmith.model.transformer import Transformer
from gptsmith.storage import sha256_file
from gptsmith.tokenizer import Tokenizer, train_char
from tests.factories import examples

VOCABULARY, CONTEXT = 300, 24


def tiny(model_type: str) -> Any:
    """Make a small random model of transformers' own class; norms and biases are random, too."""
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
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": CONTEXT,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
        if model_type in ("gpt_neox", "stablelm", "deepseek_v3"):  # heads have no width of their own
            del values["head_dim"]
            values |= {"rotary_pct": 1 / 3, "partial_rotary_factor": 1 / 3}
        if model_type == "deepseek_v3":
            values |= {"num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 10, "v_head_dim": 5}
            values |= {"qk_rope_head_dim": 2, "qk_nope_head_dim": 4, "n_group": 2, "topk_group": 1}
            values |= {"first_k_dense_replace": 1}
        if model_type in ("gemma3_text", "olmo2", "opt", "phi3", "smollm3"):  # theirs may be beyond the vocabulary
            values["pad_token_id"] = None
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
    return model


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer) -> Callable[..., tuple[Path, Any]]:
    """Return (directory, model) as transformers writes them, made once. Do not change them."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(model_type: str) -> tuple[Path, Any]:
        if model_type not in made:
            directory, model = tmp_path_factory.mktemp(model_type), tiny(model_type)
            model.save_pretrained(directory)
            bpe.save(directory)
            made[model_type] = (directory, model)
        return made[model_type]

    return get


@pytest.fixture
def llama(foreign: Callable[..., tuple[Path, Any]], tmp_path: Path) -> Path:
    """A model directory that a test can damage."""
    return Path(shutil.copytree(foreign("qwen3")[0], tmp_path / "llama"))


def logits_equal(our_model: Transformer, hf_model: Any) -> None:
    ids = torch.randint(0, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(our_model(ids), hf_model(ids).logits, atol=1e-4, rtol=1e-4)


def change(path: Path, **values: Any) -> None:
    """Change a JSON file. A value of None removes its key."""
    before = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**before, **values}.items() if v is not None}))


# Directories as transformers writes them -----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(LAYOUTS))
def test_a_directory_of_transformers_loads(model_type: str, foreign: Callable[..., tuple[Path, Any]]) -> None:
    directory, hf_model = foreign(model_type)
    model, _ = gptsmith.load(directory)
    assert not model.training
    logits_equal(model, hf_model)


def test_a_layer_that_predicts_further_tokens_is_left_out(
    foreign: Callable[..., tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, hf_model = foreign("deepseek_v3")
    shutil.copytree(directory, tmp_path / "it")
    tensors = load_file(directory / "model.safetensors")
    extra = {f"model.layers.2.{name}.weight": torch.ones(3, 3) for name in ("eh_proj", "embed_tokens", "enorm")}
    save_file(tensors | extra, tmp_path / "it" / "model.safetensors")
    model, _ = gptsmith.load(tmp_path / "it")
    assert capsys.readouterr().err.count("predicts further tokens (multi-token prediction). It is left out.") == 1
    logits_equal(model, hf_model)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
def test_shards_load(model_type: str, foreign: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    directory, hf_model = foreign(model_type)
    hf_model.save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    model, _ = load_model(tmp_path)
    logits_equal(model, hf_model)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_legacy_file_loads_with_a_warning(
    sharded: bool, zipped: bool, foreign: Callable[..., tuple[Path, Any]], tmp_path: Path, capsys: Any
) -> None:
    directory, hf_model = foreign("gpt2")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, tmp_path)
    tensors = dict(hf_model.state_dict())
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.bool)  # a mask of old files
    parts = {"pytorch_model.bin": tensors}
    if sharded:
        names = sorted(tensors)
        files = {f"pytorch_model-0000{i}-of-00002.bin": names[i::2] for i in (0, 1)}
        parts = {file: {name: tensors[name].clone() for name in names} for file, names in files.items()}
        weight_map = {name: file for file, names in files.items() for name in names}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, values in parts.items():
        torch.save(values, tmp_path / file, _use_new_zipfile_serialization=zipped)
    model, _ = load_model(tmp_path)
    assert "weights_only=True" in capsys.readouterr().err
    logits_equal(model, hf_model)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_as_fp32(stored: torch.dtype, llama: Path) -> None:
    weights = {name: tensor.to(stored) for name, tensor in load_file(llama / "model.safetensors").items()}
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    source = open_model(llama)
    assert source.stored_dtype() == (stored if stored != torch.float64 else torch.float32)
    model = source.model()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.embed_tokens.weight, weights["model.embed_tokens.weight"].float())


def test_the_precision_in_memory_can_be_chosen(llama: Path) -> None:
    model, _ = load_model(llama, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope_cos.dtype == torch.float32  # positions stay exact
    with torch.no_grad():
        expected = load_model(llama)[0](torch.arange(12)[None])
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(torch.arange(12)[None])
    assert torch.isfinite(actual).all()
    assert (actual.float() - expected).abs().max() < 0.15 * expected.abs().max()


@pytest.mark.parametrize("model_type", sorted(LAYOUTS))
def test_a_loaded_model_equals_one_built_directly(model_type: str, foreign: Callable[..., tuple[Path, Any]]) -> None:
    """Loading builds a meta skeleton and then allocates it. Buffers and tied weights must be as usual."""
    model = open_model(foreign(model_type)[0]).model()
    built = Transformer(read_config(foreign(model_type)[0]))
    assert all(not t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert (model.lm_head.weight is model.embed_tokens.weight) == model.config.tie_word_embeddings
    mine, others = dict(model.named_buffers()), dict(built.named_buffers())
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert all(p.requires_grad for p in model.parameters())


# Tokenizers and what goes with them ----------------------------------------------------------------------------------


def test_the_chat_template_is_found_in_either_file(llama: Path) -> None:
    assert "chat_template" not in open_model(llama).tokenizer().config()
    change(llama / "tokenizer_config.json", chat_template="A")
    assert open_model(llama).tokenizer().config()["chat_template"] == "A"
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    assert open_model(llama).tokenizer().config()["chat_template"] == "{{ messages }}"


def test_gpt2_vocabulary_files_become_a_tokenizer(llama: Path, bpe: Tokenizer, words: str) -> None:
    model = json.loads((llama / "tokenizer.json").read_text())["model"]
    (llama / "tokenizer.json").unlink()
    (llama / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"]]
    (llama / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    (llama / "added_tokens.json").write_text(json.dumps({"<|user|>": 300, "<|bot|>": 301}))
    (llama / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|user|>"}))
    loaded = open_model(llama).tokenizer()
    assert loaded.kind == "bpe"
    assert loaded.eos_id == bpe.eos_id
    assert loaded.encode(words[:500] + " <|endoftext|>é") == bpe.encode(words[:500] + " <|endoftext|>é")
    assert loaded.vocab_size == 302
    assert loaded.token_text(301) == "<|bot|>"
    assert loaded.config()["pad_token"] == "<|user|>"


def test_gpt1_vocabulary_files_become_a_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    tokens = ["<unk>", ".</w>", "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab", "abc</w>", "ab</w>"]
    (llama / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    (llama / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\na b</w>\n")
    loaded = open_model(llama).tokenizer()
    assert [loaded.token_text(id) for id in loaded.encode("ABC ab a.")] == ["abc", "ab", "a", "."]
    assert loaded.decode(loaded.encode("ABC ab.")) == "abc ab ."
    assert loaded.unk_id == 0


def test_gpt1_tokenizer_equals_transformers(llama: Path) -> None:
    from transformers import OpenAIGPTTokenizer

    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    (llama / "config.json").write_text(json.dumps({"model_type": "openai-gpt"}))
    letters = "abcdefghij"
    tokens = ["<unk>", *letters, *(f"{c}</w>" for c in letters + ".,!"), "ab", "de", "abc</w>"]
    (llama / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    (llama / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\nd e\n")
    from gptsmith.tokenizer.pretrained import read_tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_tokenizer = OpenAIGPTTokenizer.from_pretrained(llama)
    our_tokenizer = read_tokenizer(llama)
    for text in ("abc de, ab!", "Deab  ABC.\nj", "hijabc z"):
        assert our_tokenizer.encode(text) == hf_tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.model": "x"}, "SentencePiece"),
        ({}, "no tokenizer in"),
        ({"vocab.json": "{", "merges.txt": ""}, "vocab.json"),
        ({"vocab.json": "[]", "merges.txt": ""}, "not a JSON object"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "not a vocabulary"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a q\n"}, "do not match"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"x": 7}'}, "must continue from 1"),
    ],
)
def test_unusable_tokenizers_are_reported(files: dict[str, str], message: str, llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    for name, text in files.items():
        (llama / name).write_text(text)
    with pytest.raises(TokenizerError, match=message):
        load_model(llama)


# Files that are damaged or mean harm ---------------------------------------------------------------------------------


def shard_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..safetensors",
        "",
        "x.bin",
        "x.safetensors\0",
        7,
    ],
)
def test_shards_outside_the_directory_are_rejected(name: Any, llama: Path) -> None:
    (llama.parent / "secret.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    shard_index(llama, {"model.norm.weight": name})
    with pytest.raises(CheckpointError, match="not the plain name"):
        load_model(llama)


def test_missing_shards_are_listed(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    names = [f"model-{i}.safetensors" for i in range(3)]
    save_file(tensors, llama / names[1])
    shard_index(llama, {name: names[i % 3] for i, name in enumerate(tensors)})
    with pytest.raises(CheckpointError, match="lacks 2 of 3 shards: model-0.safetensors, model-2.safetensors"):
        load_model(llama)


def test_an_index_and_its_shards_must_agree(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    save_file(tensors, llama / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, llama / "b.safetensors")
    shard_index(llama, {**dict.fromkeys(tensors, "a.safetensors"), "model.surplus": "a.safetensors"})
    with pytest.raises(CheckpointError, match="shards do not contain: model.surplus"):
        load_model(llama)
    index = {"weight_map": {**dict.fromkeys(tensors, "a.safetensors"), "model.norm.weight": "b.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="in two files"):
        load_model(llama)


@pytest.mark.parametrize("contents", ["", "{", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\udcff"])
def test_a_broken_index_is_named(contents: str, llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_bytes(contents.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_model(llama)


def test_an_implausibly_large_json_file_is_rejected(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match="implausibly large"):
        load_model(llama)


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 10**12},
        {"hidden_size": 1 << 19},
        {"num_hidden_layers": 4000},
        {"num_hidden_layers": 10**9},
        {"max_position_embeddings": 10**10},
        {"intermediate_size": 1 << 21},
        {"num_attention_heads": 1 << 11, "num_key_value_heads": 1 << 11, "head_dim": 1 << 11},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": True},
        {"rms_norm_eps": float("nan")},
        {"vocab_size": -5},
        {"hidden_size": "wide"},
        {"hidden_size": 24.5},
        {"rope_theta": "x", "rope_parameters": None},
        {"head_dim": 7},
    ],
    ids=str,
)
def test_configurations_that_claim_too_much_cost_nothing(values: dict[str, Any], llama: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows does not say how much memory was used")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    change(llama / "config.json", **values)
    with pytest.raises(CheckpointError):
        load_model(llama)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_quantized_weights_are_rejected(llama: Path) -> None:
    change(llama / "config.json", quantization_config={"quant_method": "hqq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantization_config \\(hqq\\) is not supported; supported: awq, bits"):
        load_model(llama)
    change(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="says that the weights are quantized \\(gptq\\), but no tensor is"):
        load_model(llama)


def test_integer_weights_are_rejected(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(24, dtype=torch.int8)
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.norm.weight is stored as int8"):
        load_model(llama)


def test_missing_unexpected_and_misshapen_tensors_are_listed(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.surprise"] = torch.zeros(2)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model(llama)
    for part in ("model.norm.weight", "model.surprise", "down_proj.weight is [3, 3], expected [24, 40]"):
        assert part in str(error.value)


def test_a_directory_without_weights_is_reported(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        load_model(llama)


HEADERS = {
    "absurd length": struct.pack("<Q", 1 << 62) + b"{}",
    "length beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"abcd",
    "offsets beyond the file": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "offsets backwards": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
    "overflowing shape": b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
    "overlapping": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "unknown type": b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
    "negative": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "empty file": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_safetensors_headers_are_rejected(case: str, llama: Path) -> None:
    header = HEADERS[case]
    if header.startswith(b"{"):
        header = struct.pack("<Q", len(header)) + header + bytes(4)
    (llama / "model.safetensors").write_bytes(header)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        load_model(llama)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil-was-here",)


def test_a_pickle_that_runs_code_is_rejected(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama)
    (llama / "model.safetensors").unlink()
    for write in (
        lambda path: path.write_bytes(pickle.dumps({"a": Evil()})),
        lambda path: torch.save({"a": Evil()}, path),
        lambda path: torch.save({"a": 1}, path),
        lambda path: torch.save([torch.zeros(1)], path),
        lambda path: torch.save({"model.norm.weight": torch.zeros(1).expand(1 << 40)}, path),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\3\4 not really"),
    ):
        write(llama / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="pytorch_model.bin"):
            load_model(llama)
    assert not (llama / "evil-was-here").exists()


def mutate(data: bytes, places: list[tuple[float, int]], cut: float) -> bytes:
    changed = bytearray(data)
    for place, value in places:
        changed[min(int(place * len(changed)), len(changed) - 1)] = value
    return bytes(changed[: int(len(changed) * cut)])


MUTATIONS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4)
CUTS = st.one_of(st.just(1.0), st.floats(0, 1))


def survives(directory: Path) -> None:
    """Load a model or raise GptsmithError. Any other exception fails the test."""
    with contextlib.suppress(GptsmithError):
        load_model(directory)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=MUTATIONS, cut=CUTS, name=st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"]))
def test_changed_files_load_or_give_one_error(
    places: list[tuple[float, int]], cut: float, name: str, foreign: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = Path(shutil.copytree(foreign("qwen3")[0], tmp_path_factory.mktemp("fuzz") / "m"))
    data = (directory / name).read_bytes()
    (directory / name).write_bytes(mutate(data, places, cut))
    survives(directory)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=MUTATIONS)
def test_changed_headers_load_or_give_one_error(
    places: list[tuple[float, int]], foreign: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = Path(shutil.copytree(foreign("qwen3")[0], tmp_path_factory.mktemp("fuzz") / "m"))
    path = directory / "model.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(mutate(data[:end], places, 1.0) + data[end:])
    survives(directory)


CONFIG_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta"]), st.text(max_size=3), max_size=2),
)


@pytest.mark.parametrize("model_type", sorted(LAYOUTS))
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_configuration_loads_or_gives_one_error(
    data: st.DataObject, model_type: str, foreign: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, _ = foreign(model_type)
    directory = tmp_path_factory.mktemp("fuzz")
    for path in source.iterdir():
        (directory / path.name).symlink_to(path)
    values = json.loads((source / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=2, unique=True)):
        values[key] = data.draw(CONFIG_VALUES, label=key)
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(values))
    survives(directory)


# Which model is meant ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("org/name", True),
        ("Qwen/Qwen3-0.6B", True),
        ("org/name@main", True),
        ("org/name@refs/pr/1", True),
        ("hf:gpt2", True),
        ("hf:here/name", True),
        ("here/name", False),  # a folder of that name is here
        ("gpt2", False),
        ("./org/name", False),
        ("/org/name", False),
        ("../org", False),
        ("a/b/c", False),
        ("org/", False),
        ("org/na me", False),
        ("", False),
    ],
)
def test_hub_ids_are_distinguished_from_paths(
    spec: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(spec) == expected


def test_a_path_comes_before_a_name(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    llama.rename("smollm2-135m")
    assert resolve_model("smollm2-135m") == Path("smollm2-135m")
    Path("org").mkdir()
    Path("smollm2-135m").rename("org/name")
    assert resolve_model("org/name") == Path("org/name")
    with pytest.raises(CheckpointError, match=r"no model at org/nam\. Did you mean 'name'"):
        resolve_model("org/nam")
    with pytest.raises(CheckpointError, match="Did you mean 'smollm2-135m'"):
        resolve_model("smollm2")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> NamedModel:
    """A named model whose package is in the cache."""
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "cache"))
    content = b"GGUF" + bytes(range(256)) * 50
    wheel = tmp_path / "pack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pack/tiny.gguf", content)
    (tmp_path / "tiny").write_bytes(content)
    package = PackageFile("pack", "1.0", wheel.name, sha256_file(wheel), wheel.stat().st_size, "MIT")
    model = NamedModel("tiny", "", "mit", package, "pack/tiny.gguf", sha256_file(tmp_path / "tiny"), len(content))
    package.path.parent.mkdir(parents=True)
    shutil.copy(wheel, package.path)
    monkeypatch.setitem(named_models.NAMED_MODELS, "tiny", model)
    return model


def test_a_named_model_is_unpacked_once_and_repaired(named: NamedModel) -> None:
    path = resolve_model("tiny")
    assert path == named.path
    assert sha256_file(path) == named.sha256
    stamp = path.stat().st_mtime_ns
    assert resolve_model("tiny").stat().st_mtime_ns == stamp
    named.source.path.unlink()  # no longer needed
    resolve_model("tiny")
    with open(path, "r+b") as file:
        file.write(b"X")
    with pytest.raises(GptsmithError, match="could not download pack"):
        resolve_model("tiny")


def test_a_named_model_with_other_contents_is_rejected(named: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    monkeypatch.setitem(named_models.NAMED_MODELS, "tiny", dataclasses.replace(named, sha256="0" * 64))
    with pytest.raises(CheckpointError, match="not the expected file"):
        named_model_path("tiny")
    assert not named.path.exists()
    assert list(named.path.parent.iterdir()) == []


def test_unknown_names_are_reported() -> None:
    with pytest.raises(UsageError, match="Did you mean 'smollm2-135m'"):
        named_model_path("smollm2-136m")


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(foreign: Any, tmp_path: Path) -> Iterator[str]:
    """The address of a local hub with the model `org/tiny`. It counts requests for files."""
    pytest.importorskip("huggingface_hub")
    directory = tmp_path / "served"
    shutil.copytree(foreign("qwen3")[0], directory)
    (directory / "evil.py").write_text("1/0")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.safetensors").write_bytes(b"not wanted")
    commit = "a" * 40

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            files = sorted(p for p in directory.rglob("*") if p.is_file())
            if path.startswith("/api/models/org/tiny/tree/"):
                entries = [
                    {"type": "file", "path": p.relative_to(directory).as_posix(), "size": p.stat().st_size, "oid": "0"}
                    for p in files
                ]
                return self._send(json.dumps(entries).encode(), body)
            if path.startswith("/api/models/org/tiny"):
                info = {
                    "id": "org/tiny",
                    "sha": commit,
                    "siblings": [{"rfilename": p.relative_to(directory).as_posix()} for p in files],
                }
                return self._send(json.dumps(info).encode(), body)
            if path.startswith("/api/"):
                return self._send(b'{"error": "Repository not found"}', body, 404, {"X-Error-Code": "RepoNotFound"})
            name = path.split("/resolve/")[-1].split("/", 1)[-1]
            file = directory / name
            if not path.startswith("/org/tiny/resolve/") or not file.is_file():
                return self._send(b"", body, 404, {"X-Error-Code": "EntryNotFound"})
            headers = {"ETag": f'"{sha256_file(file)}"', "X-Repo-Commit": commit}
            return self._send(file.read_bytes(), body, 200, headers)

        def _send(self, data: bytes, body: bool, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def run_with_hub(endpoint: str, home: Path, *arguments: object, **environment: str) -> tuple[int, str, str]:
    """Run the command line in a new process, since huggingface_hub reads its settings at import."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    done = subprocess.run(
        [sys.executable, "-m", "gptsmith", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**kept, **settings},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_hub_model_is_downloaded_cached_and_used_offline(hub: str, tmp_path: Path, foreign: Any) -> None:
    home = tmp_path / "home"
    code, _, err = run_with_hub(hub, home, "import", "org/tiny", "--out", tmp_path / "out")
    assert code == 0, err
    logits_equal(load_model(tmp_path / "out")[0], foreign("qwen3")[1])
    names = {p.name for p in home.rglob("snapshots/*/*")}
    assert "model.safetensors" in names
    assert names.isdisjoint({"evil.py", "onnx"})  # only what is needed
    code, _, err = run_with_hub(hub, home, "import", "org/tiny", "--out", tmp_path / "two", HF_HUB_OFFLINE="1")
    assert code == 0, err
    nobody = "http://127.0.0.1:9"  # answers there: the cache is enough
    code, out, err = run_with_hub(nobody, home, "generate", "org/tiny", "--prompt", "ba", "--max-tokens", "3")
    assert code == 0, err
    assert out.startswith("ba")


def test_hub_failures_are_reported(hub: str, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    code, _, err = run_with_hub(hub, home, "import", "org/unknown", "--out", out)
    assert (code, "the hub has no model org/unknown" in err) == (1, True), err
    code, _, err = run_with_hub(hub, home, "import", "org/tiny", "--out", out, HF_HUB_OFFLINE="1")
    assert (code, "HF_HUB_OFFLINE is set" in err, "Traceback" in err) == (1, True, False), err
    code, _, err = run_with_hub("http://127.0.0.1:9", home, "import", "org/tiny", "--out", out)
    assert (code, "cannot be reached" in err, "Traceback" in err) == (1, True, False), err
    assert not out.exists()


def test_without_huggingface_hub_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'gptsmith\[hub\]'"):
        load_model("org/name")


def test_tensors_are_read_on_access(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = SafetensorsFiles.__getitem__

    def get(self: SafetensorsFiles, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(SafetensorsFiles, "__getitem__", get)
    source = open_model(llama)
    assert source.stored_dtype() == torch.float32
    assert read == []
    source.model()
    assert sorted(read) == sorted(source.tensors)


def test_a_character_model_keeps_its_tokenizer(llama: Path) -> None:
    train_char(["abc"]).save(llama)
    assert open_model(llama).tokenizer().kind == "char"


def test_loading_does_not_import_the_compiler(llama: Path) -> None:
    """Importing it takes a second, longer than reading a small model."""
    code = (
        "import sys; from gptsmith.loading import load_model; "
        f"load_model({str(llama)!r}); sys.exit('torch._dynamo.convert_frame' in sys.modules or 'sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
