"""An imported model beside transformers' own reading of it: python benchmarks/imported.py [--save]

smollm2-135m (GGUF, Q4_1): seconds to load, seconds from the command to its first token, and perplexity over a text
(the opening of Coriolanus, from tinyshakespeare) through this package and through transformers, on the same token ids.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

MODEL = "smollm2-135m"
TOKENS = 2048
WINDOW = 512


def perplexity(logits_of: Any, ids: list[int]) -> float:
    """exp of the mean loss over consecutive windows that do not overlap."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, WINDOW):
            window = torch.tensor([ids[start : start + WINDOW + 1]])
            logits = logits_of(window[:, :-1])
            total += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/imported.json")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    import gptsmith
    from gptsmith.data.corpora import corpus_path
    from gptsmith.export.export import export_directory

    gptsmith.load(MODEL)  # fetched
    began = time.perf_counter()
    model, tokenizer = gptsmith.load(MODEL)
    result: dict[str, Any] = {"model": MODEL, "load_seconds": round(time.perf_counter() - began, 2)}
    ids = tokenizer.encode(corpus_path("tinyshakespeare").read_text()[:20_000])[: TOKENS + 1]
    result["perplexity"] = round(perplexity(model, ids), 4)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "model"
        export_directory(MODEL, out, dtype="fp32")
        theirs: Any = AutoModelForCausalLM.from_pretrained(out)
        result["perplexity_transformers"] = round(perplexity(lambda x: theirs(x).logits, ids), 4)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            command = [sys.executable, "-m", "gptsmith", "generate", str(out), "--prompt", "The", "--max-tokens", "1"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(round(time.perf_counter() - began, 2))
        result["first_token_seconds_safetensors"] = sorted(times)
    print(result)
    if arguments.save:
        print(machine.save("imported", result))


if __name__ == "__main__":
    main()
