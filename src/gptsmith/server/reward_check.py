"""How well a reward model predicts a person's choices: `gptsmith serve --collect FILE --reward-model DIR`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel

from gptsmith.data.conversations import Example
from gptsmith.data.preferences import Preference, PreferenceRenderer, as_preferences
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.loading import resolve_model
from gptsmith.server.runs import Row
from gptsmith.tokenizer.pretrained import read_tokenizer
from gptsmith.train.rollout.rewards import RewardModel

SECONDS = 1.0  # of scoring in one request; the rest waits for the next one


class RewardModelStatus(BaseModel):
    name: str
    scored: int
    """Choices that the reward model has scored."""
    correct: int
    """Those of which it gives the chosen answer the higher score."""
    accuracy: float | None
    pending: int
    """Choices that it has not scored yet."""
    skipped: int
    """Choices that it cannot score, because they are too long for it or written in a way that it cannot read."""


class RewardCheck:
    """A reward model that is asked about each choice once. It is loaded again when its files change.

    spec: a run, or a directory of a model with one score. Raise UsageError or CheckpointError if there is none.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self._model, self._renderer, self._signature = *self._load(), self._files()
        self._verdicts: list[bool | None] = []  # of the choices in the order of the file; None: cannot be scored
        self._generation = -1

    def _load(self) -> tuple[RewardModel, PreferenceRenderer]:
        tokenizer = read_tokenizer(resolve_model(self.spec))
        try:
            model = RewardModel.load(self.spec, tokenizer, torch.device("cpu"))
        except UsageError as error:
            raise UsageError(str(error).replace("--reward ", "--reward-model ", 1)) from None
        return model, PreferenceRenderer(tokenizer)

    def _files(self) -> tuple[tuple[int, int] | None, ...]:
        """Return what changes when the model is trained again."""
        found: list[tuple[int, int] | None] = []
        for name in ("", "best", "last", "model.safetensors"):
            try:
                status = (Path(self.spec) / name).stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_mtime_ns))
        return tuple(found)

    def status(self, choices: Sequence[Row], generation: int, seconds: float = SECONDS) -> RewardModelStatus:
        """Score choices for some time, and return how many it predicts.

        choices: rows with a chosen and a rejected answer. Those of an earlier call come first, unless `generation`
        differs. While a model that has changed cannot be loaded, the one before it stays.
        """
        with self._lock:
            files = self._files()
            if files != self._signature:
                self._signature = files
                try:
                    self._model, self._renderer = self._load()
                except GptsmithError:  # it is being written
                    pass
                else:
                    self._verdicts = []
            if generation != self._generation:
                self._verdicts, self._generation = [], generation
            until = time.monotonic() + seconds
            for row in choices[len(self._verdicts) :]:
                self._verdicts.append(self._is_correct(row))
                if time.monotonic() > until:
                    break
            scored = len(self._verdicts) - self._verdicts.count(None)
            correct = self._verdicts.count(True)
            return RewardModelStatus(
                name=self._model.name,
                scored=scored,
                correct=correct,
                accuracy=correct / scored if scored else None,
                pending=len(choices) - len(self._verdicts),
                skipped=self._verdicts.count(None),
            )

    def _is_correct(self, row: Row) -> bool | None:
        """Return whether the chosen answer has the higher score; None if the model cannot score both."""
        try:
            (preference,) = as_preferences(row)
            if not isinstance(preference, Preference):
                return None
            pair = [_to_its_end(example) for example in self._renderer.pair(preference)]
        except GptsmithError:
            return None
        if max(map(len, pair)) > self._model.longest:
            return None
        chosen, rejected = self._model.score_ids(pair)
        return chosen > rejected if math.isfinite(chosen) and math.isfinite(rejected) else None


def _to_its_end(example: Example) -> list[int]:
    """Return the ids up to the token that ends the answer, where rewards are read. Templates may add more after it."""
    length = len(example.ids)
    while not example.trained[length - 1]:
        length -= 1
    return example.ids[:length]
