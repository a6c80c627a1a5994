"""RLHF, small: how much reward do PPO, GRPO, DPO and best-of-n gain from equally many answers, at which divergence?

    python benchmarks/alignment/rlhf.py              # writes benchmarks/results/alignment_rlhf.json and its picture
    python benchmarks/alignment/rlhf.py rates        # one seed, learning rates of PPO and GRPO: alignment_rates.json
    python benchmarks/alignment/rlhf.py draw         # the picture again, from the committed results

A small model is pretrained on sentences of movie reviews. Pairs of its own answers, of which that with the better
sentiment is preferred, train a reward model. Then each method is given the same number of answers, scored by it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reviews

import gptsmith
from gptsmith.loading import load_model
from gptsmith.report.figures import GRID, save_png
from gptsmith.run_directory import Run, read_run

PAIRS = 2000  # that the reward model learns from
ANSWERS = 2560  # that each method is given
BATCH = 64  # answers between two updates of PPO and GRPO
PASSES = 2  # of PPO over each answer
POINTS = 5  # of each curve
RATE_ANSWERS = 1024  # that each learning rate is tried with
BEST_OF = 64
METHODS = ("ppo", "grpo", "dpo")
OPTIM: dict[str, dict[str, Any]] = {
    "ppo": {"name": "adamw", "lr": 1e-3, "schedule": "constant"},
    "grpo": {"name": "adamw", "lr": 1e-3, "schedule": "constant"},
    "dpo": {"name": "adamw", "lr": 5e-4, "schedule": "constant"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"kl": 0.05, "passes": PASSES, "value_lr": 1e-3},
    "grpo": {"kl": 0.2},
    "dpo": {"beta": 0.1},
}
RESULT, PICTURE = "alignment_rlhf", reviews.PICTURES / "alignment-rlhf.png"


def prompts_file(out: Path, tokenizer: Any) -> Path:
    train, _ = reviews.split_prompts(tokenizer)
    return reviews.write_rows(out / "prompts.jsonl", [{"prompt": each.prompt} for each in train])


def train(
    name: str,
    start: Run,
    judge: reviews.Judge,
    reward: Run,
    out: Path,
    seed: int,
    answers: int = ANSWERS,
    points: int = POINTS,
    **options: Any,
) -> reviews.Measured:
    """Train a policy by a method of METHODS on `answers` answers that a reward model scores, and measure it."""
    passes = PASSES if name == "ppo" else 1
    steps = answers // BATCH * passes
    measured = reviews.Measured(judge, answers / steps)
    settings: dict[str, Any] = {
        **reviews.QUIET,
        "context": reviews.CONTEXT,
        "steps": steps,
        "eval_every": math.ceil(steps / points),
        "seed": seed,
        "lora": "off",
        "optim": OPTIM[name],
        **OPTIONS.get(name, {}),
        "callbacks": [measured],
        "out": out / name,
        **options,
    }
    shutil.rmtree(settings["out"], ignore_errors=True)
    if name == "dpo":
        written = reviews.sample(judge.reference, judge.tokenizer, train_prompts(judge, answers // 2), 2, seed)
        rows = reviews.write_rows(out / "dpo.jsonl", reviews.pairs(written, judge.scores(written)))
        gptsmith.dpo(start, rows, batch_size=BATCH // 2, val_fraction=0.02, **settings)
        return measured
    method = gptsmith.ppo if name == "ppo" else gptsmith.grpo
    shared = {"batch_size": BATCH, "answer_tokens": reviews.ANSWER_TOKENS, "eval_prompts": 8, "check_rewards": False}
    method(start, prompts_file(out, judge.tokenizer), reward=reward.directory, **(shared | settings))
    return measured


def train_prompts(judge: reviews.Judge, count: int) -> list[Any]:
    """Return `count` prompts for training, from the first again after the last."""
    prompts, _ = reviews.split_prompts(judge.tokenizer)
    return [prompts[i % len(prompts)] for i in range(count)]


def best_of_n(judge: reviews.Judge, seed: int) -> list[reviews.Point]:
    """Return what the best of 1, 2, 4, … answers are worth, from ANSWERS answers to held-out prompts."""
    answers = reviews.sample(judge.reference, judge.tokenizer, judge.prompts[: ANSWERS // BEST_OF], BEST_OF, seed)
    return judge.best_of(answers, BEST_OF)


def one_seed(seed: int) -> dict[str, Any]:
    """Return the curves of all methods."""
    start, out = reviews.base(), reviews.FOLDER / f"rlhf-{seed}"
    judge, reward = judge_of(start, out, seed)

    def beginning() -> dict[str, Any]:
        before, written = judge.point(judge.reference, seed=100 + seed)
        spreads = {"reward_std": statistics.stdev(judge.scores(written)), "gold_std": reviews.spread_of_gold(written)}
        return {
            "reward_model": {
                name: reward.metrics[-1][f"val_{name}"] for name in ("accuracy", "calibration", "length_bias")
            },
            "reference": before.record() | {name: round(value, 4) for name, value in spreads.items()},
            "best of n": [each.record() for each in best_of_n(judge, 200 + seed)],
            "examples": [f"{each.prompt.prompt}{each.text}" for each in written[:3]],
        }

    def trained(name: str) -> dict[str, Any]:
        measured = train(name, start, judge, reward, out, seed)
        return {"curve": [each.record() for each in measured.curve], "examples": measured.examples}

    first = reviews.kept(out / "start.json", beginning)
    parts = {name: reviews.kept(out / f"{name}.json", functools.partial(trained, name)) for name in METHODS}
    before = {name: first["reference"][name] for name in first["best of n"][0]}
    curves = {name: [before, *part["curve"]] for name, part in parts.items()}
    return {
        "seconds": sum(part["seconds"] for part in (first, *parts.values())),
        "reward_model": first["reward_model"],
        "reference": first["reference"],
        "curves": {"best of n": first["best of n"]} | curves,
        "examples": {"reference": first["examples"]} | {name: part["examples"] for name, part in parts.items()},
    }


def judge_of(start: Run, out: Path, seed: int) -> tuple[reviews.Judge, Run]:
    """Train the reward model of a seed, if it is not there, and return it and the judge that uses it."""
    reference, tokenizer = load_model(start.directory)
    place = out / "reward"
    if (place / "report.html").exists():
        return reviews.open_judge(start, read_run(place)), read_run(place)
    rows = reviews.preferences(reference, tokenizer, PAIRS, 300 + seed)
    run = reviews.reward_model(start, rows, place, seed)
    return reviews.open_judge(start, run), run


# The table and the picture --------------------------------------------------------------------------------------------


def gain(point: dict[str, float], seed: dict[str, Any]) -> float:
    """Return how much more reward than the reference a policy has, in standard deviations of the reference's."""
    return float((point["reward"] - seed["reference"]["reward"]) / seed["reference"]["reward_std"])


