"""Registries: model families, objectives, tasks, corpora and commands by name. `docs/extending.md` adds to each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from gptsmith.errors import UsageError, nearest

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dictionary of things by name, to which other packages add.

    kind: what the things are, for messages ("task"). builtin: those of this package.
    """

    def __init__(self, kind: str, builtin: Mapping[str, T]) -> None:
        super().__init__(builtin)
        self.kind, self.builtin = kind, frozenset(builtin)

    # Compared by identity, so that an annotation can contain it: `Annotated[str, FAMILIES]`.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    @property
    def metavar(self) -> str:
        """The names as help texts list them: `{gpt2,llama}`."""
        return "{" + ",".join(self) + "}"

    def register(self, name: str, thing: T) -> None:
        """Add a thing, or replace one that was added before. UsageError for the name of a built-in one, or a bad name.

        Names are used on command lines and as file names, so they consist of letters, digits, `_`, `-` and `.`.
        """
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"{name!r} cannot be the name of a {self.kind}: use letters, digits, '_', '-' and '.'.")
        if name in self.builtin:
            raise UsageError(
                f"the {self.kind} {name!r} is part of gptsmith and cannot be replaced; choose another name."
            )
        self[name] = thing

    def find(self, name: str) -> T:
        """Return the thing of that name. UsageError, with the nearest name, where there is none."""
        if name not in self:
            raise UsageError(
                f"there is no {self.kind} {name!r}.{nearest(name, self)} Known: {', '.join(self)}. If a plugin defines "
                "it, name the plugin's module in GPTSMITH_PLUGINS, or import it first."
            )
        return self[name]
