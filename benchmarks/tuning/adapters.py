"""All weights, adapters and quantized adapters on one task: python benchmarks/tuning/adapters.py WHAT [--save]

Task: 400 rows of alpaca_en_demo, one pass, held-out loss per answer token. Base: a llama-layout model of 4 layers and
4,096 byte pairs, pretrained on wiki-summaries with AdamW. WHAT: `table` compares ranks and quantized weights at width
128 over three seeds; `rates` sweeps the learning rate over widths, for all weights and for rank 16; `updates` sweeps
rows in a batch and passes over the data, on bases of either optimizer. Every run is a process of its own: memory is its
peak; time is that of the processor with one thread, for preparing, training and two evaluations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common

WIDTHS = (64, 128)
STEPS = 400  # updates that pretrain a base
METHODS: dict[str, dict[str, Any]] = {
    "full": {"lora": "off"},
    **{f"LoRA rank {rank}": {"lora": "on", "lora.rank": rank} for rank in (1, 4, 16, 64)},
    "QLoRA int8": {"lora": "on", "lora.quantize": "int8"},
    "QLoRA int4": {"lora": "on", "lora.quantize": "int4"},
}
RATES = {"full": (3e-4, 1e-3, 3e-3, 1e-2), "LoRA rank 16": (3e-3, 1e-2, 3e-2)}
BEST = {"full": 3e-3, "LoRA": 1e-2}  # rates at width 128, of `rates`: the best, or as good and forgetting less
UPDATES: dict[str, tuple[str, dict[str, Any]]] = {  # base and options
    "LoRA, AdamW": ("adamw-128", METHODS["LoRA rank 16"] | {"optim": {"name": "adamw", "lr": 1e-2}}),
    "full, Muon": ("muon-128", METHODS["full"] | {"optim": {"name": "muon", "lr": 2e-2, "embedding_lr": 1e-2}}),
}
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


def rates(models: Path) -> dict[str, Any]:
    """name -> width -> rate -> loss, one seed."""
    made: dict[str, Any] = {}
    for name, chosen in RATES.items():
        for width in WIDTHS:
            found = {
                rate: work(models / f"adamw-{width}", METHODS[name] | {"optim": {"name": "adamw", "lr": rate}})
                for rate in chosen
            }
            made.setdefault(name, {})[str(width)] = {f"{rate:g}": each for rate, each in found.items()}
    return made


def table(models: Path, seeds: int) -> dict[str, Any]:
    """Method -> means over the seeds. The seed draws the order and an adapter's first weights."""
    made = {}
    for name, options in METHODS.items():
        optim = {"name": "adamw", "lr": BEST["full" if name == "full" else "LoRA"]}
        found = [work(models / "adamw-128", options | {"seed": 1337 + seed, "optim": optim}) for seed in range(seeds)]
        made[name] = {
            "rate": optim["lr"],
            "losses": [each["loss"] for each in found],
            **{key: round(statistics.mean(each[key] for each in found), 4) for key in ("start", "loss", "text")},
            **{key: statistics.median(each[key] for each in found) for key in ("peak_mb", "imported_mb", "seconds")},
        }
    return made


def updates(models: Path) -> dict[str, Any]:
    """Method -> rows in a batch, or passes over the data -> loss, one seed."""
    made: dict[str, Any] = {}
    for name, (base, options) in UPDATES.items():
        for what, values in {"batch_size": (2, 4, 8, 16), "epochs": (2, 4, 8)}.items():
            found = {value: work(models / base, options | {what: value}) for value in values}
            made.setdefault(name, {})[what] = {str(value): each for value, each in found.items()}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "table", "updates", "work"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_adapters_WHAT.json")
    parser.add_argument("--models", type=Path, default=common.MODELS, help="where base models are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.what == "work":
        print(json.dumps(tune(str(a.models), a.options)))
        return
    import machine

    bases = {"rates": ("adamw-64", "adamw-128"), "table": ("adamw-128",), "updates": ("adamw-128", "muon-128")}
    for base in bases[a.what]:
        optimizer, width = base.split("-")
        common.small_model(a.models / base, int(width), 4, steps=STEPS, optimizer=optimizer)
    if a.what == "table":
        found = table(a.models, a.seeds)
    else:
        found = rates(a.models) if a.what == "rates" else updates(a.models)
    result = {"pretraining_steps": STEPS, a.what: found}
    print(json.dumps(result, indent=1))
    if a.save:
        print(machine.save(f"tuning_adapters_{a.what}", result))


if __name__ == "__main__":
    main()
