"""What quantization costs, beside llama.cpp's: python benchmarks/quantization.py [--only smollm2 trained] [--save]

smollm2  SmolLM2-135M with its hidden numbers in another order. Its file has numbers of 4 bits already, in groups of 32;
         in another order, a new group has numbers of many of the file's groups, so that its grid is of no help.
trained  A small model, trained on tinyshakespeare here for --steps updates.

Each is rounded by this package (calibrated on the built-in text, and to the nearest), and by llama.cpp to Q4_0, Q4_K_M
and Q8_0, if llama-cpp-python is installed. "as Q4_0" is this package's rounding with so many bits per weight that it is
not larger than llama.cpp's Q4_0. Perplexity, KL divergence and agreement on the most likely token are those of each
program on the same 8,192 tokens of held-out text, in windows of 512. Sizes are those of the weights alone.

With --save, each row is written as soon as it is known, and later runs add to them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from inference import reordered
from llama import open_llama, quantize_gguf
from machine import RESULTS, save
from torch import Tensor

if TYPE_CHECKING:
    from gptsmith.evaluate.text import Window
    from gptsmith.model.quantized import Bits
    from gptsmith.model.transformer import Transformer
    from gptsmith.quantize.report import Comparison, Reference
    from gptsmith.tokenizer import Tokenizer

TOKENS = 8192
LLAMA_TYPES = {"F32": 0, "Q4_0": 2, "Q4_K_M": 15, "Q8_0": 7}  # llama.cpp's llama_ftype
OURS: tuple[tuple[str, Bits, float | None], ...] = (  # bits per weight; 0: to the nearest
    ("4 bits", 4, None),
    ("8 bits", 8, None),
    ("4 bits, no wider matrix", 4, 4.5),
    ("nearest, 4 bits", 4, 0.0),
    ("nearest, 8 bits", 8, 0.0),
)


def smollm2() -> tuple[Transformer, Tokenizer, str]:
    from pydoc_data.topics import topics

    from gptsmith.loading import load_model

    model, tokenizer = load_model("smollm2-135m", quantize="none")
    return reordered(model), tokenizer, "\n".join(topics.values())[: 25 * TOKENS]


def trained(steps: int, directory: Path) -> Callable[[], tuple[Transformer, Tokenizer, str]]:
    """Train a model, and return a function that loads it."""
    import gptsmith
    from gptsmith.data.sources import open_source
    from gptsmith.loading import load_model

    text = "".join(chunk.text for chunk in open_source("tinyshakespeare").chunks())
    kept, held_out = text[:-60_000], text[-60_000:]
    (directory / "plays.txt").write_text(kept, encoding="utf-8")
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4}
    gptsmith.fit(directory / "plays.txt", out=directory / "run", steps=steps, context=256, batch_size=8, model=sizes)

    def load() -> tuple[Transformer, Tokenizer, str]:
        return *load_model(directory / "run", quantize="none"), held_out

    return load


def measure(
    load: Callable[[], tuple[Transformer, Tokenizer, str]],
    name: str,
    wanted: Collection[str],
    tokens: int,
    calibration_tokens: int,
    saved: bool,
) -> None:
    """Measure the wanted programs on a model; keep each result as soon as it is known."""
    from gptsmith.quantize.report import Reference

    model, tokenizer, text = load()
    ids = tokenizer.encode(text)[:tokens]
    reference = Reference(model, ids, prefix=tokenizer.prefix_ids)
    rows: dict[str, dict[str, float]] = earlier(name) if saved else {}

    def add(program: str, size: int, result: Comparison) -> None:
        rows[program] = {
            "megabytes": round(size / 1e6, 4),
            "perplexity": round(result.after, 4),
            "change_percent": round(100 * result.change, 3),
            "kl_divergence": round(result.divergence, 5),
            "top1_percent": round(100 * result.agreement, 2),
        }
        print(f"  {program:32}", *(f"{key} {value:,.6g}" for key, value in rows[program].items()), flush=True)
        if saved:
            keep(name, {"tokens": len(ids), "programs": rows})

    print(f"\n{name}: {model.num_parameters():,} parameters, {len(ids):,} tokens", flush=True)
    if importlib.util.find_spec("llama_cpp") and not LLAMA_TYPES.keys().isdisjoint(wanted):
        for program, size, result in by_llama(load()[0], tokenizer, reference, wanted):
            add(f"llama.cpp {program}", size, result)
    for program, bits, budget in OURS:
        if program in wanted:
            size, result = by_us(load()[0], tokenizer, reference, bits, budget, calibration_tokens)
            add(f"gptsmith {program}", size, result)
    for kind in LLAMA_TYPES:
        theirs = rows.get(f"llama.cpp {kind}")
        if f"as {kind}" in wanted and theirs is not None:
            model = load()[0]
            budget = budget_of(model, int(1e6 * theirs["megabytes"]))
            size, result = by_us(model, tokenizer, reference, 4, budget, calibration_tokens)
            add(f"gptsmith as {kind}", size, result)
    compare_sizes(rows)


def by_us(
    model: Transformer,
    tokenizer: Tokenizer,
    reference: Reference,
    bits: Bits,
    budget: float | None,
    calibration_tokens: int,
) -> tuple[int, Comparison]:
    """Quantize a model in place; return its bytes and the result."""
    from gptsmith.model.quantized import quantize, quantized_state
    from gptsmith.quantize.calibration import calibration_ids
    from gptsmith.quantize.layers import open_partial, quantize_layers, round_outer

    if budget == 0.0:
        quantize(model, bits)
    else:
        with tempfile.TemporaryDirectory() as directory:
            sequences = calibration_ids(model, tokenizer, tokens=calibration_tokens)
            widths = open_partial(Path(directory) / "part", model, sequences, bits, budget)
            quantize_layers(model, sequences, widths, Path(directory) / "part")
        round_outer(model)
    return sum(tensor.nbytes for tensor in quantized_state(model).values()), reference.compare(model)


def budget_of(model: Transformer, size: int) -> float:
    """Return the bits per weight of the layers with which the model has so many bytes, or a little less."""
    from gptsmith.quantize.report import planned_sizes
    from gptsmith.quantize.widths import bits_per_weight, quantizable

    weights = sum(weight.numel() for weight in quantizable(model).values())
    least = planned_sizes(model, spare=0.0)[0]
    return bits_per_weight(least.bits) + 8 * (0.999 * size - least.file) / weights


def compare_sizes(rows: dict[str, dict[str, float]]) -> None:
    """Print, for each of llama.cpp's types, our largest row that is not larger, and whether it is better."""
    for program, theirs in rows.items():
        smaller = [
            (ours["megabytes"], name, ours)
            for name, ours in rows.items()
            if name.startswith("gptsmith") and ours["megabytes"] <= theirs["megabytes"]
        ]
        if not program.startswith("llama.cpp") or program == "llama.cpp F32":
            continue
        if not smaller:
            print(f"  {program} ({theirs['megabytes']} MB): no row of gptsmith is as small", flush=True)
            continue
        _, name, ours = max(smaller, key=lambda row: row[0])
        better = ours["kl_divergence"] < theirs["kl_divergence"]
        print(
            f"  {program} ({theirs['megabytes']} MB): {name} ({ours['megabytes']} MB) is "
            f"{'better' if better else 'NOT better'}: KL divergence {ours['kl_divergence']} against "
            f"{theirs['kl_divergence']}, perplexity {ours['change_percent']:+}% against {theirs['change_percent']:+}%",
            flush=True,
        )


