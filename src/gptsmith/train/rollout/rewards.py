"""What answers are worth: rewards from functions, reward models and judges, weighted and added.

    rewards = open_rewards(["runs/rm", "rewards.py:brevity"], [1.0, 0.2], tokenizer=tokenizer, device="cpu")
    scores = rewards.score(samples)        # scores.total, scores.parts["brevity"]

A reward is named by its spec:

| spec | reward |
|---|---|
| `module:function`, `file.py:function` | `function(prompts, completions, **columns)` returns one number for each |
| a run, a model directory, a model on the hub | a reward model: it scores the token ids of prompt and answer |
| `sentiment`, `format:REGEX`, … | one of `tasks.text_rewards.REWARDS`, made from what follows the colon |
| `judge:URL` or `judge:URL#MODEL` | a model behind an OpenAI-compatible API gives 0 to 10 points |

A reward that fails, or gives something that is no finite number, raises `RewardError`; nothing that fails is a score.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from gptsmith.checkpoint import MANIFEST
from gptsmith.errors import CheckpointError, GptsmithError, RewardError, UsageError, first_few, nearest
from gptsmith.formats.hf import CONFIG_FILE, read_json
from gptsmith.formats.hf_heads import load_classifier, reward_scale
from gptsmith.loading import resolve_model
from gptsmith.log import note
from gptsmith.storage import sha256_file
from gptsmith.tasks.text_rewards import REWARDS, RewardFunction
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.pretrained import read_tokenizer

_FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<name>[^:]*))?")
_MODULE = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_BATCH_TOKENS = 8192  # of a reward model's batch, padding included


class Prompt(Protocol):
    """What was asked: `train.prompts.Prompt`."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def prompt(self) -> str | list[dict[str, Any]]: ...
    @property
    def columns(self) -> dict[str, Any]: ...
    @property
    def place(self) -> str: ...


@dataclass(frozen=True)
class Sample:
    """An answer to a prompt. ids: of the answer, with the token that ended it. text: of the answer, without it."""

    prompt: Prompt
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Scores:
    """What samples are worth. total: the weighted sum for each. parts: each reward's scores by its name, unweighted."""

    total: list[float]
    parts: dict[str, list[float]]


class Reward(Protocol):
    """One reward."""

    @property
    def name(self) -> str:
        """What it is called in metrics."""

    def score(self, samples: Sequence[Sample]) -> Sequence[Any]:
        """Return one number for each sample. Raises RewardError."""

    def identity(self) -> dict[str, Any]:
        """Return what its scores depend on, as JSON."""


