"""Supervised fine-tuning on a CPU against TRL's SFTTrainer: python benchmarks/tuning/speed.py [--save]

One pass over the same rows of alpaca_en_demo, prompts and completions, by the same llama-layout model of 5.7M
parameters in fp32 with AdamW, 8 rows per batch. Conversations have at most 1,200 characters, so that nobody has to
truncate to 512 tokens. TRL runs as its documentation has it, but without gradient checkpointing, which only costs
time here. Each contestant is a process of its own; they take turns, and the figures are medians. Tokens are those
that are predicted from (no padding). Seconds are those of the processor, with one thread, since the machine may be
shared. The first updates do not count. TRL's own packing needs FlashAttention to keep conversations apart: it has no
counterpart on a CPU.

Memory: the peak of a LoRA run (rank 16, all linear layers) on the small model and on smollm2-135m (batch 4), and what
the process holds after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common

SKIPPED = 1  # first updates
PARTS = ("full", "lora", "smollm2")  # all weights; an adapter; an adapter of smollm2-135m
CONTESTANTS = ("gptsmith", "gptsmith padded", "trl")


class Clock:
    """Processor time and tokens of each update. With one thread, other programs on the machine hardly change it."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def tick(self) -> None:
        self.times.append(time.process_time())

    def result(self, losses: list[float], imported: int) -> dict[str, Any]:
        """Leave out the first updates; times[0] is the end of the first, tokens[0] are its tokens."""
        updates = len(self.times)
        return {
            "tokens_per_second": round(
                sum(self.tokens[SKIPPED:updates]) / (self.times[-1] - self.times[SKIPPED - 1]), 1
            ),
            "updates": updates,
            "tokens": sum(self.tokens[:updates]),
            "losses": [round(loss, 4) for loss in losses],
            "peak_mb": common.peak_mb(),
            "imported_mb": imported,
        }


def ours(model: str, data: str, packing: bool, lora: bool, batch: int, steps: int | None) -> dict[str, Any]:
    import gptsmith
    import gptsmith.report
    import gptsmith.train.run
    from gptsmith.train.callbacks import Callback

    imported, clock = common.peak_mb(), Clock()

    class OnLog(Callback):
        def on_log(self, run: Any, row: Any) -> None:
            clock.tick()
            clock.tokens.append(row["tokens"] - sum(clock.tokens))

    with tempfile.TemporaryDirectory() as directory:
        run = gptsmith.sft(
            model,
            data,
            out=Path(directory) / "run",
            packing=packing,
            context=512,
            batch_size=batch,
            lora="on" if lora else "off",
            warm_start=False,
            compile="off",
            optim={"name": "adamw", "lr": 1e-4},
            val_fraction=0.01,
            callbacks=[OnLog()],
            **({"steps": steps} if steps else {"epochs": 1}),
            **common.QUIET,
        )
        return clock.result([row["loss"] for row in run.metrics if "loss" in row][:3], imported)


def trl(model: str, data: str, lora: bool, batch: int, steps: int | None) -> dict[str, Any]:
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    imported, clock = common.peak_mb(), Clock()
    datasets.disable_progress_bars()

    class OnStep(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
            train_dataset=datasets.load_dataset("json", data_files=data, split="train"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            if lora
            else None,
            callbacks=[OnStep()],
            args=SFTConfig(
                output_dir=directory,
                per_device_train_batch_size=batch,
                max_length=512,
                num_train_epochs=1,
                max_steps=steps or -1,
                learning_rate=1e-4,
                max_grad_norm=1.0,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
        )
        collate = trainer.data_collator

        def counting(rows: Any) -> Any:
            made = collate(rows)
            clock.tokens.append(int(made["attention_mask"].sum()) - len(rows))  # the last one is only predicted
            return made

        trainer.data_collator = counting
        trainer.train()
        return clock.result([row["loss"] for row in trainer.state.log_history if "loss" in row][:3], imported)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_speed.json")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", type=Path, default=common.MODELS, help="where base models are kept")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, help="what to measure; the rest is kept")
    parser.add_argument("--work", nargs=3, metavar=("CONTESTANT", "MODEL", "DATA"), help=argparse.SUPPRESS)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.work:
        who, model, data = a.work
        if who == "trl":
            found = trl(model, data, a.lora, a.batch, a.steps)
        else:
            found = ours(model, data, who == "gptsmith", a.lora, a.batch, a.steps)
        print(json.dumps(found))
        return

    os.environ["OMP_NUM_THREADS"] = "1"
    import machine

    import gptsmith
    from gptsmith.export.export import export_directory

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        data = common.demo_rows(place / "rows.jsonl", a.rows, longest=1200)
        base = common.small_model(a.models / "speed", layers=6)
        chat = gptsmith.sft(base, data, out=place / "chat", lora="off", steps=1, **common.QUIET)  # has a template
        export_directory(chat.directory, place / "small", dtype="fp32")

        def work(who: str, model: Path, *options: object) -> dict[str, Any]:
            found = common.child(__file__, "--work", who, model, data, *options)
            print(who, *options, found, flush=True)
            return found

        path = machine.RESULTS / "tuning_speed.json"
        result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        result.pop("machine", None)
        for part in a.parts:
            options: tuple[object, ...] = () if part == "full" else ("--lora",)
            model, asked = place / "small", list(CONTESTANTS)
            if part == "smollm2":
                options, asked = (*options, "--batch", 4, "--steps", 3), list(CONTESTANTS[1:])
                export_directory("smollm2-135m", place / "smollm2", dtype="fp32")
                model = place / "smollm2"
            runs: dict[str, list[dict[str, Any]]] = {who: [] for who in asked}
            for _ in range(a.repeats if part == "full" else 1):
                for who in asked:
                    runs[who].append(work(who, model, *options))
            result[part] = summary(runs, a.rows)
    print(json.dumps(result, indent=1))
    if a.save:
        print(machine.save("tuning_speed", result))


def summary(runs: dict[str, list[dict[str, Any]]], rows: int) -> dict[str, Any]:
    """Return medians over the repeats, and their ratios."""
    speeds = {who: statistics.median(r["tokens_per_second"] for r in rs) for who, rs in runs.items()}
    made: dict[str, Any] = {
        "rows": rows,
        "tokens_per_second": speeds,
        "all": {who: [r["tokens_per_second"] for r in rs] for who, rs in runs.items()},
        "peak_mb": {who: statistics.median(r["peak_mb"] for r in rs) for who, rs in runs.items()},
        "imported_mb": {who: rs[0]["imported_mb"] for who, rs in runs.items()},
        "padded_against_trl": round(speeds["gptsmith padded"] / speeds["trl"], 2),
    }
    if "gptsmith" in speeds:
        made["against_trl"] = round(speeds["gptsmith"] / speeds["trl"], 2)
        made["packed_against_padded"] = round(speeds["gptsmith"] / speeds["gptsmith padded"], 2)
    return made


if __name__ == "__main__":
    main()
