"""Larger models use their context better (GPT-3, figure 1.2): python benchmarks/evaluation/in_context.py [--save]

Four sizes are trained on the same documents, with three seeds each. A document has solved questions of one rule. A
question is a letter of no meaning and a symbol, the answer is what the rule makes of the symbol: `Qc` → `a`. A rule
permutes six symbols, of which a document uses two or more; a tenth of the rules is held out. Then each model is
measured on held-out rules with 0 to 64 shots, which are never the graded questions: what a symbol becomes has to be
found in the context.

Trained on answers alone, all sizes with the same number of steps and tokens and the same, automatic learning rate.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SYMBOLS, NOISE = "abcdef", string.ascii_uppercase
SIZES = ((2, 16), (2, 32), (2, 48), (2, 64))  # layers, width
SHOTS = (0, 1, 2, 4, 8, 16, 32, 64)
LENGTHS = (8, 16, 32, 65)  # examples in a training document
EXAMPLES_PER_STEP = 128
USED = (3, 4, 5, 6)  # symbols that occur in a prompt of a held-out rule
RULES_EACH, QUESTIONS = 5, 8  # held-out rules for each number of symbols, and graded questions of a rule
RULES = ["".join(rule) for rule in itertools.permutations(SYMBOLS)]
Ints = NDArray[np.int64]


def held_out(*parts: str) -> bool:
    return hashlib.sha256("\0".join(parts).encode()).digest()[0] % 10 == 0


def records(split: str) -> list[dict[str, str]]:
    """Return questions of the held-out rules, "graded" ones or others as "shots". The source of the task below."""
    rows = []
    rules = random.Random(0).sample(list(filter(held_out, RULES)), RULES_EACH * len(USED))
    for i, rule in enumerate(rules):
        rng = random.Random(rule)
        used = rng.sample(SYMBOLS, USED[i % len(USED)])
        questions = [letter + symbol for letter in NOISE for symbol in used]
        rng.shuffle(questions)
        chosen = questions[:QUESTIONS] if split == "graded" else questions[QUESTIONS:]
        rows += [{"question": q, "answer": rule[SYMBOLS.index(q[1])], "rule": rule} for q in chosen]
    return rows


TASK = """
name: held-out rules
source: {python: "in_context.py:records", options: {split: graded}}
kind: cloze
prompt: "{{ question }}"
separator: ""
answer: answer
group: "{{ rule }}"
shots: {separator: "\\n", source: {python: "in_context.py:records", options: {split: shots}}}
"""


def batches(tokenizer: Any, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield ids and targets. A document uses 2 to 6 of the symbols, since rules of few symbols are learned first."""
    rng = np.random.default_rng(seed)
    symbols, noise = (np.array(tokenizer.encode(text)) for text in (SYMBOLS, NOISE))
    (newline,) = tokenizer.encode("\n")
    known = np.array([[SYMBOLS.index(c) for c in rule] for rule in RULES if not held_out(rule)])
    while True:
        length = int(rng.choice(LENGTHS))
        rows = max(1, EXAMPLES_PER_STEP // length)
        used = rng.integers(2, len(SYMBOLS) + 1, (rows, 1))
        order = np.argsort(rng.random((rows, len(SYMBOLS))), axis=1)
        asked = np.take_along_axis(order, (rng.random((rows, length)) * used).astype(int), axis=1)
        answers = np.take_along_axis(known[rng.integers(0, len(known), rows)], asked, axis=1)
        letters = noise[rng.integers(0, len(NOISE), (rows, length))]
        ends = np.full_like(letters, newline)
        ids = np.stack([letters, symbols[asked], symbols[answers], ends], axis=2).reshape(rows, -1)
        targets = np.where(np.arange(ids.shape[1]) % 4 == 2, ids, -100)
        yield ids[:, :-1], targets[:, 1:]


def measure(layers: int, width: int, seed: int, steps: int, work: Path) -> dict[str, Any]:
    """Train a model and return its results on the held-out rules, with its parameters and seconds."""
    import gptsmith
    from gptsmith.tasks.definition import parse_definition
    from gptsmith.tokenizer import train_char

    tokenizer = train_char([SYMBOLS + NOISE + "\n"])
    options: dict[str, Any] = {
        "model.num_hidden_layers": layers,
        "model.hidden_size": width,
        "model.num_attention_heads": max(2, width // 32),
    }
    began, cpu = time.monotonic(), time.process_time()
    run = gptsmith.fit(
        batches(tokenizer, seed),
        tokenizer=tokenizer,
        steps=steps,
        context=4 * max(LENGTHS) - 1,
        batch_size=EXAMPLES_PER_STEP // min(LENGTHS),
        seed=seed,
        eval_every=steps,
        sample_tokens=0,
        compile="off",
        out=work / f"{layers}-{width}-{seed}",
        **options,
    )
    if run.status != "finished":
        raise SystemExit(f"training {run.status}")
    model, tokenizer = gptsmith.load(run)
    trained, trained_cpu = time.monotonic() - began, time.process_time() - cpu
    task = parse_definition(TASK, "held-out rules", Path(__file__).parent)
    results = gptsmith.evaluate(model, tokenizer, task, shots=SHOTS, seeds=(0, 1), name=f"{layers}-{width}-{seed}")
    record: dict[str, Any] = results.to_json()
    shutil.rmtree(run.directory)
    return record | {
        "parameters": model.num_parameters(),
        "training_seconds": round(trained, 1),
        "training_processor_seconds": round(trained_cpu, 1),
        "seconds": round(time.monotonic() - began, 1),
        "losses": [round(row["loss"], 4) for row in run.metrics if "loss" in row][::10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="the first so many sizes")
    parser.add_argument("--log", type=Path, help="keep finished models' results here, and continue from them")
    parser.add_argument("--save", action="store_true", help="write the result and docs/images/in_context.png")
    a = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import machine

    from gptsmith.evaluate.curves import curves_of, pooled
    from gptsmith.report.evaluation import shot_figure
    from gptsmith.report.figures import save_png
    from gptsmith.report.html import format_size

    known = [json.loads(line) for line in a.log.read_text().splitlines()] if a.log and a.log.exists() else []
    found = {(row["layers"], row["width"], row["seed"]): row for row in known if row["steps"] == a.steps}
    with tempfile.TemporaryDirectory() as work:
        for seed in range(a.seeds):
            for layers, width in SIZES[: a.sizes]:
                if (layers, width, seed) in found:
                    continue
                row = {"layers": layers, "width": width, "seed": seed, "steps": a.steps}
                row |= measure(layers, width, seed, a.steps, Path(work))
                found[layers, width, seed] = row
                if a.log:
                    with a.log.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                (curve,) = curves_of(row)
                scores = " ".join(f"{k}:{mean:.2f}" for k, mean in zip(curve.shots, curve.means, strict=True))
                print(f"{row['parameters']:>9,} parameters, seed {seed}, {row['seconds']:.0f} s: {scores}", flush=True)
    table, curves = [], []
    for layers, width in SIZES[: a.sizes]:
        rows = [found[layers, width, seed] for seed in range(a.seeds)]
        own = [curves_of(row)[0] for row in rows]
        curve = pooled(own, f"{format_size(rows[0]['parameters'])} parameters")
        curves.append(curve)
        low, high = curve.intervals()
        table.append(
            {
                "layers": layers,
                "width": width,
                "parameters": rows[0]["parameters"],
                "shots": list(SHOTS),
                "accuracy": [round(float(x), 4) for x in curve.means],
                "accuracy_low": [round(float(x), 4) for x in low],
                "accuracy_high": [round(float(x), 4) for x in high],
                **{key: round(value, 4) for key, value in curve.slope().items()},
                "slope_of_each_seed": [round(each.slope()["slope"], 4) for each in own],
                "training_processor_seconds": [row["training_processor_seconds"] for row in rows],
                "seconds": [row["seconds"] for row in rows],
            }
        )
        print(json.dumps(table[-1]))
    apart = all(one["slope_high"] < two["slope_low"] for one, two in itertools.pairwise(table))
    result = {
        "steps": a.steps,
        "seeds": a.seeds,
        "held_out_rules": sum(map(held_out, RULES)),
        "rules": len(RULES),
        "examples": curves[0].scores.shape[2],
        "slopes_grow_with_size_and_intervals_do_not_overlap": apart,
        "sizes": table,
    }
    print("slopes grow with size, intervals do not overlap:", apart)
    if a.save:
        print(machine.save("in_context", result))
        picture = Path(__file__).parents[2] / "docs" / "images" / "in_context.png"
        save_png(shot_figure(curves), picture)


if __name__ == "__main__":
    main()
