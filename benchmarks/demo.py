"""The demo, measured: python benchmarks/demo.py [--preset shakespeare-3min] [--seeds 1] [--save]

Trains on tinyshakespeare through the command line in a process of its own and reports the time of training (from the
first step to the last evaluation, compiling and saving included), the validation loss over the whole split, the wall
time of the whole command with its report, and the peak resident memory of the process and its children.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import psutil


def measure(preset: str, seed: int, extra: list[str]) -> dict[str, Any]:
    """One run. Times in seconds, memory in MB (10**6 bytes) of the whole process tree."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "-m", "gptsmith", "train", "tinyshakespeare", "--preset", preset]
        command += ["--out", str(out), "--seed", str(seed), *extra]
        began, peak = time.perf_counter(), 0
        process = psutil.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(0.05)
        wall = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"the run failed with exit code {process.returncode}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((out / "run.json").read_text())
        evaluations = [row for row in rows if "val_loss" in row]
        speeds = sorted(row["tokens_per_second"] for row in rows if "loss" in row)
        return {
            "preset": preset,
            "seed": seed,
            "compiled": record["compile"],
            "parameters": record["parameters"],
            "steps": evaluations[-1]["step"],
            "training_seconds": evaluations[-1]["time"],
            "update_seconds": evaluations[-1]["update_time"],
            "tokens_per_second_median": speeds[len(speeds) // 2],
            "val_loss": round(evaluations[-1]["val_loss"], 4),
            "val_losses": [(row["step"], round(row["time"], 1), round(row["val_loss"], 4)) for row in evaluations],
            "command_seconds": round(wall, 1),
            "peak_rss_mb": round(peak / 1e6),
        }


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            try:
                total += each.memory_info().rss
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shakespeare-3min")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/demo.json")
    arguments, extra = parser.parse_known_args()
    runs = [measure(arguments.preset, 1337 + i, extra) for i in range(arguments.seeds)]
    for run in runs:
        print(json.dumps(run))
    if arguments.save:
        print(machine.save("demo", {"runs": runs}))


if __name__ == "__main__":
    main()
