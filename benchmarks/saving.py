"""What saving costs: how long training stands still for checkpoints, and how much memory they take.

python benchmarks/saving.py                     # about four minutes on two cores
python benchmarks/saving.py --seconds 120 --hidden 512 --layers 8

The same steps are trained three times, each in a process of its own: without checkpoints, with checkpoints that are
written beside training, and with checkpoints that training waits for. A checkpoint is due every --seconds. The stall is
the time for which the training thread waited, as a share of the run; the slowdown is by the clock and includes that
cores are shared with the writer. Memory is the highest resident set while steps were computed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MODES = ("none", "beside", "waiting")


def train(options: argparse.Namespace, mode: str, place: Path) -> dict[str, float]:
    """Train in this process and return what was measured."""

    from gptsmith.train import trainer as module
    from gptsmith.train.config import run_config
    from gptsmith.train.run import start
    from gptsmith.train.saver import Saver
    from gptsmith.train.trainer import Trainer

    text = place / "text.txt"
    words = random.Random(1)
    text.write_text("".join(words.choice("abcdefghij klmnop\n") for _ in range(400_000)))
    options_of_model = {
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
    }
    config = run_config(
        model=options_of_model,
        tokenizer="char",
        context=256,
        batch_size=options.batch,
        steps=options.steps,
        eval_every=10 * options.steps,
        save_every=10 * options.steps,
        log_every=1,
        sample_tokens=0,
        eval_tokens=256,
        compile="off",
        device="cpu",
        precision="fp32",
        optim={"name": "adamw"},
    )
    module.FIRST_SAVE_SECONDS = module.SAVE_SECONDS = 1e9 if mode == "none" else options.seconds
    found: dict[str, Any] = {"saves": 0, "stalled": 0.0, "rss": 0}
    begin, save, save_due = Saver.start, Trainer._save, Trainer._save_due
    updates = Trainer.update
    done = threading.Event()

    def watch() -> None:
        import psutil

        process = psutil.Process()
        while not done.wait(0.005):
            if found.get("warm"):
                found["rss"] = max(found["rss"], process.memory_info().rss)

    def counted(self: Saver, step: int, write: Any) -> None:
        found["saves"] += 1
        begin(self, step, write)

    def timed(self: Trainer) -> None:
        began = time.perf_counter()
        save(self)
        if mode == "waiting":
            self._finish_save()
        found["stalled"] += time.perf_counter() - began

    def due(self: Trainer) -> bool:
        return self.step < self.steps and save_due(self)  # not the last, which nothing comes after

    def update(self: Trainer, lr_factor: float) -> bool:
        if self.step == 2:  # buffers are there
            found["began"], found["warm"] = time.perf_counter(), True
        ok = updates(self, lr_factor)
        found["ended"], found["trainer"] = time.perf_counter(), self
        return ok

    Saver.start, Trainer._save, Trainer._save_due, Trainer.update = counted, timed, due, update  # type: ignore[method-assign]
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start(str(text), config, place / "run")
    done.set()
    thread.join()
    trainer = found["trainer"]
    sizes = [sum(p.numel() for p in layer.parameters()) * 4 for layer in trainer.model.layers]
    return {
        "seconds": found["ended"] - found["began"],
        "stalled": found["stalled"] + trainer.saver.stalled,
        "saves": found["saves"],
        "rss": found["rss"],
        "parameters": trainer.model.num_parameters(),
        "layer": max([*sizes, trainer.model.embed_tokens.weight.numel() * 4]),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20.0, help="between checkpoints (a run: 600)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode is not None:
        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(train(options, options.mode, Path(place))))
        return
    results: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode in MODES:
            command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ)).stdout
            results[mode].append(json.loads(output.splitlines()[-1]))
    best = {mode: min(rows, key=lambda row: row["seconds"]) for mode, rows in results.items()}
    base = best["none"]
    layer = base["layer"] / 2**20
    print(f"{base['parameters'] / 1e6:.1f} M parameters; the largest layer has {layer:.1f} MiB of weights")
    print(f"{'':10} {'saves':>5} {'stall':>8} {'a save':>9} {'slowdown':>9} {'memory above none':>18}")
    for mode in MODES[1:]:
        row = best[mode]
        stall = row["stalled"] / row["seconds"]
        slowdown = row["seconds"] / base["seconds"] - 1
        each = row["stalled"] / max(1, row["saves"])
        more = (row["rss"] - base["rss"]) / 2**20
        print(f"{mode:10} {row['saves']:5.0f} {stall:8.2%} {each:7.2f} s {slowdown:9.1%} {more:14.1f} MiB")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
