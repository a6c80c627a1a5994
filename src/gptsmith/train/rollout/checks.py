"""Is a reward worth optimizing? Tried on degenerate answers before training, and watched with a second one during it.

    findings = try_rewards(rewards, prompts, tokenizer, limit=64, ordinary=samples)
    for warning in findings.warnings: ...

    alarm = GoodhartAlarm("vader")
    message = alarm.add(step, proxy, gold)        # at each evaluation: scores of held-out answers

A policy finds what a reward pays for, and that is seldom all that was meant (Goodhart's law; Gao et al. 2210.10760).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptsmith.errors import RewardError, TokenizerError
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.rollout.rewards import Prompt, Rewards, Sample

RIGHT = "the right answer"
_LEAST, _TOGETHER = 2.0, 6.5
"""By how many standard errors the reward must have risen and gold fallen: each, and in sum.

The best of many evaluations is partly so by luck, and those after it seem lower. With these limits, a run of 60
evaluations in which nothing changes raises an alarm with a probability of 0.3% if the noises of reward and gold are
independent, and less if they go together, as those of a sound reward do (simulated).
"""
_FEWEST = 8  # held-out answers, for a standard error to mean something
_WINDOW = 3  # evaluations whose mean is the best so far: the mean of one alone is the best by luck, too
_LATEST = (1, 2)  # evaluations that are compared with it: one shows a steep fall first, the mean of two a slow one


# Before training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Answers of one kind. mean, error: of their total scores, and the standard error; parts: means of the rewards;
    example: one of the answers."""

    kind: str
    mean: float
    error: float
    parts: dict[str, float]
    example: str


@dataclass(frozen=True)
class Findings:
    """What a reward gives for each kind of answer, and what about it is suspicious, in words."""

    trials: list[Trial]
    warnings: list[str]

    def record(self) -> dict[str, Any]:
        """Return them as JSON, for run.json."""
        trials = {each.kind: {"mean": each.mean, "error": each.error, "parts": each.parts} for each in self.trials}
        return {"trials": trials, "warnings": self.warnings}

    def lines(self) -> list[str]:
        """Return one line for each kind of answer."""
        width = max(len(each.kind) for each in self.trials)
        return [f"{each.kind:{width}}  {each.mean:10.4g} ± {each.error:.2g}" for each in self.trials]


def try_rewards(
    rewards: Rewards, prompts: Sequence[Prompt], tokenizer: Tokenizer, limit: int, ordinary: Sequence[Sample]
) -> Findings:
    """Score degenerate answers to the prompts, and warn of those that are worth more than ordinary ones.

    limit: the most tokens of an answer. ordinary: answers that the model gives before it is trained, to any prompts.
    Tried are empty answers, copies of the prompt, a token and a phrase that are repeated, and answers of `limit`
    tokens. Where the prompts have a column `answer`, that is tried, too, and should be worth more than the others.
    Raises RewardError where the reward fails for one of them: in training it would, later.
    """
    if not ordinary or not prompts:
        return Findings([], [])
    usual = _trial("ordinary answers", rewards, ordinary)
    trials = [usual]
    for kind, answers in _degenerate(prompts, tokenizer, limit, ordinary).items():
        if answers:
            trials.append(_trial(kind, rewards, answers))
    warnings = [
        f"{each.kind} ({_short(each.example)}): worth {each.mean:.4g}, ordinary answers {usual.mean:.4g}"
        + _blamed(each, usual)
        for each in trials[1:]
        if each.kind != RIGHT and _exceeds(each, usual)
    ]
    for right in trials:
        if right.kind != RIGHT:
            continue
        better = [each for each in trials if each.kind != RIGHT and _exceeds(each, right)]
        warnings += [
            f"{RIGHT} ({_short(right.example)}): worth {right.mean:.4g}, less than {each.kind} with {each.mean:.4g}"
            for each in better
        ]
    if len({(each.mean, each.error) for each in trials}) == 1 and usual.error == 0:
        warnings.append(f"every answer is worth {usual.mean:.4g}: there is nothing to learn")
    return Findings(trials, warnings)


