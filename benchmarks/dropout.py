"""What dropout adds to a forward and backward pass on a CPU: python benchmarks/dropout.py

The 0.8M character model, compiled, batch 16; medians of alternated rounds.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from gptsmith.model.transformer import Transformer
from gptsmith.presets import preset
from gptsmith.train.compile import compile_blocks

ROUNDS, PASSES = 5, 20


def main() -> None:
    config = preset("char-small")
    ids = torch.randint(0, 65, (16, config.loop.context))
    models = {p: Transformer(config.model.build(65, config.loop.context), dropout=p).train() for p in (0.0, 0.1)}
    seconds: dict[float, list[float]] = {p: [] for p in models}
    for model in models.values():
        compile_blocks(model)
    for round_number in range(ROUNDS + 1):
        for p, model in models.items():
            began = time.perf_counter()
            for _ in range(PASSES):
                model.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()))
            if round_number:  # the first one compiles
                seconds[p].append((time.perf_counter() - began) / PASSES)
    medians = {p: statistics.median(times) for p, times in seconds.items()}
    for p, median in medians.items():
        print(f"dropout {p}: {1000 * median:.1f} ms, {median / medians[0.0] - 1:+.0%}")


if __name__ == "__main__":
    main()
