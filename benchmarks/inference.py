"""Generation here and elsewhere: python benchmarks/inference.py [--peers DIR] [--repeats N] [--only NAME ...] [--save]

decode      gpt2-124M's shape, batch 1, 64 tokens in, 128 out: fp32, int8 and int4; transformers; ctranslate2
smollm2     SmolLM2-135M in 4 bits, batch 1: decoding, and prompts of 80 and 1,000 tokens; llama.cpp on the same GGUF
throughput  32 requests of unequal length at once (64 in and 64 out on average); transformers' batched `generate`
latency     time to the first token of a short prompt, idle and while a prompt of 1,000 tokens is read

Each figure is the median of repeats that alternate between the programs. Peers are not dependencies: install them with
`pip install --no-deps --target DIR ctranslate2 llama-cpp-python diskcache` and name the directory; those that are not
there are left out. On a GPU (--device cuda) the programs are this package and transformers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

IN, OUT = 64, 128
Program = Callable[[], dict[str, float]]


def bandwidth() -> float:
    """GB/s at which all cores together read memory: the best of several sums over 1 GB."""
    import torch

    numbers = torch.ones(1 << 28)
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - began) / 1e9)
    return best


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


def ours(engine: Any, prompt: list[int], count: int) -> dict[str, float]:
    """Seconds to the first token, and tokens a second after it."""
    from gptsmith.engine.sampling import SamplingParams

    engine.weights_changed()  # nothing is known of the prompt
    began, first = time.perf_counter(), 0.0
    for _ in engine.stream(prompt, SamplingParams(max_tokens=count, temperature=0)):
        first = first or time.perf_counter()
    ended = time.perf_counter()
    figures = {"first_token_seconds": first - began, "tokens_a_second": count / (ended - began)}
    return figures | ({"decode_tokens_a_second": (count - 1) / (ended - first)} if count > 1 else {})


def engine_of(model: Any, **options: Any) -> Any:
    from gptsmith.engine.engine import Engine

    return Engine(model, **{"max_batch": 1, "cache_tokens": 2048, **options})


def weight_bytes(model: Any) -> int:
    """What decoding one token reads: all weights but the tables of which it reads a row."""
    from gptsmith.model.quantized import state

    tables = ("embed_positions", "embed_tokens") if not model.config.tie_word_embeddings else ("embed_positions",)
    return sum(int(t.nbytes) for name, t in state(model).items() if not name.startswith(tables))


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from gptsmith.model import families
    from gptsmith.model.hf import save_model
    from gptsmith.model.quantized import quantize
    from gptsmith.model.transformer import Transformer

    prompt = list(range(100, 100 + IN))
    models: dict[str, Any] = {}
    for name, bits in (("fp32", None), ("int8", 8), ("int4", 4)):
        torch.manual_seed(0)
        models[name] = Transformer(families.gpt2()).eval().to(arguments.device)
        if bits is not None:
            quantize(models[name], bits)  # type: ignore[arg-type]
    programs: dict[str, Program] = {}
    for name, model in models.items():
        engine = engine_of(model)
        programs[f"gptsmith {name}"] = lambda engine=engine: ours(engine, prompt, OUT)  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as directory:
        from transformers import AutoModelForCausalLM

        save_model(models["fp32"], Path(directory))
        theirs: Any = AutoModelForCausalLM.from_pretrained(directory).to(arguments.device)
        ids = torch.tensor([prompt], device=arguments.device)

        def transformers() -> dict[str, float]:
            began = time.perf_counter()
            made = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=OUT,
                min_new_tokens=OUT,
                do_sample=False,
                pad_token_id=0,
            )
            assert made.shape[1] == IN + OUT
            return {"tokens_a_second": OUT / (time.perf_counter() - began)}

        programs["transformers fp32"] = transformers
        if arguments.device == "cpu" and available("ctranslate2"):
            programs |= _ctranslate2(Path(directory), prompt)
        figures = alternate(programs, arguments.repeats)
    speed = bandwidth() if arguments.device == "cpu" else None
    for name, model in models.items():
        if speed is not None:
            bound = speed * 1e9 / weight_bytes(model)
            row = figures[f"gptsmith {name}"]
            row["share_of_bandwidth_bound"] = round(row["decode_tokens_a_second"] / bound, 3)
    return {"memory_gb_a_second": speed and round(speed, 1), "programs": figures}


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
    import torch

    import gptsmith
    from gptsmith.model_source import named_model_path

    model, tokenizer = gptsmith.load("smollm2-135m", quantize="int4")
    engine = engine_of(model, vocab_size=tokenizer.vocab_size)
    text = tokenizer.encode(Path(__file__).read_text() * 3)
    programs: dict[str, Program] = {
        "gptsmith int4": lambda: {
            "decode_tokens_a_second": ours(engine, text[:80], 128)["decode_tokens_a_second"],
            **{f"prefill_{n}": n / ours(engine, text[:n], 1)["first_token_seconds"] for n in (80, 1000)},
        }
    }
    if available("llama_cpp"):
        import llama_cpp

        threads = torch.get_num_threads()
        path = str(named_model_path("smollm2-135m"))
        llama: Any = llama_cpp.Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

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
    speed = bandwidth()
    row = figures["gptsmith int4"]
    row["share_of_bandwidth_bound"] = round(row["decode_tokens_a_second"] * weight_bytes(model) / speed / 1e9, 3)
    return {"memory_gb_a_second": round(speed, 1), "programs": figures}


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of 32 requests that come at once; transformers pads prompts, and goes on to the longest."""
    import torch
    from transformers import AutoModelForCausalLM

    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.model import families
    from gptsmith.model.hf import save_model
    from gptsmith.model.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(families.gpt2()).eval().to(arguments.device)
    sizes = [(16 + 3 * i, 16 + 97 * ((7 * i) % 32) // 31) for i in range(32)]
    prompts = [list(range(100, 100 + n)) for n, _ in sizes]
    total = sum(m for _, m in sizes)
    engine = engine_of(model, max_batch=32, cache_tokens=8192)
    wishes = [SamplingParams(max_tokens=m, temperature=0) for _, m in sizes]

    def run() -> dict[str, float]:
        engine.weights_changed()
        began = time.perf_counter()
        results = engine.generate(prompts, wishes)
        seconds = time.perf_counter() - began
        assert sum(len(r.ids) for r in results) == total
        return {"tokens_a_second": total / seconds}

    with tempfile.TemporaryDirectory() as directory:
        save_model(model, Path(directory))
        theirs: Any = AutoModelForCausalLM.from_pretrained(directory).to(arguments.device)
    longest, most = max(n for n, _ in sizes), max(m for _, m in sizes)
    ids = torch.tensor([[0] * (longest - n) + p for p, (n, _) in zip(prompts, sizes, strict=True)])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n, _ in sizes])

    def transformers() -> dict[str, float]:
        began = time.perf_counter()
        theirs.generate(
            ids.to(arguments.device),
            attention_mask=mask.to(arguments.device),
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
            pad_token_id=0,
        )
        return {"tokens_a_second": total / (time.perf_counter() - began)}

    programs: dict[str, Program] = {"gptsmith fp32": run, "transformers fp32": transformers}
    return {"requests": 32, "tokens": total, "programs": alternate(programs, arguments.repeats)}


