"""The claim of GPT-1, small: pretraining on unlabeled text helps a classifier, most where labels are few.

    python benchmarks/tuning/gpt1.py rates|curve|figure [--save]

The task is the sentiment of the last 250 characters of IMDB's reviews of at most 900 characters. A model is pretrained
on all movie reviews without their labels, but for 2,500 that are held out. It learns from 100, 1,000 and 8,000 labeled
ones, with and without the auxiliary language-model loss. The same architecture with new weights and the same tokenizer
learns from the same labels. `rates` sweeps the learning rate of either at 1,000 labels, with labels, order and new
weights of a seed of its own, and judges by reviews that are in no other part; `curve` trains with three other seeds.
The seeds share one pretraining. The checkpoint with the best accuracy on 300 validation reviews is tested on 1,000
others.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import torch

import gptsmith
from gptsmith.data.corpora import corpus_path
from gptsmith.evaluate.classifier import Classifier
from gptsmith.run_directory import Run, read_run

LONGEST, READ = 900, 250  # characters of a labeled review, and those at its end that are read
HELD_OUT, TEST, VALIDATION = 2500, 1000, 300
SWEPT = 1000  # labels in `rates`
RATES = {"pretrained": (3e-4, 1e-3), "scratch": (1e-3, 3e-3)}
BEST = {"pretrained": 1e-3, "scratch": 1e-3}  # found by `rates`
EPOCHS = {100: 12, 1000: 4, 8000: 1}
KINDS = ("pretrained", "scratch")
CONTEXT = 256
QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "precision": "bf16", "keep_checkpoints": 1}
GOOD = "great good best excellent wonderful amazing perfect beautiful fun brilliant enjoyed loved love well nice"
BAD = "bad worst terrible awful boring stupid horrible poor waste worse annoying dull crap hate lame"
Rows = list[dict[str, str]]


def read_reviews() -> tuple[Rows, Rows]:
    """Return IMDB's short reviews in a fixed order, and all others; no text occurs twice."""
    # Not splitlines(): reviews have line separators (U+2028) in them.
    rows = [json.loads(line) for line in corpus_path("movie-reviews").read_text().split("\n") if line]
    unique = {" ".join(row["text"].replace("<br />", " ").split()): row for row in rows}
    short: Rows = []
    others: Rows = []
    for text, row in unique.items():
        is_short = row["source"] == "imdb" and len(text) <= LONGEST
        (short if is_short else others).append({"text": text, "label": row["label"]})
    random.Random(0).shuffle(short)
    return short, others


