"""InstructGPT in one command: pretraining, fine-tuning, a reward model, PPO, and a page that compares the answers.

    align_demo("runs/align", budget="30m")

The text is the package's movie reviews. The assistant is asked about films; people prefer good words to bad ones, since
the preferences are positive reviews before negative ones. Each stage is a run like any other, in a folder of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptsmith.api import fit as pretrain
from gptsmith.api import ppo, reward, sft
from gptsmith.data.corpora import corpus_path
from gptsmith.data.rows import read_rows
from gptsmith.errors import BudgetError, UsageError
from gptsmith.loading import load_model
from gptsmith.log import duration, note
from gptsmith.report.html import escape
from gptsmith.run_directory import Run
from gptsmith.storage import explain_os_errors, write_text
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.budget.parse import Budget

QUESTIONS = (
    "What did you think of the film?",
    "Was it a good film?",
    "How was the movie?",
    "Tell me about the film you saw.",
    "Would you see this movie again?",
    "What do you say about the acting?",
    "How do you like the story?",
    "Write a line about the movie.",
)
SHARES = {"base": 0.5, "chat": 0.13, "reward": 0.1, "aligned": 0.24}  # of the budget; the comparison has the rest
LONGEST = 160  # characters of a review that is an answer
PAIRS = 2000
ANSWER_TOKENS = 48
LEAST = 240.0  # seconds
CHARACTERS = 15_000  # of text for each second of the budget
COMPARED = 4  # answers to each question


def align_demo(out: str | Path = "runs/align", *, budget: str = "30m", seed: int = 1337) -> Path:
    """Train a base model, a chat model, a reward model and an aligned model within a budget of time; return the folder.

    It holds the runs `base`, `chat`, `reward` and `aligned`, the data they were trained on, and report.html, which
    compares answers. Raises UsageError for a budget that is no time or too short, and for a folder that is not empty.
    """
    began, total = time.monotonic(), Budget.parse(budget)
    if total.kind != "seconds":
        raise UsageError(f"--budget {budget}: give a time, such as 30m.")
    if total.amount < LEAST:
        raise UsageError(f"--budget {budget} is too short for four models: give at least {duration(LEAST)}.")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory. Choose another --out.")
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    data = write_data(out / "data", seed, CHARACTERS * total.amount)

    def stage(name: str, what: str, method: Callable[..., Run], *arguments: Any, **options: Any) -> Run:
        """Train within the stage's share of the budget, with fewer updates than are sensible if necessary."""
        left = total.amount * sum(SHARES.values()) - (time.monotonic() - began)
        still_to_come = sum(itertools.islice(SHARES.values(), list(SHARES).index(name), None))
        seconds = max(1.0, left * SHARES[name] / still_to_come)  # a stage that was late shortens all that follow
        note(f"\n== {what}: {duration(seconds)} of {duration(total.amount)} ==")
        options |= {"out": out / name, "seed": seed, "verbose": True}
        try:
            return method(*arguments, budget=f"{seconds:.0f}s", **options)
        except BudgetError as error:
            steps = max(1, error.steps // 2)  # the other half: what else a stage does, and to be on the safe side
            note(f"note: in this time this machine makes few updates: {steps}. {out / name} will have learned little.")
            return method(*arguments, steps=steps, eval_every=steps, **options)

    base = stage("base", "pretraining on reviews", pretrain, data / "reviews.txt")
    chat = stage("chat", "fine-tuning on questions and answers", sft, base, data / "chats.jsonl", lora="off")
    judge = stage("reward", "reward model from preferences", reward, chat, data / "preferences.jsonl")
    aligned = stage(
        "aligned",
        "PPO on the reward model",
        ppo,
        chat,
        data / "prompts.jsonl",
        reward=judge.directory,
        answer_tokens=ANSWER_TOKENS,
        eval_prompts=32,
    )
    write_comparison(out, {"base": base, "chat": chat, "aligned": aligned}, judge, seed)
    note(f"\n{out}/report.html compares the answers. Talk to the model: gptsmith chat {out}/aligned")
    return out


def write_data(folder: Path, seed: int, characters: float) -> Path:
    """Write the text and the rows of all stages into `folder`, from the named set movie-reviews; return it.

    characters: of the text; more take longer to tokenize.
    """
    rng = random.Random(seed)
    rows = [row.values for row in read_rows(corpus_path("movie-reviews"))]
    texts = [" ".join(str(row["text"]).split()) for row in rows]
    short: dict[bool, list[str]] = {True: [], False: []}
    for row, text in zip(rows, texts, strict=True):
        if len(text) <= LONGEST:
            short[str(row["label"]) in ("1", "pos", "positive")].append(text)
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lengths = itertools.accumulate(map(len, texts))
    few = list(itertools.takewhile(lambda pair: pair[1] <= characters, zip(texts, lengths, strict=True)))
    write_text(folder / "reviews.txt", "\n\n".join(text for text, _ in few) + "\n")

    def asked() -> list[dict[str, str]]:
        return [{"role": "user", "content": rng.choice(QUESTIONS)}]

    answers = [text for texts_of in short.values() for text in texts_of]
    rng.shuffle(answers)
    chats = [{"messages": [*asked(), {"role": "assistant", "content": text}]} for text in answers]
    pairs = [
        {"prompt": asked(), "chosen": rng.choice(short[True]), "rejected": rng.choice(short[False])}
        for _ in range(PAIRS)
    ]
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS for _ in range(64)]
    for name, part in (("chats", chats), ("preferences", pairs), ("prompts", prompts)):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return folder


