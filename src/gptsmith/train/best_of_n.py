"""Best-of-n and rejection sampling: of n answers to each prompt, keep the best by a reward.

    result = best_of_n("runs/chat", "task:arithmetic", Path("best.jsonl"), BestOfNOptions(reward=("module:function",)))
    print(result.summary())

The best of n answers is the simplest use of a reward, and a baseline for every other: it changes no weights, and its
distribution is within log n - (n - 1) / n nats of the model's own (Stiennon et al. 2020, 2009.01325). Training on the
answers that a reward accepts is rejection sampling (Touvron et al. 2023, 2307.09288).

All answers with their scores go into a second file as they are made. The same command continues it after a stop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptsmith.errors import DataError, UsageError
from gptsmith.log import JsonLines, note, progress
from gptsmith.storage import atomic_file

if TYPE_CHECKING:
    from gptsmith.model.transformer import Transformer
    from gptsmith.tasks.text_rewards import RewardFunction
    from gptsmith.tokenizer import Tokenizer
    from gptsmith.train.prompts import Prompt, Prompts
    from gptsmith.train.rollout.rewards import Rewards

ANSWERS_AT_ONCE = 64  # that are sampled and scored between two writes
_UNRELATED = ("reward", "reward_weights", "keep", "min_reward", "unfinished", "limit", "device", "bad_rows", "too_long")
"""Options that do not change the answers and scores, or that the rewards and the prompts record."""


@dataclass(frozen=True)
class BestOfNOptions:
    """What is sampled, and what is kept."""

    reward: tuple[str, ...] = ()
    """What scores answers: module:function, file.py:function, the directory of a reward model, or judge:URL. Give it
    several times to add several rewards up."""
    reward_weights: str | None = None
    """Weight of each reward, such as 1,0.2 (default: 1 each)."""
    n: int = 16
    """Number of answers to each prompt."""
    keep: int = 1
    """Number of different answers to keep for each prompt, the best first."""
    min_reward: float | None = None
    """Keep only answers with at least this reward (rejection sampling)."""
    unfinished: Literal["drop", "keep"] = "drop"
    """What to do with answers that were cut off at --answer-tokens: training on them teaches to end there."""
    answer_tokens: int = 128
    """Maximum length of an answer, in tokens."""
    stop: tuple[str, ...] = ()
    """An answer ends before this text, besides at the model's end tokens."""
    temperature: float = 1.0
    """Temperature of sampling."""
    limit: int | None = None
    """Use only so many prompts, from the first."""
    seed: int = 1337
    """Seed of the answers."""
    prompt_form: Literal["auto", "chat", "text"] = "auto"
    """auto: messages are written by the chat template, texts as they are. chat: a text is a message of the user. text:
    a prompt of one message is plain text."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows without a usable prompt: stop at the first, or leave them out and count them."""
    too_long: Literal["skip", "error"] = "skip"
    """What to do with prompts that leave no room for an answer: leave them out and count them, or stop."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        for name in ("n", "keep", "answer_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
        if self.keep > self.n:
            raise UsageError(f"--keep {self.keep} is more than --n {self.n}.")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"--temperature must be above 0, not {self.temperature}: otherwise all answers are equal.")
        if self.min_reward is not None and not math.isfinite(self.min_reward):
            raise UsageError(f"--min-reward must be a number, not {self.min_reward}.")


@dataclass(frozen=True)
class BestOfN:
    """What came of it. path: the best answers, one on a line. samples: all answers.

    num_kept: answers. num_without: prompts without an answer that was kept. num_unfinished: answers that were cut off.
    curve: k -> the mean reward of the best of k.
    """

    path: Path
    samples: Path
    num_prompts: int
    num_kept: int
    num_without: int
    num_unfinished: int
    curve: dict[int, float]

    def summary(self) -> str:
        """Return the numbers in words."""
        n = max(self.curve)
        best = ", ".join(f"of {k} {reward:.4g}" for k, reward in self.curve.items())
        nats = math.log(n) - (n - 1) / n
        lines = [
            f"{self.num_prompts:,} prompts, {n} answers to each; {self.num_unfinished:,} answers were cut off",
            f"mean reward of the best {best} (KL divergence from the model at most {nats:.2f} nats)",
            f"kept {self.num_kept:,} answers"
            + (f"; {self.num_without:,} prompts have none that qualifies" if self.num_without else ""),
        ]
        return "\n".join(lines)


def best_of_n(
    model: str | Path,
    prompts: str | Path,
    out: Path,
    options: BestOfNOptions,
    *,
    functions: Sequence[str | RewardFunction] = (),
) -> BestOfN:
    """Sample answers to all prompts, score them, and write the best ones to `out`, as rows that fine-tuning reads.

    functions: the rewards, where they are not all named in `options.reward`. All answers are in
    `out` with the suffix .samples.jsonl; what is in there already is not made again.
    Raises UsageError for options that do not fit, or another job's file; DataError if no answer is kept; RewardError.
    """
    from gptsmith.loading import load_model
    from gptsmith.runtime import choose_device
    from gptsmith.train.config import PromptConfig, RunConfig
    from gptsmith.train.prompts import PromptFiles
    from gptsmith.train.rollout.rewards import open_rewards
    from gptsmith.train.rollout.rollout import weights_hash

    specs = list(functions or options.reward)
    weights = None if options.reward_weights is None else _numbers(options.reward_weights)
    method = PromptConfig(prompt_form=options.prompt_form, bad_rows=options.bad_rows, too_long=options.too_long)
    config = RunConfig(method=method).replace(val_fraction=0.0)
    files = PromptFiles.open(prompts, config)
    device = choose_device(options.device)
    policy, tokenizer = load_model(model, device=device)
    log = JsonLines(samples_path(out))
    rewards = open_rewards(specs, weights, tokenizer=tokenizer, device=device)
    context = min(policy.config.max_position_embeddings, rewards.longest or 1 << 62)
    if options.answer_tokens >= context:
        raise UsageError(
            f"--answer-tokens {options.answer_tokens} leaves no room for a prompt in the context of {context} tokens "
            "that the model and the rewards can read."
        )
    found = files.prepare(config, tokenizer).within(
        context, answer_tokens=options.answer_tokens, on_long=options.too_long
    )
    chosen = found.train[: options.limit]
    stop = (*options.stop, *_plain_stops(found, tokenizer))
    job = {
        "weights": weights_hash(policy),
        "prompts": found.fingerprint,
        "rewards": rewards.identity(),
        **{name: value for name, value in asdict(options).items() if name not in _UNRELATED},
        "stop": list(stop),
    }
    rows = _continued(log, job)
    sampled = _Job(log, rows, found.train, rewards, policy, tokenizer, options, stop, context)
    try:
        sampled.run(len(chosen))
    except KeyboardInterrupt:
        done = sum(i in rows for i in range(len(chosen)))
        note(f"{done:,} of {len(chosen):,} prompts are answered; the same command continues")
        raise
    return _choose(out, log.path, [(prompt, rows[i]) for i, prompt in enumerate(chosen)], options)


def samples_path(out: Path) -> Path:
    """Return the path of the file with all answers."""
    return out.with_suffix(".samples.jsonl")


def _numbers(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(f"--reward-weights {text}: write numbers with commas between them, such as 1,0.2.") from None


def _plain_stops(prompts: Prompts, tokenizer: Any) -> tuple[str, ...]:
    """Return the texts that end an answer in a chat without a template of its own."""
    from gptsmith.tokenizer.chat import ChatTemplate

    template = ChatTemplate(tokenizer)
    is_chat = any(not isinstance(prompt.prompt, str) for prompt in prompts.train)
    return template.stop if template.plain and is_chat else ()


def _continued(log: JsonLines, job: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the rows that the file has, by number. Raise UsageError where they are another job's."""
    from gptsmith.train.rollout.rewards import changes

    rows = log.read()
    if not rows:
        log.append_durably({"job": job})
        return {}
    before = rows.pop(0).get("job")
    if not isinstance(before, dict):
        raise UsageError(f"{log.path} is there, and no file of answers. Choose another --out.")
    now = json.loads(json.dumps(job))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            reason = f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
            if name in ("weights", "prompts"):
                reason = f"the {'weights of the model' if name == 'weights' else name} differ"
            elif name == "rewards":
                reason = "; ".join(changes(before.get(name) or [], now[name]))
            raise UsageError(
                f"{log.path} has the answers of another job: {reason}. Choose another --out, or delete it."
            )
    if rows:
        note(f"{log.path} has the answers to {len(rows):,} prompts already")
    return {row["index"]: row for row in rows}


