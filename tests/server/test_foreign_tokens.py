"""Log-probabilities of a model with a SentencePiece tokenizer: bytes, tokens and offsets belong to the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from gptsmith.server.app import create_app
from gptsmith.server.models import ModelRegistry, load
from tests.foreign import sentencepiece, unigram, write_model


@pytest.fixture(scope="module", params=["sentencepiece", "unigram"])
def http(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    directory = tmp_path_factory.mktemp("model")
    pipeline = sentencepiece() if request.param == "sentencepiece" else unigram()
    write_model(directory, "llama", pipeline, {"eos_token": "</s>"})
    models = ModelRegistry({"model": str(directory)}, lambda spec: load(spec, device="cpu"))
    with TestClient(create_app(models), base_url="http://127.0.0.1") as client:
        yield client
    models.close()


def post(http: TestClient, path: str, **body: Any) -> dict[str, Any]:
    made = http.post(path, json={"model": "model", "temperature": 1, "ignore_eos": True, **body})
    assert made.status_code == 200, made.text
    choice: dict[str, Any] = made.json()["choices"][0]
    return choice


@pytest.mark.parametrize("seed", range(6))
def test_bytes_of_an_answer(http: TestClient, seed: int) -> None:
    question = [{"role": "user", "content": "the house"}]
    options: dict[str, Any] = {"messages": question, "max_tokens": 20, "logprobs": True, "top_logprobs": 3}
    choice = post(http, "/v1/chat/completions", **options, seed=seed)
    tokens = choice["logprobs"]["content"]
    joined, text = bytes(byte for token in tokens for byte in token["bytes"]), choice["message"]["content"]
    if "\ufffd" not in text:
        assert joined.decode().lstrip() == text.lstrip()
    for token in tokens:
        assert "▁" not in token["token"]
        assert not token["token"].startswith("<0x")
        assert {"token": token["token"], "bytes": token["bytes"]} in [
            {"token": each["token"], "bytes": each["bytes"]} for each in token["top_logprobs"]
        ] or token["logprob"] <= min(each["logprob"] for each in token["top_logprobs"])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("echo", [False, True])
def test_offsets_of_a_completion(http: TestClient, seed: int, echo: bool) -> None:
    prompt = "the house"
    choice = post(http, "/v1/completions", prompt=prompt, max_tokens=20, logprobs=2, seed=seed, echo=echo)
    text, logprobs = choice["text"], choice["logprobs"]
    if echo:
        assert text.startswith(prompt)
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    for token, start, end in zip(logprobs["tokens"], offsets, [*offsets[1:], len(text)], strict=True):
        if "\\x" not in token and "\ufffd" not in text and token not in ("<unk>", "</s>", "<pad>", "<s>"):
            assert text[start:end] == token


def test_a_completion_continues_its_prompt(http: TestClient) -> None:
    loaded = http.post("/v1/completions", json={"model": "model", "prompt": "the house", "max_tokens": 8, "seed": 2})
    text = loaded.json()["choices"][0]["text"]
    echoed = http.post(
        "/v1/completions", json={"model": "model", "prompt": "the house", "max_tokens": 8, "seed": 2, "echo": True}
    )
    assert echoed.json()["choices"][0]["text"] == "the house" + text