class Rewards:
    """Several rewards, weighted and added."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        """weights: one for each reward (None: 1). Raises UsageError if their number differs, or for equal names."""
        if not rewards:
            raise UsageError("no reward is given: --reward module:function, a reward model, or judge:URL.")
        self.rewards = list(rewards)
        self.weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.rewards):
            raise UsageError(
                f"--reward-weights has {len(self.weights)} numbers for {len(self.rewards)} rewards: give one for each."
            )
        if not all(math.isfinite(weight) for weight in self.weights) or not any(self.weights):
            raise UsageError(f"--reward-weights {self.weights}: give finite numbers, of which one at least is not 0.")
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise UsageError(f"two rewards have the name {twice[0]!r}, by which they are logged: give each once.")

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    @property
    def longest(self) -> int | None:
        """The most tokens of prompt and answer that all reward models can read; None without reward models."""
        return min((reward.longest for reward in self.rewards if isinstance(reward, RewardModel)), default=None)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Return what the samples are worth. Raises RewardError, which names the reward and the sample, where one fails
        or gives something that is not a finite number."""
        if not samples:
            return Scores([], {name: [] for name in self.names})
        parts = {reward.name: _checked(reward.name, reward.score(samples), samples) for reward in self.rewards}
        rows = zip(*parts.values(), strict=True)
        return Scores([math.fsum(w * s for w, s in zip(self.weights, row, strict=True)) for row in rows], parts)

    def identity(self) -> list[dict[str, Any]]:
        """Return what the scores depend on, for run.json: specs, weights, and hashes of files."""
        return [
            {"name": reward.name, "weight": weight, **reward.identity()}
            for reward, weight in zip(self.rewards, self.weights, strict=True)
        ]


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words what differs between two `Rewards.identity`: of a run and of its continuation."""
    old, new = ({str(each.get("name")): each for each in identities} for identities in (before, now))
    found = [f"the reward {name} is gone" for name in old.keys() - new.keys()]
    found += [f"the reward {name} is new" for name in new.keys() - old.keys()]
    for name in old.keys() & new.keys():
        keys = [key for key in {**old[name], **new[name]} if old[name].get(key) != new[name].get(key)]
        found += [
            f"the {key} of the reward {name} was {old[name].get(key)!r} and is now {new[name].get(key)!r}"
            for key in keys
            if key != "sha256"
        ]
        if keys == ["sha256"]:
            found.append(f"{new[name].get('file') or new[name].get('spec')}, the reward {name}, has changed")
    return sorted(found)


def open_rewards(
    specs: Sequence[str | RewardFunction],
    weights: Sequence[float] | None = None,
    *,
    tokenizer: Tokenizer,
    device: str | torch.device = "cpu",
    record: Path | None = None,
) -> Rewards:
    """Open the rewards that `specs` name; a function can be given itself.

    tokenizer: the policy's; reward models must have the same tokens. record: a file to which the scores of judges are
    appended and from which they are read, so that a resumed run gets the scores that it got before.
    Raises UsageError for a reward that cannot be opened, and CheckpointError for a damaged reward model.
    """
    rewards = [_open(spec, tokenizer, torch.device(device), record) for spec in specs]
    names = Counter(reward.name for reward in rewards)
    for reward in rewards:  # two functions of one name, of different files
        if names[reward.name] > 1 and isinstance(reward, FunctionReward):
            reward.name = reward.spec
    return Rewards(rewards, weights)


def _open(spec: str | RewardFunction, tokenizer: Tokenizer, device: torch.device, record: Path | None) -> Reward:
    if isinstance(spec, str) and spec.partition(":")[0] in REWARDS:
        name, _, argument = spec.partition(":")
        return FunctionReward(REWARDS[name](argument), spec=spec)
    if not isinstance(spec, str):
        return FunctionReward(spec, spec=f"{spec.__module__}:{getattr(spec, '__qualname__', type(spec).__qualname__)}")
    if spec.startswith("judge:"):
        from gptsmith.train.rollout.judge import Judge

        return Judge(spec, record=record)
    if Path(spec).is_dir() or spec.startswith("hf:"):
        return RewardModel.load(spec, tokenizer, device)
    if found := _FILE.fullmatch(spec):
        return FunctionReward(_from_file(spec, Path(found["file"]), found["name"]), spec=spec)
    if found := _MODULE.fullmatch(spec):
        return FunctionReward(_from_module(spec, found["module"], found["name"]), spec=spec)
    try:
        return RewardModel.load(spec, tokenizer, device)
    except CheckpointError as error:
        raise UsageError(
            f"--reward {spec}: {error}{nearest(spec.partition(':')[0], REWARDS)} A reward is module:function, "
            f"file.py:function, a reward model, judge:URL, or one of these: {', '.join(REWARDS)}."
        ) from None


# Functions ------------------------------------------------------------------------------------------------------------


class FunctionReward:
    """A reward that a Python function computes: `function(prompts, completions, **columns)`.

    Prompts are texts or messages, completions are texts. Of the columns (the other fields of the rows, and
    `completion_ids`) it is given those that it has parameters for, or all if it takes any; a column that a row lacks is
    None there. It is given copies, so it can change nothing.
    """

    def __init__(self, function: RewardFunction, *, spec: str) -> None:
        if not callable(function):
            raise UsageError(f"--reward {spec} is {_kind(function)}, not a function.")
        if inspect.iscoroutinefunction(function):
            raise UsageError(f"--reward {spec} is a coroutine; write it with `def`, and await nothing in it.")
        self.function, self.spec = function, spec
        self.name = getattr(function, "__name__", None) or type(function).__name__
        self._identity = _identity(function, spec)  # of the file as it was imported
        self._by_name, self._takes_all, self._accepted, self._needed = _parameters(function, spec)

    def score(self, samples: Sequence[Sample]) -> Sequence[Any]:
        try:
            return self._call(samples)
        except (Exception, SystemExit) as error:
            if isinstance(error, RewardError):
                raise
            sample, cause = self._culprit(samples, error)
            where = "" if sample is None else f" for the answer {_short(sample.text)} to {sample.prompt.place}"
            raise RewardError(
                f"the reward {self.spec} fails{where}: {_reason(cause)}. Repair it; a failure is not a score of 0."
            ) from cause

    def _call(self, samples: Sequence[Sample]) -> list[Any]:
        texts = [sample.text for sample in samples]
        available = dict.fromkeys(key for sample in samples for key in sample.prompt.columns)
        columns = [key for key in available if self._takes_all or key in self._accepted]
        given = {"prompts": [copy.deepcopy(sample.prompt.prompt) for sample in samples], "completions": texts}
        given |= {key: [copy.deepcopy(sample.prompt.columns.get(key)) for sample in samples] for key in columns}
        if self._takes_all or "completion_ids" in self._accepted:
            given.setdefault("completion_ids", [list(sample.ids) for sample in samples])
        if missing := [key for key in self._needed if key not in given]:
            raise RewardError(
                f"the reward {self.spec} needs {', '.join(missing)}, which the prompts do not have. Their columns: "
                f"{first_few(list(available)) or 'none'}.{nearest(missing[0], available)}"
            )
        if not self._by_name:
            result = self.function(given.pop("prompts"), given.pop("completions"), **given)
        else:
            if not self._takes_all:
                given = {key: value for key, value in given.items() if key in self._accepted}
            result = self.function(**given)
        if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
            raise RewardError(
                f"the reward {self.spec} returned {_kind(result)}, not a list with a number for each of the "
                f"{len(samples)} answers."
            )
        return list(result)

    def _culprit(self, samples: Sequence[Sample], error: BaseException) -> tuple[Sample | None, BaseException]:
        """Return the first sample for which the function fails alone, and how; None if it fails for none."""
        for sample in samples:
            try:
                self._call([sample])
            except RewardError:
                break
            except (Exception, SystemExit) as alone:
                return sample, alone
        return None, error

    def identity(self) -> dict[str, Any]:
        return dict(self._identity)


def _identity(function: RewardFunction, spec: str) -> dict[str, Any]:
    file = _source_file(function)
    if file is None or Path(__file__).parents[2] in file.parents:  # our own change with the version
        return {"spec": spec}
    return {"spec": spec, "file": str(file), "sha256": sha256_file(file)}


def _parameters(function: RewardFunction, spec: str) -> tuple[bool, bool, set[str], list[str]]:
    """Return whether prompts and completions are given by name, whether any column is taken, the names of all
    parameters, and of those without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions that are written in C have none
        return False, False, set(), []
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    by_name = any(each.name == "completions" for each in named)
    if not by_name:  # other names: the first two are meant
        positional = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.POSITIONAL_ONLY)]
        if len(positional) < 2 and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
            raise UsageError(
                f"--reward {spec} takes {len(positional)} arguments; it must take prompts and completions, and the "
                "columns that it needs: def reward(prompts, completions, **columns)."
            )
        named = [each for each in named if each not in positional[:2]]
    needed = [each.name for each in named if each.default is each.empty]
    return by_name, takes_all, {each.name for each in named}, needed


