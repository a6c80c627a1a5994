"""A live server in this process over small random models, and separate engines of the same models as references."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import uvicorn
from safetensors.torch import save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as Pipeline

from gptsmith.data.image_processor import ImageProcessor
from gptsmith.data.images import DecodedImage
from gptsmith.engine.async_engine import AsyncEngine
from gptsmith.engine.engine import Engine
from gptsmith.engine.prompt import prompt_image, with_images
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.text import generate_texts
from gptsmith.formats.hf import weight_mappings, weights_to_hf
from gptsmith.model.config import VisionConfig
from gptsmith.model.transformer import Transformer
from gptsmith.server.app import create_app
from gptsmith.server.models import LoadedModel, ModelRegistry
from gptsmith.server.runner import listen
from gptsmith.server.service import Settings
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from gptsmith.tokenizer.chat import ChatTemplate
from tests.factories import tiny_config, tiny_model

CONTEXT = 512

TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\nTools:' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" %}{{ '<|im_start|>assistant' }}
{%- if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def make_tokenizer(*, image_token: bool = False) -> Tokenizer:
    """Return a byte-level tokenizer whose chat template supports tools. As in Qwen, calls start with a
    token that is not special. image_token: it has a token that stands for a picture."""
    words = '{"name": "arguments": "city": "Rome"} true false the cat sat on a mat. Tools: system user assistant \n' * 3
    pipeline = Pipeline.from_str(train_bpe([words], 320).to_json())
    pipeline.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    if image_token:
        pipeline.add_special_tokens([AddedToken("<image>", special=True)])
    pipeline.add_tokens([AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>")])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    return Tokenizer(pipeline.to_str(), config)


def make_model(tokenizer: Tokenizer, seed: int = 1) -> Transformer:
    return tiny_model(
        "llama", seed=seed, vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, initializer_range=0.2
    )


VISION = VisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=6
)


def make_seer(tokenizer: Tokenizer) -> Transformer:
    """Return a model that reads pictures, with 16 tokens for each."""
    config, id = make_model(tokenizer).config, tokenizer.added_tokens()["<image>"]
    torch.manual_seed(4)
    return Transformer(dataclasses.replace(config, vision=VISION, image_token_id=id)).eval()


COLORS = {"red": (220, 40, 30), "green": (40, 180, 60), "blue": (40, 60, 220)}


@functools.cache
def trained_seer(tokenizer: Tokenizer) -> Transformer:
    """Return a model that answers the question "What is this?" about a picture with the name of its color."""
    torch.manual_seed(0)
    config = tiny_config(
        "llama", vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, hidden_size=32, initializer_range=0.1
    )
    model = Transformer(dataclasses.replace(config, vision=VISION, image_token_id=tokenizer.added_tokens()["<image>"]))
    template, processor = ChatTemplate(tokenizer), ImageProcessor.of(VISION)
    asked: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    conversations = {name: [asked, {"role": "assistant", "content": name}] for name in COLORS}
    rows = {name: template.encode(said, return_mask=True) for name, said in conversations.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        loss = torch.zeros(())
        for name, color in COLORS.items():
            noise = np.random.default_rng(step).integers(-30, 31, (24, 24, 3)) + np.array(color)
            picture = prompt_image(DecodedImage(noise.clip(0, 255).astype(np.uint8)), processor)
            ids, mask = rows[name]
            tokens = torch.tensor([with_images(ids, [picture], tokenizer.added_tokens()["<image>"]).ids])
            answer = len(mask) - mask.index(True)  # tokens of the answer, and what follows it
            logits = model(tokens, pixels=picture.pixels[None])[0, -answer - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, tokens[0, -answer:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def write_adapter(directory: Path, model: Transformer, rank: int = 2) -> None:
    """Write a random LoRA adapter in PEFT's format, large enough to change the generated text."""
    torch.manual_seed(5)
    tensors = {}
    for mapping in weight_mappings(model.config):
        if "q_proj.weight" in mapping.local or "v_proj.weight" in mapping.local:
            for name in mapping.hf:
                rows, columns = weights_to_hf(model)[name].shape
                base = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{base}.lora_A.weight"] = torch.randn(rank, columns)
                tensors[f"{base}.lora_B.weight"] = torch.randn(rows, rank)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")


