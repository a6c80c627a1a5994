"""What the tuning benchmarks share: a small pretrained model, rows of the demo set, children with a memory record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

MODELS = Path(tempfile.gettempdir()) / "gptsmith-tuning"  # base models, kept from one script to the next

QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "eval_every": 10**9, "save_every": 10**9, "log_every": 1}


def small_model(
    directory: Path, width: int = 256, layers: int = 8, *, steps: int = 2, optimizer: str = "muon", seed: int = 1337
) -> Path:
    """Pretrain a llama-layout model with 4,096 byte pairs on wiki-summaries and return its run. Reused if it is there.

    steps: 2 give a model for measuring speed; some hundred give one that knows words.
    """
    import gptsmith

    if (directory / "report.html").exists():
        return directory
    rates = {"lr": 0.02, "embedding_lr": 0.01} if optimizer == "muon" else {"lr": 0.002}
    shared = next(iter(sorted(directory.parent.glob("*/tokenizer"))), None)  # learned once for all
    options: dict[str, Any] = {
        "tokenizer": str(shared or "bpe"),
        "vocab_size": 4096,
        "steps": steps,
        "context": 512,
        "batch_size": 4,
        "compile": "off",
        "seed": seed,
        "eval_tokens": 20_000,
        "model": {
            "family": "llama",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // 32),
        },
        "optim": {"name": optimizer, **rates},
    }
    gptsmith.fit("wiki-summaries", options | QUIET | {"log_every": 50}, out=directory)
    return directory


def demo_rows(path: Path, count: int | None = None, longest: int = 10**9) -> Path:
    """Write alpaca_en_demo, or its first rows, as conversational prompts and completions; TRL has no Alpaca form.

    longest: leave out rows with more characters.
    """
    from gptsmith.data.corpora import corpus_path

    source = corpus_path("alpaca_en_demo")
    file = source if source.is_file() else next(p for p in sorted(source.rglob("*.json*")))
    text = file.read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if sum(len(str(value)) for value in row.values()) <= longest]
    with path.open("w") as out:
        for row in rows[:count]:
            prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
            value = {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            out.write(json.dumps(value) + "\n")
    return path


def child(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script of this folder in a process of its own and return the JSON of its last line, with its peak memory.

    The environment is this one's: OMP_NUM_THREADS sets the threads.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def peak_mb() -> int:
    """Return the peak resident memory of this process so far, in MB. (`ru_maxrss` begins with that of the parent.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    raise OSError("no VmHWM in /proc/self/status")
