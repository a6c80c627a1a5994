"""Training speed on a GPU: python benchmarks/gpu.py [--save]. Runs unattended, in under eight minutes.

gpt2-124M and a 350M modern model, bf16, context 1,024: tokens per second and model FLOP utilization of ours (compiled
blocks, fused AdamW, the loss by a kernel that never holds all logits) and of the same models in transformers (bf16
autocast, SDPA, torch.compile, fused AdamW), in turns; of a modern model of 1.3B ours alone, to see what width does.
Utilization is by the usual convention: 6 a multiplied parameter, attention over the whole context, over the card's
dense bf16 peak. And the memory that ours takes, beside the forecast.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import machine
import torch

from gptsmith.data.loader import TokenBatch
from gptsmith.formats.hf import config_to_hf
from gptsmith.model.config import ModelConfig
from gptsmith.model.families import gpt2, qwen3
from gptsmith.model.flops import count_parameters, flops_per_token
from gptsmith.train.budget.machine import example_step
from gptsmith.train.compile import compile_blocks
from gptsmith.train.config import OptimConfig, run_config
from gptsmith.train.forecast.memory import Forecaster

CONTEXT, VOCABULARY = 1024, 50304


def modern(width: int, feed_forward: int) -> ModelConfig:
    return qwen3(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=24,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 256,
        head_dim=128,
        intermediate_size=feed_forward,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )


# The model, the sequences of an update, and whom to compare.
MODELS: dict[str, tuple[ModelConfig, int, tuple[str, ...]]] = {
    "gpt2-124M": (gpt2(vocab_size=VOCABULARY), 64, ("adamw", "transformers", "muon", "fp8")),
    "modern-350M": (modern(1024, 2752), 32, ("adamw", "transformers", "muon", "fp8")),
    "modern-1.3B": (modern(2048, 5632), 16, ("adamw",)),
}
LABELS = {"adamw": "gptsmith", "transformers": "transformers", "muon": "gptsmith, Muon", "fp8": "gptsmith, fp8"}
# Dense bf16, FLOP/s, from the vendors' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "L4": 121e12}


def ours(config: ModelConfig, batch: int, name: str, precision: Any) -> Callable[[torch.Tensor], object]:
    options = run_config(context=CONTEXT, batch_size=batch, optim=OptimConfig(name=name, lr=3e-4))  # type: ignore[arg-type]
    step = example_step(options, config, torch.device("cuda"), precision)
    compile_blocks(step.models.policy)
    batches: dict[int, TokenBatch] = {}  # in the memory of the host, as a loader makes them

    def update(ids: torch.Tensor) -> object:
        if id(ids) not in batches:
            batches[id(ids)] = TokenBatch(ids.cpu(), ids.cpu())
        return step(batches[id(ids)], 1.0)

    return update


def theirs(config: ModelConfig) -> Callable[[torch.Tensor], object]:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_to_hf(config)
    make: Any = AutoModelForCausalLM
    model = make.from_config(AutoConfig.for_model(values.pop("model_type"), **values), attn_implementation="sdpa")
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    forward: Any = torch.compile(model)

    def update(ids: torch.Tensor) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = forward(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def timed(update: Callable[[torch.Tensor], object], ids: torch.Tensor, updates: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(updates):
        update(ids)
    torch.cuda.synchronize()
    return updates * ids.numel() / (time.perf_counter() - began)


def measure(name: str, repeats: int, deadline: float) -> dict[str, Any]:
    config, batch, kinds = MODELS[name]
    ids = torch.randint(VOCABULARY, (batch, CONTEXT), device="cuda")
    makers: dict[str, Callable[[], Callable[[torch.Tensor], object]]] = {
        "adamw": lambda: ours(config, batch, "adamw", "bf16"),
        "transformers": lambda: theirs(config),
        "muon": lambda: ours(config, batch, "muon", "bf16"),
        "fp8": lambda: ours(config, batch, "adamw", "fp8"),
    }
    contestants, speeds, failed = {}, {}, {}
    memory = {"forecast_gb": round(forecast(config, batch) / 1e9, 2)}
    for kind in kinds:
        label = LABELS[kind]
        if kind in ("muon", "fp8") and time.monotonic() > deadline - 60:
            failed[label] = "no time"
            continue
        try:
            contestants[label] = makers[kind]()
            timed(contestants[label], ids, 3)  # compiles
            speeds[label] = list[float]()
        except Exception as error:  # one that does not work here must not cost the others' figures
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            contestants.pop(label, None)
        if kind == "adamw":  # the first, alone on the card
            memory["measured_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    for _ in range(repeats):
        for label, update in contestants.items():
            if time.monotonic() < deadline or not speeds[label]:
                speeds[label].append(timed(update, ids, 10))
    per_token = flops_per_token(config, CONTEXT)
    card = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAKS.items() if key in card), None)
    return {
        "parameters": count_parameters(config).total,
        "batch": batch,
        "memory": memory,
        "repeats": {label: len(values) for label, values in speeds.items()},
        "tokens_per_second": {label: round(statistics.median(values)) for label, values in speeds.items()},
        "utilization": {
            label: round(statistics.median(values) * per_token / peak, 3) if peak else None
            for label, values in speeds.items()
        },
        "failed": failed,
    }


def forecast(config: ModelConfig, batch: int) -> int:
    """What `gptsmith plan` says that ours takes, bytes."""
    options = run_config(context=CONTEXT, batch_size=batch, optim=OptimConfig(name="adamw"))
    return Forecaster(options, config, device=torch.device("cuda"), precision="bf16", compiled=True).at(batch).total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=7.0, help="no repeat begins after that")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu.json, model by model")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA GPU; there is none here", file=sys.stderr)
        return 1
    began, results = time.monotonic(), {}
    for number, name in enumerate(MODELS, 1):
        deadline = began + 60 * arguments.minutes * number / len(MODELS)
        results[name] = measure(name, arguments.repeats, deadline)
        print(name, json.dumps(results[name]), flush=True)
        if arguments.save:
            machine.save("gpu", results)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return 0


if __name__ == "__main__":
    sys.exit(main())
