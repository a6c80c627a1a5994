"""How fast is DPO, compared with TRL's DPOTrainer?

    python benchmarks/alignment/dpo_speed.py                 # writes benchmarks/results/dpo_speed.json

Both train all weights of the same small random Llama by AdamW on the same pairs, without evaluations and checkpoints
in between, on the same number of threads. TRL runs as by default, with the reference in every step, and with
log-probabilities of the reference that it has computed before (their time is not counted for it, but for us it is).
The repeats alternate; the ratio is that of the medians of pairs per second.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import gptsmith

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from against_trl import OURS, make_model, text, trl_settings


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return pairs with prompts of 20 to 60 words and answers of 5 to 80."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"{i}: {text(rng, rng.randint(20, 60))}?",
            "chosen": f" {text(rng, rng.randint(5, 80))}.",
            "rejected": f" {text(rng, rng.randint(5, 80))}!",
        }
        for i in range(count)
    ]


def ours(model: Path, data: Path, out: Path, steps: int, batch_size: int) -> tuple[float, float]:
    """Return pairs per second, and the loss of the first step."""
    run = gptsmith.dpo(
        model,
        data,
        out=out,
        steps=steps,
        batch_size=batch_size,
        log_every=1,
        eval_every=steps,
        compile="off",
        **OURS,
    )
    rows = [row for row in run.metrics if "loss" in row]
    return steps * batch_size / rows[-1]["time"], rows[0]["loss"]


def theirs(
    model: Path, rows: list[dict[str, str]], out: Path, steps: int, batch_size: int, *, precompute: bool
) -> float:
    """Return pairs per second of TRL."""
    import datasets
    import transformers
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(
            **trl_settings(out, steps, batch_size),
            precompute_ref_log_probs=precompute,
            max_length=512,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )
    began = time.perf_counter()
    trainer.train()
    return steps * batch_size / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    size = {"steps": arguments.steps, "batch_size": arguments.batch_size}
    speeds: dict[str, list[float]] = {"gptsmith": [], "trl": [], "trl, reference computed before": []}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = make_model(
            place / "model",
            arguments.width,
            arguments.layers,
            vocabulary=1024,
            context=512,
            characters=string.printable,
        )
        rows = pairs(arguments.steps * arguments.batch_size)
        data = place / "pairs.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        for repeat in range(arguments.repeats):
            speed, first = ours(model, data, place / f"ours-{repeat}", **size)
            speeds["gptsmith"].append(speed)
            for name, precompute in (("trl", False), ("trl, reference computed before", True)):
                out = place / f"trl-{repeat}-{precompute}"
                speeds[name].append(theirs(model, rows, out, **size, precompute=precompute))
            print(
                {name: round(values[-1], 1) for name, values in speeds.items()}, f"first loss {first:.6f}", flush=True
            )
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result: dict[str, Any] = {
        "options": vars(arguments),
        "pairs_per_second": speeds,
        "medians": medians,
        "ratios": {name: medians["gptsmith"] / value for name, value in medians.items() if name != "gptsmith"},
    }
    print(result["ratios"])
    from machine import save

    print(save("dpo_speed", result))


if __name__ == "__main__":
    main()
