"""Speed beside llama.cpp's on the same GGUF files: python benchmarks/gguf_speed.py [--only PART ...] [--save]

smollm2   SmolLM2-135M (Q4_1) through `gptsmith serve`, against llama-cpp-python in a process: decoding, and prompts of
          80 and 1,000 tokens. Ours include HTTP and text; theirs are calls of `Llama.eval` and `Llama.sample`.
kquants   A Llama shape of 113M parameters in Q4_1, Q4_K_M, Q5_K_M and Q6_K: decoding. SmolLM2's width is no multiple of
          256, so that it has few K-quants.
gpt_oss   A mixture of experts of gpt-oss' kind in MXFP4: decoding.
qwen3_moe A mixture of Qwen 3's kind in Q4_K_M: decoding.
gemma3    Gemma 3's shape (270M, with SmolLM2's vocabulary) in Q4_0: decoding.

The last four have random weights and run in this process, in this package's engine. Each figure is the median of
repeats that alternate between the programs, each with two threads; a ratio is the median of the ratios of the repeats.
Before the measurement, the logits of both programs are compared. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine
from inference import engine_of, ours
from llama import open_llama, quantize_gguf
from serving import gptsmith_command, post, server

THREADS = 2
PROMPT = 32
FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "MXFP4": 38}  # llama.cpp's llama_ftype
Program = Callable[[int], dict[str, float]]  # the number of the repeat -> figures, each the larger the better


def alternated(programs: Mapping[str, Program], repeats: int, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the medians of all figures, and of the ratios of one program to another of the same repeat."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            figures = program(repeat)
            if repeat:  # the first one warms up
                rounds[name].append(figures)

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    medians = {name: {figure: median([r[figure] for r in runs]) for figure in runs[0]} for name, runs in rounds.items()}
    ratios: dict[str, Any] = {}
    for one, other in pairs:
        both = list(zip(rounds[one], rounds[other], strict=True))
        ratios[f"{one} : {other}"] = {
            figure: {
                "median": median([a[figure] / b[figure] for a, b in both]),
                "range": [round(f(a[figure] / b[figure] for a, b in both), 3) for f in (min, max)],
            }
            for figure in both[0][0]
        }
    return {"programs": medians, "ratios": ratios}


def decoding(llama: Any, prompt: list[int], count: int) -> float:
    """Return tokens a second of llama.cpp after the first token."""
    llama.reset()
    llama.eval(prompt)
    token = llama.sample(temp=0.0)
    began = time.perf_counter()
    for _ in range(count - 1):
        llama.eval([token])
        token = llama.sample(temp=0.0)
    return (count - 1) / (time.perf_counter() - began)


def check_same(model: Any, llama: Any, prompt: list[int]) -> float:
    """Return the relative difference of the logits after a prompt; end the program if these are not the same models."""
    import llama_cpp
    import numpy as np
    import torch

    with torch.no_grad():
        mine = model(torch.tensor([prompt]))[0, -1]
    llama.reset()
    llama.eval(prompt)
    row = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    theirs = torch.from_numpy(np.ctypeslib.as_array(row, (llama.n_vocab(),)).copy())
    difference = float((mine - theirs).norm() / theirs.norm())
    if not difference < 0.2:  # both round inputs, each in its own way
        raise SystemExit(f"the programs compute different logits: they differ by {difference:.0%}.")
    return round(difference, 4)


# Through the server ---------------------------------------------------------------------------------------------------


async def completion(port: int, prompt: list[int], count: int) -> tuple[float, float]:
    """Return seconds to the first token, and tokens a second after it."""
    body = {"model": "model", "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "cache_prompt": False, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    answer = await post(port, "/v1/completions", json.dumps(body).encode())
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {(await answer.body())[:300]!r}")
    first = last = 0.0
    tokens = 0
    async for event in answer.events():
        tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
        if event["choices"]:
            last = time.perf_counter()
            first = first or last
    answer.close()
    if tokens != count:
        raise SystemExit(f"the server has generated {tokens} tokens, not {count}.")
    return first - began, (count - 1) / (last - first) if count > 1 else 0.0


def smollm2(repeats: int, tokens: int, directory: Path) -> dict[str, Any]:
    import gptsmith
    from gptsmith.formats.named import named_model_path

    model, tokenizer = gptsmith.load("smollm2-135m")
    path = named_model_path("smollm2-135m")
    text = tokenizer.encode(Path(__file__).read_text() * 3)
    llama = open_llama(path, threads=THREADS, n_ctx=2048)
    difference = check_same(model, llama, text[:PROMPT])
    with server(gptsmith_command(path, "--alias", f"model={path}"), r"at http://127\.0\.0\.1:(\d+)") as (_, port):

        def served(repeat: int) -> dict[str, float]:
            figures = {"decoding": asyncio.run(completion(port, text[repeat : repeat + PROMPT], tokens))[1]}
            for n in (80, 1000):
                seconds, _ = asyncio.run(completion(port, text[repeat : repeat + n], 1))
                figures[f"prompt of {n}"] = n / seconds
            return figures

        def theirs(repeat: int) -> dict[str, float]:
            figures = {"decoding": decoding(llama, text[repeat : repeat + PROMPT], tokens)}
            for n in (80, 1000):
                llama.reset()
                began = time.perf_counter()
                llama.eval(text[repeat : repeat + n])
                figures[f"prompt of {n}"] = n / (time.perf_counter() - began)
            return figures

        programs: dict[str, Program] = {"gptsmith serve": served, "llama.cpp": theirs}
        return {"difference": difference, **alternated(programs, repeats, [("gptsmith serve", "llama.cpp")])}


# Shapes with random weights -------------------------------------------------------------------------------------------


def shape(name: str, vocabulary: int) -> Any:
    """Return the configuration of a shape."""
    from gptsmith.model import families

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
    }  # larger ones amplify the rounding of inputs
    experts: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512}
    heads: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    if name == "kquants":
        sizes = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "tie_word_embeddings": True}
        return families.llama(**common, **heads, **sizes)
    if name == "gpt_oss":
        return families.gpt_oss(**common, **heads, **experts, hidden_size=768, num_hidden_layers=8)
    if name == "qwen3_moe":
        return families.qwen3_moe(**common, **heads, **experts, hidden_size=768, num_hidden_layers=8)
    return families.gemma3(
        **common, num_attention_heads=4, num_key_value_heads=1, head_dim=256, hidden_size=640, num_hidden_layers=18,
        intermediate_size=2048, sliding_window=512,
    )  # fmt: skip


TYPES = {
    "kquants": ("Q4_1", "Q4_K_M", "Q5_K_M", "Q6_K"),
    "gpt_oss": ("MXFP4",),
    "qwen3_moe": ("Q4_K_M",),
    "gemma3": ("Q4_0",),
}


def write(name: str, directory: Path) -> dict[str, Path]:
    """Write the files of a shape, by type; llama.cpp makes them of one in F32."""
    import torch

    import gptsmith
    from gptsmith.formats.gguf import write_gguf
    from gptsmith.formats.gguf_tokenizer import tokenizer_to_gguf
    from gptsmith.model.transformer import Transformer

    _, tokenizer = gptsmith.load("smollm2-135m")
    torch.manual_seed(0)
    model = Transformer(shape(name, tokenizer.vocab_size)).eval()
    full, paths = directory / f"{name}-F32.gguf", {}
    write_gguf(model, tokenizer_to_gguf(tokenizer, model.config.vocab_size), full, "f32")
    for type_ in TYPES[name]:
        paths[type_] = directory / f"{name}-{type_}.gguf"
        quantize_gguf(full, paths[type_], FTYPES[type_], THREADS)
    full.unlink()
    return paths


def of_shape(name: str, repeats: int, tokens: int, directory: Path) -> dict[str, Any]:
    from gptsmith.loading import load_model

    programs: dict[str, Program] = {}
    pairs, differences, sizes = [], {}, {}
    prompt = list(range(1000, 1000 + PROMPT))
    for type_, path in write(name, directory).items():
        print(f"{name}: {type_}, {path.stat().st_size / 1e6:.0f} MB", file=sys.stderr, flush=True)
        model, tokenizer = load_model(path)
        engine, llama = engine_of(model, vocab_size=tokenizer.vocab_size), open_llama(path, threads=THREADS, n_ctx=512)
        differences[type_], sizes[type_] = check_same(model, llama, prompt), path.stat().st_size

        def mine(repeat: int, engine: Any = engine) -> dict[str, float]:
            figures = ours(engine, [repeat + 1000, *prompt[1:]], tokens)
            return {"decoding": figures["decode_tokens_a_second"]}

        def theirs(repeat: int, llama: Any = llama) -> dict[str, float]:
            return {"decoding": decoding(llama, [repeat + 1000, *prompt[1:]], tokens)}

        programs |= {f"gptsmith {type_}": mine, f"llama.cpp {type_}": theirs}
        pairs.append((f"gptsmith {type_}", f"llama.cpp {type_}"))
    first = TYPES[name][0]
    pairs += [(f"gptsmith {type_}", f"gptsmith {first}") for type_ in TYPES[name][1:]]
    result = alternated(programs, repeats, pairs)
    return {"bytes": sizes, "differences": differences, **result}


PARTS = ("smollm2", *TYPES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=96, help="tokens to generate for a figure of decoding")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/gguf_speed.json (keeps other parts)"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the server, too
    import torch

    torch.set_num_threads(THREADS)
    result: dict[str, Any] = {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as directory:
            measure = smollm2 if name == "smollm2" else lambda *a, name=name: of_shape(name, *a)
            result[name] = measure(arguments.repeats, arguments.tokens, Path(directory))
        print(name, json.dumps(result[name], indent=1), flush=True)
    if arguments.save:
        path = machine.RESULTS / "gguf_speed.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        parts = {name: part for name, part in (earlier | result).items() if name != "machine"}
        print(
            machine.save(
                "gguf_speed", parts | {"threads": THREADS, "repeats": arguments.repeats, "tokens": arguments.tokens}
            )
        )


if __name__ == "__main__":
    main()
