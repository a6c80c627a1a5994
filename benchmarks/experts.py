"""A mixture of experts against a dense model of equal active parameters: python benchmarks/experts.py [--save]

Both train on enwik8 for the same time of updates on the same machine, one after the other, eager against eager, for
each duration and seed. The sparse model has eight experts of half the dense model's feed-forward width, two a token:
what a token passes through has the same size. How many steps fit into the time is taken from short runs before,
alternated; the time that the updates really took is in the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

SHARED = ["--model.num-hidden-layers", "4", "--model.hidden-size", "192", "--model.num-attention-heads", "6"]
SHARED += ["--context", "128", "--batch-size", "32", "--sample-tokens", "0", "--compile", "off", "--log-every", "5"]
MODELS = {
    "dense": ["--model.family", "qwen3", "--model.intermediate-size", "512"],
    "experts": [
        *("--model.family", "qwen3_moe", "--model.intermediate-size", "256"),
        *("--model.num-experts", "8", "--model.num-experts-per-tok", "2"),
    ],
}


def gptsmith(*arguments: str) -> None:
    command = [sys.executable, "-m", "gptsmith", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def train(name: str, steps: int, seed: int, tokenizer: Path, eval_tokens: int = 400_000) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        options = ["--steps", str(steps), "--eval-every", str(steps), "--eval-tokens", str(eval_tokens)]
        options += ["--seed", str(seed), "--tokenizer", str(tokenizer), *SHARED, *MODELS[name]]
        gptsmith("train", "enwik8", "--out", str(out), *options)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((out / "run.json").read_text())
    speeds = sorted(row["tokens_per_second"] for row in rows if "loss" in row)
    return {
        "model": name,
        "seed": seed,
        "parameters": record["parameters"],
        "steps": steps,
        "update_seconds": rows[-1]["update_time"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "val_loss": round(rows[-1]["val_loss"], 4),
        "expert_load_max": next((row.get("expert_load_max") for row in reversed(rows) if "loss" in row), None),
    }


def steps_per_second(tokenizer: Path, trials: int = 3) -> dict[str, float]:
    """Of each model's updates: the best of several short runs, alternated, so that both meet the same machine."""
    best = dict.fromkeys(MODELS, 0.0)
    for _ in range(trials):
        for name in MODELS:
            best[name] = max(best[name], 20 / train(name, 20, 1337, tokenizer, 4096)["update_seconds"])
    return best


def compare(durations: list[float], seeds: int, tokenizer: Path) -> tuple[float, list[dict[str, Any]]]:
    """Updates a second with experts, as a share of the dense model's, and all runs."""
    speeds = steps_per_second(tokenizer)
    ratio = speeds["experts"] / speeds["dense"]
    print(f"updates: {ratio:.0%} as many a second as the dense model", flush=True)
    runs = []
    for seconds in durations:
        for seed in range(1337, 1337 + seeds):
            for name in MODELS:
                runs.append({"seconds": seconds, **train(name, round(seconds * speeds[name]), seed, tokenizer)})
                print(json.dumps(runs[-1]), flush=True)
    return ratio, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[60, 300], help="training times of each model")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each model and time")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/experts.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Path(directory) / "tokenizer"
        gptsmith("tokenizer", "train", "enwik8", "--kind", "bpe", "--vocab-size", "1024", "--out", str(tokenizer))
        ratio, runs = compare(arguments.seconds, arguments.seeds, tokenizer)
    print("\n| seconds | model | steps | tokens/s | validation loss |\n|---|---|---|---|---|")
    for seconds in arguments.seconds:
        for name in MODELS:
            same = [run for run in runs if (run["seconds"], run["model"]) == (seconds, name)]
            speed = sorted(run["tokens_per_second"] for run in same)[len(same) // 2]
            losses = " · ".join(f"{run['val_loss']:.3f}" for run in same)
            print(f"| {seconds:g} | {name} | {same[0]['steps']:,} | {speed:,.0f} | {losses} |")
    if arguments.save:
        print(machine.save("experts", {"speed_ratio": round(ratio, 3), "runs": runs}))


if __name__ == "__main__":
    main()
