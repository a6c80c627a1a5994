"""Errors that the user can fix. They are shown as one message without a traceback.

The command line prints `str(error)` and exits with `error.exit_code`: 2 for bad usage, 1 for everything else.
A message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


class GptsmithError(Exception):
    """Something outside the program is wrong: a file, the network, the disk. Exit code 1."""

    exit_code = 1


class UsageError(GptsmithError):
    """The request itself is wrong: an option, a value, a name. Exit code 2."""

    exit_code = 2


class BudgetError(UsageError):
    """A budget of time is too short to learn anything: there is time for `steps` updates."""

    def __init__(self, message: str, steps: int) -> None:
        super().__init__(message)
        self.steps = steps


class DataError(GptsmithError):
    """A text, corpus or prepared dataset cannot be used."""


class TokenizerError(GptsmithError):
    """A tokenizer cannot be built or loaded, or cannot encode a text."""


class CheckpointError(GptsmithError):
    """A model directory or checkpoint is missing or damaged, or does not fit."""


class TrainingError(GptsmithError):
    """Training had to stop, for example because a checkpoint could not be saved. Names the last good checkpoint."""


class DivergedError(TrainingError):
    """The loss is NaN or infinite, or has risen far above its start. Names the last good checkpoint."""


class RewardError(GptsmithError):
    """A reward fails, or gives something that is no score. Names the reward and the sample."""


class LostProcessError(TrainingError):
    """A process of the run has ended without a message, or does not answer: the run can go on from its checkpoint."""


class ProcessError(TrainingError):
    """Another process of the run, number `rank`, has failed and told the user why.

    lost: it has failed because it lost one itself; see `LostProcessError`.
    """

    def __init__(self, rank: int, message: str, exit_code: int, lost: bool = False) -> None:
        super().__init__(rank, message, exit_code, lost)
        self.rank, self.message, self.exit_code, self.lost = rank, message, exit_code, lost

    def __str__(self) -> str:
        return self.message


class ProcessKilledError(TrainingError):
    """A signal ended a process of the run before any could say why. The exit code is the shell's for it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the choice that `name` is probably a misspelling of, or an empty string.

    A choice is suggested if it differs only in case or separators, if one of the two names begins with the other (at
    least 3 characters) or contains it (at least 4), or if few typing errors lie between them: at most one for every
    three characters.
    """
    spelled = _normalize(name)
    matches: list[tuple[int, str]] = []
    for choice in choices:
        other = _normalize(choice)
        short, long = sorted((spelled, other), key=len)
        errors = _typing_errors(short, long, limit=len(long) // 3)
        if errors is not None:
            matches.append((errors, choice))
        elif (len(short) >= 3 and long.startswith(short)) or (len(short) >= 4 and short in long):
            matches.append((len(long) - len(short), choice))
    return f" Did you mean {min(matches)[1]!r}?" if matches else ""


def first_few(names: Sequence[str], limit: int = 8) -> str:
    """Join names with commas; of more than `limit`, only the first and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _normalize(name: str) -> str:
    return re.sub(r"[\W_]+", "-", name.casefold())


def _typing_errors(a: str, b: str, limit: int) -> int | None:
    """Count the insertions, deletions, substitutions and swaps of neighbors from `a` to `b`; None if above `limit`.

    This is the restricted Damerau-Levenshtein distance.
    """
    if abs(len(a) - len(b)) > limit:
        return None
    before_last: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before_last[j - 2] + 1)
            row.append(cost)
        before_last, last = last, row
    return last[-1] if last[-1] <= limit else None
