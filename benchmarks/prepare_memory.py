"""Peak memory and speed of preparing a large text file: python benchmarks/prepare_memory.py [--gigabytes 2] [--save]

Writes a text of that size from words, numbers and names that vary, prepares it with a byte-level BPE tokenizer in a
process of its own, and samples the resident memory of that process and all its children (psutil, every 20 ms). The
kernel's own high-water mark of the process is reported beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from gptsmith.data import open_dataset, open_source, prepare
from gptsmith.runtime import available_cores
from gptsmith.tokenizer import load_tokenizer, train_bpe, train_char

LIMIT_MB = 600
RESULTS = Path(__file__).parent / "results"


def write_text(path: Path, size: int, seed: int = 0) -> None:
    """A play without end: speakers, and verses of words that are common in proportion to Zipf's law."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "ee", "ou", "ai")]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 3)))) for _ in range(50_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    scenes = []
    for _ in range(200):
        verses = draw.choices(words, weights, k=20_000)
        lines = [" ".join(verses[start : start + 8]).capitalize() for start in range(0, len(verses), 8)]
        for start in range(0, len(lines), 5):
            lines[start] = f"\n{draw.choice(words).upper()}:\n{lines[start]}, {draw.randrange(2000)} — é!"
        scenes.append("\n".join(lines).encode())
    with open(path, "wb") as file:
        while file.tell() < size:
            file.write(b"\n\nSCENE %d\n" % draw.randrange(10**6) + draw.choice(scenes))


def measure(text: Path, tokenizer: Path, cache: Path) -> dict[str, float | int]:
    """Prepare `text` in another process. Memory in MB (10**6 bytes) of the whole process tree."""
    command = [sys.executable, __file__, "--child", str(text), str(tokenizer)]
    started = time.perf_counter()
    process = psutil.Popen(command, env={**os.environ, "GPTSMITH_CACHE": str(cache)}, stdout=subprocess.PIPE)
    peak, processes = 0, 0
    while process.poll() is None:
        total, count = 0, 0
        for each in [process, *_children(process)]:
            try:
                total += each.memory_info().rss
                count += 1
            except psutil.Error:
                continue
        peak, processes = max(peak, total), max(processes, count)
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(process.returncode)
    child = json.loads(process.stdout.read())
    return {
        "peak_rss_tree_mb": round(peak / 1e6, 1),
        "processes": processes,
        "high_water_process_mb": round(child["high_water"] / 1e6, 1),
        "before_prepare_mb": round(child["before"] / 1e6, 1),
        "tokens": child["tokens"],
        "seconds": round(seconds, 1),
        "mb_per_second": round(text.stat().st_size / 1e6 / child["seconds"], 2),
        "cpu_seconds": round(child["cpu"], 1),
    }


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    except psutil.Error:
        return []


def child(text: Path, tokenizer: Path) -> None:
    """The measured process: nothing but what `gptsmith train` does before it trains."""
    before = psutil.Process().memory_info().rss
    loaded = load_tokenizer(tokenizer)
    started = time.perf_counter()
    dataset = prepare(open_source(text), loaded)
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "before": before,
        "high_water": usage.ru_maxrss * unit,
        "tokens": len(dataset.train) + len(dataset.val),
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the text in units of 10**9 bytes")
    parser.add_argument("--kind", choices=("bpe", "char"), default="bpe")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--save", action="store_true", help=f"write the result into {RESULTS}")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    what = f"a BPE of {arguments.vocab_size}" if arguments.kind == "bpe" else "characters"
    directory = Path(tempfile.mkdtemp(prefix="gptsmith-prepare-"))
    try:
        text = directory / "input.txt"
        write_text(text, int(arguments.gigabytes * 1e9))
        with open(text, encoding="utf-8") as file:
            sample = [file.read(3_000_000)]
        tokenizer = train_bpe(sample, arguments.vocab_size) if arguments.kind == "bpe" else train_char(sample)
        tokenizer.save(directory / "tokenizer")
        measured = measure(text, directory / "tokenizer", directory / "cache")
        result = {
            "what": f"prepare {text.stat().st_size / 1e9:.2f} GB of text with {what}",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()} {platform.system()}, {available_cores()} cores",
            "python": platform.python_version(),
            **measured,
            "under_limit": max(measured["peak_rss_tree_mb"], measured["high_water_process_mb"]) < LIMIT_MB,
        }
        (prepared,) = (path for path in (directory / "cache" / "prepared").iterdir() if path.is_dir())
        open_dataset(prepared, verify=True)
        print(json.dumps(result, indent=1))
        if arguments.save:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"prepare_memory_{arguments.kind}.json").write_text(
                json.dumps(result, indent=1) + "\n", encoding="utf-8"
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
