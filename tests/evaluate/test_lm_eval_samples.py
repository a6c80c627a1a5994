"""Comparison with files that lm_eval --log_samples wrote: transformers item by item, and what differs is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptsmith.errors import DataError, UsageError
from gptsmith.evaluate.lm_eval_samples import compare_samples, read_samples

Cli = Callable[..., tuple[int, str, str]]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sample(index: int, prompt: str, responses: list[Any], **scores: float) -> dict[str, Any]:
    arguments = {f"gen_args_{i}": {"arg_0": prompt, "arg_1": " x"} for i in range(len(responses))}
    return {"doc_id": index, "arguments": arguments, "resps": [[each] for each in responses], **scores}


def outcome(index: int, prompt: str, logprobs: list[float], score: float, answer: str = "") -> dict[str, Any]:
    return {"index": index, "prompt_sha256": sha(prompt), "logprobs": logprobs, "score": score, "answer": answer}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def result(*outcomes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = {"task": "quiz", "shots": 0, "kind": "choices", "normalization": "raw", "outcomes": list(outcomes)}
    return {"tasks": [values | changes]}


def test_items_are_matched_by_prompt_and_differences_are_named(tmp_path: Path) -> None:
    path = written(
        tmp_path / "samples_quiz_2026-11-28T15-03-00.123456.jsonl",
        [
            sample(0, "a", [["-1.5", "False"], ["-2.0", "False"]], acc=1.0),
            sample(1, "b", [["-3.0", "False"], ["-1.0", "True"]], acc=0.0),
            sample(2, "c", [["-3.0", "False"], ["-1.0", "True"]], acc=0.0),
            sample(3, "d", [["-3.0", "False"], ["-1.0", "True"]], acc=1.0),
        ],
    )
    samples = read_samples(path)
    assert (samples.task, len(samples.items)) == ("quiz", 4)
    equal = result(
        outcome(7, "b", [-3.0001, -1.0], 0.0), outcome(0, "a", [-1.5, -2.0], 1.0), outcome(3, "another", [-3, -1], 1.0)
    )
    found = compare_samples(equal, samples)
    assert found.verdict() == "equal item by item"
    assert (found.items, found.same_prompts, found.only_ours, found.only_theirs) == (3, 2, 0, 1)
    assert found.largest_difference == pytest.approx(1e-4)
    assert found.ours == found.theirs == pytest.approx(2 / 3)
    other = result(outcome(0, "a", [-1.5, -2.5], 1.0), outcome(1, "b", [-3, -1], 1.0), outcome(2, "c", [-3.0], 0.0))
    found = compare_samples(other, samples)
    assert found.verdict() == "3 items differ"
    assert [(each.index, each.what) for each in found.differences] == [
        (0, "choice 1 has the log-probability -2.5000 and -2.0000"),
        (1, "the scores are 1 and 0 (acc)"),
        (2, "1 and 2 choices are scored"),
    ]


def test_of_several_shots_the_ones_with_the_same_prompts_are_compared(tmp_path: Path) -> None:
    path = written(tmp_path / "samples_quiz.jsonl", [sample(0, "shot a", [["-1.5", "False"]], acc=1.0)])
    record = {
        "tasks": [
            *result(outcome(0, "a", [-9.0], 0.0))["tasks"],
            *result(outcome(0, "shot a", [-1.5], 1.0), shots=1)["tasks"],
        ]
    }
    found = compare_samples(record, read_samples(path))
    assert (found.shots, found.verdict()) == (1, "equal item by item")


def test_generated_answers(tmp_path: Path) -> None:
    path = written(
        tmp_path / "samples_quiz.jsonl", [sample(i, "a", [text], exact_match=1.0) for i, text in enumerate(["x", "y"])]
    )
    record = result(
        outcome(0, "a", [], 1.0, " x"),
        outcome(1, "a", [], 0.0, " z"),
        kind="generation",
        normalization=None,
    )
    found = compare_samples(record, read_samples(path))
    assert [each.what for each in found.differences] == [
        "the answers are 'z' and 'y'; the scores are 0 and 1 (exact_match)"
    ]


def test_files_that_are_no_samples(tmp_path: Path) -> None:
    for content, message in (
        ('{"a": 1}\n', r"samples_x.jsonl, line 1: not a sample of lm_eval --log_samples \(KeyError: 'arguments'"),
        ('{"arguments": [], "resps": [["x"]], "doc_id": 0}\n', "line 1: not a sample"),
        ("{\n", "line 1"),
    ):
        (tmp_path / "samples_x.jsonl").write_text(content)
        with pytest.raises(DataError, match=message):
            read_samples(tmp_path / "samples_x.jsonl")
    with pytest.raises(DataError, match="there is no file"):
        read_samples(tmp_path / "samples_y.jsonl")
    samples = read_samples(written(tmp_path / "samples_riddle.jsonl", [sample(0, "a", [["-1", "True"]])]))
    both = {"tasks": [*result()["tasks"], *result(task="other")["tasks"]]}
    with pytest.raises(UsageError, match="no task 'riddle'.*they have other, quiz"):
        compare_samples(both, samples)
    with pytest.raises(DataError, match="damaged"):
        compare_samples({"tasks": [{"task": "riddle", "shots": 0}]}, samples)


@pytest.mark.filterwarnings("ignore")  # those of the harness and of what it imports
def test_the_harness_with_transformers(tmp_path: Path, run_cli: Cli) -> None:
    """The command line, on files that the harness itself wrote."""
    pytest.importorskip("lm_eval", reason="lm_eval[api] is not installed")
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from tests.evaluate.test_lm_eval_parity import OURS, ROWS, THEIRS, documents
    from tests.foreign import sentencepiece, write_model

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_model(
        tmp_path / "it", "llama", sentencepiece(), special, bos_token_id=1, eos_token_id=2, max_position_embeddings=256
    )
    names = ["choices", "cloze", "answers"]
    common = {"custom_dataset": documents, "test_split": "test"}
    made = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "it"), "dtype": "float32"},
        tasks=[{**common, "task": name, **THEIRS[name]} for name in names],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    tracker.general_config_tracker.model_name_sanitized = "it"
    tracker.date_id = "2026-11-28T15-03-00.123456"
    for name in names:
        tracker.save_results_samples(name, made["samples"][name])
        task = {"source": {"rows": ROWS}, "normalization": "raw", **OURS[name]}
        if name != "choices":
            task.pop("normalization")
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    samples = sorted((tmp_path / "out").rglob("samples_*.jsonl"))
    assert len(samples) == 3
    tasks = ",".join(str(tmp_path / f"{name}.yaml") for name in names)
    code, _, err = run_cli("eval", tmp_path / "it", "--tasks", tasks, "--json", tmp_path / "ours.json", "--no-resume")
    assert code == 0, err
    code, said, err = run_cli("compare", tmp_path / "ours.json", *samples, "--json", tmp_path / "out.json")
    assert code == 0, err
    assert said.count("equal item by item") == 3, said
    for each in json.loads((tmp_path / "out.json").read_text())["samples"]:
        assert (each["items"], each["same_prompts"]) == (len(ROWS), len(ROWS))
        assert each["ours"] == each["theirs"]
        assert each["differences"] == []
    code, _, err = run_cli("compare", *samples)
    assert (code, "give one model or one .json file" in err) == (2, True)
