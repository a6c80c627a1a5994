"""All weights, adapters and quantized adapters on one task: python benchmarks/tuning/adapters.py table|rates [--save]

Task: 400 rows of alpaca_en_demo, one pass, held-out loss per answer token. Base: a llama-layout model of 4 layers and
4,096 byte pairs, pretrained on wiki-summaries with AdamW. `rates` sweeps the learning rate over widths, for all
weights and for rank 16; `table` compares ranks and quantized weights at width 128, each at the rate of the rule, over
three seeds. Every run is a process of its own: memory is its peak; time is that of the processor with one thread, for
preparing, training and two evaluations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

WIDTHS = {64: 400, 128: 400}  # and the updates that pretrain the base
METHODS: dict[str, dict[str, Any]] = {
    "full": {"lora": "off"},
    **{f"LoRA rank {rank}": {"lora": "on", "lora.rank": rank} for rank in (1, 4, 16, 64)},
    "QLoRA int8": {"lora": "on", "lora.quantize": "int8"},
    "QLoRA int4": {"lora": "on", "lora.quantize": "int4"},
}
RATES = {"full": (3e-4, 1e-3, 3e-3, 1e-2), "LoRA rank 16": (3e-3, 1e-2, 3e-2)}
ROWS = 400  # of the demo set


def tune(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune once; return the held-out losses, the loss on plain text, seconds and memory."""
    import gptsmith
    import gptsmith.train.run

    imported = common.peak_mb()
    with tempfile.TemporaryDirectory() as directory:
        data = common.demo_rows(Path(directory) / "rows.jsonl", ROWS, longest=1200)
        began = time.process_time()
        fixed = {"epochs": 1, "batch_size": 4, "context": 512, "compile": "off", "warm_start": False}
        run = gptsmith.sft(model, data, out=Path(directory) / "run", **(fixed | common.QUIET | options))
        seconds = time.process_time() - began
        first, *between, last = [row for row in run.metrics if "val_loss" in row]
    return {
        "start": round(first["val_loss"], 4),
        "loss": round(last["val_loss"], 4),
        "between": [round(row["val_loss"], 4) for row in between],
        "text": round(last["text_bits_per_byte"], 4),
        "seconds": round(seconds, 1),
        "peak_mb": common.peak_mb(),
        "imported_mb": imported,
    }


def work(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    found = common.child(__file__, "work", "--models", model, "--options", json.dumps(options))
    print(model.name, json.dumps(options), found, flush=True)
    return found


def rates(models: Path, jobs: int) -> dict[str, Any]:
    """name -> width -> rate -> loss, one seed."""
    wanted = [(name, width, rate) for name in RATES for width in WIDTHS for rate in RATES[name]]

    def one(job: tuple[str, int, float]) -> dict[str, Any]:
        name, width, rate = job
        return work(models / f"adamw-{width}", METHODS[name] | {"optim": {"name": "adamw", "lr": rate}})

    with ThreadPoolExecutor(jobs) as pool:
        done = dict(zip(wanted, pool.map(one, wanted), strict=True))
    made: dict[str, Any] = {}
    for (name, width, rate), found in done.items():
        losses = made.setdefault(name, {}).setdefault(str(width), {"start": found["start"]})
        losses[f"{rate:g}"] = found["loss"]
    return made


def table(models: Path, jobs: int, seeds: int, full_rate: float, lora_rate: float) -> dict[str, Any]:
    """Method -> means over the seeds."""

    def one(job: tuple[str, int]) -> dict[str, Any]:
        name, seed = job
        optim = {"name": "adamw", "lr": full_rate if name == "full" else lora_rate}
        return work(models / "adamw-128", METHODS[name] | {"seed": 1337 + seed, "optim": optim})

    wanted = [(name, seed) for seed in range(seeds) for name in METHODS]
    with ThreadPoolExecutor(jobs) as pool:
        results = dict(zip(wanted, pool.map(one, wanted), strict=True))
    made = {}
    for name in METHODS:
        found = [results[name, seed] for seed in range(seeds)]
        made[name] = {
            "rate": full_rate if name == "full" else lora_rate,
            "losses": [each["loss"] for each in found],
            "start": found[0]["start"],
            "loss": round(statistics.mean(each["loss"] for each in found), 4),
            "text": round(statistics.mean(each["text"] for each in found), 4),
            "peak_mb": statistics.median(each["peak_mb"] for each in found),
            "imported_mb": found[0]["imported_mb"],
            "seconds": statistics.median(each["seconds"] for each in found),
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bases", "rates", "table", "work"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_adapters_WHAT.json")
    parser.add_argument("--models", type=Path, default=common.MODELS, help="where base models are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--full-rate", type=float, default=1e-3)
    parser.add_argument("--lora-rate", type=float, default=1e-2)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.what == "work":
        print(json.dumps(tune(str(a.models), a.options)))
        return
    import machine

    for width, steps in WIDTHS.items():
        common.small_model(a.models / f"adamw-{width}", width, 4, steps=steps, optimizer="adamw")
    if a.what == "bases":
        return
    both = a.full_rate, a.lora_rate
    found = rates(a.models, a.jobs) if a.what == "rates" else table(a.models, a.jobs, a.seeds, *both)
    result = {"pretraining_steps": WIDTHS, a.what: found}
    print(json.dumps(result, indent=1))
    if a.save:
        print(machine.save(f"tuning_adapters_{a.what}", result))


if __name__ == "__main__":
    main()
