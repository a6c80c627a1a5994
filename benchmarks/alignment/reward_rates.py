"""At which learning rates does a reward model learn from 2,000 pairs?

    python benchmarks/alignment/reward_rates.py              # writes benchmarks/results/alignment_reward_rates.json

The model is that of rlhf.py, pretrained with Muon. Each seed has its own preferences, and its own order of them. The
accuracy is that on held-out pairs after two passes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import reviews

import gptsmith

SEEDS = (0, 1, 2)
RATES: dict[str, dict[str, Any]] = {
    "Muon 0.002 and 0.001, those of continued pretraining": {"name": "muon", "lr": 0.002, "embedding_lr": 0.001},
    "Muon 0.006 and 0.003": {"name": "muon", "lr": 0.006, "embedding_lr": 0.003},
    "Muon 0.02 and 0.01, those of pretraining": {"name": "muon", "lr": 0.02, "embedding_lr": 0.01},
    "AdamW 0.0005": {"name": "adamw", "lr": 0.0005},
    "AdamW 0.002": {"name": "adamw", "lr": 0.002},
}


def main() -> None:
    start = reviews.base()
    model, tokenizer = gptsmith.load(start)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            pairs = reviews.preferences(model, tokenizer, 2000, 50 + seed)
            for name, optim in RATES.items():
                run = reviews.reward_model(start, pairs, Path(folder) / f"{len(rows)}", seed, optim=optim)
                last = [row for row in run.metrics if "val_accuracy" in row][-1]
                rows.append({"rates": name, "seed": seed, "accuracy": last["val_accuracy"], "loss": last["val_loss"]})
                print(json.dumps(rows[-1]), flush=True)
    for name in RATES:
        found = [row["accuracy"] for row in rows if row["rates"] == name]
        print(f"{name}: {statistics.mean(found):.3f} ({', '.join(f'{each:.3f}' for each in found)})")
    from machine import save

    print(save("alignment_reward_rates", {"runs": rows}))


if __name__ == "__main__":
    main()
