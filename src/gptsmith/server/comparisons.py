"""A person's comparisons of two answers, collected as JSON lines that `gptsmith reward` and `gptsmith dpo` read.

| field | content |
|---|---|
| `prompt` | messages; a text for a base model |
| `choice` | `left`, `right`, `tie` or `both_bad` |
| `chosen`, `rejected` | the two answers, if one was chosen |
| `completions` | the left and the right answer, if none was |
| `edited` | whether `chosen` is what the person made of the answer; then `unedited` is the model's text |
| `model`, `options` | what wrote the answers; of two models, that of the left one |
| `models` | what wrote the left answer and the right one, if these are two models |
| `seeds`, `finish_reasons` | the left answer's and the right one's |
| `time` | when it was chosen, in UTC |
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest

from gptsmith.engine.sampling import SAMPLING_OPTIONS
from gptsmith.errors import GptsmithError, UsageError, nearest
from gptsmith.log import JsonLines
from gptsmith.server.errors import ApiError
from gptsmith.server.reward_check import RewardCheck, RewardModelStatus
from gptsmith.server.runs import Row, Tail
from gptsmith.server.schema import Request
from gptsmith.server.service import context_of, service_of

Choice = Literal["left", "right", "tie", "both_bad"]
SIDES = ("left", "right")
UNDECIDED = ("tie", "both_bad")

Scalar = bool | int | float | str | None


class PromptMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class ComparisonRequest(Request):
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[PromptMessage], Field(min_length=1)] = Field(
        description="The conversation that was answered; the text that was continued, for a base model."
    )
    completions: list[str] = Field(
        min_length=2, max_length=2, description="The answers as the model wrote them: the left one, the right one."
    )
    choice: Choice
    edited: str | None = Field(None, description="What the person made of the chosen answer.")
    options: dict[str, Scalar | list[Scalar]] = Field(
        default={}, description="The sampling options that the answers were generated with."
    )
    models: Annotated[list[str], Field(min_length=2, max_length=2)] | None = Field(
        None, description="What wrote the left answer and the right one, where these are two models."
    )
    seeds: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    finish_reasons: Annotated[list[Literal["stop", "length", "stopped"]], Field(min_length=2, max_length=2)] | None = (
        None
    )


class CollectionStatus(BaseModel):
    """What has been collected so far."""

    file: str
    """The name of the file."""
    comparisons: int
    """All rows: pairs, ties, and those of which both answers are bad."""
    pairs: int
    """Rows with a chosen and a rejected answer."""
    left: int
    right: int
    tie: int
    both_bad: int
    edited: int
    unreadable: int
    """Lines that are no comparison; they are left out."""
    reward_model: RewardModelStatus | None = None
    """How well the server's reward model predicts the choices; null without one."""


