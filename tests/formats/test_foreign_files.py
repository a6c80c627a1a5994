"""Model files that transformers or llama.cpp load although they are not quite as expected, and give the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

import gptsmith
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import CheckpointError, TokenizerError, UsageError
from gptsmith.export.export import export_directory, export_gguf
from gptsmith.formats.gguf_file import PlannedTensor, open_gguf, write_gguf_file
from gptsmith.formats.source import open_model
from gptsmith.loading import load_model
from gptsmith.server.app import create_app
from gptsmith.server.models import ModelRegistry, load
from gptsmith.tokenizer.ids import IdTokenizer
from tests.foreign import byte_level, change_json, greedy, write_model

RunCli = Callable[..., tuple[int, str, str]]
IDS = [5, 9, 33, 70, 12, 200, 7]


def theirs(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits
    return logits


def equal(directory: Path, expected: torch.Tensor | None = None) -> None:
    """Compare our logits with transformers', or with the expected ones."""
    with torch.no_grad():
        ours = load_model(directory)[0](torch.tensor([IDS]))
    torch.testing.assert_close(ours, theirs(directory) if expected is None else expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tied Llama, to be changed."""
    write_model(tmp_path / "llama", "llama", byte_level(), tie_word_embeddings=True)
    return tmp_path / "llama"


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    write_model(tmp_path / "gpt2", "gpt2", byte_level())
    return tmp_path / "gpt2"


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# Tied embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_head", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bin"])
def test_the_weights_decide_whether_embeddings_are_tied(
    equal_head: bool, kind: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue("llama" if kind == "bin" else kind)
    name = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    noise = 0.0 if equal_head else 0.1
    change_weights(directory, lambda w: {**w, "lm_head.weight": w[name] + noise})
    if kind == "bin":
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    equal(directory)
    assert load_model(directory)[0].config.tie_word_embeddings is equal_head


def test_an_untied_model_is_exported_untied(llama: Path, tmp_path: Path) -> None:
    change_weights(llama, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"] * 2})
    export_directory(llama, tmp_path / "out")
    export_gguf(llama, tmp_path / "out.gguf", dtype="f32")
    expected = theirs(llama)
    for place in ("out", "out.gguf"):
        equal(tmp_path / place, expected)
    equal(tmp_path / "out")


@pytest.mark.parametrize(("kind", "name"), [("llama", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")])
def test_embeddings_may_be_stored_as_the_output_matrix_alone(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(kind)
    expected = theirs(directory)
    change_weights(directory, lambda w: {("lm_head.weight" if k == name else k): v for k, v in w.items()})
    equal(directory, expected)


def test_a_model_that_is_not_tied_needs_an_output_matrix(llama: Path) -> None:
    change_json(llama / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing tensors: lm_head\.weight"):
        load_model(llama)


# Names and tensors that are not needed -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_without_the_prefix(kind: str, tied: bool, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    prefix, embeddings = ("model.", "embed_tokens") if kind == "llama" else ("transformer.", "wte")
    change_json(directory / "config.json", tie_word_embeddings=tied)
    change_weights(directory, lambda w: {**w, "lm_head.weight": w[f"{prefix}{embeddings}.weight"] * (1 if tied else 2)})
    expected = theirs(directory)
    change_weights(directory, lambda w: {name.removeprefix(prefix): tensor for name, tensor in w.items()})
    equal(directory, expected)
    equal(directory)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("prefix", [True, False])
def test_masks_are_not_read(dtype: torch.dtype, prefix: bool, gpt2: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for i in range(2):
            weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().to(dtype)
            weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return weights if prefix else {name.removeprefix("transformer."): t for name, t in weights.items()}

    change_weights(gpt2, change)
    equal(gpt2)


def test_rotary_frequencies_are_not_read(llama: Path) -> None:
    change_weights(
        llama,
        lambda w: {**w, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}},
    )
    equal(llama)


def shard(directory: Path) -> Path:
    """Write the weights of a directory in shards; return the index."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    return directory / "model.safetensors.index.json"


@pytest.mark.parametrize("file", ["first", "absent"])
def test_an_output_matrix_that_only_the_index_has(file: str, llama: Path) -> None:
    index = shard(llama)
    weight_map = json.loads(index.read_text())["weight_map"]
    place = next(iter(weight_map.values())) if file == "first" else "model-00099-of-00099.safetensors"
    change_json(index, weight_map={**weight_map, "lm_head.weight": place})
    with torch.no_grad():
        assert torch.isfinite(load_model(llama)[0](torch.tensor([IDS]))).all()
    if file == "first":
        equal(llama)
    change_json(llama / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_model(llama)


def test_byte_order_marks_in_json(llama: Path) -> None:
    expected = theirs(llama)
    shard(llama)
    for path in llama.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    equal(llama, expected)
    assert load_model(llama)[1].encode("The quick")


# More tokens than the model has --------------------------------------------------------------------------------------


@pytest.fixture
def short(tmp_path: Path) -> tuple[Path, int]:
    """A model with one row less than its tokenizer has tokens, and the text of the last token."""
    pipeline = byte_level()
    rows = max(pipeline.get_vocab().values())
    write_model(tmp_path / "short", "llama", pipeline, {"eos_token": "<|endoftext|>"}, vocab_size=rows)
    return tmp_path / "short", rows


def last_token(id: int) -> str:
    token = byte_level().id_to_token(id)
    assert token is not None
    return token.replace("Ġ", " ")


def test_one_token_more_than_rows(short: tuple[Path, int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    directory, rows = short
    model, tokenizer = load_model(directory)
    assert f"tokens from {rows} on" in capsys.readouterr().err
    assert tokenizer.vocab_size == rows
    last = last_token(rows)
    assert gptsmith.generate(model, tokenizer, "a", max_tokens=3, temperature=0) is not None
    with pytest.raises(TokenizerError, match=f"the model does not have: its ids go from 0 to {rows - 1}"):
        gptsmith.generate(model, tokenizer, last, max_tokens=3)
    with pytest.raises(UsageError, match="token id outside"):
        Engine(model).add_request([rows], SamplingParams())
    export_directory(directory, tmp_path / "out")
    assert load_model(tmp_path / "out")[1].to_json() == tokenizer.to_json()


def test_the_server_refuses_such_an_id(short: tuple[Path, int]) -> None:
    directory, rows = short
    last = last_token(rows)
    models = ModelRegistry({"m": str(directory)}, lambda spec: load(spec, device="cpu"))
    with TestClient(create_app(models), base_url="http://localhost") as client:
        for value in (last, [rows]):
            for path, field in (("completions", "prompt"), ("embeddings", "input")):
                answer = client.post(f"/v1/{path}", json={"model": "m", field: value})
                assert answer.status_code == 400, answer.text
                assert str(rows - 1) in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json={"model": "m", "prompt": "a"}).status_code == 200
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
        body = {"model": "m", "prompt": "a", "response_format": schema}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] in ('"a"', '"b"')
    models.close()


def test_an_end_token_without_a_row(short: tuple[Path, int]) -> None:
    directory, rows = short
    change_json(directory / "tokenizer_config.json", eos_token=byte_level().id_to_token(rows))
    model, tokenizer = load_model(directory)
    assert tokenizer.end_ids == ()
    assert gptsmith.generate(model, tokenizer, "a", max_tokens=3) is not None
    with pytest.raises(UsageError, match="no end-of-text token to start from"):
        gptsmith.generate(model, tokenizer, "", max_tokens=3)
    from gptsmith.train.init import load_init

    with pytest.raises(TokenizerError, match="end-of-text token"):
        load_init(str(directory))


@pytest.mark.parametrize("count", [1, 3])
def test_tokens_that_were_added_later(count: int, tmp_path: Path) -> None:
    pipeline = byte_level()
    rows = pipeline.get_vocab_size()
    pipeline.add_special_tokens([f"[PAD{i}]" for i in range(count)])
    write_model(tmp_path / "m", "llama", pipeline, {"eos_token": "<|endoftext|>"}, vocab_size=rows)
    assert load_model(tmp_path / "m")[1].vocab_size == rows
    write_model(tmp_path / "n", "llama", pipeline, {"eos_token": "<|endoftext|>"}, vocab_size=rows - 1)
    with pytest.raises(TokenizerError, match=f"has {rows + count} tokens, the model only {rows - 1}"):
        load_model(tmp_path / "n")


# Without a tokenizer -------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(llama: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    change_json(llama / "generation_config.json", eos_token_id=[3, 4])
    return llama


def test_a_model_without_a_tokenizer_is_used_through_ids(bare: Path, run_cli: RunCli) -> None:
    from transformers import AutoModelForCausalLM

    expected = greedy(AutoModelForCausalLM.from_pretrained(bare), IDS, 8)
    model, tokenizer = load_model(bare)
    (result,) = Engine(model).generate([IDS], SamplingParams(max_tokens=len(expected), temperature=0))
    assert result.completions[0].ids == expected
    text = " ".join(map(str, IDS))
    continued = "".join(f" {id}" for id in expected if id not in (3, 4))
    assert gptsmith.generate(model, tokenizer, text, max_tokens=8, temperature=0) == continued
    assert tokenizer.end_ids == (3, 4)
    code, out, err = run_cli("generate", bare, "--prompt", text, "--max-tokens", 8, "--temperature", 0)
    assert (code, out) == (0, f"{text}{continued}\n")
    assert "has no tokenizer" in err
    code, _, err = run_cli("generate", bare, "--prompt", "Once")
    assert code == 1
    assert "this model has no tokenizer: write token ids" in err


def test_ids_as_text() -> None:
    tokenizer = IdTokenizer.of(1000, [7])
    assert tokenizer.encode(" 5  17\n999 ") == [5, 17, 999]
    assert tokenizer.decode([5, 17, 999]) == " 5 17 999"
    assert "".join(map(tokenizer.stream().push, [5, 17, 999])) == " 5 17 999"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (1000, 7)
    for text in ("1000", "-1", "x", "5,17", "05"):
        with pytest.raises(TokenizerError, match="token ids from 0 to 999"):
            tokenizer.encode(text)


def test_a_model_without_a_tokenizer_can_be_exported_and_served(bare: Path, tmp_path: Path) -> None:
    export_directory(bare, tmp_path / "out")
    equal(tmp_path / "out")
    assert load_model(tmp_path / "out")[1].encode("5 17") == [5, 17]
    models = ModelRegistry({"m": str(bare)}, lambda spec: load(spec, device="cpu"))
    with TestClient(create_app(models), base_url="http://localhost") as client:
        body = {"model": "m", "prompt": IDS, "max_tokens": 4, "temperature": 0}
        by_ids = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        by_text = client.post("/v1/completions", json={**body, "prompt": "5 9 33 70 12 200 7"}).json()
        assert by_text["choices"][0]["text"] == by_ids
    models.close()


# A GGUF file in parts ------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(llama: Path, tmp_path: Path) -> list[Path]:
    """A model as llama.cpp's gguf-split writes it: metadata in the first of three parts."""
    export_gguf(llama, tmp_path / "whole.gguf", dtype="q8_0")
    whole = open_gguf(tmp_path / "whole.gguf")
    tensors = list(whole.tensors.values())
    paths = [tmp_path / f"split-{i + 1:05d}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(paths):
        metadata = dict(whole.metadata) if i == 0 else {}
        metadata |= {"split.no": i, "split.count": 3, "split.tensors.count": len(tensors)}
        planned = [PlannedTensor(t.name, t.shape, t.type, partial(whole.read, t.name)) for t in tensors[i::3]]
        with open(path, "wb") as file:
            write_gguf_file(file, metadata, planned)
    return paths


@pytest.mark.parametrize("given", [0, 1, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_any_part_of_a_gguf_file_opens_all(given: int, packed: bool, parts: list[Path]) -> None:
    whole = open_model(parts[0].with_name("whole.gguf")).model(packed=packed)
    joined = open_model(parts[given]).model(packed=packed)
    with torch.no_grad():
        assert torch.equal(joined(torch.tensor([IDS])), whole(torch.tensor([IDS])))
    assert load_model(parts[given])[1].encode("The quick") == load_model(parts[0].with_name("whole.gguf"))[1].encode(
        "The quick"
    )


def test_parts_that_do_not_belong_together_are_reported(parts: list[Path], tmp_path: Path) -> None:
    shutil.copy(parts[1], tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="one of 3 parts of a model, and was renamed"):
        load_model(tmp_path / "renamed.gguf")
    original = parts[2].read_bytes()
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match="is not part 3 of 3"):
        load_model(parts[0])
    other = open_gguf(parts[0].with_name("whole.gguf"))
    metadata = {"split.no": 2, "split.count": 3, "split.tensors.count": 9}
    name = next(iter(other.tensors))
    tensor = other.tensors[name]
    for planned, message in (
        ([PlannedTensor(name, tensor.shape, tensor.type, lambda: other.read(name))], "is in two parts"),
        ([], "tensors, but"),
    ):
        with open(parts[2], "wb") as file:
            write_gguf_file(file, metadata, planned)
        with pytest.raises(CheckpointError, match=message):
            load_model(parts[0])
    parts[2].write_bytes(original)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 parts of the model: split-00002-of-00003.gguf"):
        load_model(parts[0])
