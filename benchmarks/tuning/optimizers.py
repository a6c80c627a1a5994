"""Muon or AdamW, on a base pretrained with either: python benchmarks/tuning/optimizers.py [--save]

All weights are trained on the task of adapters.py: 400 rows of alpaca_en_demo, one pass; on the Muon-pretrained base an
adapter of rank 16, too. (AdamW on the AdamW-pretrained base, all weights and adapter, is in the results of
adapters.py.) Each pair gets a sweep of the learning rate with one seed; its best rate is run with two more. Bases:
width 128, 4 layers, pretrained on wiki-summaries for the same number of updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import adapters
import common

STEPS = 400  # updates that pretrain a base
SECOND = 0.5  # with muon: rate of embeddings, head and norms over that of the matrices, as in pretraining
ADAMW, MUON = {"lora": "off", "optim.name": "adamw"}, {"lora": "off", "optim.name": "muon"}
LORA = {"lora": "on", "lora.rank": 16, "optim.name": "adamw"}
PAIRS: tuple[tuple[str, str, dict[str, Any], tuple[float, ...]], ...] = (  # base, name, options, learning rates
    ("muon", "Muon", MUON, (2e-3, 6e-3, 2e-2, 4e-2)),
    ("muon", "AdamW", ADAMW, (1e-3, 3e-3, 1e-2)),
    ("muon", "LoRA", LORA, (1e-2,)),
    ("adamw", "Muon", MUON, (6e-3, 2e-2)),
)


def with_rate(options: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
    """Return the options of a run."""
    second = {"optim.embedding_lr": rate * SECOND} if options["optim.name"] == "muon" else {}
    return options | {"optim.lr": rate, "seed": seed} | second


def once(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune, or return the result of an earlier call: finished runs are kept next to the bases."""
    kept = model.parent / "optimizers.json"
    done: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    key = f"{model.name} {json.dumps(options)}"
    if key not in done:
        done[key] = adapters.work(model, options)
        kept.write_text(json.dumps(done, indent=1))
    return done[key]


def compare(model: Path, options: dict[str, Any], rates: tuple[float, ...], seeds: int) -> dict[str, Any]:
    """Sweep the rate with the first seed, run the best one with the others, and return losses and means."""
    sweep = {rate: once(model, with_rate(options, rate, 1337)) for rate in rates}
    rate = min(sweep, key=lambda rate: float(sweep[rate]["loss"]))
    more = [once(model, with_rate(options, rate, 1337 + seed)) for seed in range(1, seeds)]
    runs = [sweep[rate], *more]
    return {
        "sweep": {f"{rate:g}": {"loss": each["loss"], "text": each["text"]} for rate, each in sweep.items()},
        "rate": rate,
        "losses": [each["loss"] for each in runs],
        **{key: round(statistics.mean(each[key] for each in runs), 4) for key in ("start", "loss", "text")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_optimizers.json")
    parser.add_argument("--models", type=Path, default=common.MODELS, help="where base models are kept")
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    import machine

    table: dict[str, Any] = {}
    for base, name, options, rates in PAIRS:
        model = common.small_model(a.models / f"{base}-128", 128, 4, steps=STEPS, optimizer=base)
        table[f"{base} base, {name}"] = compare(model, options, rates, a.seeds)
    result = {"pretraining_steps": STEPS, "table": table}
    print(json.dumps(result, indent=1))
    if a.save:
        print(machine.save("tuning_optimizers", result))


if __name__ == "__main__":
    main()