def _degenerate(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, limit: int, ordinary: Sequence[Sample]
) -> dict[str, list[Sample]]:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    special = {*tokenizer.end_ids, *tokenizer.special_tokens()}
    said = [[id for id in sample.ids if id not in special] for sample in ordinary]
    counted = Counter(id for ids in said for id in ids)
    phrases = [ids[:5] for ids in said if len(ids) >= 2] or [[id] for id in counted]

    def answer(prompt: Prompt, ids: Sequence[int], *, ends: bool = True) -> Sample:
        """Return an answer of these ids; one of `limit` tokens has no room for the end token."""
        kept = list(ids)[:limit]
        return Sample(prompt, [*kept, *end][:limit] if ends else kept, tokenizer.decode(kept))

    def repeated(prompt: Prompt, ids: Sequence[int], length: int, *, ends: bool = True) -> Sample:
        return answer(prompt, (list(ids) * (length // len(ids) + 1))[:length], ends=ends)

    found: dict[str, list[Sample]] = {"empty answers": [answer(prompt, []) for prompt in prompts]}
    found["copies of the prompt"] = [answer(prompt, ids) for prompt in prompts if (ids := _copied(prompt, tokenizer))]
    if counted:
        # As long as ordinary answers: what is tried is repetition, not length.
        usual = max(2, round(sum(map(len, said)) / len(said)))
        token = counted.most_common(1)[0][0]
        found["a repeated token"] = [repeated(prompt, [token], usual) for prompt in prompts]
        found["a repeated phrase"] = [
            repeated(prompt, phrases[i % len(phrases)], max(usual, 3 * len(phrases[i % len(phrases)])))
            for i, prompt in enumerate(prompts)
        ]
        # What the model says, on and on.
        found["answers of the greatest length"] = [
            repeated(
                prompt, [id for ids in said[i % len(said) :] + said[: i % len(said)] for id in ids], limit, ends=False
            )
            for i, prompt in enumerate(prompts)
        ]
    found[RIGHT] = [
        answer(prompt, ids)
        for prompt in prompts
        if (ids := _encoded(prompt.columns.get("answer"), tokenizer)) and len(ids) <= limit
    ]
    return found


def _copied(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt's text, of messages the last one's."""
    asked = prompt.prompt
    return _encoded(asked if isinstance(asked, str) else asked[-1].get("content"), tokenizer)


def _encoded(text: Any, tokenizer: Tokenizer) -> list[int]:
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = str(text)
    try:
        return tokenizer.encode(text) if isinstance(text, str) else []
    except TokenizerError:
        return []


def _trial(kind: str, rewards: Rewards, samples: Sequence[Sample]) -> Trial:
    try:
        scores = rewards.score(samples)
    except RewardError as error:
        if kind == "ordinary answers":
            raise
        raise RewardError(f"tried on {kind} before training: {error}") from error
    mean, spread = _mean_and_error(scores.total)
    parts = {name: math.fsum(values) / len(values) for name, values in scores.parts.items()}
    return Trial(kind, mean, spread, parts, samples[0].text)


def _exceeds(one: Trial, other: Trial) -> bool:
    return _sigmas(one.mean - other.mean, math.hypot(one.error, other.error), one.mean) > 2


def _blamed(trial: Trial, usual: Trial) -> str:
    """Return which of several rewards prefer the answers of a trial to ordinary ones."""
    if len(trial.parts) < 2:
        return ""
    blamed = [name for name, mean in trial.parts.items() if mean > usual.parts[name]]
    return f" (because of {', '.join(blamed)})" if blamed else ""


# During training ------------------------------------------------------------------------------------------------------


class GoodhartAlarm:
    """Notices when the reward keeps rising while the quality that it stands for falls.

    gold: the name of the metric that nothing is trained on. Each evaluation gives both for answers to the same held-out
    prompts, in the same order. The latest evaluations are compared with those around the best of gold, prompt by
    prompt, so that easy and hard prompts do not blur the difference. An alarm is raised where gold has fallen and the
    reward has risen by more than the noise of that comparison.
    """

    def __init__(self, gold: str) -> None:
        self.gold = gold
        self.step: int | None = None
        """The step of the first alarm."""
        self.best_step: int | None = None
        """The step of the evaluation with the highest mean of gold."""
        self.best_gold = -math.inf
        self._reference: list[_Evaluation] = []  # the evaluations whose mean of gold is the highest
        self._recent: list[_Evaluation] = []

    def add(self, step: int, proxy: Sequence[float], gold: Sequence[float]) -> str | None:
        """Take the scores of an evaluation. Return the alarm in words if it is the first one.

        Raises ValueError for other numbers of answers than before, or scores that are not finite.
        """
        if len(proxy) != len(gold) or not gold or not all(map(math.isfinite, (*proxy, *gold))):
            raise ValueError(f"{len(proxy)} rewards and {len(gold)} gold scores: equally many finite ones are needed")
        if self._recent and len(gold) != len(self._recent[-1].gold):
            raise ValueError(f"{len(gold)} held-out answers, but {len(self._recent[-1].gold)} at the evaluation before")
        now = _Evaluation(step, list(proxy), list(gold))
        self._recent = [*self._recent, now][-_WINDOW:]
        mean = _mean(now.gold)
        if mean > self.best_gold:
            self.best_step, self.best_gold = step, mean
        if not self._reference or _pooled_mean(self._recent) >= _pooled_mean(self._reference):
            self._reference = list(self._recent)
            return None
        later = [each for each in self._recent if each.step > self._reference[-1].step]
        if self.step is not None or len(gold) < _FEWEST:
            return None
        for latest in _LATEST[: len(later)]:
            risen, fallen = self._since_best(later[-latest:])
            if min(risen.sigmas, -fallen.sigmas) > _LEAST and risen.sigmas - fallen.sigmas > _TOGETHER:
                self.step = step
                return (
                    f"step {step}: the reward rises at the cost of {self.gold}. Since step {self._reference[-1].step} "
                    f"the reward has gone from {risen.before:.4g} to {risen.after:.4g}, and {self.gold} from "
                    f"{fallen.before:.4g} to {fallen.after:.4g} (±{fallen.error:.2g}). {self.gold} was best at step "
                    f"{self.best_step}."
                )
        return None

    def _since_best(self, latest: Sequence[_Evaluation]) -> tuple[_Change, _Change]:
        """Return how the reward and gold have changed since gold was best."""
        return (
            _change([each.proxy for each in self._reference], [each.proxy for each in latest]),
            _change([each.gold for each in self._reference], [each.gold for each in latest]),
        )

    def state(self) -> dict[str, Any]:
        """Return what must be saved to go on, as JSON."""
        return {
            "step": self.step,
            "best_step": self.best_step,
            "best_gold": None if self.best_step is None else self.best_gold,
            "reference": [each.values() for each in self._reference],
            "recent": [each.values() for each in self._recent],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.step, self.best_step = state["step"], state["best_step"]
        self.best_gold = -math.inf if self.best_step is None else state["best_gold"]
        self._reference = [_Evaluation(**values) for values in state["reference"]]
        self._recent = [_Evaluation(**values) for values in state["recent"]]


@dataclass(frozen=True)
class _Evaluation:
    step: int
    proxy: list[float]
    gold: list[float]

    def values(self) -> dict[str, Any]:
        return {"step": self.step, "proxy": self.proxy, "gold": self.gold}


@dataclass(frozen=True)
class _Change:
    """Means before and after, the standard error of their difference, and how many of those the difference is."""

    before: float
    after: float
    error: float
    sigmas: float


def _change(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> _Change:
    """Compare several evaluations with several later ones, prompt by prompt."""
    one, other = ([_mean(scores) for scores in zip(*group, strict=True)] for group in (before, after))
    mean, error = _mean_and_error([b - a for a, b in zip(one, other, strict=True)])
    return _Change(_mean(one), _mean(other), error, _sigmas(mean, error, max(map(abs, (*one, *other)))))


def _pooled_mean(evaluations: Sequence[_Evaluation]) -> float:
    return _mean([_mean(each.gold) for each in evaluations])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is 0 for a single value."""
    mean = _mean(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _sigmas(difference: float, error: float, scale: float) -> float:
    """Return how many standard errors a difference is; one of rounding is none."""
    if abs(difference) <= 1e-9 * abs(scale):
        return 0.0
    return difference / error if error else math.copysign(math.inf, difference)


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 40 else f"{shown[:39]}…{shown[0]}"
