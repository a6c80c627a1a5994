"""Training speed on a CPU against transformers and against the machine's limit: python benchmarks/train.py [--save]

For each model, updates of ours and of transformers' class with torch's AdamW are timed in turns, each in a process of
its own; the machine's fp32 matrix rate is measured in the same turns. The bound is that rate over the model's
floating-point operations (6 a multiplied parameter, attention over the whole context: the usual convention).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import machine
import torch

from gptsmith.data.loader import TokenBatch
from gptsmith.model.flops import flops_per_token
from gptsmith.presets import preset
from gptsmith.runtime import keep_freed_memory
from gptsmith.train.budget.machine import example_step
from gptsmith.train.compile import compile_blocks
from gptsmith.train.config import ModelOptions, OptimConfig, RunConfig, run_config

VOCABULARY = 65


def gpt2_small_text() -> RunConfig:
    """GPT-2's layout, 6 layers, 6 heads, 384 wide, context 256, batch 8, AdamW: 10.7M parameters."""
    return run_config(
        model=ModelOptions(family="gpt2", num_hidden_layers=6, hidden_size=384, num_attention_heads=6),
        context=256,
        batch_size=8,
        optim=OptimConfig(name="adamw", lr=1e-3),
    )


def char_small() -> RunConfig:
    """The default 0.8M-parameter model with Muon."""
    return preset("char-small")


def transformers_update(config: RunConfig) -> Callable[[torch.Tensor], object]:
    """One AdamW update of the same model in transformers, as its documentation trains."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from gptsmith.formats.hf import config_to_hf

    values = config_to_hf(config.model.build(VOCABULARY, config.loop.context))
    make: Any = AutoModelForCausalLM
    theirs = make.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)

    def update(ids: torch.Tensor) -> None:
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def work(model: str, contestant: str) -> None:
    """In a process of its own: for each line on standard input, so many updates; answers with the seconds they took."""
    config = MODELS[model]()
    if contestant == "gptsmith":
        keep_freed_memory()
        model_config = config.model.build(VOCABULARY, config.loop.context)
        step = example_step(config, model_config, torch.device("cpu"), "fp32")
        compile_blocks(step.models.policy)
        update: Callable[[torch.Tensor], object] = lambda ids: step(TokenBatch(ids, ids), 1.0)  # noqa: E731
    else:
        update = transformers_update(config)
    ids = torch.randint(VOCABULARY, (config.loop.batch_size, config.loop.context))
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            update(ids)
        print(time.perf_counter() - began, flush=True)


class Contestant:
    """A process that makes updates when asked."""

    def __init__(self, model: str, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", model, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self, updates: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def measure(model: str, repeats: int, updates: int) -> dict[str, Any]:
    config = MODELS[model]()
    tokens = config.loop.batch_size * config.loop.context
    per_token = flops_per_token(config.model.build(VOCABULARY, config.loop.context), config.loop.context)
    contestants = {name: Contestant(model, name) for name in ("gptsmith", "transformers")}
    for contestant in contestants.values():
        contestant.seconds(3)  # compiles, makes buffers
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    shares = []
    for _ in range(repeats):
        rates = [machine.sgemm_gflops(seconds=1.0)]
        for name, contestant in contestants.items():
            speeds[name].append(updates * tokens / contestant.seconds(updates))
            rates.append(machine.sgemm_gflops(seconds=1.0))
        shares.append(speeds["gptsmith"][-1] * per_token / statistics.median(rates) / 1e9)
    for contestant in contestants.values():
        contestant.process.communicate()
    ratios = [a / b for a, b in zip(speeds["gptsmith"], speeds["transformers"], strict=True)]
    return {
        "tokens_per_second": {name: round(statistics.median(values)) for name, values in speeds.items()},
        "times_transformers": round(statistics.median(ratios), 2),
        "share_of_sgemm_bound": round(statistics.median(shares), 3),
        "flops_per_token": per_token,
    }


MODELS = {"gpt2 6x384": gpt2_small_text, "char-small": char_small}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/train.json")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "CONTESTANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    results = {}
    for name in MODELS:
        results[name] = measure(name, arguments.repeats, arguments.updates)
        print(name, json.dumps(results[name]), flush=True)
    if arguments.save:
        print(machine.save("train", results))


if __name__ == "__main__":
    main()
