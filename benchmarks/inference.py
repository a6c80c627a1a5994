"""Generation here and elsewhere: python benchmarks/inference.py [--only NAME ...] [--repeats N] [--device D] [--save]

decode      gpt2-124M's shape, batch 1, 64 tokens in, 128 out: fp32, int8 and int4; transformers; ctranslate2
smollm2     SmolLM2-135M in 4 bits, batch 1: decoding, and prompts of 80 and 1,000 tokens; llama.cpp on the same GGUF
throughput  32 requests of unequal length at once (about 64 in and 64 out); transformers' batched `generate`
latency     time to the first token of a prompt of 64, idle and while one of 1,000 tokens is read
quality     perplexity of SmolLM2 in 32, 8 and 4 bits

Each figure is the median of repeats that alternate between the programs, in one process. The peers are the packages of
the extra `bench`; those that are not there are left out. With every figure of a single request comes the share of what
memory allows: the bytes of the weights that a token needs, at the rate at which all cores together sum 1 GB.

On a GPU (--device cuda) the models are in bfloat16, the programs this package and transformers, and the parts `decode`,
`throughput` and `latency`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
from llama import open_llama

IN, OUT = 64, 128
Program = Callable[[], dict[str, float]]


def bandwidth(device: str) -> float:
    """GB/s at which memory is read: the best of several sums over 1 GB."""
    import torch

    numbers = torch.ones(1 << 28, device=device)
    best = 0.0
    for _ in range(12):
        finish(device)
        began = time.perf_counter()
        numbers.sum()
        finish(device)
        best = max(best, numbers.nbytes / (time.perf_counter() - began) / 1e9)
    return best


def finish(device: str) -> None:
    """Wait for what a GPU has been given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def alternate(programs: dict[str, Program], repeats: int) -> dict[str, dict[str, float]]:
    """The median of each figure over so many rounds, in each of which every program runs once."""
    for program in programs.values():
        program()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            rounds[name].append(program())
    return {
        name: {figure: round(statistics.median(each[figure] for each in runs), 4) for figure in runs[0]}
        for name, runs in rounds.items()
    }


def add_shares(figures: dict[str, dict[str, float]], bytes_: dict[str, int], device: str) -> float:
    """Add to each row the share of memory's bound on decoding; the measured rate, GB/s."""
    speed = bandwidth(device)
    for name, row in figures.items():
        rate = row.get("decode_tokens_a_second", row.get("tokens_a_second", 0.0))
        row["share_of_bandwidth"] = round(rate * bytes_[name] / speed / 1e9, 3)
    return round(speed, 1)


def ours(engine: Any, prompt: list[int], count: int) -> dict[str, float]:
    """Seconds to the first token, tokens a second in all, and after the first."""
    from gptsmith.engine.sampling import SamplingParams

    engine.on_weights_updated()  # nothing is known of the prompt
    began, first = time.perf_counter(), 0.0
    for _ in engine.stream(prompt, SamplingParams(max_tokens=count, temperature=0)):
        first = first or time.perf_counter()
    ended = time.perf_counter()
    figures = {"first_token_seconds": first - began, "tokens_a_second": count / (ended - began)}
    return figures | ({"decode_tokens_a_second": (count - 1) / (ended - first)} if count > 1 else {})


def engine_of(model: Any, **options: Any) -> Any:
    from gptsmith.engine.engine import Engine

    return Engine(model, **{"max_batch": 1, "cache_tokens": 2048, **options})


def gpt2(bits: int | None, device: str, **options: Any) -> Any:
    """A model of gpt2-124M's shape with random weights, in so many bits (None: fp32, on a GPU bf16)."""
    import torch

    from gptsmith.model import families
    from gptsmith.model.quantized import quantize, quantize_on_gpu
    from gptsmith.model.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(families.gpt2(**options)).eval()
    if device != "cpu":
        model = model.to(device, torch.bfloat16)
        return model if bits is None else quantize_on_gpu(model, bits)  # type: ignore[arg-type]
    return model if bits is None else quantize(model, bits)  # type: ignore[arg-type]


