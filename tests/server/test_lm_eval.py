"""EleutherAI's harness gives a model the same scores through the server as with transformers in its own process."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gptsmith.server.app import create_app
from gptsmith.server.models import ModelRegistry, load
from gptsmith.server.runner import listen
from tests.foreign import byte_level, sentencepiece, write_model

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness and of what it imports
pytest.importorskip("lm_eval", reason="lm_eval[api] is not installed")
pytest.importorskip("tenacity", reason="lm_eval[api] is not installed")
Scores = tuple[dict[str, Any], dict[str, list[Any]]]
SAMPLES, CONTEXT = 6, 128
TEXT = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a house by the sea, and in it lived an old"
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models without and with a beginning-of-sequence token before texts."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"max_position_embeddings": CONTEXT}
    write_model(root / "qwen", "qwen2", byte_level(), {"eos_token": "<|endoftext|>"}, eos_token_id=0, **sizes)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_model(root / "llama", "llama", sentencepiece(), special, bos_token_id=1, eos_token_id=2, **sizes)
    return {"qwen": root / "qwen", "llama": root / "llama"}


@pytest.fixture(scope="module")
def url(directories: dict[str, Path]) -> Iterator[str]:
    models = ModelRegistry({name: str(path) for name, path in directories.items()}, lambda s: load(s, device="cpu"))
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(models), log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
    server.should_exit = True
    thread.join()


def documents(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    draw, words = random.Random(0), TEXT.split()
    rows = [
        {
            "question": " ".join(draw.choices(words, k=draw.randint(1, 9))),
            "choices": [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(3)],
            "answer": draw.randrange(3),
        }
        for _ in range(SAMPLES)
    ]
    return {"test": Dataset.from_list(rows)}


def tasks() -> list[Any]:
    common = {"custom_dataset": documents, "test_split": "test"}
    return [
        {
            **common,
            "task": "choices",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            **common,
            "task": "continuations",
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": " {{choices[0]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        {
            **common,
            "task": "texts",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{choices[0]}} {{question}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        {
            **common,
            "task": "answers",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": [" the", "\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def evaluate(backend: str, **arguments: Any) -> Scores:
    """Return the harness's results by task and metric, and what the model answered to each request."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    made = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=tasks(),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert made is not None
    results = {
        f"{task} {metric}": value
        for task, metrics in made["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    return results, {task: [sample["resps"] for sample in samples] for task, samples in made["samples"].items()}


@pytest.fixture(scope="module")
def reference(directories: dict[str, Path]) -> Callable[[str], Scores]:
    @functools.cache
    def scores(name: str) -> Scores:
        return evaluate("hf", pretrained=str(directories[name]), device="cpu", dtype="float32", batch_size=1)

    return scores


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qwen", {}),
        ("qwen", {"tokenized_requests": False}),
        ("qwen", {"num_concurrent": 4, "batch_size": 3}),
        ("llama", {"add_bos_token": True}),
    ],
    ids=["ids", "text", "concurrent batches", "beginning-of-sequence"],
)
def test_scores_equal_those_of_transformers(
    name: str,
    arguments: dict[str, Any],
    url: str,
    directories: dict[str, Path],
    reference: Callable[[str], Scores],
) -> None:
    where = {"base_url": url, "tokenizer": str(directories[name]), "tokenizer_backend": "huggingface"}
    made, answers = evaluate("local-completions", model=name, max_length=CONTEXT, **where, **arguments)
    expected, expected_answers = reference(name)
    assert len(made) == 7
    # Sent as text, the end-of-text token that the harness puts before a whole text is not a token: text stays text.
    compared = [task for task in answers if task != "texts" or arguments.get("tokenized_requests", True)]
    assert {key: made[key] for key in made if key.split()[0] in compared} == pytest.approx(
        {key: expected[key] for key in expected if key.split()[0] in compared}, rel=1e-4
    )
    assert answers.keys() == expected_answers.keys()
    for task in compared:
        assert len(answers[task]) == SAMPLES
        assert _flat(answers[task]) == [
            pytest.approx(each, rel=1e-4, abs=1e-4) if isinstance(each, float) else each
            for each in _flat(expected_answers[task])
        ]


def _flat(value: Any) -> list[Any]:
    return [each for item in value for each in _flat(item)] if isinstance(value, list | tuple) else [value]