def _from_file(spec: str, file: Path, name: str | None) -> Any:
    if not file.is_file():
        siblings = [each.name for each in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise UsageError(f"--reward {spec}: there is no file {file.absolute()}.{nearest(file.name, siblings)}")
    path = file.resolve()
    module_name = f"gptsmith_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module = sys.modules.get(module_name)
    if module is None:
        specification = importlib.util.spec_from_file_location(module_name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[module_name] = module  # dataclasses look for it there
        _search_in(path.parent)
        try:
            specification.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise UsageError(f"--reward {spec}: {path} cannot be imported: {_reason(error)}.") from error
    return _member(spec, module, name or "", str(path))


def _from_module(spec: str, module_name: str, name: str) -> Any:
    directory = str(Path.cwd())
    sys.path.insert(0, directory)  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"--reward {spec}: there is no module {error.name}. It was looked for in {directory}, in the installed "
                "packages and in PYTHONPATH. A file anywhere can be given as path/to/file.py:function."
            ) from None
        raise UsageError(f"--reward {spec}: {module_name} cannot be imported: {_reason(error)}.") from error
    finally:
        sys.path.remove(directory)
    _search_in(Path(directory))
    return _member(spec, module, name, f"the module {module_name} ({getattr(module, '__file__', None) or 'built in'})")


def _member(spec: str, module: ModuleType, name: str, where: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            functions = [
                key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
            ]
            problem = f"has no {name!r}.{nearest(name, functions)}" if name else "is given without a function."
            raise UsageError(f"--reward {spec}: {where} {problem} Its functions: {first_few(functions) or 'none'}.")
        found = getattr(found, part)
    return found


def _search_in(directory: Path) -> None:
    """Let modules of a directory be imported, after those of all other places."""
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _source_file(function: RewardFunction) -> Path | None:
    for thing in (function, type(function)):
        try:
            return Path(inspect.getfile(inspect.unwrap(thing))).resolve(strict=True)
        except (TypeError, OSError, ValueError):
            continue
    return None


def _reason(error: BaseException) -> str:
    """Return what an exception of foreign code says, and the line that raised it."""
    if isinstance(error, GptsmithError):
        return str(error).rstrip(".")  # of ours
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SyntaxError):
        return text.rstrip(".")  # it names the line itself
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) != Path(__file__) and "importlib" not in frame.filename]
    at = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return text.rstrip(".") + at


