"""The models that a server serves: by name, by alias, with adapters; each loaded when it is first asked for.

models = Models(["runs/bard", "smollm2-135m"], aliases={"gpt-4": "bard"})
served = await models.get("gpt-4")            # Served: engine (AsyncEngine), tokenizer, model, template, adapter
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

from gptsmith.errors import GptsmithError, UsageError, nearest
from gptsmith.server.errors import ApiError

if TYPE_CHECKING:
    from gptsmith.engine.async_engine import AsyncEngine
    from gptsmith.loading import Quantization
    from gptsmith.model.transformer import Transformer
    from gptsmith.server.tools import Form
    from gptsmith.tokenizer import Tokenizer
    from gptsmith.tokenizer.chat import ChatTemplate


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and the engine that owns it."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    model: Transformer
    template: ChatTemplate

    @property
    def context(self) -> int:
        return self.model.config.max_position_embeddings

    @functools.cached_property
    def form(self) -> Form | None:
        """How the template writes calls of tools; None if it knows none."""
        from gptsmith.server.tools import form_of

        return form_of(self.template)


@dataclass(frozen=True)
class Served:
    """What a name means. name: as it was asked for. base: the name of the model itself. adapter: to give the engine."""

    name: str
    base: str
    adapter: str | None
    loaded: Loaded

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


Load = Callable[[str], Loaded]


@dataclass
class _Entry:
    spec: str
    created: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: Loaded | None = None


class Models:
    """All that is served. Raises UsageError for names that clash or that stand for nothing.

    specs: what `gptsmith.load` understands, or name -> such. load: how to load one; it is called in a thread, once for
    each model. aliases: other names of models. adapters: name -> (model, directory).
    """

    def __init__(
        self,
        specs: Sequence[str] | Mapping[str, str],
        load: Load,
        *,
        aliases: Mapping[str, str] | None = None,
        adapters: Mapping[str, tuple[str, Path]] | None = None,
    ) -> None:
        named = list(specs.items()) if isinstance(specs, Mapping) else [(name_of(spec), spec) for spec in specs]
        self._load = load
        self._entries: dict[str, _Entry] = {}
        self._aliases: dict[str, str] = {}
        self._adapters: dict[str, tuple[str, Path]] = {}
        by_spec = {}
        for name, spec in named:
            self._claim(name)
            self._entries[name] = _Entry(spec, int(time.time()))
            by_spec[spec] = name
        if not self._entries:
            raise UsageError("there is no model to serve; name one.")
        for name, target in (aliases or {}).items():
            self._claim(name)
            self._aliases[name] = by_spec.get(target, target)
        for name, (base, directory) in (adapters or {}).items():
            self._claim(name)
            base = by_spec.get(base, base)
            if base not in self._entries:
                raise UsageError(
                    f"the adapter {name} is for {base}, which is not served.{nearest(base, self._entries)}"
                )
            self._adapters[name] = (base, Path(directory))
        for name, target in self._aliases.items():
            if target not in self._entries and target not in self._adapters:
                known = [*self._entries, *self._adapters]
                raise UsageError(f"the alias {name} is for {target}, which is not served.{nearest(target, known)}")

    def _claim(self, name: str) -> None:
        if name in self._entries or name in self._aliases or name in self._adapters:
            raise UsageError(f"two models would have the name {name!r}; give one of them another with --alias.")

    @property
    def bases(self) -> list[str]:
        """The names of the models themselves, without adapters and aliases."""
        return list(self._entries)

    @property
    def names(self) -> list[str]:
        """All names that may be asked for; the first is the model that was named first."""
        return [*self._entries, *self._adapters, *self._aliases]

    def known(self, name: str) -> bool:
        return name in self._entries or name in self._adapters or name in self._aliases

    async def get(self, name: str) -> Served:
        """The model of a name, loaded if it was not. Raises ApiError: 404 if there is none of that name, 500 if it
        cannot be loaded."""
        target = self._aliases.get(name, name)
        base, directory = self._adapters.get(target, (target, None))
        entry = self._entries.get(base)
        if entry is None:
            shown = name if len(name) <= 100 else name[:100] + "..."
            raise ApiError(
                404,
                f"there is no model {shown!r} here.{nearest(name[:100], self.names)} /v1/models lists them.",
                param="model",
                code="model_not_found",
            )
        loaded = entry.loaded
        if loaded is None:
            try:
                loaded = await asyncio.to_thread(self.load, base)
            except GptsmithError as error:
                message = f"the model {base} cannot be loaded: {error}"
                raise ApiError(500, message, code="model_not_loaded") from error
        return Served(name, base, None if directory is None else target, loaded)

    def load(self, name: str) -> Loaded:
        """Load the model `name` and its adapters, unless it has been. Raises what loading raises."""
        entry = self._entries[name]
        with entry.lock:
            if entry.loaded is None:
                loaded = self._load(entry.spec)
                try:
                    for adapter, (base, directory) in self._adapters.items():
                        if base == name:
                            loaded.engine.add_adapter(adapter, directory)
                except GptsmithError:
                    loaded.engine.close(drain=False)
                    raise
                entry.loaded = loaded
            return entry.loaded

    def cards(self) -> Iterator[tuple[str, int, Loaded | None, str | None]]:
        """For each name: itself, when its model was named, the model if it is loaded, and what it stands for."""
        for name in self.names:
            target = self._aliases.get(name, name)
            base, _ = self._adapters.get(target, (target, None))
            entry = self._entries[base]
            parent = self._aliases.get(name) or (base if name in self._adapters else None)
            yield name, entry.created, entry.loaded, parent

    def loaded(self) -> dict[str, Loaded]:
        """The models in memory, by name."""
        return {name: entry.loaded for name, entry in self._entries.items() if entry.loaded is not None}

    def close(self, *, drain: bool = True) -> None:
        """Have all engines finish (drain) or drop what they are at, and end."""
        for loaded in self.loaded().values():
            loaded.engine.close(drain=drain)


def name_of(spec: str) -> str:
    """The name of a model that nobody gave one: the last part of its path; of what is no path, the whole."""
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
) -> Loaded:
    """Load a model as `gptsmith.load` does, and start its engine. speculate: guess ahead from the prompt's words."""
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
    return Loaded(AsyncEngine(engine), tokenizer, model, template)
