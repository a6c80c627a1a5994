"""Adapters that were trained here, served beside the model that they belong to."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import gptsmith
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import CheckpointError
from gptsmith.server.app import create_app
from gptsmith.server.models import ModelRegistry, load
from gptsmith.tokenizer.chat import ChatTemplate
from tests.factories import tiny_run_config
from tests.foreign import byte_level, change_json, write_model

ANSWER = "ANSWER: {% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


def rows(count: int = 12) -> list[dict[str, Any]]:
    pairs = [("The quick brown?", "A fox."), ("The lazy?", "A dog.")]
    return [
        {"messages": [{"role": "user", "content": pairs[i % 2][0]}, {"role": "assistant", "content": pairs[i % 2][1]}]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the tokens of ChatML and one without, and a run of each that trained an adapter."""
    place = tmp_path_factory.mktemp("adapters")
    sizes = {"hidden_size": 64, "max_position_embeddings": 256}
    write_model(place / "chatml", "qwen2", byte_level(), {"eos_token": "<|endoftext|>"}, eos_token_id=0, **sizes)
    text = (string.printable.replace("\r", "") + "\n") * 60
    (place / "text.txt").write_text(text)
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, rows())))
    model = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    quiet: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "compile": "off"}
    gptsmith.fit(place / "text.txt", tiny_run_config(steps=4, context=256, model=model), out=place / "characters")
    for name in ("chatml", "characters"):
        data, out = place / "chats.jsonl", place / f"{name}-run"
        gptsmith.fit(data, objective="sft", init=place / name, out=out, lora={"rank": 4}, steps=20, **quiet)
    return place


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[TestClient]:
    models = {name: str(place / name) for name in ("chatml", "characters")}
    adapters = {f"{name}-tuned": (name, place / f"{name}-run") for name in models}
    registry = ModelRegistry(models, lambda spec, adapter=None: load(spec, adapter, device="cpu"), adapters=adapters)
    with TestClient(create_app(registry), base_url="http://localhost") as client:
        yield client
    registry.close()


@pytest.mark.parametrize("name", ["chatml", "characters"])
def test_a_run_is_served_with_its_own_template_and_ends(name: str, place: Path, client: TestClient) -> None:
    model, tokenizer = gptsmith.load(place / f"{name}-run")
    template = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "The lazy?"}]
    ids = template.encode(messages)
    body = {"model": f"{name}-tuned", "messages": messages}
    assert client.post("/tokenize", json=body).json()["tokens"] == ids
    params = SamplingParams(max_tokens=12, temperature=0.0, stop_ids=(*tokenizer.end_ids, *template.end_ids()))
    (expected,) = Engine(model, vocab_size=tokenizer.vocab_size).generate([ids], params)
    answer = client.post("/v1/chat/completions", json={**body, "max_tokens": 12, "temperature": 0}).json()["choices"][0]
    assert answer["message"]["content"] == tokenizer.decode(expected.ids)
    assert answer["finish_reason"] == expected.completions[0].finish_reason
    plain = client.post("/v1/chat/completions", json={**body, "model": name, "max_tokens": 12, "temperature": 0})
    assert plain.json()["choices"][0]["message"]["content"] != answer["message"]["content"]
    assert client.get(f"/api/models/{name}-tuned").json()["chat"]
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert cards[f"{name}-tuned"]["parent"] == name
    assert cards[f"{name}-tuned"]["loaded"]


def test_adapters_share_an_engine_unless_they_have_tokens_of_their_own(client: TestClient) -> None:
    for name in ("chatml", "characters"):
        client.post("/tokenize", json={"model": name, "prompt": "a"})
    models: ModelRegistry = client.app.state.models  # type: ignore[attr-defined]
    assert list(models.loaded()) == ["chatml", "characters", "characters-tuned"]
    answer = client.post("/v1/completions", json={"model": "characters-tuned", "prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """A copy of the adapter for `chatml`, in PEFT's layout, to be changed."""
    shutil.copytree((place / "chatml-run" / "best").resolve(), tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    return tmp_path / "copy"


def loaded_with(base: Path, adapter: Path) -> None:
    registry = ModelRegistry(
        {"m": str(base)}, lambda spec, path=None: load(spec, path, device="cpu"), adapters={"x": ("m", adapter)}
    )
    try:
        registry.load("m")
    finally:
        registry.close()


def test_an_adapter_for_another_model_is_named(place: Path, copied: Path, tmp_path: Path) -> None:
    loaded_with(place / "chatml", copied)
    with pytest.raises(CheckpointError, match="adapter x: .* is for another model"):
        loaded_with(place / "characters", copied)
    with pytest.raises(CheckpointError, match="adapter x: .* is a whole model, not an adapter"):
        loaded_with(place / "chatml", place / "characters")
    changed = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    one, other = (token for token, id in vocabulary.items() if id in (50, 51))
    vocabulary |= {one: vocabulary[other], other: vocabulary[one]}
    (copied / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="adapter x: it belongs to another model: its token 50 is"):
        loaded_with(place / "chatml", copied)


def test_an_adapter_with_tokens_that_the_model_lacks(place: Path, copied: Path) -> None:
    changed = json.loads((copied / "tokenizer.json").read_text())
    last = max(changed["model"]["vocab"].values(), default=0)
    new = max(last, *(token["id"] for token in changed["added_tokens"])) + 1
    changed["added_tokens"].append({**changed["added_tokens"][0], "id": new, "content": "<|turn|>"})
    (copied / "tokenizer.json").write_text(json.dumps(changed))
    change_json(copied / "tokenizer_config.json", chat_template=ANSWER.replace("im_start", "turn"))
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"its chat template writes '<\|turn\|>', a token that the model lacks"):
        loaded_with(place / "chatml", copied)


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
def test_files_are_checked_at_the_start(
    missing: str, place: Path, copied: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    (copied / missing).unlink()
    code, _, err = run_cli("serve", place / "chatml", "--adapter", f"x={copied}", "--port", 0)
    assert code == 2
    assert "--adapter" in err
    assert missing.removesuffix(".json") in err or "neither a model directory" in err
    code, _, err = run_cli("serve", place / "chatml", "--adapter", f"x={place / 'characters'}", "--port", 0)
    assert (code, "is a whole model, not an adapter" in err) == (2, True)
