"""Prompts, ends and sampling defaults of models from elsewhere: as transformers and llama.cpp have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.engine.grammar import choices
from gptsmith.engine.sampling import SamplingOptions, SamplingParams, model_defaults
from gptsmith.engine.text import engine_for, generate_texts, stream
from gptsmith.errors import UsageError
from gptsmith.evaluate.text import perplexity
from gptsmith.export.export import export_directory, export_gguf
from gptsmith.formats.gguf import read_gguf
from gptsmith.formats.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from gptsmith.loading import load_model
from gptsmith.server.app import create_app
from gptsmith.server.models import ModelRegistry, load
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.pretrained import read_tokenizer
from tests.foreign import byte_level, change_json, greedy, sentencepiece, write_model

SPM = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model whose tokenizer puts <s> before texts, as a directory and as transformers' model. Do not change it."""
    directory = tmp_path_factory.mktemp("llama")
    return directory, write_model(directory, "llama", sentencepiece(), SPM, bos_token_id=1, eos_token_id=2)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A chat model with the special tokens <|endoftext|> 0, <|im_start|> 1 and <|im_end|> 2, to be changed."""
    write_model(tmp_path / "qwen", "qwen2", byte_level(), {"eos_token": "<|im_end|>"})
    return tmp_path / "qwen"


@pytest.fixture
def client(llama: tuple[Path, Any]) -> Any:
    models = ModelRegistry({"m": str(llama[0])}, lambda spec: load(spec, device="cpu"))
    with TestClient(create_app(models), base_url="http://localhost") as client:
        yield client
    models.close()


# The beginning of a prompt -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["The quick brown", "Once upon\n", "naïve"])
def test_greedy_text_equals_transformers(prompt: str, llama: tuple[Path, Any]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(llama[0])
    expected = theirs.decode(greedy(llama[1], theirs(prompt).input_ids, 16), skip_special_tokens=True)
    model, tokenizer = gptsmith.load(llama[0])
    assert gptsmith.generate(model, tokenizer, prompt, max_tokens=16, temperature=0) == expected
    params = SamplingParams(max_tokens=16, temperature=0)
    assert generate_texts(engine_for(model, tokenizer, params), tokenizer, [prompt], params) == [[expected]]


def test_nothing_is_put_before_token_ids(llama: tuple[Path, Any]) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = gptsmith.load(llama[0])
    params = SamplingParams(max_tokens=16, temperature=0)
    for ids in ([7, 300, 301], [1, 7, 300]):
        made = "".join(chunk.text for chunk in stream(engine_for(model, tokenizer, params), tokenizer, ids, params))
        theirs = AutoTokenizer.from_pretrained(llama[0])
        assert made == theirs.decode(greedy(llama[1], ids, 16), skip_special_tokens=True)


def test_completions_equal_transformers(client: TestClient, llama: tuple[Path, Any]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(llama[0])
    ids = theirs("The quick brown").input_ids
    for prompt, prompt_ids in (("The quick brown", ids), (ids[1:], ids[1:]), ("<s>The quick brown", ids)):
        body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["prompt_tokens"] == len(prompt_ids)
        expected = theirs.decode(greedy(llama[1], prompt_ids, 12), skip_special_tokens=True)
        assert answer["choices"][0]["text"] == expected
    body = {"model": "m", "prompt": "The quick", "add_special_tokens": False}
    assert (
        client.post("/tokenize", json=body).json()["tokens"] == theirs("The quick", add_special_tokens=False).input_ids
    )
    del body["add_special_tokens"]
    assert client.post("/tokenize", json=body).json()["tokens"] == theirs("The quick").input_ids


def test_log_probabilities_of_a_prompt_equal_transformers(client: TestClient, llama: tuple[Path, Any]) -> None:
    from transformers import AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(llama[0])("The quick brown").input_ids])
    with torch.no_grad():
        expected = llama[1](ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    body = {"model": "m", "prompt": "The quick brown", "max_tokens": 1, "echo": True, "logprobs": 0}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"].startswith("The quick brown")
    first, *others = choice["logprobs"]["token_logprobs"][: ids.shape[1]]
    assert first is None
    assert others == pytest.approx(expected.tolist(), abs=1e-4)


def test_embeddings_equal_transformers(client: TestClient, llama: tuple[Path, Any]) -> None:
    from transformers import AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(llama[0])("The quick brown").input_ids])
    with torch.no_grad():
        mean = llama[1].model(ids).last_hidden_state[0].mean(0)
    answer = client.post("/v1/embeddings", json={"model": "m", "input": "The quick brown"}).json()
    assert answer["data"][0]["embedding"] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-4)
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]


def test_perplexity_equals_transformers(llama: tuple[Path, Any]) -> None:
    """Each window begins with <s>, as in llama.cpp."""
    model, tokenizer = gptsmith.load(llama[0])
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. Once upon a time there was a house")
    losses: list[float] = []
    for start in range(0, len(ids), 15):
        window = torch.tensor([[1, *ids[start : start + 15]]])
        with torch.no_grad():
            logprobs = llama[1](window).logits[0, :-1].log_softmax(-1)
        losses += (-logprobs.gather(1, window[0, 1:, None])[:, 0]).tolist()
    expected = torch.tensor(losses).mean().exp().item()
    assert perplexity(model, ids, window=16, prefix=tokenizer.prefix_ids) == pytest.approx(expected, rel=1e-4)


# The end of a text ---------------------------------------------------------------------------------------------------

ENDS = [
    ({}, {}, {"eos_token": "<|im_end|>"}, [2]),
    ({"eos_token_id": 0}, {}, {"eos_token": "<|im_end|>"}, [2, 0]),
    ({"eos_token_id": [0, 40]}, {}, {"eos_token": "<|im_end|>"}, [2, 0, 40]),
    ({"eos_token_id": 0}, {"eos_token_id": [2, 41]}, {}, [2, 41, 0]),
    ({}, {"eos_token_id": 2}, {}, [2]),
    ({"eos_token_id": 2}, {}, {}, [2]),
    ({"eos_token_id": 2}, {}, {"eos_token": {"content": "<|endoftext|>"}}, [0, 2]),
    ({"eos_token_id": None}, {"eos_token_id": None}, {}, [0]),
    ({"eos_token_id": 100_000}, {}, {"eos_token": "<|im_end|>"}, [2]),
]


@pytest.mark.parametrize(("config", "generation", "tokenizer", "expected"), ENDS)
def test_ends_are_the_union_of_all_files(
    config: dict[str, Any], generation: dict[str, Any], tokenizer: dict[str, Any], expected: list[int], qwen: Path
) -> None:
    (qwen / "generation_config.json").unlink()
    change_json(qwen / "config.json", **{"eos_token_id": ..., **config})
    change_json(qwen / "tokenizer_config.json", **{"eos_token": ..., **tokenizer})
    if generation:
        change_json(qwen / "generation_config.json", **generation)
    model, loaded = load_model(qwen)
    assert list(loaded.end_ids) == expected
    assert loaded.eos_id == expected[0]
    for id in expected:
        params = SamplingParams(max_tokens=5, temperature=0, logit_bias={id: 1000.0})
        engine = engine_for(model, loaded, params)
        chunks = list(stream(engine, loaded, "The quick", params))
        assert chunks[-1].finish_reason == "stop"
        assert "".join(chunk.text for chunk in chunks) == ""
        assert engine.stats.generated_tokens == 1


def test_texts_end_where_those_of_transformers_end(qwen: Path) -> None:
    from transformers import AutoModelForCausalLM

    for token in range(3, 60):  # make an ordinary token an end, so that greedy texts reach it
        change_json(qwen / "generation_config.json", eos_token_id=[2, token, token + 60])
        theirs = AutoModelForCausalLM.from_pretrained(qwen)
        model, tokenizer = load_model(qwen)
        ids = tokenizer.encode("The quick brown")
        expected = greedy(theirs, ids, 30)
        engine = engine_for(model, tokenizer, SamplingParams())
        text = "".join(c.text for c in stream(engine, tokenizer, ids, SamplingParams(max_tokens=30, temperature=0)))
        assert engine.stats.generated_tokens == len(expected)
        ended = expected[-1] in (2, token, token + 60)
        assert text == tokenizer.decode(expected[:-1] if ended else expected)
        if ended and len(expected) > 1:
            return
    pytest.fail("no text reached an end: choose other weights")


def test_ends_can_be_ignored(qwen: Path, run_cli: RunCli) -> None:
    change_json(qwen / "generation_config.json", eos_token_id=[2, 0])
    model, tokenizer = load_model(qwen)
    bias = {0: 1000.0}
    assert gptsmith.generate(model, tokenizer, "The", max_tokens=4, logit_bias=bias) == ""
    engine = engine_for(model, tokenizer, SamplingParams())
    params = SamplingParams(max_tokens=4, logit_bias=bias, ignore_eos=True)
    chunks = list(stream(engine, tokenizer, "The", params))
    assert (chunks[-1].finish_reason, engine.stats.generated_tokens) == ("length", 4)
    assert "".join(chunk.text for chunk in chunks) == ""  # special tokens are not text
    code, _, _ = run_cli("generate", qwen, "--prompt", "The", "--ignore-eos", "--max-tokens", 3)
    assert code == 0


def test_structured_output_may_stop_at_any_end(qwen: Path) -> None:
    change_json(qwen / "generation_config.json", eos_token_id=[2, 0])
    model, tokenizer = load_model(qwen)
    constraint = choices(tokenizer, ["the", "then"])
    for end in (0, 2):
        params = SamplingParams(max_tokens=9, temperature=0, constraint=constraint, logit_bias={end: 1000.0})
        chunks = list(stream(engine_for(model, tokenizer, params), tokenizer, "x", params))
        assert "".join(chunk.text for chunk in chunks) == "the"
        assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("ends", [[2, 0], [2, 0, 40], [2, 40, 41]])
def test_ends_survive_saving_and_exporting(ends: list[int], qwen: Path, tmp_path: Path) -> None:
    change_json(qwen / "config.json", eos_token_id=2)
    change_json(qwen / "generation_config.json", eos_token_id=ends, temperature=0.6, top_k=20, do_sample=True)
    model, tokenizer = load_model(qwen)
    save_checkpoint(tmp_path / "saved", model, tokenizer)
    export_directory(qwen, tmp_path / "exported")
    export_directory(tmp_path / "saved", tmp_path / "again")
    for place in ("saved", "exported", "again"):
        values = json.loads((tmp_path / place / "generation_config.json").read_text())
        assert values["eos_token_id"] == ends
        assert (values["temperature"], values["top_k"]) == (0.6, 20)
        assert list(load_model(tmp_path / place)[1].end_ids) == ends
    export_gguf(qwen, tmp_path / "model.gguf", dtype="f32")
    from_gguf, its_tokenizer = load_model(tmp_path / "model.gguf")
    assert set(its_tokenizer.end_ids) == set(ends) | {0}  # llama.cpp ends at <|endoftext|>, whatever the file says
    assert its_tokenizer.eos_id == 2
    assert model_defaults(from_gguf.generation_config).options == {"temperature": 0.6, "top_k": 20}
    export_directory(tmp_path / "model.gguf", tmp_path / "back")
    assert set(load_model(tmp_path / "back")[1].end_ids) == set(ends) | {0}
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["temperature"] == 0.6


def test_ends_survive_a_tokenizer_saved_on_its_own(qwen: Path, tmp_path: Path) -> None:
    change_json(qwen / "generation_config.json", eos_token_id=[2, 0, 40])
    read_tokenizer(qwen).save(tmp_path)
    assert Tokenizer.load(tmp_path).end_ids == (2, 0, 40)


def test_ends_of_a_gguf_file() -> None:
    metadata = tokenizer_to_gguf(Tokenizer(byte_level().to_str(), {"eos_token": "<|im_start|>"}), 400)
    metadata |= {"tokenizer.ggml.eot_token_id": 50, "tokenizer.ggml.eom_token_id": 51}
    tokenizer = tokenizer_from_gguf(metadata, "x.gguf")
    assert tokenizer.end_ids[0] == 1
    assert set(tokenizer.end_ids) == {1, 50, 51, 0, 2}  # 0 and 2 by their names, as in llama.cpp


# Sampling defaults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}),
        ({"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "typical_p": 1.0}, {}),
        (
            {"top_k": 1, "repetition_penalty": 1.1, "min_p": 0.05},
            {"top_k": 1, "repetition_penalty": 1.1, "min_p": 0.05},
        ),
        (
            {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2},
            {"temperature": 0, "repetition_penalty": 1.2},
        ),
        ({"temperature": None, "eos_token_id": [1]}, {}),
    ],
)
def test_sampling_options_of_a_model(values: dict[str, Any], expected: dict[str, Any]) -> None:
    assert model_defaults(values).options == expected


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": "0.9"}, {"top_k": 2.5}, {"top_p": float("nan")}])
def test_invalid_sampling_options_are_reported(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"generation_config.json has {next(iter(values))}"):
        model_defaults(values)


@given(
    st.dictionaries(
        st.sampled_from(["num_beams", "no_repeat_ngram_size", "penalty_alpha", "bad_words_ids", "forced_eos_token_id"]),
        st.sampled_from([2, 0.6, [[3]]]),
    )
)
def test_options_that_are_not_supported_are_named(values: dict[str, Any]) -> None:
    text = model_defaults(values).describe(SamplingOptions())
    assert (text is None) == (not values)
    assert all(f"{name} {value}" in (text or "") for name, value in values.items())


def test_a_model_of_ours_needs_no_note() -> None:
    assert (
        model_defaults({"do_sample": True, "temperature": 0.8, "eos_token_id": 0}).describe(SamplingOptions()) is None
    )


def test_generate_uses_them_unless_told_otherwise(qwen: Path, run_cli: RunCli) -> None:
    change_json(qwen / "generation_config.json", do_sample=True, temperature=0.3, top_k=3, num_beams=4)
    model, tokenizer = load_model(qwen)

    def text(**options: Any) -> str:
        return gptsmith.generate(model, tokenizer, "The", max_tokens=12, seed=4, **options)

    def command(*options: object) -> tuple[str, str]:
        code, out, err = run_cli("generate", qwen, "--prompt", "The", "--max-tokens", 12, "--seed", 4, *options)
        assert code == 0
        return out.removesuffix("\n"), err

    out, err = command()
    assert out == "The" + text() == "The" + text(temperature=0.3, top_k=3)
    assert "temperature 0.3, top_k 3" in err
    assert "not supported: num_beams 4" in err
    out, err = command("--temperature", 1.5)
    assert out == "The" + text(temperature=1.5) == "The" + text(temperature=1.5, top_k=3)
    assert out != "The" + text(temperature=1.5, top_k=None)
    assert "model's own sampling options: top_k 3" in err


def test_chat_uses_them_unless_told_otherwise(qwen: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    change_json(qwen / "generation_config.json", do_sample=False, repetition_penalty=1.3)

    def answer(*options: object) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("The quick\n"))
        code, out, err = run_cli("chat", qwen, "--max-tokens", 12, *options)
        assert code == 0
        return out, err

    out, err = answer()
    assert out == answer("--temperature", 0, "--repetition-penalty", 1.3)[0]
    assert out == answer()[0]  # greedy
    assert "repetition_penalty 1.3, temperature 0.0" in err
    assert answer("--repetition-penalty", 1.0)[0] != out


def test_the_server_uses_them_unless_told_otherwise(qwen: Path) -> None:
    change_json(qwen / "generation_config.json", do_sample=True, temperature=0.3, top_k=3)
    models = ModelRegistry({"m": str(qwen)}, lambda spec: load(spec, device="cpu"))
    with TestClient(create_app(models), base_url="http://localhost") as client:

        def text(**options: Any) -> str:
            body = {"model": "m", "prompt": "The", "max_tokens": 12, "seed": 4, **options}
            made: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            return made

        assert text() == text(temperature=0.3, top_k=3) != text(temperature=1.0)
        assert text(temperature=1.0) == text(temperature=1.0, top_k=3) != text(temperature=1.0, top_k=400)
        assert text(beams=2) == text(beams=2, temperature=0)
    models.close()


def test_gguf_files_keep_their_sampling_options(qwen: Path, tmp_path: Path) -> None:
    change_json(qwen / "generation_config.json", temperature=0.6, top_p=0.95, min_p=0.05, repetition_penalty=1.1)
    export_gguf(qwen, tmp_path / "model.gguf", dtype="f32")
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert metadata["general.sampling.temp"] == pytest.approx(0.6)
    expected = {"temperature": 0.6, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    assert model_defaults(load_model(tmp_path / "model.gguf")[0].generation_config).options == expected
