"""Rewards: functions, reward models and judges, and what becomes of those that fail."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptsmith.errors import RewardError, UsageError
from gptsmith.formats.hf_heads import save_classifier
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.tasks.arithmetic import Arithmetic
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.train.rollout import judge as judge_module
from gptsmith.train.rollout.rewards import RewardModel, Rewards, Sample, changes, open_rewards
from tests.factories import tiny_model


@dataclass
class Asked:
    prompt: str | list[dict[str, Any]] = "say it:"
    columns: dict[str, Any] = field(default_factory=dict)
    ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    place: str = "prompts.jsonl line 1"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["abcdefghijklmnopqrstuvwxyz :"])


def samples(*texts: str, **columns: Sequence[Any]) -> list[Sample]:
    return [
        Sample(
            Asked(columns={key: values[i] for key, values in columns.items()}, place=f"prompts.jsonl line {i + 1}"),
            [4 + j % 9 for j in range(len(text))],
            text,
        )
        for i, text in enumerate(texts)
    ]


def lengths(prompts: list[Any], completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


def test_scores_are_weighted_and_added(tokenizer: Tokenizer) -> None:
    def vowels(prompts: list[Any], completions: list[str]) -> Any:
        return np.array([sum(letter in "aeiou" for letter in text) for text in completions], dtype=np.float32)

    rewards = open_rewards([lengths, vowels], [1, -0.5], tokenizer=tokenizer)
    scores = rewards.score(samples("aeb", "xyz", ""))
    assert scores.parts == {"lengths": [3, 3, 0], "vowels": [2, 0, 0]}
    assert scores.total == [2, 3, 0]
    assert rewards.score([]).total == []
    assert all(type(score) is float for score in [*scores.total, *scores.parts["vowels"]])


def test_functions_get_the_columns_that_they_take(tokenizer: Tokenizer) -> None:
    seen: dict[str, Any] = {}

    def one(completions: list[str], answer: list[str], completion_ids: Any = None) -> list[float]:  # as for TRL
        seen.update(one=(answer, completion_ids))
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    def everything(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        columns["nested"][0].append("changed")
        return [0.0] * len(completions)

    def other_names(asked: list[Any], said: list[str], *, answer: list[str]) -> Iterator[int]:
        seen.update(other=(asked, said, answer))
        return (len(text) for text in said)

    given = samples("a", "b", answer=["a", "c"], nested=[[1], [2]])
    scores = open_rewards([one, everything, other_names], tokenizer=tokenizer).score(given)
    assert scores.parts == {"one": [1, 0], "everything": [0, 0], "other_names": [1, 1]}
    assert seen["one"] == (["a", "c"], [[4], [4]])
    assert seen["answer"] == ["a", "c"]
    assert seen["other"] == (["say it:", "say it:"], ["a", "b"], ["a", "c"])
    assert given[0].prompt.columns["nested"] == [1]  # a reward changes nothing


def test_a_column_that_is_missing_is_named(tokenizer: Tokenizer) -> None:
    def needy(prompts: list[Any], completions: list[str], answer: list[str]) -> list[float]:
        return [0.0] * len(completions)

    rewards = open_rewards([needy], tokenizer=tokenizer)
    with pytest.raises(RewardError, match=r"needs answer, .* columns: answers, level\. Did you mean 'answers'"):
        rewards.score(samples("a", answers=["x"], level=[3]))


def raising(prompts: list[Any], completions: list[str]) -> list[float]:
    return [1 / len(text) for text in completions]


def constant(value: Any) -> Callable[..., Any]:
    def reward(prompts: list[Any], completions: list[str]) -> Any:
        return [1.0, value] if len(completions) == 2 else [value]

    return reward


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("9", "a str, '9'"),
        (1j, "a complex"),
        ([1.0], "a list"),
        (torch.zeros(2), "a Tensor"),
        (10**400, "a int"),
        (torch.tensor(math.nan), "nan"),
    ],
)
def test_what_is_no_finite_number_is_an_error(value: Any, shown: str, tokenizer: Tokenizer) -> None:
    """ms-swift #8123: a reward of None becomes NaN, and the whole batch with it."""
    rewards = open_rewards([constant(value)], tokenizer=tokenizer)
    with pytest.raises(
        RewardError, match=rf"the reward reward gave {shown}.* for the answer 'b' to prompts.jsonl line 2"
    ):
        rewards.score(samples("a", "b"))


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ([1.0], "returned 1 scores for 2 answers"),
        ([1.0] * 3, "returned 3 scores for 2 answers"),
        ([], "returned 0 scores for 2 answers"),
        (0.5, "returned a float, 0.5, not a list"),
        (None, "returned None, not a list"),
        ("ab", "returned a str, 'ab', not a list"),
        ({"a": 1, "b": 2}, "returned a dict, .* not a list"),
    ],
)
def test_another_number_of_scores_is_an_error(result: Any, problem: str, tokenizer: Tokenizer) -> None:
    rewards = open_rewards([lambda prompts, completions: result], tokenizer=tokenizer)
    with pytest.raises(RewardError, match=problem):
        rewards.score(samples("a", "b"))


