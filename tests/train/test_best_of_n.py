"""Best-of-n: what is kept is the best, and a run that is stopped goes on as if it had not been."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith.errors import DataError, RewardError, UsageError
from gptsmith.train.best_of_n import best_of_k, samples_path
from tests.factories import tiny_run_config

REWARDS = """
import os

def likes_e(prompts, completions):
    return [float(text.count("e")) for text in completions]

def wanted(prompts, completions, letter):
    return [float(each in text) for text, each in zip(completions, letter)]

def interrupted(prompts, completions):
    if any("noon" in prompt for prompt in prompts):
        raise KeyboardInterrupt
    return likes_e(prompts, completions)

def fails_later(prompts, completions):
    if any("noon" in prompt for prompt in prompts) and os.environ.get("FAIL"):
        raise ConnectionError("no route")
    return likes_e(prompts, completions)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("best")
    (place / "text.txt").write_text("the cat sees the tree. a dog runs home at noon. " * 100)
    model = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    config = tiny_run_config(steps=20, eval_every=20, context=64, model=model)
    gptsmith.fit(place / "text.txt", config, out=place / "base")
    words = ("the cat", "a dog", "sees", "home", "the tree", "at noon", "runs")
    rows = [{"prompt": word, "letter": "ea"[i % 2]} for i, word in enumerate(words)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "rewards.py").write_text(REWARDS)
    return place


