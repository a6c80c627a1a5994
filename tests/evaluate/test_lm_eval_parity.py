"""Scores equal those of lm-evaluation-harness with transformers, item by item, for three kinds of tokenizers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith.evaluate.harness import TaskResult, run_tasks
from gptsmith.tasks.definition import Definition, parse_definition
from tests.foreign import byte_level, sentencepiece, unigram, write_model

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness and of what it imports
pytest.importorskip("lm_eval", reason="lm_eval[api] is not installed")
CONTEXT = 512
TEXT = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a house by the sea, and in it lived an "
    "old man who said: I'll go, don't you? 1234567890"
)
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "byte-level": (
        byte_level,
        {"eos_token": "<|endoftext|>"},
        {"model_type": "gpt2", "eos_token_id": 0, "n_positions": CONTEXT},
    ),
    "sentencepiece": (
        sentencepiece,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": CONTEXT},
    ),
    "unigram": (
        unigram,
        {"eos_token": "</s>", "unk_token": "<unk>"},
        {"eos_token_id": 1, "max_position_embeddings": CONTEXT},
    ),
}


def rows(count: int) -> list[dict[str, Any]]:
    """Return questions with choices that end and begin at all kinds of boundaries."""
    draw, words = random.Random(0), TEXT.split()
    made = []
    for i in range(count):
        question = " ".join(draw.choices(words, k=draw.randint(1, 9)))
        choices = [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(3)]
        if i % 3 == 1:
            question += draw.choice([" ", "  ", "\n", "\n\n"])  # moves to the choice
        if i % 3 == 2:
            choices = [choice[1:] + "é" for choice in choices]
        made.append({"question": question, "choices": choices, "answer": draw.randrange(3), "last": draw.choice(words)})
    return made


ROWS, SHOTS = rows(8), [{**row, "question": f"So {row['question']}"} for row in rows(3)]
THEIRS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "few_shot": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 3,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "schema": {
        "output_type": "multiple_choice",
        "doc_to_text": "answer",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "acc"}],
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{last}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}:",
        "doc_to_target": "{{last}}",
        "generation_kwargs": {"until": [" the", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
OURS: dict[str, dict[str, Any]] = {
    "choices": {"prompt": "{{ question }}", "choices": "choices", "answer": "answer"},
    "few_shot": {
        "prompt": "Q: {{ question }}\nA:",
        "choices": "choices",
        "answer": "answer",
        "shots": {"count": 3, "fixed": SHOTS},
    },
    "schema": {"prompt": "", "choices": "choices", "answer": "answer", "continuation": "{{ question }}"},
    "cloze": {"kind": "cloze", "prompt": "{{ question }}", "answer": "last"},
    "answers": {
        "kind": "generation",
        "prompt": "{{ question }}:",
        "answer": "last",
        "metric": "exact_match",
        "stop": [" the", "\n"],
        "max_tokens": 12,
    },
}


def documents(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(ROWS), "train": Dataset.from_list(SHOTS)}


def definition(name: str) -> Definition:
    return parse_definition(json.dumps({"source": {"rows": ROWS}, "name": name, **OURS[name]}), name, Path())


@pytest.fixture(scope="module", params=list(KINDS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make, tokenizer_config, settings = KINDS[request.param]
    write_model(path, pipeline=make(), tokenizer_config=tokenizer_config, **settings)
    return path


@pytest.fixture(scope="module")
def theirs(directory: Path) -> dict[str, list[dict[str, Any]]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    common = {"custom_dataset": documents, "test_split": "test"}
    made = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32", "batch_size": 3},
        tasks=[{**common, "task": name, **task} for name, task in THEIRS.items()],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    return {name: sorted(samples, key=lambda sample: sample["doc_id"]) for name, samples in made["samples"].items()}


@pytest.mark.parametrize("name", list(THEIRS))
def test_scores_of_each_item(directory: Path, theirs: dict[str, list[dict[str, Any]]], name: str) -> None:
    model, tokenizer = gptsmith.load(directory)
    results = {
        kind: run_tasks(model, tokenizer, [replaced]).tasks[0]
        for kind, replaced in with_normalizations(definition(name)).items()
    }
    for kind, result in results.items():
        check(name, kind, result, theirs[name])


def with_normalizations(task: Definition) -> dict[str, Definition]:
    from dataclasses import replace

    if task.kind != "choices":
        return {"": task}
    return {"acc": replace(task, normalization="raw"), "acc_norm": replace(task, normalization="characters")}


def check(name: str, kind: str, result: TaskResult, samples: list[dict[str, Any]]) -> None:
    assert len(result.outcomes) == len(samples) == len(ROWS)
    for outcome, sample in zip(result.outcomes, samples, strict=True):
        if name == "answers":
            # It decodes answers as texts of their own, and misses a stop string that begins with the space before.
            theirs = sample["resps"][0][0].strip()
            if outcome.answer or not theirs.startswith("the"):
                assert outcome.answer.strip() == theirs
                assert outcome.score == sample["exact_match"]
            continue
        responses = [response[0] for response in sample["resps"]]
        assert outcome.logprobs == pytest.approx([float(value) for value, _ in responses], abs=1e-4)
        if name == "cloze":
            assert outcome.score == float(sample["acc"])
        elif kind in sample:
            assert outcome.score == sample[kind]