def latency(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of a prompt of 64 tokens: idle, and when it comes while one of 1,000 is being read."""
    import torch

    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.model import families
    from gptsmith.model.transformer import Transformer

    torch.manual_seed(0)
    engine = engine_of(Transformer(families.gpt2(max_position_embeddings=2048)).eval(), max_batch=8, cache_tokens=4096)
    params = SamplingParams(max_tokens=1, temperature=0)

    def run() -> dict[str, float]:
        idle = ours(engine, list(range(64)), 1)["first_token_seconds"]
        engine.weights_changed()
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

    return alternate({"gptsmith fp32": run}, arguments.repeats)["gptsmith fp32"]


def available(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "decode": decode,
    "smollm2": smollm2,
    "throughput": throughput,
    "latency": latency,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a directory with ctranslate2 and llama_cpp")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/inference.json")
    arguments = parser.parse_args()
    if arguments.peers:
        sys.path.append(arguments.peers)
    import torch

    from gptsmith.runtime import available_cores

    torch.set_num_threads(available_cores())
    result: dict[str, Any] = {}
    for name in arguments.only:
        result[name] = PARTS[name](arguments)
        print(name, result[name], flush=True)
    if arguments.save:
        print(machine.save("inference", result))


if __name__ == "__main__":
    main()
