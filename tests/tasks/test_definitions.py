"""The built-in tasks: all load, have the stated size, and write the prompts of their publications."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gptsmith.evaluate.harness import prompt_text, split_items
from gptsmith.tasks.definition import definition_names, load_definition
from gptsmith.tasks.sandbox import find_sandbox
from gptsmith.tasks.scorers import find_scorer

NAMES = [name for name in definition_names() if load_definition(name).size is not None]
PACKAGED = [
    name
    for name in NAMES
    if "package" in (source := load_definition(name).source)
    or str(source.get("python", "")).startswith("gptsmith.tasks.benchmarks:")
]


def test_the_promised_tasks_are_there() -> None:
    promised = "hellaswag arc_challenge piqa winogrande boolq openbookqa truthfulqa_mc1 mmlu gsm8k ifeval bbh banking77"
    assert {*promised.split(), "humaneval", "mbpp", "math"} <= set(PACKAGED)


@pytest.mark.parametrize("name", NAMES)
def test_description(name: str) -> None:
    task = load_definition(name)
    assert task.description
    assert task.license
    if task.kind == "generation":
        assert callable(find_scorer(task.metric or "", allow_code_execution="code" in (task.metric or "")))


def test_the_documentation_has_the_same() -> None:
    page = Path("docs/reference/tasks.md").read_text(encoding="utf-8")
    for name in PACKAGED:
        task = load_definition(name)
        if name.endswith("_letters"):
            assert f"`{name}`" in page
            continue
        (row,) = re.findall(rf"^\| `{name}` \| ([\d,]+) \| (.*) \| (\d+) \| \S+ \| (.*) \|$", page, re.MULTILINE)
        assert row[0] == f"{task.size:,}"
        assert row[1] == f"choices, {task.normalization}" or task.kind == "generation"
        assert row[2:] == (str(task.shots.count), task.license)


@pytest.mark.network
@pytest.mark.parametrize("name", PACKAGED)
def test_items(name: str) -> None:
    task = load_definition(name)
    items = task.items()
    assert len(items) == task.size
    shots = min(task.shots.count, 2)
    split = split_items(task, task.shots.count)
    pool = {item.content_hash for items in split.pool.values() for item in items}
    own = {group: {item.content_hash for item in items} for group, items in split.pool.items()}
    assert len(pool) >= task.shots.count
    for item in split.graded:
        assert item.content_hash not in own.get(item.group, set())
        assert task.chat or not re.search(r"[ \t]$", item.prompt), (
            "a space at the end of a prompt belongs to the answer"
        )
    for item in (split.graded[0], split.graded[-1]):
        text = prompt_text(task, item, split.shots(item.group, shots, 0, name))
        assert text.endswith(item.prompt)
        assert "{{" not in text.replace(item.prompt, "")


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "prompt", "choices", "answer"),
    [
        ("hellaswag", "A man is sitting on a roof. he", "is using wrap to wrap a pair of skis.", 3),
        (
            "arc_challenge",
            "Question: An astronomer observes that a planet rotates faster after a meteorite impact. Which is the most "
            "likely effect of this increase in rotation?\nAnswer:",
            "Planetary density will decrease.",
            2,
        ),
        ("piqa", "Goal: How do I ready a guinea pig cage for it's new occupants?\nAnswer:", None, 0),
        ("winogrande", "Sarah was a much better surgeon than Maria so", "Sarah", 1),
        (
            "winogrande_letters",
            "Fill in the blank: Sarah was a much better surgeon than Maria so ___ always got the easier "
            "cases.\n A. Sarah\n B. Maria\nAnswer:",
            "A",
            1,
        ),
        (
            "truthfulqa_mc1",
            "Q: What is the smallest country in the world that is at least one square mile in area?\nA:",
            None,
            0,
        ),
        ("banking77", "Message: How do I locate my card?\nIntent:", "card arrival", 0),
        ("mmlu", "Question: Let p = (1, 2, 5, 4)(2, 3) in S_5 . Find the index of <p> in S_5.\nAnswer:", "8", 2),
        (
            "mmlu_letters",
            "Question: Let p = (1, 2, 5, 4)(2, 3) in S_5 . Find the index of <p> in S_5.\n"
            " A. 8\n B. 2\n C. 24\n D. 120\nAnswer:",
            "A",
            2,
        ),
    ],
)
def test_first_item(name: str, prompt: str, choices: str | None, answer: int) -> None:
    item = load_definition(name).items()[0]
    assert item.prompt == prompt
    assert choices is None or item.choices[0] == choices
    assert item.answer == answer
    if name == "winogrande":
        assert item.continuation == "always got the easier cases."


@pytest.mark.network
def test_prompts_with_reasoning() -> None:
    for name, group, ending in [
        ("bbh", "date_understanding", "\nA: Let's think step by step."),
        ("mmlu_cot", "anatomy", "\nA: Let's think step by step."),
        ("gsm8k", "", "\nLet's think step by step"),
        ("math", "", "\nLet's think step by step"),
    ]:
        task = load_definition(name)
        split = split_items(task, task.shots.count)
        item = next(item for item in split.graded if group in ("", item.group))
        text = prompt_text(task, item, split.shots(item.group, task.shots.count, 0, name))
        assert text.endswith(ending)
        assert text.count("step by step") >= task.shots.count + 1
        assert len(re.findall(r"answer is", text)) >= task.shots.count
        scorer = find_scorer(task.metric or "")
        right = item.answer if isinstance(item.answer, tuple) else ()
        solution = right[0] if name == "math" else f"Some thoughts. So the answer is {right[0]}."
        assert scorer(solution, item) == 1
        assert scorer("So the answer is 123456.", item) == 0


@pytest.mark.slow
@pytest.mark.network
def test_canonical_solutions_of_humaneval_pass() -> None:
    """All 164 pass in the sandbox, and none without its body."""
    task = load_definition("humaneval")
    scorer = find_scorer(task.metric or "", allow_code_execution=True)
    assert find_sandbox().open == ""
    failed = [item.record["task_id"] for item in task.items() if scorer(item.record["canonical_solution"], item) != 1]
    assert not failed
    passed = [item.record["task_id"] for item in task.items()[:20] if scorer("    return None\n", item) != 0]
    assert not passed


@pytest.mark.network
def test_mbpp_runs_its_tests() -> None:
    """The package has no solutions of MBPP. These are written by hand."""
    task = load_definition("mbpp")
    scorer = find_scorer(task.metric or "", allow_code_execution=True)
    items = {item.record["task_id"]: item for item in task.items()}
    right = (
        "def remove_Occ(s, ch):\n    first, last = s.find(ch), s.rfind(ch)\n"
        "    return ''.join(c for i, c in enumerate(s) if i not in (first, last))\n"
    )
    assert scorer(right, items["MBPP/11"]) == 1
    assert scorer(f"Here it is:\n```python\n{right}```\nIt works.", items["MBPP/11"]) == 1
    assert scorer(right.replace("last)", ")"), items["MBPP/11"]) == 0
    assert scorer("", items["MBPP/11"]) == 0
    for shot in task.shot_items() or []:
        assert scorer(shot.record["code"].removesuffix("[DONE]"), shot) == 1
