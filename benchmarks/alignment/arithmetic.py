"""What GRPO with a verifiable reward gains on arithmetic, and what each of its choices is worth.

    python benchmarks/alignment/arithmetic.py                # writes benchmarks/results/grpo_arithmetic.json

A character-level model of 0.4 million parameters reads sums of numbers below 100, of which half are wrong, and
writes answers like these. GRPO then samples answers; a right one is rewarded with 1. Problems that are measured occur
neither in the text nor in the prompts. Each variant differs from the default in one choice. pass@k: the probability
that one of k samples at temperature 1 is right, estimated without bias from 16 samples of each problem (Chen et al.
2021, 2107.03374).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import gptsmith
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.text import generate_texts

HELD_OUT = 400
ERRORS = 0.5  # the share of wrong answers in the text
SAMPLES = 16
MODEL = {"family": "qwen3", "num_hidden_layers": 4, "hidden_size": 96, "num_attention_heads": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "default: divided by the batch's spread, token mean, clip-higher": {},
    "divided by the group's spread": {"scale": "group"},
    "not divided by a spread": {"scale": "none"},
    "mean over answers of their means": {"normalize": "sequence"},
    "Dr. GRPO: no spread, constant length": {"variant": "dr_grpo"},
    "no clip-higher": {"clip_high": 0.2},
    "CISPO": {"variant": "cispo"},
    "RLOO": {"variant": "rloo"},
}


def exact(prompts: list[Any], completions: list[str], answer: list[str]) -> list[float]:
    """Return 1 for each right answer."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def written(answer: str, rng: random.Random) -> str:
    """Return the answer, or one that is wrong by up to ten."""
    wrong = rng.random() < ERRORS
    return str(max(0, int(answer) + rng.choice((-1, 1)) * rng.randint(1, 10))) if wrong else answer


def prepare(place: Path) -> list[dict[str, str]]:
    """Write the pretraining text and the prompts; return the held-out problems."""
    sums = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(sums)
    rows = [{"prompt": f"\n{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    held_out, prompts = rows[:HELD_OUT], rows[HELD_OUT:]
    rng = random.Random(1)
    text = [row["prompt"] + written(row["answer"], rng) for _ in range(8) for row in rng.sample(prompts, len(prompts))]
    (place / "text.txt").write_text("".join(text))
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (place / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return held_out


def pass_at(counts: list[int], k: int) -> float:
    """Return the mean over problems of the probability that k of the 16 samples have a right one."""
    return statistics.mean(1 - math.comb(SAMPLES - right, k) / math.comb(SAMPLES, k) for right in counts)


def measure(model: Any, problems: list[dict[str, str]]) -> dict[str, float]:
    """Return pass@1 and pass@16."""
    policy, tokenizer = gptsmith.load(model)
    engine = Engine(policy, vocab_size=tokenizer.vocab_size, max_batch=64, max_batch_tokens=1024)
    params = SamplingParams(n=SAMPLES, max_tokens=5, temperature=1.0, seed=7, stop=("\n",))
    found = generate_texts(engine, tokenizer, [row["prompt"] for row in problems], params)
    counts = [sum(text.strip() == row["answer"] for text in texts) for texts, row in zip(found, problems, strict=True)]
    return {"pass@1": pass_at(counts, 1), f"pass@{SAMPLES}": pass_at(counts, SAMPLES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1, help="0 was for choosing rate and batch")
    parser.add_argument("--pretraining", type=int, default=1200, help="updates")
    parser.add_argument("--steps", type=int, default=150, help="updates of GRPO")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="only the first so many")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    began, rows, starts = time.monotonic(), [], []
    quiet: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "keep_checkpoints": 1}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        problems = prepare(place)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            base = gptsmith.fit(
                place / "text.txt",
                out=place / f"base-{seed}",
                steps=options.pretraining,
                context=32,
                batch_size=32,
                model=MODEL,
                seed=seed,
                eval_every=options.pretraining,
                compile="off",
                **quiet,
            )
            starts.append({"seed": seed, **measure(base, problems)})
            print(json.dumps(starts[-1]), f"{time.monotonic() - began:.0f} s", flush=True)
            for name, choices in list(VARIANTS.items())[: options.variants]:
                run = gptsmith.grpo(
                    base,
                    place / "prompts.jsonl",
                    val=str(place / "held-out.jsonl"),
                    reward=exact,
                    out=place / f"grpo-{seed}-{name}",
                    steps=options.steps,
                    eval_every=30,
                    eval_prompts=200,
                    batch_size=128,
                    answer_tokens=5,
                    stop=("\n",),
                    lora="off",
                    optim={"name": "adamw", "lr": options.lr},
                    check_rewards=False,
                    seed=seed,
                    **quiet,
                    **choices,
                )
                dead = [row["dead_groups"] for row in run.metrics if "dead_groups" in row]
                tenth = max(1, len(dead) // 10)
                rows.append(
                    {
                        "variant": name,
                        "seed": seed,
                        **measure(run.directory / "last", problems),
                        "dead groups at first": statistics.mean(dead[:tenth]),
                        "dead groups at last": statistics.mean(dead[-tenth:]),
                        "gap": max(row["gap"] for row in run.metrics if "gap" in row),
                        "curve": [[row["step"], row["val_reward"]] for row in run.metrics if "val_reward" in row],
                    }
                )
                shown = {key: value for key, value in rows[-1].items() if key != "curve"}
                print(json.dumps(shown), f"{time.monotonic() - began:.0f} s", flush=True)
    before = statistics.mean(start["pass@1"] for start in starts)
    print(f"before: pass@1 {before:.3f}, pass@16 {statistics.mean(s['pass@16'] for s in starts):.3f}")
    for name in list(VARIANTS)[: options.variants]:
        mine = [row for row in rows if row["variant"] == name]
        gains = [row["pass@1"] - start["pass@1"] for row, start in zip(mine, starts, strict=True)]
        print(
            f"{name}: pass@1 {statistics.mean(r['pass@1'] for r in mine):.3f}, gain {min(gains):.3f} to "
            f"{max(gains):.3f}, pass@16 {statistics.mean(r['pass@16'] for r in mine):.3f}"
        )
    if not options.no_save:
        from machine import save

        seconds = round(time.monotonic() - began)
        print(save("grpo_arithmetic", {"options": vars(options), "before": starts, "runs": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
