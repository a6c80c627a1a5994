"""Bits per byte against llama.cpp: python benchmarks/evaluation/llama_perplexity.py [--bytes 1000000] [--save]

SmolLM2-135M, exported to GGUF in fp32, on the beginning of enwik8. llama.cpp's side repeats its program `perplexity`
through llama-cpp-python: windows of 512 tokens that do not overlap, of which the second half is scored. Ours is
`gptsmith eval --data FILE --context 512 --stride 256`, which scores every token with as much context as there, and
besides the same half of each window, computed by the model here.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import gptsmith
from gptsmith.data.corpora import corpus_path
from gptsmith.evaluate.text import TextOptions, evaluate_text
from gptsmith.export.export import export_gguf
from gptsmith.model.loss import token_logprobs

MODEL, WINDOW = "smollm2-135m", 512


def log_probability(logits: Any, ids: Any) -> float:
    """Return the sum of the log-probabilities of ids, (T,), under logits, (T, V), in double precision."""
    rows = np.asarray(logits, dtype=np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    chosen = rows[np.arange(len(ids)), ids]
    return float((chosen - np.log(np.exp(rows).sum(axis=1))).sum())


def theirs(path: Path, ids: list[int]) -> float:
    """Return the negative log-probability, in nats, of the second half of each window."""
    llama: Any = importlib.import_module("llama_cpp")
    model = llama.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False, n_threads=1)
    total = 0.0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        model.reset()
        part = ids[start : start + WINDOW]
        model.eval(part)
        total -= log_probability(model.scores[WINDOW // 2 - 1 : WINDOW - 1], part[WINDOW // 2 :])
    return total


def ours(ids: list[int], model: Any) -> float:
    """Return the same, computed here."""
    total = 0.0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        part = torch.tensor(ids[start : start + WINDOW])[None]
        with torch.inference_mode():
            total -= float(token_logprobs(model, part[:, :-1], part[:, 1:])[0, WINDOW // 2 - 1 :].double().sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/evaluation_llama_perplexity.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = gptsmith.load(MODEL)
    text = corpus_path("enwik8").read_bytes()[: options.bytes].decode("utf-8", errors="ignore")
    ids = list(tokenizer.encode(text))
    scored = [ids[i] for at in range(0, len(ids) - WINDOW + 1, WINDOW) for i in range(at + WINDOW // 2, at + WINDOW)]
    size = len(tokenizer.decode(scored).encode())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        export_gguf(MODEL, place / "model.gguf", dtype="f32")
        (place / "text.txt").write_text(text)
        began = time.process_time()
        their_bits = theirs(place / "model.gguf", ids) / size / math.log(2)
        middle = time.process_time()
        our_bits = ours(ids, model) / size / math.log(2)
        last = time.process_time()
        windows = TextOptions(context=WINDOW, stride=WINDOW // 2)
        result = evaluate_text(model, tokenizer, place / "text.txt", options=windows)
    found: dict[str, Any] = {
        "bytes": len(text.encode()),
        "tokens": len(ids),
        "scored": len(scored),
        "llama.cpp": their_bits,
        "here, the same tokens": our_bits,
        "gptsmith eval": result.bits_per_byte,
        "seconds": [round(middle - began), round(last - middle), round(time.process_time() - last)],
    }
    print(found)
    if options.save:
        import machine

        print(machine.save("evaluation_llama_perplexity", found))


if __name__ == "__main__":
    main()