def table(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds, for each method at its end, and of the best of 64."""
    rows: dict[str, Any] = {}
    for name in ("best of n", *METHODS):
        points = [seed["curves"][name][-1] for seed in seeds]
        rows[name] = {
            "gain": reviews.mean_and_spread([gain(point, seed) for point, seed in zip(points, seeds, strict=True)])
        } | {
            key: reviews.mean_and_spread([point[key] for point in points])
            for key in ("kl", "gold", "perplexity", "length", "distinct")
            if points[0][key] is not None
        }
    reference = [seed["reference"] for seed in seeds]
    rows["reference"] = {
        key: reviews.mean_and_spread([each[key] for each in reference])
        for key in ("reward", "reward_std", "gold", "gold_std", "perplexity", "length", "distinct")
    }
    return rows


def draw(result: dict[str, Any]) -> None:
    """Reward and gold against √KL, a line for each method and seed."""
    figure, axes = reviews.panels(2)
    colors = dict(zip(("best of n", *METHODS), reviews.COLORS, strict=True))
    for name, color in colors.items():
        for i, seed in enumerate(result["seeds"]):
            points = seed["curves"][name]
            x = [math.sqrt(max(0.0, point["kl"])) for point in points]
            style: dict[str, Any] = {"color": color, "linewidth": 1.3, "marker": "o", "markersize": 3}
            label = None if i else {"best of n": "best of n"}.get(name, name.upper())
            axes[0].plot(x, [gain(point, seed) for point in points], label=label, **style)
            axes[1].plot(x, [point["gold"] for point in points], **style)
    axes[0].set_ylabel("reward gained, standard deviations")
    axes[1].set_ylabel("sentiment (gold)")
    axes[0].axhline(2, color=GRID, linewidth=1, zorder=0)
    for each in axes:
        each.set_xlabel("√KL from the reference, nats per answer")
        each.axvline(math.sqrt(10), color=GRID, linewidth=1, zorder=0)
    axes[0].legend(frameon=False, fontsize=8.5)
    save_png(figure, PICTURE)


def rates() -> dict[str, Any]:
    """Return curves of PPO and GRPO at several learning rates, one seed: all weights, and an adapter."""
    start, out = reviews.base(), reviews.FOLDER / "rlhf-0"
    out.mkdir(exist_ok=True)
    judge, reward = judge_of(start, out, 0)
    found: dict[str, Any] = {}
    adapter, full = {"lora": "on"}, {"lora": "off"}
    for what, options, rates in (
        ("all weights", full, (1e-4, 3e-4, 1e-3, 3e-3)),
        ("adapter", adapter, (1e-3, 3e-3, 1e-2)),
    ):
        for name, lr in itertools.product(("grpo", "ppo"), rates):
            optim = {"name": "adamw", "lr": lr, "schedule": "constant"}

            def curve(name: str = name, options: dict[str, Any] = options | {"optim": optim}) -> dict[str, Any]:
                measured = train(name, start, judge, reward, out / "rates", 0, RATE_ANSWERS, 1, **options)
                return {"curve": [each.record() for each in measured.curve]}

            print(name, what, lr, flush=True)
            place = out / f"rates-{name}-{options['lora']}-{lr:g}.json"
            found.setdefault(name, {})[f"{what}, {lr:g}"] = reviews.kept(place, curve)["curve"]
    return {"answers": RATE_ANSWERS, "pairs": PAIRS, "curves": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="methods", choices=("methods", "rates", "draw"))
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    import machine

    if a.what == "draw":
        draw(json.loads((machine.RESULTS / f"{RESULT}.json").read_text()))
        return
    if a.what == "rates":
        print(machine.save("alignment_rates", rates()))
        return
    seeds = [one_seed(seed) for seed in range(a.seeds)]
    settings = {"answers": ANSWERS, "pairs": PAIRS, "optim": OPTIM, "options": OPTIONS}
    result = {**settings, "table": table(seeds), "seeds": seeds}
    print(json.dumps(result["table"], indent=1))
    print(machine.save(RESULT, result))
    draw(result)


if __name__ == "__main__":
    main()