@dataclass(frozen=True)
class _Job:
    """What is sampled, and the rows that are there already, by the number of the prompt."""

    log: JsonLines
    rows: dict[int, dict[str, Any]]
    prompts: Sequence[Prompt]
    rewards: Rewards
    policy: Transformer
    tokenizer: Tokenizer
    options: BestOfNOptions
    stop: Sequence[str]
    context: int

    def run(self, number: int) -> None:
        """Add what is missing of the first `number` rows to the file and to `rows`.

        Prompts are always sampled with the same neighbors, so that the answers do not depend on where it was stopped.
        """
        at_once = max(1, ANSWERS_AT_ONCE // self.options.n)
        chunks = [range(start, min(start + at_once, len(self.prompts))) for start in range(0, number, at_once)]
        missing = [chunk for chunk in chunks if any(i not in self.rows for i in chunk)]
        with progress(sum(map(len, missing)), "Answering") as bar:
            for chunk in missing:
                for i, row in zip(chunk, self._answered(chunk), strict=True):
                    if i not in self.rows:
                        self.log.append_durably(row)
                        self.rows[i] = row
                    bar.advance(1)

    def _answered(self, chunk: range) -> list[dict[str, Any]]:
        from gptsmith.train.rollout.rewards import Sample
        from gptsmith.train.rollout.rollout import sample_answers

        n = self.options.n
        answers = sample_answers(
            self.policy,
            self.tokenizer,
            [self.prompts[i] for i in chunk],
            per_prompt=n,
            answer_tokens=self.options.answer_tokens,
            context=self.context,
            temperature=self.options.temperature,
            stop=self.stop,
            seed=self.options.seed,
            first_group=chunk.start,
        )
        assert answers is not None
        scores = self.rewards.score([Sample(each.prompt, each.ids, each.text) for each in answers])
        rows = []
        for i, start in zip(chunk, range(0, len(answers), n), strict=True):
            part = slice(start, start + n)
            rows.append(
                {
                    "index": i,
                    "place": self.prompts[i].place,
                    "completions": [each.text for each in answers[part]],
                    "rewards": scores.total[part],
                    "parts": {name: values[part] for name, values in scores.parts.items()},
                    "tokens": [len(each.ids) for each in answers[part]],
                    "finished": [each.ended for each in answers[part]],
                }
            )
        return rows


def _choose(
    out: Path, samples: Path, answered: Sequence[tuple[Prompt, dict[str, Any]]], options: BestOfNOptions
) -> BestOfN:
    """Write the best answers, and return what came of it. Raise DataError where none is kept."""
    kept = [list(_kept(row, options)) for _, row in answered]
    num_unfinished = sum(row["finished"].count(False) for _, row in answered)
    number = sum(map(len, kept))
    if not number:
        cut = f"{num_unfinished:,} answers were cut off at --answer-tokens; --unfinished keep keeps them too."
        raise DataError(
            f"no answer is kept. {cut if num_unfinished else ''} All answers are in {samples}, and are not made again "
            "when you choose otherwise."
        )
    with atomic_file(out, "w") as file:
        for (prompt, row), places in zip(answered, kept, strict=True):
            for i in places:
                written = {
                    "prompt": prompt.prompt,
                    "completion": row["completions"][i],
                    "reward": row["rewards"][i],
                    "rewards": {name: values[i] for name, values in row["parts"].items()},
                    "all_rewards": row["rewards"],
                    "columns": prompt.columns,
                    **({"tools": list(prompt.tools)} if prompt.tools else {}),
                }
                file.write(json.dumps(written, ensure_ascii=False, default=str) + "\n")
    rewards = [row["rewards"] for _, row in answered]
    powers = [1 << i for i in range(options.n.bit_length()) if 1 << i < options.n]
    curve = {k: math.fsum(best_of_k(each, k) for each in rewards) / len(rewards) for k in [*powers, options.n]}
    return BestOfN(out, samples, len(answered), number, kept.count([]), num_unfinished, curve)


def _kept(row: Mapping[str, Any], options: BestOfNOptions) -> Iterator[int]:
    """Yield which answers are kept, the best first: different ones, and of equal rewards the first."""
    seen: set[str] = set()
    rewards, texts = row["rewards"], row["completions"]
    for i in sorted(range(len(texts)), key=lambda i: -rewards[i]):
        too_low = options.min_reward is not None and rewards[i] < options.min_reward
        dropped = options.unfinished == "drop" and not row["finished"][i]
        if too_low or dropped or not texts[i].strip() or texts[i] in seen:
            continue
        seen.add(texts[i])
        yield i
        if len(seen) == options.keep:
            return


def best_of_k(rewards: Sequence[float], k: int, values: Sequence[float] | None = None) -> float:
    """Return the expected reward of the best of `k` of the answers, drawn without replacement.

    values: another number for each answer, whose expectation is returned instead (the best is still that by reward).
    It estimates the best of k answers without bias (as pass@k does: Chen et al. 2021, 2107.03374).
    """
    n, found = len(rewards), rewards if values is None else values
    ranked = sorted(range(n), key=rewards.__getitem__)
    return math.fsum(found[i] * math.comb(rank, k - 1) for rank, i in enumerate(ranked)) / math.comb(n, k)