def test_what_raises_is_named_with_the_sample_and_the_line(tokenizer: Tokenizer) -> None:
    """NeMo Gym #2015: a failure of the infrastructure was scored 0, and trained on."""
    with pytest.raises(RewardError) as raised:
        open_rewards([raising], tokenizer=tokenizer).score(samples("abc", "", "d"))
    for part in ("test_rewards:raising", "ZeroDivisionError", "the answer '' to prompts.jsonl line 2", "line "):
        assert part in str(raised.value)

    def timeout(prompts: list[Any], completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise TimeoutError("no answer within 30 s")
        return [0.0]

    with pytest.raises(RewardError, match="fails: TimeoutError: no answer within 30 s"):
        open_rewards([timeout], tokenizer=tokenizer).score(samples("abc", "d"))

    def leaving(prompts: list[Any], completions: list[str]) -> list[float]:
        sys.exit(0)

    with pytest.raises(RewardError, match="SystemExit"):
        open_rewards([leaving], tokenizer=tokenizer).score(samples("abc"))


def test_specs_of_functions(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "helper_of_mine.py").write_text("FACTOR = 3\n")
    (tmp_path / "sub" / "mine.py").write_text(
        "from helper_of_mine import FACTOR\n"
        "def brevity(prompts, completions): return [-FACTOR * len(c) for c in completions]\n"
        "class Kind:\n    def __call__(self, prompts, completions): return [1] * len(completions)\n"
        "kind = Kind()\nnumber = 5\n"
        "async def later(prompts, completions): return [1]\n"
        "def few(completion): return [1]\n"
    )
    (tmp_path / "cwd_rewards.py").write_text("def brevity(prompts, completions): return [0 for c in completions]\n")
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "syntax_rewards.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def opened(*specs: str) -> Rewards:
        return open_rewards(specs, tokenizer=tokenizer)

    both = opened("sub/mine.py:brevity", "cwd_rewards:brevity")
    assert both.score(samples("abc")).parts == {"sub/mine.py:brevity": [-9], "cwd_rewards:brevity": [0]}
    assert opened("sub/mine.py:kind").score(samples("a")).parts == {"Kind": [1]}
    for spec, problem in {
        "sub/mine.py:brevty": r"mine.py has no 'brevty'. Did you mean 'brevity'\? Its functions: brevity",
        "sub/mine.py": "is given without a function",
        "sub/none.py:f": r"there is no file .*sub/none.py. Did you mean 'mine.py'",
        "sub/mine.py:number": "is a int, 5, not a function",
        "sub/mine.py:later": "is a coroutine",
        "sub/mine.py:few": "takes 1 arguments; it must take prompts and completions",
        "cwd_rewardz:brevity": f"there is no module cwd_rewardz. It was looked for in {tmp_path}",
        "broken_rewards:f": "ModuleNotFoundError: No module named 'nothing_of_that_name' .*broken_rewards.py, line 1",
        "syntax_rewards:f": "cannot be imported: SyntaxError",
        "broken_rewards.py:f": "cannot be imported: ModuleNotFoundError",
        "runs/none": "there is no model at runs/none.* A reward is module:function",
        "sentimant": "Did you mean 'sentiment'",
        "length:": "write the number of words",
    }.items():
        with pytest.raises(UsageError, match=problem):
            opened(spec)


def test_rewards_by_name(tokenizer: Tokenizer) -> None:
    rewards = open_rewards(["length:2", "format:a.*", "format:b.*", "no_repeats"], tokenizer=tokenizer)
    assert rewards.score(samples("a b", "b")).parts == {
        "length": [1, 0.5],
        "format:a.*": [1, 0],
        "format:b.*": [0, 1],
        "no_repeats": [1, 1],
    }
    assert rewards.identity()[0] == {"name": "length", "weight": 1.0, "spec": "length:2"}


def test_rewards_that_check_answers(tokenizer: Tokenizer) -> None:
    rewards = open_rewards(["exact_answer", "task"], [1, 2], tokenizer=tokenizer)
    given = samples("5", "6", answer=["5", "5"], task=["task:arithmetic", "task:arithmetic"], index=[0, 0])
    right = arithmetic_answer(0)
    given.append(Sample(Asked(columns={"answer": "7", "task": "task:arithmetic", "index": 0}), [1], right))
    assert rewards.score(given).parts == {"exact_answer": [1, 0, 0], "task": [0, 0, 1]}
    with pytest.raises(RewardError, match="the reward exact_answer fails.*needs prompts with a column 'answer'"):
        rewards.score(samples("5"))


def arithmetic_answer(i: int) -> str:
    return str(sum(Arithmetic().summands(i)))


def test_numbers_of_weights_and_names(tokenizer: Tokenizer) -> None:
    for specs, weights, problem in [
        ([lengths, raising], [1.0], "has 1 numbers for 2 rewards"),
        ([lengths], [math.nan], "finite"),
        ([lengths], [0.0], "finite numbers, of which one at least is not 0"),
        ([lengths, lengths], None, "two rewards have the name"),
        ([], None, "no reward is given"),
    ]:
        with pytest.raises(UsageError, match=problem):
            open_rewards(specs, weights, tokenizer=tokenizer)  # type: ignore[arg-type]


def test_changes_of_a_reward_are_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "changing.py"
    file.write_text("def f(prompts, completions): return [1 for c in completions]\n")
    before = json.loads(json.dumps(open_rewards([f"{file}:f", lengths], tokenizer=tokenizer).identity()))
    assert changes(before, open_rewards([f"{file}:f", lengths], tokenizer=tokenizer).identity()) == []
    file.write_text("def f(prompts, completions): return [2 for c in completions]\n")
    after = open_rewards([f"{file}:f"], [0.5], tokenizer=tokenizer).identity()
    assert changes(before, after) == [
        "the reward lengths is gone",
        "the weight of the reward f was 1.0 and is now 0.5",
    ]
    same_weight = open_rewards([f"{file}:f", lengths], tokenizer=tokenizer).identity()
    assert changes(before, same_weight) == [f"{file.resolve()}, the reward f, has changed"]


# Reward models --------------------------------------------------------------------------------------------------------


def saved_model(
    directory: Path, tokenizer: Tokenizer, *, scale: tuple[float, float] | None = None, labels: int = 1
) -> SequenceClassifier:
    problem: Any = "regression" if labels == 1 else "single_label_classification"
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=32)
    classifier = SequenceClassifier(model, HeadConfig(tuple(f"l{i}" for i in range(labels)), problem))
    directory.mkdir()
    save_classifier(classifier, directory, scale=scale)
    tokenizer.save(directory)
    return classifier


