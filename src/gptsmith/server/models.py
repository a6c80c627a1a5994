"""The models a server offers, by name, with aliases and LoRA adapters. A model is loaded when it is first requested.

models = ModelRegistry(["runs/bard", "smollm2-135m"], load, aliases={"gpt-4": "bard"})
served = await models.get("gpt-4")    # a ServedModel: engine, tokenizer, model, template, adapter
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gptsmith.engine.sampling import ModelDefaults, SamplingOptions, model_defaults
from gptsmith.errors import GptsmithError, UsageError, nearest
from gptsmith.server.access_log import logger
from gptsmith.server.errors import ApiError

if TYPE_CHECKING:
    from gptsmith.engine.async_engine import AsyncEngine
    from gptsmith.loading import Quantization
    from gptsmith.model.transformer import Transformer
    from gptsmith.tokenizer import Tokenizer
    from gptsmith.tokenizer.chat import ChatTemplate


SERVER_SAMPLING = SamplingOptions(temperature=1.0)
"""OpenAI's default, where the model has none of its own."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with its engine, tokenizer and chat template."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    model: Transformer
    template: ChatTemplate

    @property
    def context(self) -> int:
        return self.model.config.max_position_embeddings

    @functools.cached_property
    def defaults(self) -> ModelDefaults:
        """The sampling options that the model came with. Raise UsageError for invalid ones."""
        return model_defaults(self.model.generation_config)


@dataclass(frozen=True)
class ServedModel:
    """A model as a request addresses it. name: the requested name. base: the name of the base model. adapter: the name
    of the LoRA adapter to pass to the engine, or None."""

    name: str
    base: str
    adapter: str | None
    loaded: LoadedModel

    @property
    def engine(self) -> AsyncEngine:
        return self.loaded.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def model(self) -> Transformer:
        return self.loaded.model

    @property
    def template(self) -> ChatTemplate:
        return self.loaded.template


Load = Callable[[str], LoadedModel]


@dataclass
class _Entry:
    spec: str
    created: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: LoadedModel | None = None


