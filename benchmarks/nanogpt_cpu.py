"""Time to a validation loss of 1.88: python benchmarks/nanogpt_cpu.py [--repeats 3] [--save]

Runs nanoGPT's published CPU recipe (preset nanogpt-cpu) and this package's quickest preset (shakespeare-quick) side by
side, alternating, on tinyshakespeare, both through the same trainer without compiling. Time is that of the updates
alone: evaluations (over the whole validation split, for both) and saves are left out. A recipe that ends above the
target is given its whole time, so the ratio is then a lower bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

TARGET = 1.88


def race(preset: str, eval_every: int) -> dict[str, Any]:
    """Train once; seconds of updates until the validation loss is at most TARGET (or in all, if it never is)."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "-m", "gptsmith", "train", "tinyshakespeare", "--preset", preset, "--out", str(out)]
        command += ["--eval-every", str(eval_every), "--sample-tokens", "0", "--compile", "off"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        evaluations = [row for row in rows if "val_loss" in row]
        reached = next((row for row in evaluations if row["val_loss"] <= TARGET), None)
        last = evaluations[-1]
        return {
            "preset": preset,
            "reached": reached is not None,
            "seconds": (reached or last)["update_time"],
            "steps": (reached or last)["step"],
            "val_loss_there": round((reached or last)["val_loss"], 4),
            "final_val_loss": round(last["val_loss"], 4),
            "total_seconds": last["update_time"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/nanogpt_cpu.json")
    arguments = parser.parse_args()
    runs = []
    for _ in range(arguments.repeats):
        for preset, eval_every in (("nanogpt-cpu", 250), ("shakespeare-quick", 25)):
            runs.append(race(preset, eval_every))
            print(json.dumps(runs[-1]), flush=True)
    theirs, ours = (
        statistics.median(run["seconds"] for run in runs if run["preset"] == preset)
        for preset in ("nanogpt-cpu", "shakespeare-quick")
    )
    print(f"nanogpt-cpu {theirs:.1f} s, shakespeare-quick {ours:.1f} s: {theirs / ours:.1f} times faster to {TARGET}")
    if arguments.save:
        print(machine.save("nanogpt_cpu", {"target": TARGET, "ratio": round(theirs / ours, 2), "runs": runs}))


if __name__ == "__main__":
    main()
