"""Quality against time: python benchmarks/quality.py tinyshakespeare 3m 6m 15m --seeds 3 --save

Each run is the command a person gives, `gptsmith train DATA --budget TIME`, by the wall clock from start to end. The
loss is over the validation split; bits per byte are of its text. `enwik8 5m 15m 45m` is the other table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

KEY = ("data", "budget", "seed", "options")  # what makes two runs the same one, of which the later counts


def run(data: str, budget: str, seed: int, extra: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "-m", "gptsmith", "train", data, "--budget", budget, "--seed", str(seed), *extra]
        began = time.monotonic()
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
        wall = time.monotonic() - began
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((out / "run.json").read_text())
    evaluations = [row for row in rows if row.get("val_loss") is not None]
    best = min(evaluations, key=lambda row: row["val_loss"])
    config, sizes = record["config"], record["data"]
    return {
        "data": data,
        "budget": budget,
        "seed": seed,
        "options": " ".join(extra),
        "date": datetime.date.today().isoformat(),
        "wall_seconds": round(wall, 1),
        "val_loss": round(best["val_loss"], 4),
        "bits_per_byte": round(best["val_loss"] / math.log(2) * sizes["val_tokens"] / sizes["val_bytes"], 4),
        "parameters": record["parameters"],
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "whole_split": config["eval_tokens"] is None,
        "tokenizer": f"{config['tokenizer']} {config['vocab_size']}" if config["tokenizer"] == "bpe" else "char",
        "depth": config["model"]["num_hidden_layers"],
        "width": config["model"]["hidden_size"],
        "context": config["context"],
        "reasons": record["choice"]["reasons"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("budgets", nargs="+")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=1337)
    parser.add_argument("--save", action="store_true", help="add to benchmarks/results/quality_DATA.json as runs end")
    arguments, extra = parser.parse_known_args()
    saved = machine.RESULTS / f"quality_{arguments.data}.json"
    runs = json.loads(saved.read_text())["runs"] if arguments.save and saved.exists() else []
    for budget in arguments.budgets:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            made = run(arguments.data, budget, seed, extra)
            runs = [other for other in runs if any(other[key] != made[key] for key in KEY)] + [made]
            print(json.dumps(runs[-1], ensure_ascii=False), flush=True)
            if arguments.save:
                machine.save(f"quality_{arguments.data}", {"runs": runs})


if __name__ == "__main__":
    main()
