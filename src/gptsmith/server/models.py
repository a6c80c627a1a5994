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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptsmith.engine.prompt import processor_of
from gptsmith.engine.sampling import ModelDefaults, SamplingOptions, model_defaults
from gptsmith.errors import CheckpointError, GptsmithError, TokenizerError, UsageError, nearest
from gptsmith.server.access_log import logger
from gptsmith.server.errors import ApiError

if TYPE_CHECKING:
    from gptsmith.data.image_processor import ImageProcessor
    from gptsmith.engine.async_engine import AsyncEngine
    from gptsmith.loading import Quantization
    from gptsmith.model.transformer import Transformer
    from gptsmith.tokenizer import Tokenizer
    from gptsmith.tokenizer.chat import ChatTemplate


SERVER_SAMPLING = SamplingOptions(temperature=1.0)
"""OpenAI's default, where the model has none of its own."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with its engine, tokenizer and chat template. generation_config: None: the model's."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    model: Transformer
    template: ChatTemplate
    generation_config: Mapping[str, Any] | None = None

    @property
    def context(self) -> int:
        return self.model.config.max_position_embeddings

    @functools.cached_property
    def image_processor(self) -> ImageProcessor | None:
        """What prepares pictures for the model; None for a model that reads text only."""
        return processor_of(self.model.config)

    @functools.cached_property
    def defaults(self) -> ModelDefaults:
        """The sampling options that the model came with. Raise UsageError for invalid ones."""
        return model_defaults(self.generation_config or self.model.generation_config)


@dataclass(frozen=True)
class ServedModel:
    """A model as a request addresses it. name: the requested name. base: the name of the model whose engine it uses.
    adapter: the name of the LoRA adapter to pass to the engine, or None."""

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


Load = Callable[..., LoadedModel]
"""Called with a model, and with the directory of an adapter that is to be folded into it."""


@dataclass
class _Entry:
    spec: str
    created: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: LoadedModel | None = None
    adapted: dict[str, LoadedModel] = field(default_factory=dict)
    """The model with each of its adapters, by the adapter's name."""


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
        if directory is None:
            return ServedModel(name, base, None, loaded)
        adapted = entry.adapted[target]
        if adapted.engine is loaded.engine:
            return ServedModel(name, base, target, adapted)
        return ServedModel(name, target, None, adapted)

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
                            entry.adapted[adapter] = self._load_adapter(entry.spec, loaded, adapter, directory)
                except GptsmithError:
                    for each in (loaded, *entry.adapted.values()):
                        each.engine.close(drain=False)
                    entry.adapted.clear()
                    raise
                entry.loaded = loaded
                logger.info("model loaded", extra={"fields": {"model": name, "defaults": defaults}})
            return entry.loaded

    def _load_adapter(self, spec: str, loaded: LoadedModel, name: str, directory: Path) -> LoadedModel:
        """Return a model with an adapter. It uses the model's engine, unless it has embeddings of its own.

        Raise CheckpointError that names the adapter.
        """
        from gptsmith.formats.peft import adapted_rows
        from gptsmith.loading import resolve_adapter

        try:
            path = resolve_adapter(directory)
            if adapted_rows(path) is not None:
                return self._load(spec, path)
            loaded.engine.add_adapter(name, path)
            return _with_files_of(loaded, path)
        except GptsmithError as error:
            raise CheckpointError(f"adapter {name}: {error}") from error

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
        """Return the models in memory that have an engine of their own, by name."""
        models = {name: entry.loaded for name, entry in self._entries.items() if entry.loaded is not None}
        for entry in self._entries.values():
            models |= {
                name: adapted
                for name, adapted in entry.adapted.items()
                if entry.loaded is not None and adapted.engine is not entry.loaded.engine
            }
        return models

    def close(self, *, drain: bool = True) -> None:
        """Stop all engines, after they finish their requests (drain) or immediately."""
        for loaded in self.loaded().values():
            loaded.engine.close(drain=drain)


def _with_files_of(loaded: LoadedModel, directory: Path) -> LoadedModel:
    """Return a model with the tokenizer, chat template and sampling options in the directory of an adapter.

    Raise CheckpointError if the adapter was trained with other tokens.
    """
    from gptsmith.formats.hf import read_generation_config
    from gptsmith.tokenizer.chat import ChatTemplate
    from gptsmith.tokenizer.pretrained import has_tokenizer, read_tokenizer

    loaded = replace(loaded, generation_config=read_generation_config(directory) or None)
    if not has_tokenizer(directory):
        return loaded
    tokenizer, own = read_tokenizer(directory), loaded.tokenizer
    special = {*tokenizer.special_tokens(), *own.special_tokens(), *tokenizer.added_ids, *own.added_ids}
    for id in range(min(tokenizer.vocab_size, own.vocab_size)):
        if id not in special and tokenizer.token_text(id) != own.token_text(id):
            raise CheckpointError(
                f"it belongs to another model: its token {id} is {tokenizer.token_text(id)!r}, this model's is "
                f"{own.token_text(id)!r}."
            )
    template = ChatTemplate(
        tokenizer.limited_to(own.vocab_size) if tokenizer.vocab_size > own.vocab_size else tokenizer
    )
    try:
        used = {*template.encode([{"role": "user", "content": ""}]), *template.end_ids()}
    except TokenizerError:  # a template for other conversations
        used = set()
    if max(used, default=0) >= own.vocab_size:
        raise CheckpointError(
            f"its chat template writes {tokenizer.token_text(max(used))!r}, a token that the model lacks, and it has "
            "no embeddings for it."
        )
    return replace(loaded, tokenizer=template.tokenizer, template=template)


def default_name(spec: str) -> str:
    """Return the name of a model that has none: the last part of its path, or the spec itself if it is not a path."""
    path = Path(spec).expanduser()
    if path.exists():
        return path.absolute().stem if path.is_file() else path.absolute().name
    return spec


def load(
    spec: str,
    adapter: Path | None = None,
    *,
    device: str = "auto",
    quantize: Quantization = "auto",
    max_batch: int = 32,
    cache_tokens: int | None = None,
    speculate: bool = False,
) -> LoadedModel:
    """Load a model with `gptsmith.load` and start its engine.

    adapter: the directory of an adapter to fold in. speculate: draft tokens by prompt lookup.
    """
    from gptsmith.engine.async_engine import AsyncEngine
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.speculative import PromptLookup, Speculator
    from gptsmith.loading import load_model
    from gptsmith.runtime import choose_device
    from gptsmith.tokenizer.chat import ChatTemplate

    model, tokenizer = load_model(spec, device=choose_device(device), quantize=quantize, adapter=adapter)
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
