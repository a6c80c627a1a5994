"""Errors that are the user's to mend: one complete message, no traceback.

The command line prints `str(error)` and exits with `error.exit_code`: 2 for bad usage, 1 for everything else.
A message names what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GptsmithError(Exception):
    """Something outside the program is wrong (a file, the network, the disk). Exit code 1."""

    exit_code = 1


class UsageError(GptsmithError):
    """The request itself is wrong (an option, a value, a name). Exit code 2."""

    exit_code = 2


class DataError(GptsmithError):
    """A text, corpus or prepared dataset cannot be used."""


class TokenizerError(GptsmithError):
    """A tokenizer cannot be built, loaded, or cannot encode a text."""


class CheckpointError(GptsmithError):
    """A model directory or checkpoint is missing, damaged or does not fit."""


class TrainingError(GptsmithError):
    """Training had to stop (a checkpoint could not be saved); the last good checkpoint is named."""


class DivergedError(TrainingError):
    """The loss is no number or has risen far above where it began; the last good checkpoint is named."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the choice nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