class Comparisons:
    """The file of comparisons. Several threads can use it, and several servers can append to the same file.

    reward_check: a reward model that is to predict them.
    """

    def __init__(self, path: Path, reward_check: RewardCheck | None = None) -> None:
        self.path, self._reward_check = path, reward_check
        self._lines, self._tail, self._lock = JsonLines(path), Tail(path, parse_comparisons), threading.Lock()
        self._rows: list[Row] = []
        self._generation = 0  # of the rows: how often the file was replaced

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a comparison. Raise GptsmithError if it cannot be written."""
        with self._lock:
            self._lines.append_durably(row)

    def status(self) -> CollectionStatus:
        """Count all comparisons in the file, those of other writers included."""
        with self._lock:
            new, restarted = self._tail.read()
            self._rows = new if restarted else self._rows + new
            self._generation += restarted
            rows, generation = self._rows, self._generation
        choices = Counter(row.get("choice") for row in rows)
        pairs = [row for row in rows if row.get("choice") not in UNDECIDED]
        return CollectionStatus(
            file=self.path.name,
            comparisons=len(rows),
            pairs=len(pairs),
            **{name: choices[name] for name in (*SIDES, *UNDECIDED)},
            edited=sum(row.get("edited") is True for row in rows),
            unreadable=self._tail.unreadable,
            reward_model=None if self._reward_check is None else self._reward_check.status(pairs, generation),
        )


def parse_comparisons(lines: bytes) -> tuple[list[Row], int]:
    """Return the comparisons in some lines, and the number of other lines."""
    rows, unreadable = [], 0
    for line in filter(bytes.strip, lines.split(b"\n")):
        row = _parsed(line)
        if row is None:
            unreadable += 1
        else:
            rows.append(row)
    return rows, unreadable


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or "prompt" not in row:
        return None
    return row if row.get("choice") in UNDECIDED or {"chosen", "rejected"} <= row.keys() else None


def check_file(path: Path) -> None:
    """Raise UsageError unless comparisons can be appended to the file `path`, which need not exist."""
    if path.suffix != ".jsonl":
        raise UsageError(f"--collect {path}: the name must end in .jsonl, since comparisons are stored as JSON lines.")
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"--collect {path}: not a file.")
        lines = path.read_bytes() if path.exists() else b""
        if not path.parent.exists():
            raise UsageError(f"--collect {path}: there is no folder {path.parent}. Make it first, or check the name.")
        path.open("ab").close()
    except OSError as error:
        raise UsageError(f"--collect {path}: cannot be written ({error.strerror}).") from None
    for number, line in enumerate(lines[: lines.rfind(b"\n") + 1].split(b"\n"), 1):
        if line.strip() and _parsed(line) is None:
            raise UsageError(
                f"--collect {path}, line {number}: not a comparison (an object with prompt, chosen and rejected). "
                "Choose another file, or remove the line."
            )


def row_of(request: ComparisonRequest) -> Row:
    """Return the line of a choice. Raise ApiError 400 for what is no comparison."""
    prompt: Any = request.prompt
    if not isinstance(prompt, str):
        if prompt[-1].role != "user":
            raise ApiError(400, "prompt must end with a message of the user.", param="prompt")
        prompt = [message.model_dump() for message in prompt]
    for name in request.options:
        if name not in SAMPLING_OPTIONS:
            hint = nearest(name, SAMPLING_OPTIONS)
            raise ApiError(400, f"options.{name[:100]} is not a sampling option.{hint}", param="options")
    row: Row = {"prompt": prompt}
    if request.choice in SIDES:
        row |= _pair(request)
    elif request.edited is not None:
        raise ApiError(400, "edited is the text of a chosen answer: set choice to left or right.", param="edited")
    else:
        row |= {"completions": request.completions, "edited": False}
    row |= {"choice": request.choice, "model": request.model, "options": request.options}
    row |= request.model_dump(include={"models", "seeds", "finish_reasons"}, exclude_none=True)
    return row | {"time": datetime.now(UTC).isoformat(timespec="seconds")}


def _pair(request: ComparisonRequest) -> Row:
    side = SIDES.index(request.choice)
    unedited, rejected = request.completions[side], request.completions[1 - side]
    chosen = unedited if request.edited is None else request.edited
    if not chosen.strip():
        raise ApiError(400, "The chosen answer is empty.", param="completions" if request.edited is None else "edited")
    if not rejected.strip():
        raise ApiError(400, "The rejected answer is empty: training cannot use it.", param="completions")
    if chosen.strip() == rejected.strip():
        raise ApiError(400, "The chosen answer equals the rejected one: there is nothing to prefer.", param="choice")
    edited = chosen != unedited
    return {"chosen": chosen, "rejected": rejected, "edited": edited} | ({"unedited": unedited} if edited else {})


def comparison_routes(path: Path, reward_model: str | None = None) -> APIRouter:
    """Return routes that append comparisons to the file `path` and count them.

    reward_model: a run or a directory, whose predictions are counted, too. Raise what `RewardCheck` raises.
    """
    router = APIRouter(tags=["web page"])
    comparisons = Comparisons(path, None if reward_model is None else RewardCheck(reward_model))

    @router.get("/api/comparisons")
    def show_comparisons() -> CollectionStatus:
        """Count the comparisons collected so far."""
        return comparisons.status()

    @router.post("/api/comparisons")
    def add_comparison(body: ComparisonRequest, request: HttpRequest) -> CollectionStatus:
        """Append a person's choice between two answers to the file, and count what it has then."""
        models = service_of(request).models
        for name in [body.model, *(body.models or [])]:
            if name not in models:
                raise ApiError(404, f"The model {name[:100]!r} does not exist.", param="model", code="model_not_found")
        context_of(request).log_fields["model"] = body.model
        row = row_of(body)
        try:
            comparisons.add(row)
        except (GptsmithError, OSError) as error:
            raise ApiError(500, f"The choice was not saved: {error}", code="not_saved") from error
        return comparisons.status()

    return router
