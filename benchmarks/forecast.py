"""Forecast against reality, memory and time: python benchmarks/forecast.py [--repeats 3] [--only NAME] [--save]

Each configuration is planned by `gptsmith plan --json` and then trained by `gptsmith train`, both in processes of their
own, on tinyshakespeare. Memory: VmHWM of the training process, read until it ends, against the plan's peak. Time:
seconds from the first step to the last evaluation, by the run's own record, against the plan's. The plan is made right
before the run; the machine's speed changes by the minute, so that medians of several pairs count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

DATA = "tinyshakespeare"


def _model(family: str, layers: int, width: int, heads: int) -> list[str]:
    return [
        *("--model.family", family, "--model.num-hidden-layers", str(layers)),
        *("--model.hidden-size", str(width), "--model.num-attention-heads", str(heads)),
    ]


# Name, options. Steps are chosen for 20 seconds or so on two cores.
CONFIGURATIONS: dict[str, list[str]] = {
    "0.8M qwen3, Muon": ["--steps", "160", "--eval-every", "80", "--compile", "off"],
    "0.8M qwen3, Muon, compiled": ["--steps", "160", "--eval-every", "80", "--compile", "on"],
    "10.7M gpt2, AdamW": [
        *_model("gpt2", 6, 384, 6),
        *("--optim.name", "adamw", "--optim.lr", "0.001", "--context", "256", "--batch-size", "8", "--steps", "20"),
        *("--eval-every", "20", "--eval-tokens", "40000", "--compile", "off"),
    ],
    "10.7M gpt2, AdamW, compiled": [
        *_model("gpt2", 6, 384, 6),
        *("--optim.name", "adamw", "--optim.lr", "0.001", "--context", "256", "--batch-size", "8", "--steps", "20"),
        *("--eval-every", "20", "--eval-tokens", "40000", "--compile", "on"),
    ],
    "25M qwen3, Muon, batch 4": [
        *_model("qwen3", 8, 512, 8),
        *("--context", "256", "--batch-size", "4", "--steps", "10", "--eval-every", "10", "--eval-tokens", "20000"),
        *("--compile", "off"),
    ],
    "10.6M qwen3, Muon, micro-batches of 4": [
        *_model("qwen3", 6, 384, 6),
        *("--context", "256", "--batch-size", "32", "--micro-batch-size", "4", "--steps", "5", "--eval-every", "5"),
        *("--eval-tokens", "40000", "--compile", "off"),
    ],
    "5.3M qwen3_moe, Muon, 8 experts": [
        *_model("qwen3_moe", 4, 192, 6),
        *("--model.num-experts", "8", "--model.num-experts-per-tok", "2", "--model.intermediate-size", "256"),
        *("--steps", "30", "--eval-every", "30", "--eval-tokens", "40000", "--compile", "off"),
    ],
    "4.8M gpt3, AdamW, context 1,024": [
        *_model("gpt3", 6, 256, 8),
        *("--optim.name", "adamw", "--optim.lr", "0.001", "--context", "1024", "--batch-size", "4", "--steps", "10"),
        *("--eval-every", "10", "--eval-tokens", "40000", "--compile", "off"),
    ],
    "7.1M llama, AdamW, BPE of 4,096": [
        *_model("llama", 6, 256, 8),
        *("--tokenizer", "bpe", "--vocab-size", "4096", "--optim.name", "adamw", "--optim.lr", "0.001"),
        *("--context", "256", "--batch-size", "16", "--steps", "10", "--eval-every", "10", "--eval-tokens", "20000"),
        *("--compile", "off"),
    ],
}
COMMON = ["--device", "cpu", "--sample-tokens", "100", "--log-every", "5"]


def plan(options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "gptsmith", "plan", DATA, "--json", *COMMON, *options]
    began = time.perf_counter()
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    return {**found, "plan_seconds": time.perf_counter() - began}


def train(options: list[str]) -> tuple[int, float]:
    """Peak resident bytes of the training process, and seconds of training."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "-m", "gptsmith", "train", DATA, "--out", str(out), *COMMON, *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _high_water(process.pid))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"the run failed with exit code {process.returncode}: {' '.join(command)}")
        record = json.loads((out / "run.json").read_text())
        return peak, float(record["seconds"])


def _high_water(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def compare(options: list[str]) -> dict[str, Any]:
    planned = plan(options)
    peak, seconds = train(options)
    foreseen = planned["memory"]["total"]
    return {
        "memory_forecast_mb": round(foreseen / 1e6),
        "memory_mb": round(peak / 1e6),
        "memory_error": round(foreseen / peak - 1, 3),
        "seconds_forecast": round(planned["training_seconds"], 1),
        "seconds": round(seconds, 1),
        "time_error": round(planned["training_seconds"] / seconds - 1, 3),
        "plan_seconds": round(planned["plan_seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="this configuration only; can be given several times")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of plan and run of each, in turns")
    parser.add_argument("--more", action="store_true", help="add to what is saved instead of starting afresh")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/forecast.json")
    arguments = parser.parse_args()
    saved = machine.RESULTS / "forecast.json"
    rows: dict[str, Any] = {}
    if arguments.more and saved.exists():
        rows = {row.pop("configuration"): row for row in json.loads(saved.read_text())["rows"]}
    for _ in range(arguments.repeats):
        for name in arguments.only or CONFIGURATIONS:
            repeats = [*rows.get(name, {"repeats": []})["repeats"], compare(CONFIGURATIONS[name])]
            errors = {
                f"median_{kind}_error": round(statistics.median(repeat[f"{kind}_error"] for repeat in repeats), 3)
                for kind in ("memory", "time")
            }
            rows[name] = {**errors, "repeats": repeats}
            print(name, json.dumps(errors), json.dumps(repeats[-1]), flush=True)
            if arguments.save:
                machine.save("forecast", {"rows": [{"configuration": name, **row} for name, row in rows.items()]})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
