"""Muon or AdamW, on a base pretrained with either: python benchmarks/tuning/optimizers.py [--save]

All weights are trained on 400 rows of alpaca_en_demo for one pass. Each pair gets a sweep of the learning rate with
one seed; its best rate is run with three. Bases: width 128, 4 layers, pretrained on wiki-summaries for the same
number of updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapters
import common

RATES = {"adamw": (3e-4, 1e-3, 3e-3), "muon": (1e-3, 3e-3, 1e-2)}
SECOND = 0.5  # with muon: rate of embeddings, head and norms over that of the matrices, as in pretraining


def optim(name: str, rate: float) -> dict[str, Any]:
    return {"name": name, "lr": rate} | ({"embedding_lr": rate * SECOND} if name == "muon" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_optimizers.json")
    parser.add_argument("--models", type=Path, default=common.MODELS, help="where base models are kept")
    parser.add_argument("--steps", type=int, default=400, help="updates that pretrain a base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    a = parser.parse_args()
    import machine

    made: dict[str, Any] = {}
    with ThreadPoolExecutor(a.jobs) as pool:
        for base in ("adamw", "muon"):
            model = common.small_model(a.models / f"{base}-128", 128, 4, steps=a.steps, optimizer=base)

            def one(job: tuple[str, float, int], model: Path = model) -> dict[str, Any]:
                name, rate, seed = job
                return adapters.work(model, {"lora": "off", "seed": seed, "optim": optim(name, rate)})

            for name in ("adamw", "muon"):
                sweep = list(pool.map(one, [(name, rate, 1337) for rate in RATES[name]]))
                best = min(range(len(sweep)), key=lambda i: sweep[i]["loss"])
                more = list(pool.map(one, [(name, RATES[name][best], 1337 + s) for s in range(1, a.seeds)]))
                losses = [each["loss"] for each in (sweep[best], *more)]
                made[f"{base} base, {name}"] = {
                    "sweep": {f"{r:g}": each["loss"] for r, each in zip(RATES[name], sweep, strict=True)},
                    "start": sweep[best]["start"],
                    "rate": RATES[name][best],
                    "losses": losses,
                    "loss": round(statistics.mean(losses), 4),
                    "text": round(statistics.mean(each["text"] for each in (sweep[best], *more)), 4),
                }
    print(json.dumps(made, indent=1))
    if a.save:
        print(machine.save("tuning_optimizers", {"pretraining_steps": a.steps, "table": made}))


if __name__ == "__main__":
    main()
