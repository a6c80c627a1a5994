"""A mixture of experts against a dense model of equal active parameters: python benchmarks/experts.py [--save]

Both train on enwik8's bytes for the same wall time on the same machine, one after the other. The sparse model has eight
experts of half the dense model's feed-forward width, two a token: what a token passes through has the same size.
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
SHARED += ["--eval-tokens", "400000", "--tokenizer", "bpe", "--vocab-size", "1024"]
MODELS = {
    "dense": ["--model.family", "qwen3", "--model.intermediate-size", "512"],
    "experts": [
        *("--model.family", "qwen3_moe", "--model.intermediate-size", "256"),
        *("--model.num-experts", "8", "--model.num-experts-per-tok", "2"),
    ],
}


def train(name: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "-m", "gptsmith", "train", "enwik8", "--out", str(out), "--steps", str(steps)]
        command += ["--eval-every", str(steps), *SHARED, *MODELS[name]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((out / "run.json").read_text())
    speeds = sorted(row["tokens_per_second"] for row in rows if "loss" in row)
    return {
        "model": name,
        "parameters": record["parameters"],
        "steps": steps,
        "update_seconds": rows[-1]["update_time"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "val_loss": round(rows[-1]["val_loss"], 4),
        "expert_load_max": next((row.get("expert_load_max") for row in reversed(rows) if "loss" in row), None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="training time of each model")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/experts.json")
    arguments = parser.parse_args()
    runs = []
    for name in MODELS:
        speed = train(name, 20)["update_seconds"] / 20
        runs.append(train(name, round(arguments.seconds / speed)))
        print(json.dumps(runs[-1]), flush=True)
    dense, experts = runs
    print(f"tokens/s: {experts['tokens_per_second'] / dense['tokens_per_second']:.0%} of the dense model's")
    if arguments.save:
        print(machine.save("experts", {"runs": runs}))


if __name__ == "__main__":
    main()