# Reward models --------------------------------------------------------------------------------------------------------


class RewardModel:
    """A model with one score for a text, which it reads at the last token of prompt and answer.

    Scores are normalized by the mean and the standard deviation that were stored with the model, if any were.
    """

    def __init__(
        self, classifier: Any, *, spec: str, name: str, scale: tuple[float, float] | None = None, sha256: str = ""
    ) -> None:
        if len(classifier.head.labels) != 1:
            raise UsageError(
                f"--reward {spec} is a classifier with {len(classifier.head.labels)} labels, not a reward model. "
                "Train one on preferences: gptsmith reward."
            )
        self.classifier, self.spec, self.name = classifier.eval().requires_grad_(False), spec, name
        self.mean, self.std = scale or (0.0, 1.0)
        self.sha256 = sha256

    @classmethod
    def load(cls, spec: str, tokenizer: Tokenizer, device: torch.device) -> RewardModel:
        """Load a reward model. tokenizer: the policy's. Raises UsageError if its tokens are others than the model's,
        and CheckpointError if it is missing or damaged."""
        path = resolve_model(spec)
        classifier, _ = load_classifier(path)
        own = read_tokenizer(path)
        if problem := difference(tokenizer, own, classifier.transformer.config.vocab_size):
            raise UsageError(
                f"--reward {spec} has another tokenizer than the model that is trained: {problem}. A reward model "
                "reads token ids, so train it from a model with the same tokenizer."
            )
        if own.config().get("chat_template") != tokenizer.config().get("chat_template"):
            note(f"note: {spec} was trained with another chat template than the model whose answers it scores.")
        return cls(
            classifier.to(device),
            spec=spec,
            name=Path(spec).name or spec,
            scale=reward_scale(path),
            sha256=_digest(path),
        )

    @property
    def longest(self) -> int:
        """The most tokens of prompt and answer."""
        return int(self.classifier.transformer.config.max_position_embeddings)

    def score(self, samples: Sequence[Sample]) -> list[float]:
        texts = [[*sample.prompt.ids, *sample.ids] for sample in samples]
        for ids, sample in zip(texts, samples, strict=True):
            if not 0 < len(ids) <= self.longest:
                raise RewardError(
                    f"the reward model {self.spec} reads 1 to {self.longest:,} tokens, but {sample.prompt.place} and "
                    f"its answer have {len(ids):,}. Use a shorter --context, or leave out such prompts."
                )
        return self.score_ids(texts)

    @torch.no_grad()
    def score_ids(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each text, a prompt with its answer: 1 to `longest` token ids."""
        device = self.classifier.score.weight.device
        found = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        while order:
            rows = max(1, _BATCH_TOKENS // len(texts[order[-1]]))
            batch, order = order[-rows:], order[:-rows]
            lengths = torch.tensor([len(texts[i]) for i in batch], device=device)
            padded = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
            for row, i in enumerate(batch):
                padded[row, : len(texts[i])] = torch.tensor(texts[i])
            # Padding is to the right, where causal attention does not look; its id does not matter.
            scores = self.classifier(padded.to(device), last=lengths - 1).float().flatten().tolist()
            for i, score in zip(batch, scores, strict=True):
                found[i] = (score - self.mean) / self.std
        return found

    def identity(self) -> dict[str, Any]:
        return {"spec": self.spec, "sha256": self.sha256}


def difference(policy: Tokenizer, other: Tokenizer, rows: int) -> str:
    """Return in words how ids of the policy's tokenizer mean something else in another one; "" if they do not.

    The other one may have more tokens. rows: how many tokens its model has embeddings for.
    """
    if policy.vocab_size > min(other.vocab_size, rows):
        return f"it has {min(other.vocab_size, rows):,} tokens, and the other {policy.vocab_size:,}"
    for id in range(policy.vocab_size):
        ours, theirs = policy.token_text(id), other.token_text(id)
        if ours != theirs:
            return f"the token {id} is {theirs!r}, and {ours!r} in the other"
    return ""


def _digest(directory: Path) -> str:
    """Return the sha256 of a model's configuration and weights; a checkpoint's manifest has them."""
    files = read_json(directory / MANIFEST) if (directory / MANIFEST).is_file() else {}
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.name == CONFIG_FILE or p.suffix == ".safetensors"):
        digest.update(str((files.get(path.name) or {}).get("sha256") or sha256_file(path)).encode())
    return digest.hexdigest()


# Checks of what rewards return ----------------------------------------------------------------------------------------


def _checked(name: str, scores: Sequence[Any], samples: Sequence[Sample]) -> list[float]:
    """Return the scores as finite floats. Raises RewardError."""
    if len(scores) != len(samples):
        raise RewardError(
            f"the reward {name} returned {len(scores)} scores for {len(samples)} answers: it must give one for each."
        )
    return [_number(name, score, sample) for score, sample in zip(scores, samples, strict=True)]


def _number(name: str, score: Any, sample: Sample) -> float:
    value = math.nan
    is_number = not isinstance(score, str | bytes | complex) and score is not None
    if is_number:
        try:
            value = float(score)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor with more than one element
            is_number = False
    if not is_number or not math.isfinite(value):
        shown = repr(value) if is_number else _kind(score)
        raise RewardError(
            f"the reward {name} gave {shown} for the answer {_short(sample.text)} to {sample.prompt.place}: a score is "
            "a finite number. Give such answers a low one if they are bad, and raise an exception if they cannot be "
            "scored."
        )
    return value


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}, {_short(value)}"


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…{text[0] if isinstance(value, str) else ''}"
