"""The sweeps behind docs/recipes.md: python benchmarks/recipes/sweep.py [NAME ...] [--list]

Each sweep changes one thing and spends the same arithmetic or tokens on every run, so its losses do not depend on how
fast the machine is. Results go to benchmarks/results/recipes.json as they come; a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import machine

RESULTS = machine.RESULTS / "recipes.json"
GPTSMITH = (sys.executable, "-m", "gptsmith")
SHAKESPEARE = ("tinyshakespeare", "--optim.momentum", "0.95", "--sample-tokens", "0", "--compile", "off")
LONG = (*SHAKESPEARE[:-1], "on")
ENCYCLOPEDIA = ("enwik8-part.txt", "--val", "enwik8-end.txt", *SHAKESPEARE[1:])
NO_DECAY = ("--optim.weight-decay", "0")
SMALL = ("--budget", "2.5e12flop", *NO_DECAY)
MEDIUM = ("--budget", "1e13flop", *NO_DECAY)


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
    for share, passes in ((8, 4), (8, 8), (8, 15), (8, 30), (16, 15), (16, 30), (16, 60)):
        made[f"dropout over {passes} passes of {PARTS[share]}"] = {
            f"{p}": (*_passes(share, passes), *_against_overfitting(p, 0)) for p in (0.0, 0.1, 0.2, 0.3)
        }
    for share, passes, dropout in (
        (4, 8, 0.0),
        (8, 4, 0.0),
        (8, 8, 0.0),
        (8, 8, 0.1),
        (8, 15, 0.0),
        (8, 15, 0.1),
        (16, 15, 0.0),
        (16, 30, 0.0),
        (16, 60, 0.1),
    ):
        made[f"weight decay over {passes} passes of {PARTS[share]}, dropout {dropout}"] = {
            f"{d}": (*_passes(share, passes), *_against_overfitting(dropout, d))
            for d in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 1.6, 2.0, 3.2, 6.4)
        }
    for name, text in (("2.5e12", SHAKESPEARE), ("1e13", SHAKESPEARE), ("2e13", LONG)):
        made[f"weight decay at {name} FLOP"] = {
            f"{d}": (*text, "--budget", f"{name}flop", *_against_overfitting(0, d))
            for d in (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
        }
    for name, budget in (("2.5e12", SMALL), ("1e13", MEDIUM)):
        made[f"vocabulary at {name} FLOP"] = {
            "characters": (*ENCYCLOPEDIA, "--tokenizer", "char", *budget),
            **{
                f"{n}": (*ENCYCLOPEDIA, *("--tokenizer", "bpe", "--vocab-size", f"{n}"), *budget)
                for n in (512, 1024, 2048, 4096)
            },
        }
    made["vocabulary of tinyshakespeare at 1e13 FLOP"] = {
        f"{n}": (*SHAKESPEARE, *("--tokenizer", "bpe", "--vocab-size", f"{n}"), *MEDIUM) for n in (512, 1024, 2048)
    }
    for flops in ("2.5e12", "1e13"):
        made[f"momentum at {flops} FLOP"] = {
            f"{m}, seed {seed}": (*_momentum(m, SHAKESPEARE), "--budget", f"{flops}flop", "--seed", f"{seed}")
            for m in (0.95, 0.9, 0.85, 0.8)
            for seed in (1, 3)
        }
    made["momentum over 15 passes of an eighth"] = {f"{m}": _momentum(m, _passes(8, 15)) for m in (0.95, 0.9)}
    made["dropout and weight decay at 6e13 FLOP, depth 4"] = {
        f"{p}, {d}": (*LONG, "--budget", "6e13flop", "--depth", "4", *_against_overfitting(p, d))
        for p, d in ((0.0, 0.05), (0.1, 0.05), (0.0, 0.2), (0.0, 0.4), (0.0, 0.8), (0.1, 0.4))
    }
    return made


CHARACTERS = 1_115_394  # of tinyshakespeare
PARTS = {4: "a quarter", 8: "an eighth", 16: "a sixteenth"}


def _against_overfitting(dropout: float, weight_decay: float) -> tuple[str, ...]:
    return ("--dropout", f"{dropout}", "--optim.weight-decay", f"{weight_decay}")


def _momentum(momentum: float, command: tuple[str, ...]) -> tuple[str, ...]:
    """The command with that momentum: the sweeps before its own were made with 0.95."""
    at = command.index("--optim.momentum") + 1
    return (*command[:at], f"{momentum}", *command[at + 1 :])


def _passes(share: int, passes: int) -> tuple[str, ...]:
    """Over a part of the text, so that many passes are few tokens; the size is the one the rule chooses for them."""
    tokens = passes * CHARACTERS // share
    options = (LONG if tokens > 3e6 else SHAKESPEARE)[1:]  # compiled where that pays
    return (f"part-{share}.txt", "--val", "end.txt", *options, "--budget", f"{tokens}tok")


def _write_parts(directory: Path) -> None:
    """The beginnings of the texts, for `_passes` and for vocabularies, and the ends, to validate on."""
    text = _text("tinyshakespeare")
    for share in PARTS:
        (directory / f"part-{share}.txt").write_text(text[: CHARACTERS // share])
    (directory / "end.txt").write_text(text[-120_000:])
    text = _text("enwik8").encode("ascii", "ignore").decode()  # so that characters are few
    (directory / "enwik8-part.txt").write_text(text[:20_000_000])
    (directory / "enwik8-end.txt").write_text(text[-1_000_000:])


def _text(name: str) -> str:
    got = subprocess.run([*GPTSMITH, "data", "get", name], check=True, capture_output=True, text=True)
    return Path(got.stdout.strip()).read_text()


def run(arguments: tuple[str, ...], texts: Path) -> dict[str, Any]:
    """texts: where `_write_parts` has been."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [*GPTSMITH, "train", *arguments, "--out", str(out)]
        ended = subprocess.run(command, cwd=texts, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{' '.join(command)}\n{ended.stderr}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((out / "run.json").read_text())
    evaluations = [row for row in rows if row.get("val_loss") is not None]
    best, config, sizes = min(evaluations, key=lambda row: row["val_loss"]), record["config"], record["data"]
    return {
        "val_loss": round(best["val_loss"], 4),
        "last_val_loss": round(evaluations[-1]["val_loss"], 4),
        "bits_per_byte": round(best["val_loss"] / math.log(2) * sizes["val_tokens"] / sizes["val_bytes"], 4),
        "parameters": record["parameters"],
        "tokens": rows[-1]["tokens"],
        "steps": rows[-1]["step"],
        "depth": config["model"]["num_hidden_layers"],
        "batch_size": config["batch_size"],
        "context": config["context"],
        "lr": config["optim"]["lr"],
        "dropout": config["dropout"],
        "weight_decay": config["optim"]["weight_decay"],
        "momentum": config["optim"]["momentum"],
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
    named = {*known, *(f"{name} · {label}" for name, runs in known.items() for label in runs)}
    if unknown := set(arguments.names) - named:
        parser.error(f"no sweep or run is called {', '.join(sorted(unknown))}; see --list")
    with tempfile.TemporaryDirectory() as texts:
        _write_parts(Path(texts))
        for name, runs in known.items():
            for label, command in runs.items():
                if arguments.names and not {name, f"{name} · {label}"} & set(arguments.names):
                    continue
                if label not in saved().get(name, {}):
                    made = {"command": " ".join(("gptsmith train", *command)), **run(command, Path(texts))}
                    results = saved()  # again: another process may have added to it
                    results.setdefault(name, {})[label] = made
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{name} · {label}: {saved()[name][label]['val_loss']}", flush=True)


if __name__ == "__main__":
    main()
