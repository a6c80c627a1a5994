"""The sweeps behind docs/recipes.md: python benchmarks/recipes/sweep.py [NAME ...] [--list]

Each sweep changes one thing and spends the same arithmetic or tokens on every run, so its losses do not depend on how
fast the machine is. Results go to benchmarks/results/recipes.json as they come; a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import machine

RESULTS = machine.RESULTS / "recipes.json"
SHAKESPEARE = ("tinyshakespeare", "--sample-tokens", "0", "--compile", "off")
LONG = (*SHAKESPEARE[:-1], "on")
SMALL = ("--budget", "2.5e12flop")
MEDIUM = ("--budget", "1e13flop")


def sweeps() -> dict[str, dict[str, tuple[str, ...]]]:
    """name -> label -> the command line after `gptsmith train`."""
    made: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, budget, depths in (
        ("depth at 2.5e12 FLOP", SMALL, (2, 3, 4, 5, 6)),
        ("depth at 1e13 FLOP", MEDIUM, (2, 3, 4, 5)),
    ):
        made[name] = {f"{d}": (*SHAKESPEARE, *budget, "--depth", f"{d}") for d in depths}
    for depth in (2, 4):
        made[f"learning rate at depth {depth}"] = {
            f"{lr}": (
                *SHAKESPEARE,
                *SMALL,
                *("--depth", f"{depth}", "--optim.lr", f"{lr}", "--optim.embedding-lr", f"{lr / 2}"),
            )
            for lr in (0.01, 0.02, 0.04)
        }
    made["batch, in tokens, at depth 2"] = {
        f"{batch * 128}": (*SHAKESPEARE, *SMALL, "--depth", "2", "--context", "128", "--batch-size", f"{batch}")
        for batch in (4, 8, 16, 32)
    }
    made["context at depth 2"] = {
        f"{context}": (*SHAKESPEARE, *SMALL, "--depth", "2", "--context", f"{context}") for context in (64, 128, 256)
    }
    for passes in (3, 12):
        made[f"dropout over {passes} passes at depth 4"] = {
            f"{p}": (*LONG, *_passes(passes), "--depth", "4", "--dropout", f"{p}") for p in (0.0, 0.1, 0.2)
        }
    made["size and dropout at 6e13 FLOP"] = {
        f"depth {depth}, {p}": (*LONG, "--budget", "6e13flop", "--depth", f"{depth}", "--dropout", f"{p}")
        for depth in (4, 5)
        for p in (0.0, 0.1)
    }
    return made


def _passes(passes: int) -> tuple[str, ...]:
    """Over a quarter of the text, so that many passes are few tokens."""
    return ("--budget", f"{passes * 280_000}tok", "--val-fraction", "0.75")


def run(arguments: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "-m", "gptsmith", "train", *arguments, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((out / "run.json").read_text())
    best = min((row for row in rows if row.get("val_loss") is not None), key=lambda row: row["val_loss"])
    config = record["config"]
    return {
        "val_loss": round(best["val_loss"], 4),
        "last_val_loss": round([r for r in rows if r.get("val_loss") is not None][-1]["val_loss"], 4),
        "parameters": record["parameters"],
        "tokens": rows[-1]["tokens"],
        "steps": rows[-1]["step"],
        "batch_size": config["batch_size"],
        "context": config["context"],
        "lr": config["optim"]["lr"],
        "dropout": config["dropout"],
        "date": datetime.date.today().isoformat(),
    }


def saved() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which sweeps, or runs as `SWEEP · LABEL` (default: all)")
    parser.add_argument("--list", action="store_true", help="name them and leave")
    arguments = parser.parse_args()
    known = sweeps()
    if arguments.list:
        print("\n".join(known))
        return
    for name, runs in known.items():
        for label, command in runs.items():
            if arguments.names and not {name, f"{name} · {label}"} & set(arguments.names):
                continue
            if label not in saved().get(name, {}):
                made = {"command": " ".join(("gptsmith train", *command)), **run(command)}
                results = saved()  # again: another process may have added to it
                results.setdefault(name, {})[label] = made
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name} · {label}: {saved()[name][label]['val_loss']}", flush=True)


if __name__ == "__main__":
    main()
