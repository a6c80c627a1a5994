"""PictureReader in ten CPU-minutes: a small text model learns to name emoji.

    python benchmarks/vision/emoji.py       # writes benchmarks/results/emoji.json and the pictures of docs/vision.md

A text model is pretrained on the names, gets a new vision tower, and is fine-tuned on pictures of people (roles, hair,
genders, skin tones), of things, and of drawn shapes and digits (counts, colors). It is measured on what training does
not show:

    augmentations  pictures of training, moved, scaled and recolored by random numbers that training did not draw
    tones          compositions: people with a skin tone that training shows with other people, and these with others
    counts         compositions: combinations of count, color and shape ("three red circles", "a blue seven")
    unseen         things that training does not show

and, as controls, all compositions with a blank picture and with that of another name. An answer is right if the greedy
answer is the name, letter by letter.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gptsmith
from gptsmith.data.conversations import Example, Renderer, as_conversation
from gptsmith.data.emoji import COUNTS, QUESTION, TONES, emoji_rows, shape_rows, without_tone
from gptsmith.data.pictures import PictureReader
from gptsmith.loading import load_model
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.callbacks import Callback

ROOT = Path(__file__).parents[2]
SECONDS = 600.0  # of CPU time for all training of a seed: where they are over, it ends before its updates
UPDATES = 1200
_TEXT_STEPS, _ROWS = 50, 8
_CONTEXT = 144  # tokens of a row; about four pictures with their names share one
_TOWER: dict[str, int | None] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_TEXT: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 4}
_OPTIM: dict[str, Any] = {"optim.name": "muon", "optim.lr": 0.02, "optim.embedding_lr": 0.01}
_QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "compile": "off", "precision": "bf16"}
_PEOPLE = re.compile(r"(man|woman) (?!and )[a-h]")  # half of the roles
_COPIES = 2  # drawings of each combination of count, color and shape
_MEASURED = 60  # rows of each part that are measured during training, about


def chosen(name: str) -> bool:
    """Return whether the benchmark uses a name: people by role, gender and tone, and a tenth of the things."""
    base, _ = without_tone(name)
    if "skin tone" in base or "facing right" in name:  # two tones; and what differs in its direction alone
        return False
    return bool(_PEOPLE.match(base)) or (base == name and len(name) % 10 == 0)


@dataclass
class Parts:
    """Rows by what they measure."""

    train: list[dict[str, Any]] = field(
        default_factory=lambda: [*_rows("train"), *shape_rows("train", copies=_COPIES, seed=1)]
    )
    tones: list[dict[str, Any]] = field(default_factory=lambda: _rows("compositions"))
    counts: list[dict[str, Any]] = field(default_factory=lambda: list(shape_rows("compositions", copies=_COPIES)))
    unseen: list[dict[str, Any]] = field(default_factory=lambda: _rows("unseen"))

    @property
    def compositions(self) -> list[dict[str, Any]]:
        return [*self.tones, *self.counts]


def _rows(part: Any) -> list[dict[str, Any]]:
    return [row for row in emoji_rows(part) if chosen(row["answer"])]


# Training ------------------------------------------------------------------------------------------------------------


def text_model(names: Sequence[str], folder: Path, seed: int) -> Path:
    """Pretrain a text model on the names, in the form of answers."""
    rng = np.random.default_rng(seed)
    lines = [name for _ in range(20) for name in rng.permutation(names)]
    text = "".join(f"user\n{QUESTION}\nassistant\n{name}\n" for name in lines)
    path = folder / "names.txt"
    path.write_text(text)
    options = {f"model.{key}": value for key, value in _TEXT.items()}
    run = gptsmith.fit(
        path,
        out=folder / "text",
        tokenizer="bpe",
        vocab_size=768,
        context=_CONTEXT,
        steps=_TEXT_STEPS,
        batch_size=16,
        eval_every=_TEXT_STEPS,
        seed=seed,
        **options,
        **_QUIET,
    )
    return run.directory


class Curve(Callback):
    """Measures the model of every checkpoint, outside of the training's time, and ends training when that is over."""

    def __init__(self, parts: Parts, began: float) -> None:
        self.parts, self.began, self.outside = parts, began, 0.0
        self.points: list[dict[str, float]] = []

    @property
    def seconds(self) -> float:
        """CPU seconds of training so far."""
        return time.process_time() - self.began - self.outside

    def on_save(self, run: Run, step: int, checkpoint: Path) -> bool | None:
        seconds, before = self.seconds, time.process_time()
        with torch.random.fork_rng(devices=[]):
            measured = measure(checkpoint, self.parts, most=_MEASURED)
        self.points.append({"step": step, "seconds": seconds, **{name: m["exact"] for name, m in measured.items()}})
        print(f"{step:6} steps {seconds:6.0f} s  " + describe(measured), flush=True)
        self.outside += time.process_time() - before
        return seconds > SECONDS