def weight_bytes(model: Any, bits: int | None = None) -> int:
    """What decoding one token reads: all weights but the tables of which it reads a row. bits: of linear layers whose
    weights (torchao's) do not say."""
    import torch

    from gptsmith.model.quantized import quantized_state

    if bits is not None and any(type(p) is not torch.nn.Parameter for p in model.parameters()):
        parameters = [p for name, p in model.named_parameters() if not name.startswith("embed_positions")]
        return sum(2 * p.numel() if type(p) is torch.nn.Parameter else p.numel() * bits // 8 for p in parameters)
    tables = ("embed_positions",) if model.config.tie_word_embeddings else ("embed_positions", "embed_tokens")
    return sum(int(t.nbytes) for name, t in quantized_state(model).items() if not name.startswith(tables))


def theirs_of(model: Any, directory: Path, device: str) -> Any:
    """The same model in transformers, in the same type."""
    import torch
    from transformers import AutoModelForCausalLM

    from gptsmith.formats.hf import save_model

    save_model(model.float() if device == "cpu" else model, directory)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return theirs.to(device).eval()


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    device = arguments.device
    full = "fp32" if device == "cpu" else "bf16"
    prompt = list(range(100, 100 + IN))
    models: dict[str, Any] = {full: gpt2(None, device)}
    if device == "cpu" or importlib.util.find_spec("torchao"):
        models |= {"int8": gpt2(8, device), "int4": gpt2(4, device)}
    programs: dict[str, Program] = {}
    bytes_: dict[str, int] = {}
    for name, model in models.items():
        engine = engine_of(model)
        programs[f"gptsmith {name}"] = lambda engine=engine: ours(engine, prompt, OUT)  # type: ignore[misc]
        bytes_[f"gptsmith {name}"] = weight_bytes(model, {"int8": 8, "int4": 4}.get(name))
    with tempfile.TemporaryDirectory() as directory:
        theirs = theirs_of(models[full], Path(directory), device)
        ids = torch.tensor([prompt], device=device)
        whole = torch.ones_like(ids)

        def transformers() -> dict[str, float]:
            began = time.perf_counter()
            made = theirs.generate(
                ids, attention_mask=whole, max_new_tokens=OUT, min_new_tokens=OUT, do_sample=False, pad_token_id=0
            )
            assert made.shape[1] == IN + OUT
            finish(device)
            return {"tokens_a_second": OUT / (time.perf_counter() - began)}

        programs[f"transformers {full}"] = transformers
        bytes_[f"transformers {full}"] = weight_bytes(models[full])
        if device == "cpu" and importlib.util.find_spec("ctranslate2"):
            programs |= _ctranslate2(Path(directory), prompt)
            bytes_ |= {
                "ctranslate2 float32": weight_bytes(models[full]),
                "ctranslate2 int8": weight_bytes(models[full]) // 4,
            }
        figures = alternate(programs, arguments.repeats)
    speed = add_shares(figures, bytes_, device)
    return {"memory_gb_a_second": speed, "programs": figures}


def _ctranslate2(directory: Path, prompt: list[int]) -> dict[str, Program]:
    import ctranslate2
    import torch
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"t{i}": i for i in range(50257)}, "t0")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t0", "eos_token": "t0", "unk_token": "t0"}'
    )
    tokens = [f"t{i}" for i in prompt]
    programs: dict[str, Program] = {}
    for kind in ("float32", "int8"):
        out = directory / f"ct2-{kind}"
        ctranslate2.converters.TransformersConverter(str(directory)).convert(str(out), quantization=kind)
        generator = ctranslate2.Generator(str(out), intra_threads=torch.get_num_threads(), compute_type=kind)

        def run(generator: Any = generator) -> dict[str, float]:
            began = time.perf_counter()
            made = generator.generate_batch(
                [tokens], max_length=OUT, min_length=OUT, include_prompt_in_result=False, sampling_topk=1
            )
            assert len(made[0].sequences_ids[0]) == OUT
            return {"tokens_a_second": OUT / (time.perf_counter() - began)}

        programs[f"ctranslate2 {kind}"] = run
    return programs


