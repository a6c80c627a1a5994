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
from gptsmith.formats.hf import save_model
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import train_bpe

VOCABULARY = (
    *("the", "a", "cat", "dog", "bird", "fish", "house", "tree", "runs", "sleeps", "eats", "sees", "likes"),
    *("blue", "green", "small", "large", "and", "but", "or", "why", "who"),
)


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(words))


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


def make_model(place: Path, width: int, layers: int) -> Path:
    """Save a random Llama with a tokenizer that has an end-of-text token."""
    rng = random.Random(1)
    tokenizer = train_bpe([text(rng, 20_000) + string.printable], 1024)
    torch.manual_seed(0)
    heads = width // 32
    config = FAMILIES["llama"](
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
    )
    place.mkdir()
    save_model(Transformer(config), place, end_ids=tokenizer.end_ids)
    tokenizer.save(place)
    return place


def ours(model: Path, data: Path, out: Path, steps: int, batch_size: int) -> tuple[float, float]:
    """Return pairs per second, and the loss of the first step."""
    run = gptsmith.dpo(
        model,
        data,
        out=out,
        steps=steps,
        batch_size=batch_size,
        val_fraction=0.0,
        lora="off",
        optim={"name": "adamw", "lr": 1e-5, "warmup_steps": 0, "schedule": "constant"},
        sample_tokens=0,
        log_every=1,
        eval_every=steps,
        compile="off",
        device="cpu",
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
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            precompute_ref_log_probs=precompute,
            max_length=512,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            fp16=False,
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
        model = make_model(place / "model", arguments.width, arguments.layers)
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
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from machine import save

    print(save("dpo_speed", result))


if __name__ == "__main__":
    main()