def train(seed: int, folder: Path, parts: Parts, updates: int) -> tuple[Path, list[dict[str, float]], dict[str, Any]]:
    """Train one model; return its directory, its curve, and the times."""
    began = time.process_time()
    everything = sorted({row["answer"] for row in (*parts.train, *parts.compositions)})
    text = text_model(everything, folder, seed)
    seer = gptsmith.add_vision(text, folder / "seer", image_size=72, patch_size=18, seed=seed, **_TOWER)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in parts.train))
    val = folder / "val.jsonl"
    val.write_text("".join(json.dumps(row) + "\n" for row in parts.compositions[::8]))
    options: dict[str, Any] = {"lora": "off", "batch_size": _ROWS, "packing": True, "val": str(val), "seed": seed}
    options |= {"vision.augment": True, "vision.projector_lr": 1.0, "warm_start": False, "too_long": "error"}
    options |= {"context": _CONTEXT, **_OPTIM, **_QUIET}
    text_seconds = time.process_time() - began
    print(f"seed {seed}: {text_seconds:.0f} s of text", flush=True)
    curve = Curve(parts, began)
    run = gptsmith.sft(
        seer,
        data,
        out=folder / "run",
        steps=updates,
        eval_every=updates,
        save_every=max(1, updates // 8),
        callbacks=[curve],
        **options,
    )
    times = {"cpu_seconds": curve.seconds, "text_seconds": text_seconds, "updates": updates}
    return run.directory, curve.points, times


# Measuring -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(model: Transformer, examples: Sequence[Example], pixels: Tensor) -> list[bool]:
    """Return which examples the greedy answer equals: of a right answer, every token is the likeliest one."""
    right = []
    for start in range(0, len(examples), 32):
        part, images = examples[start : start + 32], pixels[start : start + 32]
        longest = max(len(example.ids) for example in part)
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        documents = torch.full((len(part), longest), -1)
        for i, example in enumerate(part):
            ids[i, : len(example.ids)] = torch.tensor(example.ids)
            documents[i, : len(example.ids)] = 0
        likeliest = model(ids, pixels=images, document_ids=documents).argmax(dim=-1)
        for i, example in enumerate(part):
            places = [at for at, counts in enumerate(example.trained) if counts]
            right.append(all(int(likeliest[i, at - 1]) == example.ids[at] for at in places))
    return right


@torch.no_grad()
def greedy(model: Transformer, tokenizer: Tokenizer, example: Example, pixels: Tensor) -> str:
    """Return the greedy answer to the question of an example."""
    ids = example.ids[: example.trained.index(True)]
    written: list[int] = []
    while len(written) < 24:
        id = int(model(torch.tensor([[*ids, *written]]), pixels=pixels[None])[0, -1].argmax())
        if id in tokenizer.end_ids:
            break
        written.append(id)
    return tokenizer.decode(written).strip()


def measure(directory: Path, parts: Parts, *, most: int | None = None) -> dict[str, dict[str, Any]]:
    """Return exact matches of each part and of the controls, with the answers that were wrong."""
    model, tokenizer = load_model(directory)
    picture_reader = PictureReader.of(model.config, tokenizer)
    assert picture_reader is not None
    renderer = Renderer(tokenizer, picture_reader=picture_reader)

    def rendered(rows: Sequence[dict[str, Any]]) -> list[Example]:
        step = max(1, len(rows) // most) if most else 1
        return [renderer.render(as_conversation(row)) for row in rows[::step]]

    def pixels(examples: Sequence[Example], **options: Any) -> Tensor:
        return picture_reader.pixels([example.images[0] for example in examples], **options)

    train, unseen = rendered(parts.train), rendered(parts.unseen)
    tones, counts = rendered(parts.tones), rendered(parts.counts)
    compositions = [*tones, *counts]
    plain = pixels(compositions)
    found: dict[str, dict[str, Any]] = {}
    measured = {
        "augmentations": (train, pixels(train, variation=(999_983, 1))),
        "tones": (tones, plain[: len(tones)]),
        "counts": (counts, plain[len(tones) :]),
        "unseen": (unseen, pixels(unseen)),
        "blank": (compositions, torch.ones_like(plain)),
        "shuffled": (compositions, plain.roll(len(plain) // 2, dims=0)),
    }
    for name, (examples, images) in measured.items():
        right = answers(model, examples, images)
        found[name] = {"exact": float(np.mean(right)), "rows": len(right)}
    return found


def describe(measured: dict[str, dict[str, Any]]) -> str:
    return "  ".join(f"{name} {values['exact']:.1%}" for name, values in measured.items())


def asked(directory: Path, parts: Parts) -> list[tuple[str, str]]:
    """Return (name, greedy answer) of the compositions, then of the unseen things."""
    model, tokenizer = load_model(directory)
    picture_reader = PictureReader.of(model.config, tokenizer)
    assert picture_reader is not None
    renderer, found = Renderer(tokenizer, picture_reader=picture_reader), []
    for row in [*parts.compositions, *parts.unseen]:
        example = renderer.render(as_conversation(row))
        found.append((row["answer"], greedy(model, tokenizer, example, picture_reader.pixels(example.images)[0])))
    return found


def confusion(pairs: Sequence[tuple[str, str]], values: Sequence[str], value: Callable[[str], str]) -> list[list[int]]:
    """Return how often names with a value (rows) were answered with a value; the last column is any other answer."""
    table = [[0] * (len(values) + 1) for _ in values]
    for name, answer in pairs:
        if value(name) in values:
            row, column = value(name), value(answer)
            table[values.index(row)][values.index(column) if column in values else len(values)] += 1
    return table


def tone_of(name: str) -> str:
    return without_tone(name)[1] or ""


def count_of(name: str) -> str:
    return name.partition(" ")[0]


# Pictures for the docs -----------------------------------------------------------------------------------------------


def draw(result: dict[str, Any], parts: Parts, folder: Path) -> None:
    """Draw the curves of all seeds, and a contact sheet of right and wrong answers of the first."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    from gptsmith.data.images import read_image_part

    figure, axes = plt.subplots(figsize=(7, 3.5))
    for seed in result["seeds"]:
        for name, color in (("augmentations", "C0"), ("tones", "C1"), ("counts", "C2"), ("blank", "C7")):
            x = [point["seconds"] for point in seed["curve"]]
            y = [100 * point[name] for point in seed["curve"]]
            axes.plot(x, y, color=color, label=name if seed is result["seeds"][0] else None)
    axes.set_xlabel("CPU seconds")
    axes.set_ylabel("exact answers, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "emoji-curves.svg")
    plt.close(figure)

    rows = [*parts.compositions, *parts.unseen]
    all_shown = [
        (row["image"], name, answer) for row, (name, answer) in zip(rows, result["seeds"][0]["answers"], strict=True)
    ]
    wrong = [each for each in all_shown if each[1] != each[2]]
    right = [each for each in all_shown if each[1] == each[2]]
    shown = [*right[:: max(1, len(right) // 12)][:12], *wrong[:: max(1, len(wrong) // 12)][:12]]
    figure, grid = plt.subplots(4, 6, figsize=(12, 8.5))
    for ax in grid.flat:
        ax.axis("off")
    for ax, (image, name, answer) in zip(grid.flat, shown, strict=False):
        ax.imshow(read_image_part(image).pixels)
        text = answer if name == answer else f"{answer}\n({name})"
        ax.set_title(text, fontsize=7, color="black" if name == answer else "firebrick")
    figure.tight_layout()
    figure.savefig(folder / "emoji-answers.png", dpi=80)
    plt.close(figure)


def record(directory: Path, found: dict[str, Any], parts: Parts, out: Path) -> None:
    """Measure the model of a seed, and write what is found beside the other seeds."""
    measured = measure(directory, parts)
    print(f"seed {found['seed']}: {describe(measured)}", flush=True)
    pairs = asked(directory, parts)
    found |= {"final": measured, "answers": pairs}
    found |= {"tones": confusion(pairs, TONES, tone_of), "counts": confusion(pairs, COUNTS, count_of)}
    known = json.loads(out.read_text())["seeds"] if out.exists() else []
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__},
        "rows": {name: len(getattr(parts, name)) for name in ("train", "tones", "counts", "unseen")},
        "seeds": sorted([*(one for one in known if one["seed"] != found["seed"]), found], key=lambda one: one["seed"]),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, parts, ROOT / "docs" / "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--updates", type=int, default=UPDATES, help="updates of each seed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "emoji.json")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    chosen_options = parser.parse_args()
    torch.set_num_threads(1)
    parts = Parts()
    work = chosen_options.work or Path(tempfile.mkdtemp())
    for seed in range(chosen_options.first, chosen_options.first + chosen_options.seeds):
        folder = work / f"seed{seed}"
        folder.mkdir(parents=True)
        with sdpa_kernel(SDPBackend.MATH):  # in bf16 on a CPU, twice as fast as the fused kernel's backward pass
            directory, curve, times = train(seed, folder, parts, chosen_options.updates)
        record(directory, {"seed": seed, **times, "curve": curve}, parts, chosen_options.out)


if __name__ == "__main__":
    main()
