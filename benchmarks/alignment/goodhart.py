"""Goodhart's law, small: when does the score that was meant fall, while the score of a reward model rises?

    python benchmarks/alignment/goodhart.py        # writes benchmarks/results/alignment_goodhart.json and its picture
    python benchmarks/alignment/goodhart.py draw     # the picture again, from the committed results

Proxies are reward models from 500, 2,000 and 8,000 pairs of a small model's own answers, and from 2,000 noisy ones.
Gold, which says which answer of a pair is preferred, is a lexicon of sentiment. Best-of-n and GRPO optimize the
proxies. Gold is fitted as in Gao et al. 2022 (2210.10760), d being the square root of the divergence:
d (alpha - beta d) for best-of-n, and d (alpha - beta log d) for reinforcement learning.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import reviews
from rlhf import prompts_file

import gptsmith
from gptsmith.report.figures import save_png
from gptsmith.run_directory import Run
from gptsmith.train.rollout.rollout import Rollout


@dataclass(frozen=True)
class Proxy:
    """What a reward model learns from. noise: the share of pairs that are turned round."""

    pairs: int
    passes: int = 1
    noise: float = 0.0


PROXIES = {
    "500 pairs": Proxy(500, passes=4),
    "2,000 pairs, 30% turned round": Proxy(2000, noise=0.3),
    "2,000 pairs": Proxy(2000),
    "8,000 pairs": Proxy(8000),
}
RATE = {"name": "adamw", "lr": 1e-3}  # of the reward models
BEST_OF, GROUPS = 256, 16
UPDATES, POINTS = 40, 8
GRPO: dict[str, Any] = {
    "kl": 0.001,
    "batch_size": 64,
    "optim": {"name": "adamw", "lr": 1e-3, "schedule": "constant"},
}
COLORS = ("#c4500c", "#8a6d3b", "#1f6fb4", "#2f7d4f")
RESULT, PICTURE = "alignment_goodhart", reviews.PICTURES / "alignment-goodhart.png"


def preferences(judge: reviews.Judge, seed: int) -> list[dict[str, str]]:
    """Return as many pairs as the largest proxy learns from. The others learn from the first of them."""
    most = max(each.pairs for each in PROXIES.values())
    return reviews.preferences(judge.reference, judge.tokenizer, most, 1000 + seed, group=4)


def turned(rows: Sequence[dict[str, str]], noise: float, seed: int) -> list[dict[str, str]]:
    """Return the pairs, each with probability `noise` the wrong way round."""
    rng = random.Random(seed)
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < noise else row for row in rows
    ]


def optimize(start: Run, proxy: Run, judge: reviews.Judge, out: Path, seed: int) -> list[reviews.Point]:
    """Train a policy on a proxy by GRPO with hardly any penalty on the divergence, and return its curve."""
    shutil.rmtree(out, ignore_errors=True)
    measured = reviews.Measured(judge, GRPO["batch_size"])
    gptsmith.grpo(
        start,
        prompts_file(out.parent, judge.tokenizer),
        reward=proxy.directory,
        answer_tokens=reviews.ANSWER_TOKENS,
        eval_prompts=8,
        check_rewards=False,
        context=reviews.CONTEXT,
        steps=UPDATES,
        eval_every=math.ceil(UPDATES / POINTS),
        lora="off",
        seed=seed,
        callbacks=[measured],
        out=out,
        **(reviews.QUIET | GRPO),
    )
    return measured.curve


def one_seed(seed: int) -> dict[str, Any]:
    """Return the curves of all proxies."""
    start, out = reviews.base(), reviews.FOLDER / f"goodhart-{seed}"
    judge = reviews.open_judge(start, "sentiment")
    rows = reviews.kept(out / "pairs.json", lambda: {"rows": preferences(judge, seed)})["rows"]

    @functools.cache
    def pool() -> list[Rollout]:
        return reviews.sample(judge.reference, judge.tokenizer, judge.prompts[:GROUPS], BEST_OF, 500 + seed)

    def optimized(name: str, proxy: Proxy) -> dict[str, Any]:
        place = out / f"proxy-{name}"
        shutil.rmtree(place, ignore_errors=True)
        learned = turned(rows[: proxy.pairs], proxy.noise, seed)
        run = reviews.reward_model(start, learned, place, seed, epochs=proxy.passes, optim=RATE)
        by_proxy = reviews.open_judge(start, run)
        before, _ = by_proxy.point(by_proxy.reference, seed=100 + seed)
        curve = [before, *optimize(start, run, by_proxy, out / f"grpo-{name}", seed)]
        return {
            "accuracy": run.metrics[-1]["val_accuracy"],
            "correlation": round(float(np.corrcoef(by_proxy.scores(pool()), reviews.gold(pool()))[0, 1]), 4),
            "best of n": [each.record() for each in by_proxy.best_of(pool(), BEST_OF)],
            "grpo": [each.record() for each in curve],
        }

    def by_gold() -> dict[str, Any]:
        return {"best of n": [each.record() for each in judge.best_of(pool(), BEST_OF)]}

    proxies = {
        name: reviews.kept(out / f"{name}.json", functools.partial(optimized, name, proxy))
        for name, proxy in PROXIES.items()
    }
    return {"proxies": proxies, "gold": reviews.kept(out / "gold.json", by_gold)}


# Fits and the picture -------------------------------------------------------------------------------------------------


def basis(kind: str, d: np.ndarray) -> np.ndarray:
    """Return the two functions whose sum with weights alpha and -beta is fitted: (points, 2)."""
    second = d * d if kind == "best of n" else d * np.log(np.maximum(d, 1e-9))
    return np.stack([d, -second], axis=1)


def fit(kind: str, seeds: Sequence[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Fit gold's rise above the reference to all seeds. peak: the d at which the fit is highest; None if
    that is not within what was measured."""
    d: list[float] = []
    rise: list[float] = []
    for seed in seeds:
        points = seed["proxies"][name][kind]
        d += [math.sqrt(max(0.0, point["kl"])) for point in points[1:]]
        rise += [point["gold"] - points[0]["gold"] for point in points[1:]]
    x, y = basis(kind, np.array(d)), np.array(rise)
    (alpha, beta), *_ = np.linalg.lstsq(x, y, rcond=None)
    residual = y - x @ np.array([alpha, beta])
    peak = math.inf
    if beta > 0:
        peak = alpha / (2 * beta) if kind == "best of n" else math.exp(min(alpha / beta - 1, 50))
    return {
        "alpha": round(float(alpha), 4),
        "beta": round(float(beta), 4),
        "r2": round(float(1 - residual.var() / y.var()), 3),
        "peak": round(float(peak), 2) if peak < max(d) else None,
        "largest_d": round(max(d), 2),
    }


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return fits, and how far proxy and gold part: gold at its highest and at the end, means over the seeds."""
    found: dict[str, Any] = {}
    for name in PROXIES:
        of = [seed["proxies"][name] for seed in seeds]
        rows: dict[str, Any] = {
            "accuracy": reviews.mean_and_spread([each["accuracy"] for each in of]),
            "correlation": reviews.mean_and_spread([each["correlation"] for each in of]),
        }
        for kind in ("best of n", "grpo"):
            means = [statistics.fmean(each[kind][i]["gold"] for each in of) for i in range(len(of[0][kind]))]
            best = max(range(len(means)), key=means.__getitem__)
            last = [each[kind][-1] for each in of]
            rows[kind] = fit(kind, seeds, name) | {
                "by_seed": [fit(kind, [seed], name) for seed in seeds],
                "gold_start": round(means[0], 4),
                "gold_best": round(means[best], 4),
                "d_best": round(statistics.fmean(math.sqrt(max(0, each[kind][best]["kl"])) for each in of), 2),
                "gold_end": reviews.mean_and_spread([each["gold"] for each in last]),
                "reward_end": reviews.mean_and_spread([each["reward"] for each in last]),
                "perplexity_end": reviews.mean_and_spread([each["perplexity"] for each in last]),
            }
        found[name] = rows
    return found


def draw(result: dict[str, Any]) -> None:
    """Gold against √KL: points of all seeds, and the fits."""
    figure, axes = reviews.panels(2)
    for axis, kind in zip(axes, ("best of n", "grpo"), strict=True):
        for name, color in zip(PROXIES, COLORS, strict=True):
            for seed in result["seeds"]:
                points = seed["proxies"][name][kind]
                x = [math.sqrt(max(0.0, point["kl"])) for point in points]
                axis.plot(x, [each["gold"] for each in points], color=color, linewidth=0, marker="o", markersize=3)
            fitted = result["summary"][name][kind]
            d = np.linspace(1e-3, fitted["largest_d"], 200)
            y = fitted["gold_start"] + basis(kind, d) @ np.array([fitted["alpha"], fitted["beta"]])
            axis.plot(d, y, color=color, linewidth=1.5, label=name)
        axis.set_xlabel("√KL from the reference, nats per answer")
        axis.set_title("best of n" if kind == "best of n" else "GRPO", fontsize=9.5)
    axes[0].set_ylabel("sentiment (gold)")
    axes[0].legend(frameon=False, fontsize=8.5)
    save_png(figure, PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="proxies", choices=("proxies", "draw"))
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    import machine

    if a.what == "draw":
        draw(json.loads((machine.RESULTS / f"{RESULT}.json").read_text()))
        return
    seeds = [one_seed(seed) for seed in range(a.seeds)]
    result = {"grpo": GRPO, "updates": UPDATES, "summary": summary(seeds), "seeds": seeds}
    print(json.dumps(result["summary"], indent=1))
    print(machine.save(RESULT, result))
    draw(result)


if __name__ == "__main__":
    main()