def smollm2(arguments: argparse.Namespace) -> dict[str, Any]:
    """The GGUF file's own 4-bit numbers on both sides; this package computes with them as they are, too."""
    import torch

    import gptsmith
    from gptsmith.formats.named import named_model_path

    model, tokenizer = gptsmith.load("smollm2-135m")
    engine = engine_of(model, vocab_size=tokenizer.vocab_size)
    text = tokenizer.encode(Path(__file__).read_text() * 3)
    programs: dict[str, Program] = {
        "gptsmith Q4_1": lambda: {
            "decode_tokens_a_second": ours(engine, text[:80], 128)["decode_tokens_a_second"],
            **{f"prefill_{n}": n / ours(engine, text[:n], 1)["first_token_seconds"] for n in (80, 1000)},
        }
    }
    if importlib.util.find_spec("llama_cpp"):
        llama = open_llama(named_model_path("smollm2-135m"), threads=torch.get_num_threads(), n_ctx=2048)

        def run() -> dict[str, float]:
            figures = {}
            for n in (80, 1000):
                llama.reset()
                began = time.perf_counter()
                llama.eval(text[:n])
                figures[f"prefill_{n}"] = n / (time.perf_counter() - began)
            llama.reset()
            llama.eval(text[:80])
            began = time.perf_counter()
            for _ in range(127):
                llama.eval([llama.sample(temp=0.0)])
            return {"decode_tokens_a_second": 127 / (time.perf_counter() - began), **figures}

        programs["llama.cpp Q4_1"] = run
    figures = alternate(programs, arguments.repeats)
    speed = add_shares(figures, dict.fromkeys(figures, weight_bytes(model)), "cpu")
    return {"memory_gb_a_second": speed, "programs": figures}


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of 32 requests that come at once; transformers pads prompts, and goes on to the longest."""
    import torch

    from gptsmith.engine.sampling import SamplingParams

    device = arguments.device
    full = "fp32" if device == "cpu" else "bf16"
    model = gpt2(None, device)
    sizes = [(16 + 3 * i, 16 + 97 * ((7 * i) % 32) // 31) for i in range(32)]
    prompts = [list(range(100, 100 + n)) for n, _ in sizes]
    total = sum(m for _, m in sizes)
    params = [SamplingParams(max_tokens=m, temperature=0) for _, m in sizes]
    programs: dict[str, Program] = {}
    models = {full: model} | ({"int8": gpt2(8, device), "int4": gpt2(4, device)} if device == "cpu" else {})
    for name, each in models.items():
        engine = engine_of(each, max_batch=32, cache_tokens=8192)

        def run(engine: Any = engine) -> dict[str, float]:
            engine.on_weights_updated()
            began = time.perf_counter()
            results = engine.generate(prompts, params)
            seconds = time.perf_counter() - began
            assert sum(len(r.ids) for r in results) == total
            return {"tokens_a_second": total / seconds}

        programs[f"gptsmith {name}"] = run
    with tempfile.TemporaryDirectory() as directory:
        theirs = theirs_of(model, Path(directory), device)
    longest, most = max(n for n, _ in sizes), max(m for _, m in sizes)
    padded = [[0] * (longest - n) + p for p, (n, _) in zip(prompts, sizes, strict=True)]
    ids = torch.tensor(padded, device=device)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n, _ in sizes], device=device)

    def transformers() -> dict[str, float]:
        began = time.perf_counter()
        theirs.generate(
            ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
        )
        finish(device)
        return {"tokens_a_second": total / (time.perf_counter() - began)}

    programs[f"transformers {full}"] = transformers
    return {"requests": 32, "tokens": total, "programs": alternate(programs, arguments.repeats)}


def latency(arguments: argparse.Namespace) -> dict[str, Any]:
    from gptsmith.engine.sampling import SamplingParams

    model = gpt2(None, arguments.device, max_position_embeddings=2048)
    engine = engine_of(model, max_batch=8, cache_tokens=4096)
    params = SamplingParams(max_tokens=1, temperature=0)

    def run() -> dict[str, float]:
        idle = ours(engine, list(range(64)), 1)["first_token_seconds"]
        engine.on_weights_updated()
        long = engine.add_request(list(range(1000)), params)
        for _ in range(2):
            engine.step()
        began = time.perf_counter()
        short = engine.add_request(list(range(2000, 2064)), params)
        while not any(event.request == short for event in engine.step()):
            pass
        busy = time.perf_counter() - began
        engine.abort(long)
        while engine.has_work:
            engine.step()
        return {"idle_seconds": idle, "busy_seconds": busy, "ratio": busy / idle}

    return {"programs": alternate({"gptsmith": run}, arguments.repeats)}


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on 8,192 tokens of Python's documentation.

    The file's own numbers are of 4 bits, so that rounding them to 4 bits again would lose nothing. What is rounded is
    the same model with its hidden numbers in another order: this changes nothing in 32 bits, and a new group has
    numbers of many of the file's groups.
    """
    from pydoc_data.topics import topics

    import gptsmith
    from gptsmith.evaluate.text import perplexity
    from gptsmith.model.quantized import dequantize, quantize

    stored, tokenizer = gptsmith.load("smollm2-135m")
    ids = tokenizer.encode("\n".join(topics.values())[:200_000])[:8192]
    rows = {"Q4_1, as stored": perplexity(stored, ids)}
    rows["fp32 of the stored numbers"] = perplexity(dequantize(stored), ids)
    rows["fp32, reordered"] = perplexity(reordered(stored), ids)
    for bits in (8, 4):
        model, _ = gptsmith.load("smollm2-135m", quantize="none")
        rows[f"int{bits}, reordered"] = perplexity(quantize(reordered(model), bits), ids)
    plain = rows["fp32 of the stored numbers"]
    return {
        "tokens": len(ids),
        "programs": {
            name: {"perplexity": round(value, 4), "change_percent": round(100 * (value / plain - 1), 3)}
            for name, value in rows.items()
        },
    }