def test_a_reward_model_reads_the_last_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """transformers #35352, TRL #6952: with padding told by its id, a token of the prompt is scored. Here the prompts
    are full of token 0, with which batches are padded."""
    classifier = saved_model(tmp_path / "rm", tokenizer, scale=(0.5, 2.0))
    given = [Sample(Asked(ids=[0, 5, 0][: 1 + i % 3]), [0] * (i % 2) + [3 + i] * (i % 11) + [0], "") for i in range(20)]
    scores = open_rewards([str(tmp_path / "rm")], tokenizer=tokenizer).score(given)
    alone = [classifier(torch.tensor([[*s.prompt.ids, *s.ids]])).item() for s in given]
    assert list(scores.parts) == ["rm"]
    np.testing.assert_allclose(scores.total, [(score - 0.5) / 2 for score in alone], atol=1e-6)
    assert np.std(alone) > 0.1


def test_a_reward_model_reads_long_and_short_answers_in_batches(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_model(tmp_path / "rm", tokenizer)
    given = [Sample(Asked(ids=[1]), [2] * (i % 30), "") for i in range(40)]
    rewards = open_rewards([str(tmp_path / "rm")], tokenizer=tokenizer)
    whole = rewards.score(given).total
    monkeypatch.setattr("gptsmith.train.rollout.rewards._BATCH_TOKENS", 40)
    np.testing.assert_allclose(rewards.score(given).total, whole, atol=1e-6)


def test_texts_beyond_the_context_of_a_reward_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved_model(tmp_path / "rm", tokenizer)
    rewards = open_rewards([str(tmp_path / "rm")], tokenizer=tokenizer)
    assert rewards.longest == 32
    with pytest.raises(RewardError, match=r"reads 1 to 32 tokens, but prompts.jsonl line 1 and its answer have 33"):
        rewards.score([Sample(Asked(ids=[1]), [2] * 32, "")])


def test_reward_models_that_do_not_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved_model(tmp_path / "rm", tokenizer)
    saved_model(tmp_path / "labels", tokenizer, labels=3)
    for directory, policy, problem in [
        ("rm", train_char(["abcdefghijklmnopqrstuvwxyz :é"]), "it has 29 tokens, and the other 30"),
        ("rm", train_char(["abcdefghijklmnopqrstuvwxyZ :"]), r"the token \d+ is 'a', and 'Z' in the other"),
        ("labels", tokenizer, "is a classifier with 3 labels"),
    ]:
        with pytest.raises(UsageError, match=problem):
            open_rewards([str(tmp_path / directory)], tokenizer=policy)
    assert RewardModel.load(str(tmp_path / "rm"), tokenizer, torch.device("cpu")).identity()["sha256"]


# Judges ---------------------------------------------------------------------------------------------------------------


class FakeJudge:
    """A server that answers chat completions with the replies of `reply(messages)`, or a status."""

    def __init__(self, reply: Callable[[list[dict[str, Any]]], str | int]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send({"object": "list", "data": [{"id": "m", "object": "model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append(body)
                judge.keys.append(self.headers["Authorization"])
                answer = reply(body["messages"])
                if isinstance(answer, int):
                    self.send({"error": {"message": f"bad key {self.headers['Authorization']}"}}, answer)
                    return
                message = {"role": "assistant", "content": answer}
                self.send(
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "choices": [{"index": 0, "message": message}],
                        "model": "m",
                    }
                )

            def send(self, body: dict[str, Any], status: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.spec = f"judge:http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self) -> FakeJudge:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def grade_of_length(messages: list[dict[str, Any]]) -> str:
    answer = messages[1]["content"].split("<answer>\n")[1].split("\n</answer>")[0]
    return f"Score: {len(answer)}/10."


def test_a_judge_gives_points_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    record = tmp_path / "run" / "judge.jsonl"
    given = samples("abc", "abcde", "abc", "")
    with FakeJudge(grade_of_length) as judge:
        rewards = open_rewards([judge.spec], tokenizer=tokenizer, record=record)
        assert rewards.score(given).parts == {"judge": [3, 5, 3, 0]}
        assert len(judge.requests) == 3
        assert rewards.score(given[:2]).total == [3, 5]
        assert len(judge.requests) == 3
        assert set(judge.keys) == {"Bearer sk-secret-key"}
        assert {request["model"] for request in judge.requests} == {"m"}
    record.write_text(record.read_text() + '{"key": "cut')  # a process that was killed while it wrote
    with FakeJudge(lambda messages: "9") as judge:  # it has changed its mind
        again = open_rewards([judge.spec + "#m"], tokenizer=tokenizer, record=record).rewards[0]
        again.url = rewards.rewards[0].url  # type: ignore[attr-defined]
        assert again.score(given) == [3, 5, 3, 0]
        assert again.score(samples("new")) == [9]
        assert len(judge.requests) == 1
    assert "secret" not in record.read_text() + json.dumps(again.identity())
    assert [set(json.loads(line)) for line in record.read_text().splitlines() if "cut" not in line] == [
        {"key", "score"}
    ] * 4


@pytest.mark.parametrize(("reply", "grade"), [("7", 7), (" 7.5 ", 7.5), ("**8**", 8), ("Grade: 3", 3), ("10/10", 10)])
def test_grades(reply: str, grade: float, tokenizer: Tokenizer) -> None:
    with FakeJudge(lambda messages: reply) as judge:
        assert open_rewards([judge.spec], tokenizer=tokenizer).score(samples("a")).total == [grade]


@pytest.mark.parametrize("reply", ["I like it", "11", "-3", "", "7 or 8", "1e1", "nan", "It is 7 of 10"])
def test_what_is_no_grade_is_asked_for_again_and_then_an_error(reply: str, tokenizer: Tokenizer) -> None:
    with FakeJudge(lambda messages: reply) as judge:
        with pytest.raises(
            RewardError, match=r"no grade from 0 to 10 for the answer to prompts.jsonl line 1, in 3 att"
        ):
            open_rewards([judge.spec], tokenizer=tokenizer).score(samples("a"))
        assert [len(request["messages"]) for request in judge.requests] == [2, 4, 6]
    with FakeJudge(lambda messages: "6" if len(messages) > 2 else reply) as judge:
        assert open_rewards([judge.spec], tokenizer=tokenizer).score(samples("a")).total == [6]


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_a_judge_that_fails_is_no_score(status: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    monkeypatch.setattr(judge_module, "_RETRIES", 1)
    with FakeJudge(lambda messages: status) as judge:
        with pytest.raises(RewardError, match="cannot be asked for prompts.jsonl line 1.*not a score of 0") as raised:
            open_rewards([judge.spec], tokenizer=tokenizer).score(samples("a"))
        assert len(judge.requests) == (1 if status == 401 else 2)
    assert "sk-secret" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_judge_that_recovers_is_asked_again(tokenizer: Tokenizer) -> None:
    replies: list[str | int] = [503, "4"]
    with FakeJudge(lambda messages: replies.pop(0)) as judge:
        assert open_rewards([judge.spec], tokenizer=tokenizer).score(samples("a")).total == [4]


def test_a_judge_that_is_not_there(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_RETRIES", 0)
    with pytest.raises(RewardError, match="APIConnectionError"):
        open_rewards(["judge:http://127.0.0.1:9/v1#m"], tokenizer=tokenizer).score(samples("a"))
    for spec, problem in {
        "judge:localhost": "write judge:URL#MODEL",
        "judge:http://me:sk-x@host/v1": "OPENAI_API_KEY",
        "judge:http://host/v1?key=sk-x": "OPENAI_API_KEY",
    }.items():
        with pytest.raises(UsageError, match=problem) as raised:
            open_rewards([spec], tokenizer=tokenizer)
        assert "sk-x" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"pip install 'gptsmith\[align\]'"):
        open_rewards(["judge:http://host/v1"], tokenizer=tokenizer)


def test_a_judge_sees_messages(tokenizer: Tokenizer) -> None:
    asked = Asked(prompt=[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}])
    with FakeJudge(lambda messages: "5") as judge:
        open_rewards([judge.spec], tokenizer=tokenizer).score([Sample(asked, [1], "ho")])
        assert "system: be kind\n\nuser: hi" in judge.requests[0]["messages"][1]["content"]
        assert judge.requests[0]["temperature"] == 0