# The comparison -------------------------------------------------------------------------------------------------------


def write_comparison(out: Path, models: dict[str, Run], judge: Run, seed: int) -> None:
    """Write report.html: the models' answers to the same questions, with their mean rewards."""
    from gptsmith.train.prompts import Prompt
    from gptsmith.train.rollout.rewards import Sample, open_rewards

    _, tokenizer = load_model(models["chat"].directory)
    score = open_rewards([os.fspath(judge.directory)], tokenizer=tokenizer)
    answers = {name: _answers(run, tokenizer, seed) for name, run in models.items()}
    means = {}
    for name, texts in answers.items():
        samples = [
            Sample(Prompt(_chat_ids(tokenizer, question), question, {}, question), ids, text)
            for question, each in zip(QUESTIONS, texts, strict=True)
            for text in each
            if (ids := tokenizer.encode(text))
        ]
        totals = score.score(samples).total
        means[name] = sum(totals) / len(totals)
    head = "".join(f"<th>{escape(name)}<br><small>mean reward {means[name]:+.2f}</small></th>" for name in models)
    rows = "".join(
        f"<tr><th>{escape(question)}</th>"
        + "".join("<td>" + "<hr>".join(map(escape, answers[name][i])) + "</td>" for name in models)
        + "</tr>\n"
        for i, question in enumerate(QUESTIONS)
    )
    links = " · ".join(f'<a href="{name}/report.html">{name}</a>' for name in (*models, judge.directory.name))
    write_text(
        out / "report.html",
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Aligned by preferences</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{border:1px solid #8888;padding:.5rem;text-align:left;vertical-align:top}}
:root{{color-scheme:light dark}}</style>
<h1>Base, fine-tuned and aligned</h1>
<p>Each model answers the same questions, {COMPARED} times each. The base model has seen reviews alone; the chat model
has learned to answer; the aligned model has learned what the reward model scores highly. Rewards have mean 0 and spread
1 over the answers that the reward model was trained on. Reports of the runs: {links}.</p>
<table><tr><th></th>{head}</tr>
{rows}</table>
""",
    )


def _chat_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    from gptsmith.tokenizer.chat import ChatTemplate

    return ChatTemplate(tokenizer).encode([{"role": "user", "content": question}], add_generation_prompt=True)


def _answers(run: Run, chat: Tokenizer, seed: int) -> list[Sequence[str]]:
    """Return the answers of a model to each question. The base model has no chat format: it continues the question."""
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.engine.text import generate_texts

    model, tokenizer = load_model(run.directory)
    plain = tokenizer.vocab_size != chat.vocab_size
    prompts = [tokenizer.encode_prompt(q + "\n") if plain else _chat_ids(tokenizer, q) for q in QUESTIONS]
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=1.0, seed=seed, n=COMPARED)
    return [
        list(each)
        for each in generate_texts(Engine(model, vocab_size=tokenizer.vocab_size), tokenizer, prompts, params)
    ]
