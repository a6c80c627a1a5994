"""Compare the speed of two source trees: python benchmarks/compare_trees.py OLD [--rounds 10].

OLD is a checkout of an earlier commit, for example by `git worktree add ../old COMMIT`. One process per tree trains the
demo model (compiled) and decodes, in turns, so that both meet the same noise. Prints medians of new time / old time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

DECODE = """
import sys, time, torch
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.model.families import qwen3
from gptsmith.model.quantized import quantize
from gptsmith.model.transformer import Transformer

torch.manual_seed(0)
config = qwen3(vocab_size=4096, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
               head_dim=64, intermediate_size=512, max_position_embeddings=512)
model = Transformer(config).eval()
engine = Engine(quantize(model, 4) if sys.argv[1] == "int4" else model, max_batch=8)
for line in sys.stdin:
    began = time.perf_counter()
    engine.generate([[1, 2, 3]] * int(line), SamplingParams(max_tokens=128, temperature=0.8, seed=1))
    print(time.perf_counter() - began, flush=True)
"""
TRAIN = ["benchmarks/train.py", "--worker", "char-small", "gptsmith"]
# name: arguments of Python, and the number on each line of input: updates, or sequences in a batch
MEASUREMENTS: dict[str, tuple[list[str], int]] = {
    "training, char-small, compiled": (TRAIN, 40),
    "decoding, fp32, batch 1": (["-c", DECODE, "fp32"], 1),
    "decoding, int4, batch 1": (["-c", DECODE, "int4"], 1),
    "decoding, int4, batch 8": (["-c", DECODE, "int4"], 8),
}


class Worker:
    """A process that runs one tree's code and answers each number with the seconds it took."""

    def __init__(self, tree: Path, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            # An older tree may lack the installed entry points of torch.
            env={**os.environ, "PYTHONPATH": str(tree / "src"), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )

    def seconds(self, number: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    trees = [arguments.old.resolve(), Path(__file__).resolve().parents[1]]
    for name, (command, number) in MEASUREMENTS.items():
        workers = [Worker(tree, command) for tree in trees]
        for worker in workers:
            worker.seconds(number)  # compiles and warms up
        ratios = []
        for turn in range(arguments.rounds):
            seconds = {i: workers[i].seconds(number) for i in ((0, 1) if turn % 2 else (1, 0))}
            ratios.append(seconds[1] / seconds[0])
        low, high = min(ratios), max(ratios)
        print(
            f"{name}: new/old {statistics.median(ratios):.3f} (of {len(ratios)}, {low:.3f} to {high:.3f})", flush=True
        )
        for worker in workers:
            worker.process.kill()


if __name__ == "__main__":
    main()