def by_llama(
    model: Transformer, tokenizer: Tokenizer, reference: Reference, wanted: Collection[str]
) -> Iterator[tuple[str, int, Comparison]]:
    """Yield type, bytes and result of each of llama.cpp's types of the same weights."""
    from gptsmith.formats.gguf import write_gguf
    from gptsmith.formats.gguf_file import open_gguf
    from gptsmith.formats.gguf_tokenizer import tokenizer_to_gguf

    with tempfile.TemporaryDirectory() as directory:
        full = Path(directory) / "F32.gguf"
        write_gguf(model, tokenizer_to_gguf(tokenizer, model.config.vocab_size), full, "f32")
        for name, kind in LLAMA_TYPES.items():
            if name not in wanted:
                continue
            path = Path(directory) / f"{name}.gguf"
            if name != "F32":
                quantize_gguf(full, path, kind, torch.get_num_threads())
            llama = open_llama(path, threads=torch.get_num_threads(), n_ctx=512, n_batch=512, logits_all=True)

            def logits(window: Window, llama: Any = llama) -> Iterator[Tensor]:
                llama.reset()
                llama.eval(window.ids[:-1].tolist())
                scored = torch.from_numpy(window.scored[1:])
                yield from torch.split(torch.from_numpy(llama.scores[: len(scored)])[scored], 128)

            size = sum(tensor.num_bytes for tensor in open_gguf(path).tensors.values())
            yield name, size, reference.compare_logits(logits)
            llama.close()
            if name != "F32":
                path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("smollm2", "trained"), default=["smollm2", "trained"])
    names = [*(name for name, _, _ in OURS), *LLAMA_TYPES, *(f"as {kind}" for kind in LLAMA_TYPES if kind != "F32")]
    parser.add_argument("--programs", nargs="+", choices=names, default=names, help="as the rows are called")
    parser.add_argument("--steps", type=int, default=600, help="of training the small model")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of held-out text")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/quantization.json, row by row")
    arguments = parser.parse_args()
    rest = arguments.programs, arguments.tokens, arguments.calibration_tokens, arguments.save
    with tempfile.TemporaryDirectory() as directory:
        if "trained" in arguments.only:
            model = trained(arguments.steps, Path(directory))
            measure(model, "trained", *rest)
        if "smollm2" in arguments.only:
            measure(smollm2, "smollm2", *rest)


def keep(name: str, result: dict[str, Any]) -> None:
    """Write a model's results to benchmarks/results/quantization.json; those of the other model stay as they are."""
    parts = {key: part for key, part in saved_results().items() if key != "machine"}
    save("quantization", {**parts, name: result})


def earlier(name: str) -> dict[str, dict[str, float]]:
    """Return the rows of a model that earlier runs have saved."""
    rows: dict[str, dict[str, float]] = saved_results().get(name, {}).get("programs", {})
    return rows


def saved_results() -> dict[str, Any]:
    path = RESULTS / "quantization.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


if __name__ == "__main__":
    main()
