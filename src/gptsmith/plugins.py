"""Plugins: modules of other packages that register families, objectives, tasks, corpora, commands and endpoints.

A plugin is named by an entry point in the group `gptsmith.plugins` of an installed package, or in the environment
variable GPTSMITH_PLUGINS. See `docs/extending.md`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gptsmith.errors import GptsmithError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "gptsmith.plugins"
VARIABLE = "GPTSMITH_PLUGINS"
"""Names of modules, separated by commas."""


def load_plugins() -> None:
    """Import all plugins; those already imported are not imported again. Every command calls this before it runs.

    Raises GptsmithError, naming the plugin, where one cannot be imported.
    """
    for entry in _entry_points():
        package = entry.dist.name if entry.dist is not None else "an unknown package"
        _load(f"{entry.value} of the package {package}", entry.load, f"Repair or uninstall {package}.")
    for name in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        hint = f"It is named in {VARIABLE}; Python must find it in an installed package or in PYTHONPATH."
        _load(name, functools.partial(importlib.import_module, name), hint)


@functools.cache  # searching all installed packages takes some 30 ms
def _entry_points() -> Sequence[EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, and `gptsmith --help` does without

    return tuple(entry_points(group=GROUP))


def _load(plugin: str, load: Callable[[], object], hint: str) -> None:
    try:
        load()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise GptsmithError(f"the plugin {plugin} cannot be imported: {reason}. {hint}") from error