def run(place: Path, out: Path, reward: str = "likes_e", **options: Any) -> Any:
    options = {"n": 4, "answer_tokens": 6, "unfinished": "keep", "device": "cpu", **options}
    return gptsmith.bestofn(
        place / "base", place / "prompts.jsonl", reward=f"{place / 'rewards.py'}:{reward}", out=out, **options
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_answer_is_kept(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.jsonl"
    result = run(place, out)
    rows, (job, *samples) = rows_of(out), rows_of(samples_path(out))
    assert "job" in job
    assert result.path == out
    assert len(rows) == len(samples) == result.num_prompts == result.num_kept == 7
    for row, sample, prompt in zip(rows, samples, rows_of(place / "prompts.jsonl"), strict=True):
        assert row["prompt"] == prompt["prompt"]
        assert row["columns"] == {"letter": prompt["letter"]}
        assert sample["rewards"] == [float(text.count("e")) for text in sample["completions"]]
        assert len(sample["completions"]) == 4
        assert row["reward"] == row["completion"].count("e") == max(sample["rewards"])
        assert row["completion"] == sample["completions"][sample["rewards"].index(row["reward"])]
    means = {k: statistics.fmean(best_of_k(sample["rewards"], k) for sample in samples) for k in (1, 2, 4)}
    assert result.curve == pytest.approx(means)
    assert result.curve[1] == pytest.approx(statistics.fmean(statistics.fmean(s["rewards"]) for s in samples))
    assert result.curve[1] < result.curve[2] < result.curve[4]
    assert "7 prompts, 4 answers to each" in result.summary()
    assert "at most 0.64 nats" in result.summary()  # log 4 - 3/4


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_k_is_the_mean_over_all_choices(seed: int) -> None:
    rng = random.Random(seed)
    rewards = [float(rng.randint(-5, 5)) for _ in range(rng.randint(1, 6))]
    for k in range(1, len(rewards) + 1):
        best = [max(chosen) for chosen in itertools.combinations(rewards, k)]
        assert best_of_k(rewards, k) == pytest.approx(statistics.fmean(best))


def test_another_measure_of_the_best_of_k() -> None:
    rng = random.Random(0)
    rewards, lengths = [rng.random() for _ in range(6)], [float(rng.randint(1, 9)) for _ in range(6)]
    for k in range(1, 7):
        best = [max(chosen, key=rewards.__getitem__) for chosen in itertools.combinations(range(6), k)]
        wanted = statistics.fmean(lengths[i] for i in best)
        assert best_of_k(rewards, k, lengths) == pytest.approx(wanted)


def test_it_goes_on_where_it_stopped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers come out, whether the reward failed, the last row was cut short, or nothing happened."""
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    monkeypatch.setattr("gptsmith.train.best_of_n.ANSWERS_AT_ONCE", 8)
    run(place, whole, "fails_later")
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(RewardError, match="fails_later fails.*no route"):
        run(place, stopped, "fails_later")
    assert not stopped.exists()
    assert len(rows_of(samples_path(stopped))) == 1 + 4  # the job, and two whole chunks
    samples_path(stopped).write_text(samples_path(stopped).read_text()[:-20])
    monkeypatch.delenv("FAIL")
    run(place, stopped, "fails_later")
    assert stopped.read_text() == whole.read_text()
    lines = sorted(samples_path(stopped).read_text().splitlines())
    assert lines == sorted(samples_path(whole).read_text().splitlines())


def test_an_interruption_says_how_to_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gptsmith.train.best_of_n.ANSWERS_AT_ONCE", 4)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "best.jsonl", "interrupted")
    assert "5 of 7 prompts are answered; the same command continues" in capsys.readouterr().err
    assert len(rows_of(samples_path(tmp_path / "best.jsonl"))) == 1 + 5


def test_another_choice_makes_no_new_answers(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.jsonl"
    few = run(place, out, limit=3)
    assert few.num_prompts == 3
    run(place, out)
    before = samples_path(out).read_text()
    several = run(place, out, keep=4, min_reward=1)
    assert samples_path(out).read_text() == before
    rows = rows_of(out)
    assert all(row["reward"] >= 1 for row in rows)
    assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows) == several.num_kept
    qualified = [
        {text for text, reward in zip(s["completions"], s["rewards"], strict=True) if reward >= 1}
        for s in rows_of(samples_path(out))[1:]
    ]
    assert several.num_kept == sum(map(len, qualified))
    assert several.num_without == sum(not each for each in qualified)


def test_another_job_is_refused(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.jsonl"
    run(place, out)
    for options, message in (
        ({"n": 2}, "n was 4 and is now 2"),
        ({"seed": 2}, "seed was 1337 and is now 2"),
        ({"reward": "wanted"}, "the reward likes_e is gone"),
        ({"answer_tokens": 7}, "answer_tokens was 6 and is now 7"),
    ):
        with pytest.raises(UsageError, match=message):
            run(place, out, **options)
    samples_path(out).write_text('{"index": 0}\n')
    with pytest.raises(UsageError, match="no file of answers"):
        run(place, out)


def test_columns_and_unfinished_answers(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.jsonl"
    run(place, out, "wanted")
    for row in rows_of(out):
        assert row["reward"] == float(row["columns"]["letter"] in row["completion"])
    with pytest.raises(DataError, match=r"no answer is kept. 2\d answers were cut off at --answer-tokens"):
        run(place, tmp_path / "other.jsonl", unfinished="drop", answer_tokens=2)
    stopped = run(place, tmp_path / "stopped.jsonl", unfinished="drop", answer_tokens=40, stop=(" ",))
    assert stopped.num_unfinished == 0
    assert not any(" " in row["completion"] for row in rows_of(stopped.path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "--n must be at least 1"),
        ({"keep": 5}, "--keep 5 is more than --n 4"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"answer_tokens": 64}, "leaves no room for a prompt in the context of 64"),
        ({"reward_weights": "a"}, "write numbers with commas"),
        ({"reward_weights": "1,2"}, "has 2 numbers for 1 rewards"),
        ({"best": 2}, "unknown"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(place, tmp_path / "best.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_command(place: Path, tmp_path: Path, run_cli: Any) -> None:
    """The answers that are kept train the model."""
    out, reward = tmp_path / "best.jsonl", f"{place / 'rewards.py'}:likes_e"
    command: tuple[Any, ...] = (
        "bestofn",
        place / "base",
        place / "prompts.jsonl",
        "--out",
        out,
        "--reward",
        reward,
        "--n",
        4,
    )
    command = (*command, "--answer-tokens", 6, "--unfinished", "keep", "--device", "cpu")
    after = ("--then", "sft", "--", "--out", tmp_path / "run", "--steps", 2, "--sample-tokens", 0, "--device", "cpu")
    code, printed, err = run_cli(*command, *after)
    assert code == 0, err
    assert f"answers {out}" in printed
    trained = json.loads((tmp_path / "run" / "run.json").read_text())
    assert trained["data"]["spec"] == str(out)
    assert run_cli(*command, "--", "--steps", 2)[0] == 2
    code, _, err = run_cli("bestofn", place / "base", place / "prompts.jsonl")
    assert (code, "No reward given" in err) == (2, True)