def ends_of(rows: Rows) -> Rows:
    """Return the rows with the last whole words of their texts only."""
    return [
        {**row, "text": row["text"] if len(row["text"]) <= READ else row["text"][-READ:].partition(" ")[2]}
        for row in rows
    ]


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Task:
    """The reviews and the pretrained model, which is kept in `place`."""

    def __init__(self, place: Path, steps: int) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        short, others = read_reviews()
        held_out, labeled = short[:HELD_OUT], short[HELD_OUT:]
        self.test, self.val = ends_of(held_out[:TEST]), ends_of(held_out[-VALIDATION:])
        random.Random(9).shuffle(labeled)
        self.labeled = ends_of(labeled)
        texts = [row["text"] for row in (*labeled, *others)]
        random.Random(9).shuffle(texts)
        self.text = place / "reviews.txt"
        self.text.write_text("\n\n".join(texts) + "\n")
        if (place / "base" / "run.json").exists():
            if read_run(place / "base").status != "finished":
                gptsmith.fit(resume=place / "base")
        else:
            size = {"tokenizer": "bpe", "vocab_size": 4096, "steps": steps, "seed": 9, "compile": "on"}
            self._pretrain("base", size | {"eval_tokens": 50_000})
        self.base = read_run(place / "base")

    def _pretrain(self, name: str, options: dict[str, Any]) -> Run:
        model = {"family": "llama", "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
        shared = {"context": CONTEXT, "batch_size": 8, "model": model, "eval_every": 10**9} | QUIET
        return gptsmith.fit(self.text, shared | options, out=self.place / name)

    def model(self, kind: str, seed: int) -> Path:
        """Return a run with the weights that fine-tuning starts from."""
        if kind == "pretrained":
            return self.base.directory
        if not (self.place / f"new-{seed}" / "report.html").exists():
            unchanged = {"steps": 1, "optim": {"lr": 1e-12, "embedding_lr": 1e-12}, "eval_tokens": 1000}
            tokenizer = str(self.base.directory / "tokenizer")
            self._pretrain(f"new-{seed}", unchanged | {"tokenizer": tokenizer, "seed": seed})
        return self.place / f"new-{seed}"

    def tune(self, kind: str, labels: int, seed: int, *, aux_loss: float, rate: float, test: Rows) -> dict[str, Any]:
        """Train and return the accuracy on `test`, and the seconds of the processor that it took."""
        began = time.process_time()
        labeled = list(self.labeled)
        random.Random(seed).shuffle(labeled)
        model = self.model(kind, seed)
        with tempfile.TemporaryDirectory(dir=self.place) as folder:
            run = gptsmith.classify(
                model,
                write_rows(Path(folder) / "labeled.jsonl", labeled[:labels]),
                val=str(write_rows(Path(folder) / "val.jsonl", self.val)),
                out=Path(folder) / "run",
                aux_loss=aux_loss,
                batch_size=16,
                epochs=EPOCHS[labels],
                seed=seed,
                optim={"name": "adamw", "lr": rate, "warmup_steps": 20},
                compile="off",
                **QUIET,
            )
            if run.status != "finished":
                raise SystemExit(f"a run of {kind} is {run.status}")
            found: dict[str, Any] = {
                "kind": kind,
                "labels": labels,
                "aux_loss": aux_loss,
                "rate": rate,
                "seed": seed,
                "accuracy": accuracy(run, test or labeled[labels : labels + 2000]),
                "validation": [round(row["accuracy"], 3) for row in run.metrics if "accuracy" in row],
            }
        found["seconds"] = round(time.process_time() - began)
        print(json.dumps(found), flush=True)
        return found


def accuracy(run: Run, rows: Rows) -> float:
    """Return the share of rows that the best checkpoint labels right."""
    classifier = Classifier.load(str(run.directory))
    rows = sorted(rows, key=lambda row: len(row["text"]))
    right = 0
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        said = classifier.label([(row["text"],) for row in part])
        right += sum(answer["label"] == row["label"] for answer, row in zip(said, part, strict=True))
    return round(right / len(rows), 4)


def polarity(run: Run) -> dict[str, float]:
    """Return mean cosines of embeddings: of two words of praise, of two of blame, and of one of each."""
    model, tokenizer = gptsmith.load(run)
    weights = model.embed_tokens.weight.detach()
    weights = torch.nn.functional.normalize(weights - weights.mean(dim=0), dim=1)
    ids = [[tokenizer.encode(f" {word}") for word in words.split()] for words in (GOOD, BAD)]
    good, bad = (weights[[tokens[0] for tokens in words if len(tokens) == 1]] for words in ids)

    def mean(one: torch.Tensor, other: torch.Tensor) -> float:
        cosines = one @ other.T
        return round(float(cosines[cosines < 0.9999].mean()), 3)

    return {"good with good": mean(good, good), "bad with bad": mean(bad, bad), "good with bad": mean(good, bad)}


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over labels: means of the seeds, and every seed as a dot."""
    from matplotlib.figure import Figure

    from gptsmith.report.figures import TRAIN, save_png
    from gptsmith.report.figures import VALIDATION as ORANGE

    drawing = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = drawing.subplots()
    for kind, color in zip(KINDS, (TRAIN, ORANGE), strict=True):
        for aux_loss, line in ((0.5, "-"), (0.0, "--")):
            chosen = [row for row in rows if (row["kind"], row["aux_loss"]) == (kind, aux_loss)]
            sizes = sorted({row["labels"] for row in chosen})
            means = [statistics.mean(row["accuracy"] for row in chosen if row["labels"] == size) for size in sizes]
            name = f"{kind}{'' if aux_loss else ', no auxiliary loss'}"
            axes.plot(sizes, means, line, color=color, label=name)
            axes.plot([row["labels"] for row in chosen], [row["accuracy"] for row in chosen], ".", color=color)
    axes.set_xscale("log")
    axes.set_xlabel("labeled reviews")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)
    save_png(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "curve", "figure"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_gpt1_WHAT.json")
    parser.add_argument("--models", type=Path, default=common.MODELS, help="where models are kept")
    parser.add_argument("--steps", type=int, default=8000, help="of pretraining")
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    import machine

    if a.what == "figure":
        rows = json.loads((machine.RESULTS / "tuning_gpt1_curve.json").read_text())["rows"]
        figure(rows, Path(__file__).parents[2] / "docs" / "images" / "gpt1.png")
        return
    began = time.process_time()
    task = Task(a.models / f"gpt1-{a.steps}", a.steps)
    found: dict[str, Any] = {
        "pretraining": {
            "steps": a.steps,
            "seconds": round(task.base.metrics[-1]["time"]),
            "loss": task.base.best["val_loss"] if task.base.best else None,
            "cosines": polarity(task.base),
        },
        "rows": [],
    }
    print(json.dumps(found["pretraining"]), flush=True)
    if a.what == "rates":
        jobs = [(SWEPT, 0.5, 1000, kind, rate) for kind in KINDS for rate in RATES[kind]]
    else:
        jobs = [
            (labels, aux_loss, seed, kind, BEST[kind])
            for labels, aux_loss in ((1000, 0.5), (100, 0.5), (1000, 0.0), (8000, 0.5), (100, 0.0), (8000, 0.0))
            for seed in range(a.seeds)
            for kind in KINDS
        ]
    for labels, aux_loss, seed, kind, rate in jobs:
        test = task.test if a.what == "curve" else []
        found["rows"].append(task.tune(kind, labels, seed, aux_loss=aux_loss, rate=rate, test=test))
        found["seconds"] = round(time.process_time() - began)
        if a.save:
            machine.save(f"tuning_gpt1_{a.what}", found)


if __name__ == "__main__":
    main()
