"""What `gptsmith eval --report` measures where nothing else is asked for, and the samples of its page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptsmith.errors import GptsmithError
from gptsmith.log import note

if TYPE_CHECKING:
    from gptsmith.model.transformer import Transformer
    from gptsmith.tokenizer import Tokenizer

SHOTS = (0, 1, 4, 16)
LIMIT = 50  # examples of a task
TASKS = (
    *("arc_challenge", "piqa", "hellaswag", "openbookqa"),
    *("reversed_words", "addition_2", "reverse_letters", "shift_cipher", "substitute_symbols"),
)
DOMAINS = ("plays", "encyclopedia", "code")
TEXT_BYTES = 50_000
SAMPLE_TOKENS = 160
TEMPERATURES = (0.2, 0.8, 1.2)


def overview(
    model: Transformer, tokenizer: Tokenizer, *, seeds: Sequence[int], name: str, log: Path | None
) -> dict[str, Any]:
    """Measure a model on texts of several domains and on tasks; return the results as plain data.

    What cannot be measured, such as a text with characters that the tokenizer lacks, is in `missing` with the reason.
    """
    from gptsmith.evaluate.harness import Results, TaskResult, run_tasks
    from gptsmith.evaluate.provenance import environment
    from gptsmith.evaluate.text import evaluate_text

    missing: dict[str, str] = {}
    texts, tasks = [], list[TaskResult]()
    for domain in DOMAINS:
        try:
            texts.append(evaluate_text(model, tokenizer, _domain_text(domain)).to_json() | {"name": domain})
        except GptsmithError as error:
            missing[domain] = str(error)
    for task in TASKS:
        try:
            found = run_tasks(model, tokenizer, [task], shots=SHOTS, seeds=seeds, limit=LIMIT, name=name, log=log)
            tasks += found.tasks
        except GptsmithError as error:
            missing[task] = str(error)
    for what, reason in missing.items():
        note(f"{what} is not measured: {reason}")
    results = Results(tuple(tasks), environment(model, tokenizer, name))
    if tasks:
        print(results.table())
    return results.to_json() | {"texts": texts, "missing": missing}


def _domain_text(domain: str) -> Path:
    """Return a file with the beginning of a text of a domain."""
    from gptsmith.data.corpora import corpus_path
    from gptsmith.runtime import cache_directory
    from gptsmith.storage import write_text

    if domain == "plays":
        text = corpus_path("tinyshakespeare").read_text(encoding="utf-8")
    elif domain == "encyclopedia":
        with corpus_path("wiki-summaries").open(encoding="utf-8") as lines:
            text = "\n\n".join(json.loads(line)["text"] for line, _ in zip(lines, range(1000), strict=False))
    else:
        text = Path(argparse.__file__).read_text(encoding="utf-8")
    path = cache_directory() / "evaluations" / f"{domain}.txt"
    write_text(path, text.encode()[:TEXT_BYTES].decode("utf-8", "ignore"))
    return path


def write_samples(model: Transformer, tokenizer: Tokenizer, *, seed: int) -> list[dict[str, Any]]:
    """Return texts that a model writes, at several temperatures: from nothing, or else from the end of a line."""
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.engine.text import generate_texts

    ids = tokenizer.encode_prompt("") or tokenizer.encode_prompt("\n")
    engine = Engine(model, vocab_size=tokenizer.vocab_size)
    room = max(1, min(SAMPLE_TOKENS, model.config.max_position_embeddings - len(ids)))
    samples = []
    for temperature in TEMPERATURES:
        params = SamplingParams(temperature=temperature, max_tokens=room, seed=seed)
        ((text,),) = generate_texts(engine, tokenizer, [ids], params)
        samples.append({"temperature": temperature, "prompt": "", "text": text})
    return samples
