"""A chat model from nothing in ten minutes on two cores: python benchmarks/tuning/from_nothing.py [--save]

1. `gptsmith train small-talk.txt`: pretrains a model of 0.8M parameters on plain lines of questions and answers,
   which are made here by rules.
2. `gptsmith sft RUN chats.jsonl --lora off`: teaches turns.

The clock and the processor's time run from the first command to the end of the second. Then held-out questions of
each kind are asked: an answer is in form if it ends by itself, and right if it is the expected one. Free questions
are asked for the transcript.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia", "Noah", "Olga")
ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "frog": "ribbit"}
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Norway": "Oslo",
    "Greece": "Athens",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
}
COLORS = {"grass": "green", "snow": "white", "the sky": "blue", "coal": "black", "a lemon": "yellow", "blood": "red"}
FREE = ("Hello!", "Who are you?", "What is the capital of Germany?", "Tell me a story.", "What is 123 + 456?")


def dialogue(kind: str, rng: random.Random) -> tuple[str, str]:
    """Return a question of a kind and its answer."""
    if kind == "sum":
        a, b = rng.randrange(10), rng.randrange(10)
        ask = rng.choice(("What is {} + {}?", "How much is {} + {}?", "Add {} and {}."))
        return ask.format(a, b), f"{a} + {b} = {a + b}."
    if kind == "name":
        name = rng.choice(NAMES)
        ask = rng.choice(("Hi, I am {}.", "Hello, my name is {}.", "My name is {}. Good morning!"))
        return ask.format(name), f"Nice to meet you, {name}!"
    if kind == "animal":
        animal = rng.choice(sorted(ANIMALS))
        ask = rng.choice(("What does a {} say?", "What sound does a {} make?", "How does a {} talk?"))
        return ask.format(animal), f"A {animal} says {ANIMALS[animal]}."
    if kind == "capital":
        country = rng.choice(sorted(CAPITALS))
        ask = rng.choice(("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"))
        return ask.format(country), f"The capital of {country} is {CAPITALS[country]}."
    if kind == "color":
        thing = rng.choice(sorted(COLORS))
        ask = rng.choice(("What color is {}?", "Which color does {} have?", "Tell me the color of {}."))
        return ask.format(thing), f"{thing.capitalize()} is {COLORS[thing]}."
    word = "".join(rng.choice("abcdefghij") for _ in range(rng.randint(3, 5)))
    return f"Repeat the word {word}.", f"{word}."


KINDS = ("sum", "name", "animal", "capital", "color", "repeat")


def write_data(place: Path, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Write the text and the conversations; return held-out questions by kind, whose wording neither of them has."""
    rng = random.Random(seed)
    everything = {kind: sorted({dialogue(kind, rng) for _ in range(3000)}) for kind in KINDS}
    held: dict[str, list[tuple[str, str]]] = {}
    for kind, pairs in everything.items():
        rng.shuffle(pairs)
        count = min(20, len(pairs) // 5)
        held[kind], everything[kind] = pairs[:count], pairs[count:]

    def draw() -> tuple[str, str]:
        return rng.choice(everything[rng.choice(KINDS)])

    with (place / "small-talk.txt").open("w") as text:
        for _ in range(20_000):
            question, answer = draw()
            text.write(f"{question} {answer}\n")
    with (place / "chats.jsonl").open("w") as chats:
        for _ in range(3000):
            turns = []
            for _ in range(rng.randint(1, 3)):
                question, answer = draw()
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            chats.write(json.dumps({"messages": turns}) + "\n")
    return held


def answer(model: Any, tokenizer: Any, question: str) -> tuple[str, bool]:
    """Return the greedy answer and whether it ended by itself."""
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.tokenizer.chat import ChatTemplate

    prompt = ChatTemplate(tokenizer).encode([{"role": "user", "content": question}])
    sampling = SamplingParams(max_tokens=60, temperature=0.0, stop_ids=tokenizer.end_ids)
    completion = Engine(model, vocab_size=tokenizer.vocab_size).generate([prompt], sampling)[0].completions[0]
    return tokenizer.decode(completion.ids, skip_special_tokens=True), completion.finish_reason == "stop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="updates of pretraining")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes of fine-tuning")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=common.MODELS / "from-nothing", help="a new folder for the runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_from_nothing.json")
    a = parser.parse_args()
    import machine

    import gptsmith

    place: Path = a.work
    place.mkdir(parents=True)
    held = write_data(place, a.seed)
    began = time.monotonic()
    base, chat = place / "base", place / "chat"
    quick = ("--sample-tokens", 0, "--compile", "off", "--eval-every", 500)
    length = ("--context", 256, "--batch-size", 8)
    for command in (
        ("train", place / "small-talk.txt", *length, "--steps", a.steps, *quick, "--out", base),
        ("sft", base, place / "chats.jsonl", "--lora", "off", *length, "--epochs", a.epochs, *quick, "--out", chat),
    ):
        subprocess.run([sys.executable, "-m", "gptsmith", *map(str, command)], check=True)
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    tuned = next(run for run in gptsmith.runs(place) if run.directory == chat)
    losses = [round(row["val_loss"], 4) for row in tuned.metrics if "val_loss" in row]
    model, tokenizer = gptsmith.load(place / "chat")
    scores = {}
    for kind, pairs in held.items():
        given = [answer(model, tokenizer, question) for question, _ in pairs]
        scores[kind] = {
            "asked": len(pairs),
            "ended": sum(ended for _, ended in given),
            "right": sum(text.strip() == right for (text, _), (_, right) in zip(given, pairs, strict=True)),
        }
    asked = [*(pairs[0][0] for pairs in held.values()), *FREE]
    transcript = [[question, *answer(model, tokenizer, question)] for question in asked]
    parameters = model.num_parameters()
    result = {
        "seconds": round(seconds),
        "processor_seconds": round(used.ru_utime + used.ru_stime),
        "parameters": parameters,
        "steps": a.steps,
        "epochs": a.epochs,
        "held_out_loss": losses,
        "held_out": scores,
        "transcript": transcript,
    }
    print(json.dumps(result, indent=1))
    if a.save:
        print(machine.save("tuning_from_nothing", result))


if __name__ == "__main__":
    main()