def reordered(model: Any) -> Any:
    """A Llama-like model whose hidden numbers, and those of its feed-forward layers, are in another order, in place."""
    import torch

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(model.config.hidden_size, generator=generator)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(model.embed_tokens.weight[:, order])
        for layer in model.layers:
            inner = torch.randperm(model.config.intermediate_size, generator=generator)
            both = torch.cat((inner, inner + model.config.intermediate_size))  # gate and up alike
            for norm in (layer.attention_norm, layer.mlp_norm):
                norm.weight.copy_(norm.weight[order])
            attention, mlp = layer.attention, layer.mlp
            attention.qkv_proj.weight.copy_(attention.qkv_proj.weight[:, order])
            attention.o_proj.weight.copy_(attention.o_proj.weight[order])
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[both][:, order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[order][:, inner])
        model.norm.weight.copy_(model.norm.weight[order])
    return model


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "decode": decode,
    "smollm2": smollm2,
    "throughput": throughput,
    "latency": latency,
    "quality": quality,
}
ON_A_GPU = ("decode", "throughput", "latency")


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}", *(f"{key} {value}" for key, value in result.items() if key != "programs"), sep="  ")
    for program, figures in result["programs"].items():
        print(f"  {program:26}", *(f"{figure} {value:,.4g}" for figure, value in figures.items()), sep="  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/inference.json (keeps other parts)"
    )
    arguments = parser.parse_args()
    import torch

    from gptsmith.runtime import available_cores

    torch.set_num_threads(available_cores())
    result: dict[str, Any] = {}
    for name in arguments.only or (PARTS if arguments.device == "cpu" else ON_A_GPU):
        result[name] = PARTS[name](arguments)
        show(name, result[name])
    if arguments.save:
        file = "inference" if arguments.device == "cpu" else f"inference_{arguments.device.partition(':')[0]}"
        path = machine.RESULTS / f"{file}.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        print(machine.save(file, {name: part for name, part in (earlier | result).items() if name != "machine"}))


if __name__ == "__main__":
    main()