class ModelRegistry:
    """The models of a server. Raise UsageError for names that clash or refer to no model.

    specs: models as `gptsmith.load` takes them, or a mapping from names to such. load: loads one of them; called in a
    thread, once per model. aliases: other names of models. adapters: name -> (model, directory).
    """

    def __init__(
        self,
        specs: Sequence[str] | Mapping[str, str],
        load: Load,
        *,
        aliases: Mapping[str, str] | None = None,
        adapters: Mapping[str, tuple[str, Path]] | None = None,
    ) -> None:
        named = list(specs.items()) if isinstance(specs, Mapping) else [(default_name(spec), spec) for spec in specs]
        self._load = load
        self._entries: dict[str, _Entry] = {}
        self._aliases: dict[str, str] = {}
        self._adapters: dict[str, tuple[str, Path]] = {}
        by_spec = {}
        for name, spec in named:
            self._reserve(name)
            self._entries[name] = _Entry(spec, int(time.time()))
            by_spec[spec] = name
        if not self._entries:
            raise UsageError("no model to serve; name at least one.")
        for name, target in (aliases or {}).items():
            self._reserve(name)
            self._aliases[name] = by_spec.get(target, target)
        for name, (base, directory) in (adapters or {}).items():
            self._reserve(name)
            base = by_spec.get(base, base)
            if base not in self._entries:
                raise UsageError(f"adapter {name}: its model {base} is not served.{nearest(base, self._entries)}")
            self._adapters[name] = (base, Path(directory))
        for name, target in self._aliases.items():
            if target not in self._entries and target not in self._adapters:
                available = [*self._entries, *self._adapters]
                raise UsageError(f"alias {name}: its model {target} is not served.{nearest(target, available)}")

    def _reserve(self, name: str) -> None:
        if name in self:
            raise UsageError(f"two models are named {name!r}; give one of them another name with NAME=MODEL.")

    @property
    def base_models(self) -> list[str]:
        """Names of the models, without adapters and aliases."""
        return list(self._entries)

    @property
    def names(self) -> list[str]:
        """All names that requests can use: models in the given order, then adapters, then aliases."""
        return [*self._entries, *self._adapters, *self._aliases]

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._adapters or name in self._aliases

    async def get(self, name: str) -> ServedModel:
        """Return the model with this name, loading it if needed. Raise ApiError: 404 if there is none, 500 if it cannot
        be loaded."""
        target = self._aliases.get(name, name)
        base, directory = self._adapters.get(target, (target, None))
        entry = self._entries.get(base)
        if entry is None:
            shown = name if len(name) <= 100 else name[:100] + "..."
            raise ApiError(
                404,
                f"The model {shown!r} does not exist.{nearest(name[:100], self.names)} /v1/models lists the models.",
                param="model",
                code="model_not_found",
            )
        loaded = entry.loaded
        if loaded is None:
            try:
                loaded = await asyncio.to_thread(self.load, base)
            except GptsmithError as error:
                message = f"The model {base} cannot be loaded: {error}"
                raise ApiError(500, message, code="model_not_loaded") from error
        return ServedModel(name, base, None if directory is None else target, loaded)

    def load(self, name: str) -> LoadedModel:
        """Return the model `name` with its adapters, loading it if needed. Raise what loading raises."""
        entry = self._entries[name]
        with entry.lock:
            if entry.loaded is None:
                loaded = self._load(entry.spec)
                try:
                    defaults = loaded.defaults.describe(SERVER_SAMPLING)
                    for adapter, (base, directory) in self._adapters.items():
                        if base == name:
                            loaded.engine.add_adapter(adapter, directory)
                except GptsmithError:
                    loaded.engine.close(drain=False)
                    raise
                entry.loaded = loaded
                logger.info("model loaded", extra={"fields": {"model": name, "defaults": defaults}})
            return entry.loaded

    def cards(self) -> Iterator[tuple[str, int, LoadedModel | None, str | None]]:
        """Yield, for each name: the name, its creation time (Unix), the model if it is loaded, and what the name stands
        for if it is an alias or an adapter."""
        for name in self.names:
            target = self._aliases.get(name, name)
            base, _ = self._adapters.get(target, (target, None))
            entry = self._entries[base]
            parent = self._aliases.get(name) or (base if name in self._adapters else None)
            yield name, entry.created, entry.loaded, parent

    def loaded(self) -> dict[str, LoadedModel]:
        """Return the models in memory, by name."""
        return {name: entry.loaded for name, entry in self._entries.items() if entry.loaded is not None}

    def close(self, *, drain: bool = True) -> None:
        """Stop all engines, after they finish their requests (drain) or immediately."""
        for loaded in self.loaded().values():
            loaded.engine.close(drain=drain)


def default_name(spec: str) -> str:
    """Return the name of a model that has none: the last part of its path, or the spec itself if it is not a path."""
    path = Path(spec).expanduser()
    if path.exists():
        return path.absolute().stem if path.is_file() else path.absolute().name
    return spec


def load(
    spec: str,
    *,
    device: str = "auto",
    quantize: Quantization = "auto",
    max_batch: int = 32,
    cache_tokens: int | None = None,
    speculate: bool = False,
) -> LoadedModel:
    """Load a model with `gptsmith.load` and start its engine. speculate: draft tokens by prompt lookup."""
    from gptsmith.engine.async_engine import AsyncEngine
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.speculative import PromptLookup, Speculator
    from gptsmith.loading import load_model
    from gptsmith.runtime import choose_device
    from gptsmith.tokenizer.chat import ChatTemplate

    model, tokenizer = load_model(spec, device=choose_device(device), quantize=quantize)
    template = ChatTemplate(tokenizer)
    engine = Engine(
        model,
        vocab_size=tokenizer.vocab_size,
        max_batch=max_batch,
        max_batch_tokens=max(256, 2 * max_batch),
        cache_tokens=cache_tokens,
        speculator=Speculator(PromptLookup()) if speculate else None,
    )
    return LoadedModel(AsyncEngine(engine), tokenizer, model, template)