class Live:
    """A server on a loopback port, in a thread. port: 0 picks a free one. reference: separate engines of the same
    models. more: further models by name, each with its tokenizer and what makes it."""

    def __init__(
        self,
        settings: Settings | None = None,
        adapter: Path | None = None,
        *,
        port: int = 0,
        more: Mapping[str, tuple[Tokenizer, Callable[[Tokenizer], Transformer]]] | None = None,
        **engine: Any,
    ) -> None:
        self.loads: list[str] = []
        self._more = dict(more or {})
        self._engine = {"max_batch": 16, "block_size": 8} | engine
        self.tokenizers = {"tiny": make_tokenizer(), "plain": train_char(["abcdefghijklmnopqrstuvwxyzUA: .\n"])}
        adapters = {} if adapter is None else {"tuned": ("tiny", adapter)}
        self.tokenizers |= {name: tokenizer for name, (tokenizer, _) in self._more.items()}
        names = {name: name for name in self.tokenizers}
        self.models = ModelRegistry(names, self._load, aliases={"gpt-4": "tiny"}, adapters=adapters)
        self.app = create_app(self.models, settings)
        self.listening = listen("127.0.0.1", port)
        self.port: int = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, ws="none"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.listening]})
        self.reference = {name: self._make_engine(name) for name in names}
        if adapter is not None:
            self.reference["tiny"].add_adapter("tuned", adapter)

    def _make_engine(self, name: str) -> Engine:
        tokenizer = self.tokenizers[name]
        model = self._more[name][1](tokenizer) if name in self._more else make_model(tokenizer)
        return Engine(model, vocab_size=tokenizer.vocab_size, **self._engine)

    def _load(self, spec: str) -> LoadedModel:
        self.loads.append(spec)
        engine, tokenizer = self._make_engine(spec), self.tokenizers[spec]
        return LoadedModel(AsyncEngine(engine), tokenizer, engine.model, ChatTemplate(tokenizer))

    def start(self) -> Live:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        for loaded in self.models.loaded().values():
            assert loaded.engine.stats.blocks_used == 0

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    # what the engine generates, without a server

    def texts(self, prompt: str, model: str = "tiny", **params: Any) -> list[str]:
        (texts,) = generate_texts(
            self.reference[model], self.tokenizers[model], [prompt], SamplingParams(**({"temperature": 1.0} | params))
        )
        return texts

    def answers(self, messages: list[Any], **params: Any) -> list[str]:
        """Return the reference answers of the model `tiny` to a conversation."""
        tokenizer = self.tokenizers["tiny"]
        assert tokenizer.eos_id is not None
        ids = ChatTemplate(tokenizer).encode(messages)
        chosen = SamplingParams(**{"temperature": 1.0, "max_tokens": CONTEXT - len(ids), **params})
        (result,) = self.reference["tiny"].generate(
            [ids], SamplingParams(**{**vars(chosen), "stop_ids": (tokenizer.eos_id,)})
        )
        return [tokenizer.decode(c.ids) for c in result.completions]

    def settled(self, condition: Callable[[], bool], seconds: float = 20.0) -> bool:
        """Wait until `condition` is true, and return whether it became so in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with default settings and an adapter, for a whole module."""
    adapter = tmp_path_factory.mktemp("adapters") / "tuned"
    write_adapter(adapter, make_model(make_tokenizer()))
    server = Live(adapter=adapter).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client() as client:
        yield client


@pytest.fixture
def start() -> Iterator[Callable[..., Live]]:
    """Start servers with given settings, for one test."""
    servers: list[Live] = []

    def start_server(settings: Settings, **options: Any) -> Live:
        servers.append(Live(settings, **options).start())
        return servers[-1]

    yield start_server
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def live_with_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Path]]:
    """A server for a whole module, and the directory of runs that its page shows."""
    runs = tmp_path_factory.mktemp("site") / "runs"
    runs.mkdir()
    server = Live(Settings(runs=runs)).start()
    yield server, runs
    server.stop()
