"""Training speed on a CPU against transformers and against the machine's limit: python benchmarks/train.py [--save]

For each model, updates of ours and of transformers' class with torch's AdamW are timed in turns, in one process, on the
same token ids; the machine's fp32 matrix rate is measured in the same turns. The bound is that rate over the model's
floating-point operations (6 a multiplied parameter, attention over the whole context: the usual convention).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import machine
import torch

from gptsmith.model.flops import flops_per_token
from gptsmith.model.transformer import Transformer
from gptsmith.presets import preset
from gptsmith.runtime import keep_freed_memory
from gptsmith.train.config import ModelOptions, OptimConfig, TrainConfig
from gptsmith.train.trial import Update

VOCABULARY = 65


def gpt2_small_text() -> TrainConfig:
    """GPT-2's layout, 6 layers, 6 heads, 384 wide, context 256, batch 8, AdamW: 10.7M parameters."""
    return TrainConfig(
        model=ModelOptions(family="gpt2", num_hidden_layers=6, hidden_size=384, num_attention_heads=6),
        context=256,
        batch_size=8,
        optim=OptimConfig(name="adamw", lr=1e-3),
    )


def char_small() -> TrainConfig:
    """The default 0.8M-parameter model with Muon."""
    return replace(preset("char-small"))


def transformers_update(config: TrainConfig) -> Callable[[torch.Tensor], None]:
    """One AdamW update of the same model in transformers, as its documentation trains."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from gptsmith.model.hf import config_to_hf

    values = config_to_hf(config.model.build(VOCABULARY, config.context))
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


def measure(config: TrainConfig, repeats: int, updates: int) -> dict[str, Any]:
    model_config = config.model.build(VOCABULARY, config.context)
    tokens = config.batch_size * config.context
    ids = torch.randint(VOCABULARY, (config.batch_size, config.context))
    ours = Update(Transformer(model_config).train(), config, compiled=True)
    contestants: dict[str, Callable[[torch.Tensor], None]] = {
        "gptsmith": ours,
        "transformers": transformers_update(config),
    }
    for run in contestants.values():
        for _ in range(3):
            run(ids)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    shares = []
    per_token = flops_per_token(model_config, config.context)
    for _ in range(repeats):
        rates = [machine.sgemm_gflops(seconds=1.0)]
        for name, run in contestants.items():
            began = time.perf_counter()
            for _ in range(updates):
                run(ids)
            speeds[name].append(updates * tokens / (time.perf_counter() - began))
            rates.append(machine.sgemm_gflops(seconds=1.0))
        shares.append(speeds["gptsmith"][-1] * per_token / statistics.median(rates) / 1e9)
    return {
        "tokens_per_second": {name: round(statistics.median(values)) for name, values in speeds.items()},
        "times_transformers": round(
            statistics.median(a / b for a, b in zip(speeds["gptsmith"], speeds["transformers"], strict=True)), 2
        ),
        "share_of_sgemm_bound": round(statistics.median(shares), 3),
        "flops_per_token": per_token,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/train.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    results = {}
    for name, make in {"gpt2 6×384": gpt2_small_text, "char-small": char_small}.items():
        results[name] = measure(make(), arguments.repeats, arguments.updates)
        print(name, json.dumps(results[name]), flush=True)
    if arguments.save:
        print(machine.save("train", results))


if __name__ == "__main__":
    main()
